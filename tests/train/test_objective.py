"""The run file's variants of the loss reach the step: normalisation, replay, divergence from the base, one gradient."""

import numpy as np
import pytest
import torch

from preceptor import config
from preceptor.data.dataset import weigh
from preceptor.data.forest import pack_trees
from preceptor.model.forward import Engine
from preceptor.model.options import ActivationPolicy, LossOptions
from preceptor.train.checkpoint import State
from preceptor.train.step import Objective, take_step
from tiny import chain, tiny_model

TREES = [chain(np.random.default_rng(seed), lengths) for seed, lengths in enumerate([(3, 9), (4, 2, 2, 5), (2, 30)])]


def step(sequences, objective=None, dtype=torch.float64, kind="llama"):
    """Loss and gradients of one step; the gradients are those before clipping, in the model that is returned."""
    model = tiny_model(kind, dtype=dtype)
    grads = {}

    class Keeping(torch.optim.SGD):
        def step(self, *_):
            grads.update((name, p.grad.clone()) for name, p in model.named_parameters())

    state = State(model, Keeping(model.parameters(), lr=0.0))
    loss, *_ = take_step(state, sequences, 0.0, 1e9, "float32", *([objective] if objective else []))
    return loss, grads


@pytest.mark.parametrize("kind", ["llama", "qwen3"])  # an untied head, and one tied to the embedding
def test_a_step_is_the_mean_over_its_tokens_in_one_gradient_buffer(kind):
    sequences = [pack_trees(TREES[:2]), pack_trees(TREES[2:])]
    loss, grads = step(sequences, dtype=torch.float32, kind=kind)
    model = tiny_model(kind)
    expected = sum(Engine(model)(sequence) for sequence in sequences) / sum(
        sequence.num_trained for sequence in sequences
    )
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=2e-5, atol=3e-7, msg=name)


def test_each_conversation_counts_the_same_however_sequences_are_made():
    weighed = [weigh(tree, "conversation") for tree in TREES]
    model = tiny_model("llama", dtype=torch.float64)
    means = [(Engine(model)(pack_trees([tree])) / tree.num_trained).item() for tree in TREES]
    for sequences in ([pack_trees(weighed)], [pack_trees([tree]) for tree in weighed]):
        assert step(sequences)[0] == pytest.approx(np.mean(means), rel=1e-9)


def test_the_variants_of_the_run_file_are_used():
    loss = config.Loss(type="dft", label_smoothing=0.1, z_loss=0.01)
    memory = config.Memory(context_gradient="detach", activation_checkpointing=1)
    model = tiny_model("llama", dtype=torch.float64)
    objective = Objective.of(loss, memory, model, num_base_tokens=64)
    sequence = pack_trees(TREES)
    expected = Engine(model)(sequence, objective.policy, LossOptions(0.1, 0.01, True))
    assert objective.policy == ActivationPolicy("detach", 1) and objective.base is None
    assert objective(Engine(model), sequence).item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_divergence_from_the_base_grows_with_the_distance_and_holds_back():
    model = tiny_model("llama", dtype=torch.float64)
    objective, sequence = Objective.of(config.Loss(kl_coef=0.5), config.Memory(), model, 64), pack_trees(TREES)
    plain = Engine(model)(sequence).item()
    assert objective(Engine(model), sequence).item() == pytest.approx(plain, rel=1e-9)
    with torch.no_grad():
        model.lm_head.weight += 0.1 * torch.randn(
            model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    assert objective(Engine(model), sequence).item() > Engine(model)(sequence).item() + 1e-3
