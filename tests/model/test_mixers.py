"""Layers that carry a state from token to token, in sequences of several conversations."""

import numpy as np
import pytest
import torch
from test_sequential import MIXING

from preceptor.data.forest import Segment, Tree, pack_trees
from preceptor.data.prefix_sharing import chains_of
from preceptor.errors import ModelError
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.checks import check_isolation
from preceptor.model.forward import Engine
from preceptor.model.optimisations import install
from preceptor.model.options import ActivationPolicy, LoraOptions
from tiny import branching, chain, tiny_model

KINDS = ("mamba", "lfm2", "qwen3_next", "jamba")
RNG = np.random.default_rng(0)
TREES = [chain(RNG, (5, 7, 3, 4)), branching(RNG), chain(RNG, (2, 9))]


def loss_and_gradient(model, losses):
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return total, torch.cat([grad.flatten() for grad in grads])


def by_transformers(model):
    """Each path from root to leaf by itself."""
    for tree in TREES:
        for path in chains_of(tree):
            sequence = pack_trees([path])
            logits_TV = model(input_ids=torch.from_numpy(sequence.ids_T)[None], use_cache=False).logits[0]
            log_prob_NV = logits_TV[torch.from_numpy(sequence.source_N)].log_softmax(-1)
            log_prob_N = log_prob_NV.gather(1, torch.from_numpy(sequence.target_N)[:, None])[:, 0]
            yield -(log_prob_N * torch.from_numpy(sequence.weight_N)).sum()


@pytest.mark.filterwarnings("ignore")  # of kernels that are not installed
@pytest.mark.parametrize("kind", KINDS)
def test_conversations_share_a_sequence_and_keep_their_gradient(kind):
    model = tiny_model(kind, **MIXING[kind]).eval()
    true_loss, true_gradient = loss_and_gradient(model, by_transformers(model))
    assert "mixers" in install(model).optimisations
    check_isolation(model)
    for again in ("none", "all"):
        policy = ActivationPolicy(activation_checkpointing=again)
        loss, gradient = loss_and_gradient(model, [Engine(model)(pack_trees(TREES), policy)])
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert (gradient - true_gradient).norm() <= 1e-5 * true_gradient.norm()


def test_memory_does_not_grow_with_the_branches_of_a_context():
    """What a branch computes again of its path is not kept."""

    def kept(tree):
        model, found = tiny_model("qwen3_next", **MIXING["qwen3_next"]), {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            Engine(model)(pack_trees([tree]))
        return sum(found.values())

    ids = tuple(RNG.integers(64, size=200).tolist())
    context = Segment("context", ids, None)
    star = Tree("star", (context, *(Segment("target", ids[:5], 0) for _ in range(20))))
    assert kept(star) < 1.5 * kept(chain(RNG, (200, 100)))


def test_a_convolution_that_is_trained_beside_an_adapter_is_found():
    model = tiny_model("lfm2", **MIXING["lfm2"])
    options = LoraOptions(modules_to_save=("conv.conv",))
    adapted = add_adapter(model, 2, 4.0, 0.0, ["q_proj"], [], seed=0, options=options)
    check_isolation(adapted)


def test_without_it_conversations_meet_in_the_state():
    model = tiny_model("lfm2", **MIXING["lfm2"])
    install(model, "plain")
    with pytest.raises(ModelError, match=r"lfm2.*mix tokens outside attention"):
        check_isolation(model)


def test_a_context_does_not_go_through_them_apart_from_its_targets():
    model = tiny_model("lfm2", **MIXING["lfm2"])
    with pytest.raises(ModelError, match=r"recompute, but the layers of a lfm2 model mix tokens outside attention"):
        Engine(model)(pack_trees(TREES), ActivationPolicy("recompute"))


def test_generation_meets_the_model_as_it_was():
    model, other = (tiny_model("lfm2", **MIXING["lfm2"]).eval() for _ in range(2))
    Engine(model)(pack_trees(TREES))
    ids = torch.tensor([[3, 5, 8]])
    assert torch.equal(model.generate(ids, max_new_tokens=5), other.generate(ids, max_new_tokens=5))
