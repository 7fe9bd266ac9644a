"""The trees of a run: what changes their fingerprint, and their two faces."""

from dataclasses import replace

from preceptor.data.dataset import Dataset
from preceptor.data.forest import Segment, Tree

TREE = Tree("f:1", (Segment("context", (1, 2), None), Segment("target", (3,), 0)))


def test_the_fingerprint_changes_with_what_is_trained():
    context, target = TREE.segments
    others = [
        replace(TREE, segments=(context, target._replace(ids=(4,)))),
        replace(TREE, segments=(context, target._replace(kind="context"))),
        replace(TREE, segments=(context, target._replace(weight=0.5))),
        replace(TREE, segments=(context._replace(ids=(1,)), target._replace(ids=(2, 3)))),
    ]
    hashes = {Dataset.of([each]).sha256 for each in (TREE, *others)}
    assert len(hashes) == 5 and Dataset.of([replace(TREE, source="g:9")]).sha256 in hashes
    assert Dataset.of([TREE, TREE]).sha256 not in hashes


def test_trees_by_their_index():
    longer = replace(TREE, segments=(*TREE.segments, Segment("context", (5, 6), 1)))
    dataset = Dataset.of([TREE, longer])
    assert dataset.lengths.tolist() == [3, 5]
    assert dataset.trees([1, 0, 1]) == [longer, TREE, longer] and list(dataset) == [TREE, longer]
