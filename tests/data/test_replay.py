"""Replay takes its share of the trained tokens, seeded, and each record once before any twice."""

from collections import Counter

import numpy as np
import pytest

from preceptor.data.mixture import draw_replay
from tiny import chain


@pytest.fixture
def trees():
    rng = np.random.default_rng(0)
    return [chain(rng, (3, int(length))) for length in rng.integers(5, 40, size=60)]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
def test_the_share_is_of_all_trained_tokens(trees, share):
    replay, tuning = trees[:40], trees[40:]
    drawn = draw_replay(replay, tuning, share, seed=0)
    tokens, others = (sum(tree.num_trained for tree in group) for group in (drawn, tuning))
    assert share <= tokens / (tokens + others) < share + 40 / others
    times = Counter(id(tree) for tree in drawn)
    assert max(times.values()) - min(times.get(id(tree), 0) for tree in replay) <= 1


def test_the_choice_follows_the_seed(trees):
    first, again, other = (draw_replay(trees[:40], trees[40:], 0.2, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_nothing_to_replay(trees):
    assert draw_replay([], trees, 0.5, seed=0) == []
