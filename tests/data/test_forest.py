"""Layout, subtree ends, pairs and runs."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.data.forest import Segment, Tree, attention_runs, leaf_paths, pack_trees, path_ids


def chain(*lengths, first=10):
    """context, target, context, target, ... with ids that count up."""
    segments, token = [], first
    for index, length in enumerate(lengths):
        kind = "target" if index % 2 else "context"
        segments.append(Segment(kind, tuple(range(token, token + length)), parent=index - 1 if index else None))
        token += length
    return Tree("chain", tuple(segments))


BRANCHED = Tree(
    "branched",
    (
        Segment("context", (1, 2, 3), None),
        Segment("target", (4, 5), 0),
        Segment("context", (6,), 0),
        Segment("target", (7, 8), 2),
    ),
)


def test_a_chain_attends_causally_and_is_one_run():
    row = pack_trees([chain(3, 2, 2, 1)])
    assert row.ids_T.tolist() == list(range(10, 18))
    assert row.position_T.tolist() == list(range(8))
    assert row.subtree_end_T.tolist() == [8] * 8
    assert attention_runs(row.spans) == ((0, 8, ()),)
    assert list(zip(row.source_N.tolist(), row.target_N.tolist(), strict=True)) == [(2, 13), (3, 14), (6, 17)]


def test_a_branch_shares_its_prefix_and_restarts_its_positions():
    row = pack_trees([chain(2, 1), BRANCHED])
    assert row.ids_T.tolist() == [10, 11, 12, 1, 2, 3, 4, 5, 6, 7, 8]
    assert row.position_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4, 5]
    assert row.subtree_end_T.tolist() == [3, 3, 3, 11, 11, 11, 8, 8, 11, 11, 11]
    assert attention_runs(row.spans) == ((0, 3, ()), (3, 6, ()), (6, 8, ((3, 6),)), (8, 11, ((3, 6),)))
    pairs = list(zip(row.source_N.tolist(), row.target_N.tolist(), strict=True))
    assert pairs == [(1, 12), (5, 4), (6, 5), (8, 7), (9, 8)]


def test_one_token_can_have_two_next_tokens():
    both = Tree("t", (Segment("context", (1, 2), None), Segment("target", (3,), 0), Segment("target", (4,), 0)))
    row = pack_trees([both])
    assert row.source_N.tolist() == [1, 1] and row.target_N.tolist() == [3, 4]


def test_spans_say_whose_each_token_and_target_is():
    """In layout order, which is depth-first: the branch of a tree comes before the later segment of the trunk."""
    fork = Tree(
        "t",
        (
            Segment("context", (1, 2), None),
            Segment("context", (3,), 0),
            Segment("target", (4, 5), 1),
            Segment("target", (6,), 0, weight=0.0),
            Segment("target", (7, 8), 0),
        ),
    )
    row = pack_trees([chain(2, 1), fork])
    assert [(span.tree, span.segment) for span in row.spans] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4)]
    assert [row.ids_T[span.start : span.end].tolist() for span in row.spans][2:] == [[1, 2], [3], [4, 5], [6], [7, 8]]
    assert [row.target_N[span.targets].tolist() for span in row.spans] == [[], [12], [], [], [4, 5], [], [7, 8]]
    deep = Tree("t", (fork.segments[0], fork.segments[4], Segment("target", (9,), 0), Segment("target", (3,), 1)))
    assert [span.segment for span in pack_trees([deep]).spans] == [0, 1, 3, 2]


def test_leaf_paths_lead_from_the_root_to_each_leaf():
    assert leaf_paths(BRANCHED) == [(0, 1), (0, 2, 3)]
    assert leaf_paths(chain(2, 1, 1)) == [(0, 1, 2)]


def test_weights_reach_the_pairs_and_weight_zero_is_not_trained():
    tree = Tree(
        "t",
        (
            Segment("context", (1,), None),
            Segment("target", (2, 3), 0, weight=0.5),
            Segment("target", (4,), 1, weight=0.0),
        ),
    )
    row = pack_trees([tree])
    assert row.target_N.tolist() == [2, 3] and row.weight_N.tolist() == [0.5, 0.5]
    assert tree.num_trained == row.num_trained == 2


def test_a_document_trains_all_but_its_first_token():
    tree = Tree("d", (Segment("target", (1, 2, 3), None),))
    row = pack_trees([tree])
    assert row.source_N.tolist() == [0, 1] and row.target_N.tolist() == [2, 3]
    assert tree.num_trained == row.num_trained == 2


def test_an_empty_segment_is_passed_over():
    tree = Tree("t", (Segment("context", (1, 2), None), Segment("context", (), 0), Segment("target", (3,), 1)))
    row = pack_trees([tree])
    assert row.source_N.tolist() == [1] and row.position_T.tolist() == [0, 1, 2]


def test_a_thousand_turns_do_not_meet_the_recursion_limit():
    row = pack_trees([chain(*([1] * 4000))])
    assert row.num_tokens == 4000 and row.num_trained == 2000


def test_path_ids():
    assert path_ids(BRANCHED, 3) == (1, 2, 3, 6, 7, 8)
    assert path_ids(BRANCHED, None) == ()


@st.composite
def trees(draw):
    segments = []
    for index in range(draw(st.integers(1, 8))):
        parent = draw(st.integers(0, index - 1)) if index else None
        length = draw(st.integers(0 if index else 1, 4))
        ids = tuple(draw(st.lists(st.integers(0, 99), min_size=length, max_size=length)))
        segments.append(Segment(draw(st.sampled_from(["context", "target"])), ids, parent))
    return Tree("random", tuple(segments))


@settings(max_examples=100, deadline=None)
@given(st.lists(trees(), min_size=1, max_size=4))
def test_every_pair_reads_its_own_path(forest):
    """What is visible to a token is its path from the root, in order: exactly what a server would have fed."""
    row = pack_trees(forest)
    index = np.arange(row.num_tokens)
    paths = []
    for tree in forest:
        for number, segment in enumerate(tree.segments):
            if segment.kind == "target":
                before = path_ids(tree, segment.parent)
                paths += [
                    ((*before, *segment.ids[:offset]), token)
                    for offset, token in enumerate(segment.ids)
                    if before or offset
                ]
            assert number or segment.parent is None
    seen = []
    for source, target in zip(row.source_N.tolist(), row.target_N.tolist(), strict=True):
        visible = (index <= source) & (source < row.subtree_end_T)
        assert row.position_T[visible].tolist() == list(range(visible.sum()))
        seen.append((tuple(row.ids_T[visible].tolist()), target))
    assert sorted(seen) == sorted(paths)
    assert row.num_trained == sum(tree.num_trained for tree in forest)
