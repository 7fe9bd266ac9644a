"""The mixture: weights by `loss.reduction`, the same gradient for any spread over sequences; mixing and replay."""

import numpy as np
import pytest
import torch

from preceptor.data.dataset import draw_replay, weigh
from preceptor.data.forest import Segment, Tree, pack_trees
from preceptor.data.prefix_sharing import chains_of
from preceptor.model.forward import Engine
from tiny import branching, chain, tiny_model


def step_divisor(trees, reduction):
    """The number of trained tokens, or of conversations that have any; of trees before `weigh`."""
    return sum(tree.num_trained if reduction == "token" else tree.num_trained > 0 for tree in trees)


def conversations():
    """Eight, of very different lengths and weights, one with branches."""
    rng = np.random.default_rng(0)
    chains = [chain(rng, (3, 2 + 5 * place, 4, 1 + place), weight=0.5 + 0.25 * place) for place in range(7)]
    return [*chains, branching(rng)]


def gradient(model, rows, divisor):
    """Loss and gradient of a step that accumulates over these rows."""
    model.zero_grad()
    losses = [Engine(model)(row) / divisor for row in rows]
    for loss in losses:
        loss.backward()
    return sum(loss.item() for loss in losses), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_shares_of_a_conversation_add_up_to_one():
    for tree in conversations():
        shares = {segment.share for segment in weigh(tree, "conversation").segments}
        assert [share * tree.num_trained for share in shares] == [pytest.approx(1)]
        assert weigh(tree, "token") is tree


def test_weights_of_messages_stay_what_they_are_to_each_other():
    segments = (Segment("context", (1, 2), None), Segment("target", (3, 4, 5), 0, weight=2.0))
    tree = Tree("a:1", (*segments, Segment("context", (6,), 1), Segment("target", (7,), 2, weight=0.5)))
    assert [s.weight for s in weigh(tree, "conversation").segments if s.kind == "target"] == [0.5, 0.125]


def test_the_divisor_counts_tokens_or_conversations_that_have_any():
    untrained = Tree("a:1", (Segment("context", (1, 2), None), Segment("target", (3,), 0, weight=0.0)))
    trees = [*conversations(), untrained]
    assert step_divisor(trees, "token") == sum(tree.num_trained for tree in trees)
    assert step_divisor(trees, "conversation") == pytest.approx(8)
    assert weigh(untrained, "conversation").num_trained == 0


@pytest.mark.parametrize("reduction", ["token", "conversation"])
def test_how_conversations_are_spread_over_rows_changes_nothing(reduction):
    """One row of eight, eight rows of one, two uneven rows, every chain alone: one gradient (norms are float32)."""
    model = tiny_model("llama", dtype=torch.float64)
    trees = conversations()
    divisor = step_divisor(trees, reduction)
    weighed = [weigh(tree, reduction) for tree in trees]
    loss, grad = gradient(model, [pack_trees(weighed)], divisor)
    for rows in (
        [pack_trees([tree]) for tree in weighed],
        [pack_trees(weighed[:3]), pack_trees(weighed[3:])],
        [pack_trees([path]) for tree in weighed for path in chains_of(tree)],
    ):
        other_loss, other = gradient(model, rows, divisor)
        assert other_loss == pytest.approx(loss, rel=1e-7)
        assert float((other - grad).norm() / grad.norm()) < 1e-6


def test_a_conversation_weighs_the_mean_of_its_tokens():
    """The step's loss under `conversation` is the mean of what each conversation alone has under `token`."""
    model = tiny_model("llama", dtype=torch.float64)
    trees = conversations()
    alone = [gradient(model, [pack_trees([tree])], tree.num_trained) for tree in trees]
    weighed = [weigh(tree, "conversation") for tree in trees]
    loss, grad = gradient(model, [pack_trees(weighed)], step_divisor(trees, "conversation"))
    assert loss == pytest.approx(sum(value for value, _ in alone) / len(trees), rel=1e-7)
    mean = sum(found for _, found in alone) / len(trees)
    assert float((grad - mean).norm() / mean.norm()) < 1e-6
    by_token, _ = gradient(model, [pack_trees(trees)], step_divisor(trees, "token"))
    assert abs(by_token - loss) > 1e-3


LENGTHS = np.random.default_rng(0).integers(5, 40, size=60)  # trained tokens of each example


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
def test_the_share_is_of_all_trained_tokens(share):
    replay, tuning = LENGTHS[:40], int(LENGTHS[40:].sum())
    drawn = draw_replay(replay, tuning, share, seed=0)
    tokens = replay[drawn].sum()
    assert share <= tokens / (tokens + tuning) < share + 40 / tuning
    times = np.bincount(drawn, minlength=40)
    assert times.max() - times.min() <= 1


def test_the_choice_follows_the_seed():
    first, again, other = (draw_replay(LENGTHS, 1000, 0.2, seed).tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_nothing_to_replay():
    assert len(draw_replay(LENGTHS[:0], 1000, 0.5, seed=0)) == 0
    assert draw_replay(np.array([0, 3, 0]), 10, 0.5, seed=0).tolist() == [1, 1, 1, 1]
