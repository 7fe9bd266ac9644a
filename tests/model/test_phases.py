"""Phases: every loss-bearing token once, nothing before what it sees, nothing that is not needed."""

import numpy as np
import pytest

from preceptor.data.forest import Segment, Tree, pack_trees
from preceptor.model.activations.inputs import phases, split_by_loss
from tiny import branching, chain


def sequences():
    rng = np.random.default_rng(0)
    return {
        "one turn": pack_trees([chain(rng, (9, 4))]),
        "five turns": pack_trees([chain(rng, (5, 3, 4, 2, 6, 3, 1, 5, 2, 2))]),
        "no context": pack_trees([chain(rng, (0, 7))]),
        "branches": pack_trees([branching(rng)]),
        "packed": pack_trees([chain(rng, (4, 9, 2, 3)), branching(rng), chain(rng, (1, 1)), chain(rng, (6,))]),
        "weight 0": pack_trees([chain(rng, (4, 5), weight=0.0), chain(rng, (3, 3))]),
    }


@pytest.mark.parametrize("sequence", sequences().values(), ids=sequences())
def test_phases_hold_every_token_that_is_needed_once_and_after_what_it_sees(sequence):
    read = set(sequence.source_N.tolist())
    sees = {
        i: {j for j in range(i) if i < sequence.subtree_end_T[j]} for i in range(sequence.num_tokens)
    }  # the definition of visibility
    needed = read.union(*(sees[i] for i in read))
    plan = phases(sequence)
    assert sorted(i for phase in plan for i in phase.index_T().tolist()) == sorted(needed)
    done: set[int] = set()
    for phase in plan:
        tokens = set(phase.index_T().tolist())
        assert tokens <= read if phase.loss_bearing else not tokens & read
        assert phase.num_tokens == len(tokens)
        for start, end, ancestors in phase.runs:
            above = {token for first, last in ancestors for token in range(first, last)}
            assert above == sees[start] and above <= done | tokens
            assert all(sees[i] == above | set(range(start, i)) for i in range(start, end))
        done |= tokens


@pytest.mark.parametrize(("name", "num"), [("one turn", 2), ("five turns", 10), ("no context", 1)])
def test_a_chain_has_two_phases_for_each_turn(name, num):
    plan = phases(sequences()[name])
    assert len(plan) == num
    assert [phase.loss_bearing for phase in plan] == [bool((place + (num == 1)) % 2) for place in range(num)]


def test_all_trees_of_a_row_share_their_phases():
    rng = np.random.default_rng(0)
    assert len(phases(pack_trees([chain(rng, (4, 3)) for _ in range(20)]))) == 2


def test_what_no_loss_bearing_token_sees_is_in_no_phase():
    ids = (1, 2, 3)
    segments = (Segment("context", ids, None), Segment("target", ids, 0), Segment("context", ids, 0))
    plan = phases(pack_trees([Tree("dead end:1", segments)]))
    assert [phase.index_T().tolist() for phase in plan] == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize("sequence", sequences().values(), ids=sequences())
def test_split_puts_the_phases_together(sequence):
    context, bearing = split_by_loss(sequence)
    assert sorted(bearing.index_T().tolist()) == sorted(set(sequence.source_N.tolist()))
    assert context.num_tokens + bearing.num_tokens == sum(phase.num_tokens for phase in phases(sequence))
