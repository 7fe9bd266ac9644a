"""Noise on the embeddings (NEFTune): its size, what it depends on, and that no evaluation has any."""

import numpy as np
import pytest
import torch

from preceptor.data.forest import pack_trees
from preceptor.model.activations.context import StepContext
from preceptor.model.activations.noise import EmbeddingNoise
from preceptor.model.activations.policy import ActivationPolicy
from preceptor.model.forward import Engine
from preceptor.model.optimisations import install
from tiny import branching, chain, tiny_model


def trees():
    rng = np.random.default_rng(0)
    return [chain(rng, (5, 4, 6, 3)), branching(rng), chain(rng, (30, 20))]


def noise_of(model, packed, **changes):
    noise = EmbeddingNoise(**{"alpha": 5.0, "seed": 1, "step": 2, **changes})
    return noise.of(pack_trees(packed), model.get_input_embeddings())


def test_it_is_uniform_of_the_papers_size_for_each_conversation():
    model, packed = tiny_model("llama"), trees()
    found = noise_of(model, packed).split([tree.num_tokens for tree in packed])
    for tree, own in zip(packed, found, strict=True):
        bound = 5.0 / (tree.num_tokens * own.shape[1]) ** 0.5
        assert own.abs().max() <= bound and own.std() == pytest.approx(bound / 3**0.5, rel=0.08)


def test_it_follows_from_seed_step_and_conversation_and_not_from_packing():
    model, packed = tiny_model("llama"), trees()
    first, second, third = noise_of(model, packed).split([tree.num_tokens for tree in packed])
    assert torch.equal(noise_of(model, [packed[2], packed[0]]), torch.cat([third, first]))
    for changed in (noise_of(model, packed[1:2], step=3), noise_of(model, packed[1:2], seed=2)):
        assert not torch.equal(changed, second)


@pytest.mark.parametrize("mode", ["auto", "plain"])
@pytest.mark.parametrize("context", ["full", "recompute"])
def test_a_pass_with_it_is_one_of_an_embedding_that_has_it(mode, context):
    """Against a plain pass whose embedding layer returns the sum."""
    model, sequence = tiny_model("llama"), pack_trees(trees())
    install(model, mode)
    engine, noise = Engine(model), EmbeddingNoise(20.0, 1, 2)
    policy = ActivationPolicy(context)
    loss = engine(sequence, policy, step=StepContext(noise=noise))
    loss.backward()
    gradient = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    noise_TD = noise.of(sequence, model.model.embed_tokens)

    def add(module, args, out):
        return out + torch.nn.functional.pad(noise_TD, (0, 0, 0, out.shape[-2] - len(noise_TD)))

    hook = model.model.embed_tokens.register_forward_hook(add)
    expected = engine(sequence, ActivationPolicy("full"))
    expected.backward()
    hook.remove()
    plain = engine(sequence, policy)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and abs(plain.item() / loss.item() - 1) > 1e-4
    torch.testing.assert_close(gradient, model.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(engine.hidden_states(sequence), engine.hidden_states(sequence))
