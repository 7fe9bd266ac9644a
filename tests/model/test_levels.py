"""How a row falls into levels: every read token once, nothing before what it sees, nothing that nobody needs."""

import numpy as np
import pytest

from preceptor.data.forest import Segment, Tree, pack_trees
from preceptor.model.activations.levels import levels, split
from tiny import branching, chain


def rows():
    rng = np.random.default_rng(0)
    return {
        "one turn": pack_trees([chain(rng, (9, 4))]),
        "five turns": pack_trees([chain(rng, (5, 3, 4, 2, 6, 3, 1, 5, 2, 2))]),
        "no context": pack_trees([chain(rng, (0, 7))]),
        "branches": pack_trees([branching(rng)]),
        "packed": pack_trees([chain(rng, (4, 9, 2, 3)), branching(rng), chain(rng, (1, 1)), chain(rng, (6,))]),
        "weight 0": pack_trees([chain(rng, (4, 5), weight=0.0), chain(rng, (3, 3))]),
    }


@pytest.mark.parametrize("row", rows().values(), ids=rows())
def test_levels_hold_every_token_that_is_needed_once_and_after_what_it_sees(row):
    read = set(row.source_N.tolist())
    sees = {
        i: {j for j in range(i) if i < row.subtree_end_T[j]} for i in range(row.num_tokens)
    }  # the definition of visibility
    needed = read.union(*(sees[i] for i in read))
    plan = levels(row)
    assert sorted(i for level in plan for i in level.index_T().tolist()) == sorted(needed)
    done: set[int] = set()
    for level in plan:
        tokens = set(level.index_T().tolist())
        assert tokens <= read if level.read else not tokens & read
        assert level.num_tokens == len(tokens)
        for start, end, ancestors in level.runs:
            above = {token for first, last in ancestors for token in range(first, last)}
            assert above == sees[start] and above <= done | tokens
            assert all(sees[i] == above | set(range(start, i)) for i in range(start, end))
        done |= tokens


@pytest.mark.parametrize(("name", "num"), [("one turn", 2), ("five turns", 10), ("no context", 1)])
def test_a_chain_has_two_levels_for_each_turn(name, num):
    plan = levels(rows()[name])
    assert len(plan) == num
    assert [level.read for level in plan] == [bool((place + (num == 1)) % 2) for place in range(num)]


def test_all_trees_of_a_row_share_their_levels():
    rng = np.random.default_rng(0)
    assert len(levels(pack_trees([chain(rng, (4, 3)) for _ in range(20)]))) == 2


def test_what_no_read_token_sees_is_in_no_level():
    ids = (1, 2, 3)
    segments = (Segment("context", ids, None), Segment("target", ids, 0), Segment("context", ids, 0))
    plan = levels(pack_trees([Tree("dead end:1", segments)]))
    assert [level.index_T().tolist() for level in plan] == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize("row", rows().values(), ids=rows())
def test_split_puts_the_levels_together(row):
    unread, read = split(row)
    assert sorted(read.index_T().tolist()) == sorted(set(row.source_N.tolist()))
    assert unread.num_tokens + read.num_tokens == sum(level.num_tokens for level in levels(row))
