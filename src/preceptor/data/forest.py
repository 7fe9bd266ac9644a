"""Trees of segments, and how many trees are packed into one sequence for one forward pass.

The segments of a sequence are laid out in depth-first order. One vector then decides all of attention: token j is
visible to token i iff `j <= i < subtree_end[j]`, where `subtree_end[j]` is the end of the subtree of j's segment.

    tree A   c0 ── t0 ── c1 ── t1          a chain: a plain two-turn conversation
    tree B   c0 ─┬─ t0                     a branch: the next context does not extend the last one
                 └─ c1 ── t1

    sequence     A.c0  A.t0  A.c1  A.t1 │ B.c0  B.t0  B.c1  B.t1
    subtree_end   a     a     a     a   │  b    B.t0'  b     b       (x' = where x ends, a and b = where A and B end)
    position     0 ..................   │ 0 .. │ ...   │ again from the end of B.c0, along the path from the root

One token can have several next tokens (where a tree branches), so what is trained is pairs: `source_N` (where to
read the hidden state), `target_N` (the token that must come next), `weight_N`. Nothing is shifted, nothing is -100.

Legend: T tokens of a sequence, N trained tokens of a sequence, S segments of a sequence.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

SegmentKind = Literal["context", "target"]

TokenRange = tuple[int, int]
"""Tokens `start` to `end` of a sequence."""

AttentionRun = tuple[int, int, tuple[TokenRange, ...]]
"""Tokens `start` to `end`, which attend causally, and the ranges outside the run that all of them see, root first."""


class Segment(NamedTuple):
    """A run of tokens of one kind."""

    kind: SegmentKind
    ids: tuple[int, ...]
    parent: int | None  # index, in the tree, of the segment that it continues; None: root
    text: str = ""
    weight: float = 1.0  # by which the loss of each of its tokens counts
    share: float = 1.0  # what each of its tokens adds to the divisor of the loss (dataset.py)
    message: int | None = None  # which message of its conversation a target is a part of; None: context, plain text

    @property
    def num_trained(self) -> int:
        """Its trained tokens: those of a target, less the first of a tree, which has no token before it."""
        is_trained = self.kind == "target" and self.weight > 0 and self.ids
        return len(self.ids) - (self.parent is None) if is_trained else 0


@dataclass(frozen=True, slots=True)
class Tree:
    """The segments of one example, parents before children, children in the order of the messages.

    switched: the messages for whose turn the template's thinking switch was set, each with its value. left_out: kinds
    of messages, and tools, that the template leaves out of the contexts.
    """

    source: str
    segments: tuple[Segment, ...]
    switched: tuple[tuple[int, bool], ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)

    @property
    def num_trained(self) -> int:
        return sum([segment.num_trained for segment in self.segments])


def has_branches(tree: Tree) -> bool:
    parents = [segment.parent for segment in tree.segments]
    return len(parents) != len(set(parents))


def path_to(segments: "Sequence[Segment] | Sequence[Span]", index: int | None) -> tuple[int, ...]:
    """The indices of the segments from the root to `index`; () for None."""
    path = []
    while index is not None:
        path.append(index)
        index = segments[index].parent
    return tuple(reversed(path))


def path_ids(tree: Tree, index: int | None) -> tuple[int, ...]:
    """The tokens from the root to the end of segment `index`: what the model has read by then."""
    return tuple(token for each in path_to(tree.segments, index) for token in tree.segments[each].ids)


def leaf_paths(tree: Tree) -> list[tuple[int, ...]]:
    """The paths from root to leaf, each as the indices of its segments."""
    parents = {segment.parent for segment in tree.segments}
    return [path_to(tree.segments, leaf) for leaf in range(len(tree.segments)) if leaf not in parents]


def turn_lengths(tree: Tree) -> list[tuple[int, int]]:
    """(context, target) tokens of each turn, in the order of the segments.

    A target may be in several segments, where a later context shares its beginning only; they are one turn.
    """
    depths: list[int] = []  # tokens from the root to the end of each segment
    first_of: dict[int | None, int] = {}  # target segment -> the first of its turn
    targets: dict[int, int] = {}  # the first -> tokens of the turn
    for index, segment in enumerate(tree.segments):
        depths.append(len(segment.ids) + (0 if segment.parent is None else depths[segment.parent]))
        if segment.kind == "target":
            first = first_of[index] = first_of.get(segment.parent, index)
            targets[first] = targets.get(first, 0) + len(segment.ids)
    return [(depths[first] - len(tree.segments[first].ids), target) for first, target in targets.items()]


def leaf_path_lengths(tree: Tree) -> list[int]:
    """The tokens of each path from root to leaf."""
    return [sum(len(tree.segments[index].ids) for index in path) for path in leaf_paths(tree)]


@dataclass(frozen=True, slots=True)
class RenderedTurn:
    """One assistant message: the tokens that a server feeds, and those that the model must generate.

    message: its index among the messages. target: ends with the token at which a server stops.
    """

    message: int
    context: tuple[int, ...]
    target: tuple[int, ...]
    context_text: str
    target_text: str


def turns_of(tree: Tree) -> tuple[RenderedTurn, ...]:
    """The turns of a tree. A target stands in several segments where a later context shares only its beginning."""
    of_message: dict[int, list[int]] = {}
    for index, segment in enumerate(tree.segments):
        if segment.message is not None:
            of_message.setdefault(segment.message, []).append(index)
    turns = []
    for message, indices in sorted(of_message.items()):
        path = path_to(tree.segments, indices[-1])
        start = path.index(indices[0])
        parts = [[tree.segments[index] for index in part] for part in (path[:start], path[start:])]
        context, target = (tuple(token for segment in part for token in segment.ids) for part in parts)
        texts = ["".join(segment.text for segment in part) for part in parts]
        turns.append(RenderedTurn(message, context, target, *texts))
    return tuple(turns)


@dataclass(frozen=True, slots=True)
class Span:
    """Where a segment lies in a sequence."""

    start: int
    end: int
    parent: int | None  # index of the parent's span
    tree: int  # index among the packed trees
    segment: int  # index in its tree
    targets: slice  # its places in source_N, target_N and weight_N


@dataclass(frozen=True, eq=False, slots=True)
class PackedSequence:
    """A forest of trees laid out for one forward pass. Integers are int64, weights float64."""

    ids_T: np.ndarray
    position_T: np.ndarray
    subtree_end_T: np.ndarray
    source_N: np.ndarray
    target_N: np.ndarray
    weight_N: np.ndarray
    share_N: np.ndarray  # what each adds to the divisor
    spans: tuple[Span, ...]  # in layout order
    divisor: float  # the sum of shares: its part of the number by which the step's loss is divided
    alone: bool = False  # one chain, for the model's own attention and other token mixing (checks.py)

    @property
    def num_tokens(self) -> int:
        return len(self.ids_T)

    @property
    def num_trained(self) -> int:
        return len(self.target_N)


def pack_trees(trees: Sequence[Tree], alone: bool = False) -> PackedSequence:
    """Lay the trees out depth-first, one after the other. Raises ValueError if there is not a single token."""
    ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    pairs: list[tuple[int, int, float, float]] = []
    for number, tree in enumerate(trees):
        _lay_out(number, tree, ids, positions, spans, pairs)
    if not ids:
        raise ValueError("a sequence needs at least one token")
    ends = [span.end for span in spans]
    for place in range(len(spans) - 1, -1, -1):  # children before their parents
        parent = spans[place].parent
        if parent is not None:
            ends[parent] = max(ends[parent], ends[place])
    source, target, weight, share = zip(*pairs, strict=True) if pairs else ((), (), (), ())
    return PackedSequence(
        ids_T=np.array(ids, dtype=np.int64),
        position_T=np.array(positions, dtype=np.int64),
        subtree_end_T=np.repeat(np.array(ends, dtype=np.int64), [span.end - span.start for span in spans]),
        source_N=np.array(source, dtype=np.int64),
        target_N=np.array(target, dtype=np.int64),
        weight_N=np.array(weight, dtype=np.float64),
        share_N=np.array(share, dtype=np.float64),
        spans=tuple(spans),
        divisor=math.fsum(share),
        alone=alone,
    )


def empty_sequence(alone: bool = False) -> PackedSequence:
    """A token without a target: what a rank goes through that has no sequence when others have one.

    Not token 0, which many models pad with: its row may be zero, where some norms have no finite derivative, and zero
    times that is NaN (Gemma 3n).
    """
    return pack_trees([Tree("empty", (Segment("context", (1,), None),))], alone=alone)


def _lay_out(
    number: int,
    tree: Tree,
    ids: list[int],
    positions: list[int],
    spans: list[Span],
    pairs: list[tuple[int, int, float, float]],
) -> None:
    """Append one tree. Iterative, so that a conversation of a thousand turns does not meet the recursion limit."""
    children: list[list[int]] = [[] for _ in range(len(tree.segments) + 1)]  # the last: those without a parent
    for index, segment in enumerate(tree.segments):
        assert segment.parent is None or segment.parent < index, "parents come before children"
        children[-1 if segment.parent is None else segment.parent].append(index)
    place: dict[int, int] = {}  # segment of the tree -> its span in the sequence
    stack = children[-1][::-1]
    while stack:
        index = stack.pop()
        segment = tree.segments[index]
        parent = None if segment.parent is None else place[segment.parent]
        start, first_target = len(ids), len(pairs)
        last = _last_token(spans, parent)  # the token that the first of this segment follows
        position = 0 if last is None else positions[last] + 1
        ids.extend(segment.ids)
        positions.extend(range(position, position + len(segment.ids)))
        if segment.kind == "target" and segment.weight > 0:
            for offset, token in enumerate(segment.ids):
                source = start + offset - 1 if offset else last
                if source is not None:
                    pairs.append((source, token, segment.weight, segment.share))
        place[index] = len(spans)
        spans.append(Span(start, len(ids), parent, number, index, slice(first_target, len(pairs))))
        stack += reversed(children[index])


def _last_token(spans: Sequence[Span], index: int | None) -> int | None:
    """The last token on the path that ends with span `index`; empty segments are passed over."""
    while index is not None and spans[index].start == spans[index].end:
        index = spans[index].parent
    return None if index is None else spans[index].end - 1


def attention_runs(spans: Sequence[Span]) -> tuple[AttentionRun, ...]:
    """Join segments into the longest runs that attend causally, in layout order.

    A segment that directly follows its parent and is its only child belongs to its parent's run, so a plain
    conversation is one run without ancestors.
    """
    num_children = Counter(span.parent for span in spans)
    run_of: list[int] = []
    result: list[AttentionRun] = []
    for span in spans:
        if span.parent is not None and num_children[span.parent] == 1:
            run = run_of[span.parent]
            start, _, ancestors = result[run]
            result[run] = (start, span.end, ancestors)
        else:
            ancestors = ()
            if span.parent is not None:
                above_start, above_end, above = result[run_of[span.parent]]
                ancestors = (*above, (above_start, above_end))
            run = len(result)
            result.append((span.start, span.end, ancestors))
        run_of.append(run)
    return tuple(run for run in result if run[0] < run[1])
