"""Noise on the embeddings (NEFTune): its size, what it depends on, and that no evaluation has any."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from preceptor.data.forest import pack_trees
from preceptor.model.activations.modules import EmbeddingNoise
from preceptor.model.activations.passes import StepContext
from preceptor.model.forward import Engine
from preceptor.model.optimisations import install
from preceptor.model.options import ActivationPolicy
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


def each_token_once(packed):
    """The same trees with no token twice, so that other rows of the table stand for other embeddings."""
    left = iter(range(128))
    return [
        replace(tree, segments=tuple(s._replace(ids=tuple(next(left) for _ in s.ids)) for s in tree.segments))
        for tree in packed
    ]


@pytest.mark.parametrize("mode", ["auto", "plain"])
@pytest.mark.parametrize(
    ("context", "alone"), [("full", False), ("recompute", False), ("detach", False), ("full", True)]
)
def test_a_pass_with_it_is_one_of_embeddings_that_have_it(mode, context, alone):
    """Against the same pass of a model whose table holds the sums."""
    packed = each_token_once(trees())
    sequence = pack_trees(packed[-1:], alone=True) if alone else pack_trees(packed)
    model, expected_model = (tiny_model("llama", vocab_size=128) for _ in range(2))
    install(model, mode), install(expected_model, mode)
    engine, noise, policy = Engine(model), EmbeddingNoise(20.0, 1, 2), ActivationPolicy(context)
    loss = engine(sequence, policy, step=StepContext(noise=noise))
    table = expected_model.model.embed_tokens.weight
    table.data[torch.from_numpy(sequence.ids_T)] += noise.of(sequence, model.model.embed_tokens)
    expected = Engine(expected_model)(sequence, policy)
    loss.backward(), expected.backward()
    plain = engine(sequence, policy)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and abs(plain.item() / loss.item() - 1) > 1e-4
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, table.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(engine.hidden_states(sequence), engine.hidden_states(sequence))
