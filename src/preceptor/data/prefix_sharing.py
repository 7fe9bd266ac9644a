"""Trees put together and taken apart: what several conversations begin with is computed once, or not.

    "Name a colour." -> "Red."                    c ─┬─ "Red."
    "Name a colour." -> "Teal, for example."  ->     └─ "Teal, for example."

One tree is made of those whose first context is the same, token for token, and of those whose first contexts begin
with the same `MIN_SHARED_TOKENS` or more, such as a long system prompt. Only contexts are shared: what is trained stays
trained as often as before, and each target reads exactly what it read before, so loss and gradient are those of the
separate trees. `group_prefixes` decides who shares what from the first contexts alone, 4 bytes for each of their
tokens; `tree_of_group` puts the trees of a group together when they are read.

`chains_of` is the way back, for models that can read one chain at a time only.
"""

import os
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from preceptor.data.forest import Segment, Tree, has_branches, leaf_paths
from preceptor.data.packing import plan_sequences

MIN_SHARED_TOKENS = 64  # a shorter beginning in common, such as a template's header, is not worth a branch


def chains_of(tree: Tree) -> list[Tree]:
    """The tree's paths from root to leaf, each a tree of its own; what several paths share is trained in the first."""
    if not has_branches(tree):
        return [tree]
    trained: set[int] = set()
    chains = []
    for path in leaf_paths(tree):
        segments = []
        for place, index in enumerate(path):
            segment = tree.segments[index]._replace(parent=place - 1 if place else None)
            segments.append(segment._replace(kind="context") if index in trained else segment)
        trained.update(path)
        chains.append(Tree(tree.source, tuple(segments)))
    return chains


@dataclass(frozen=True, slots=True)
class Group:
    """Trees, by their index, and groups of them, that share their first tokens."""

    num_shared: int
    members: tuple["int | Group", ...]


class Beginning(NamedTuple):
    """A tree, or a group, as far as sharing is concerned. root: the ids of its first context, 4 bytes each."""

    root: bytes
    num_tokens: int
    of: int | Group


def beginning_of(tree: Tree, index: int) -> Beginning:
    """root: b"" where the tree begins with a target, or with several segments."""
    num_roots = sum(segment.parent is None for segment in tree.segments)
    shares = num_roots == 1 and tree.segments[0].kind == "context"
    return Beginning(array("I", tree.segments[0].ids).tobytes() if shares else b"", tree.num_tokens, index)


def group_prefixes(
    beginnings: Iterable[Beginning], originals: Iterable[int], max_length: int, seed: int
) -> list[int | Group]:
    """Which trees share what they begin with.

    originals: for each tree what it is a copy of. Copies of one tree (a source's weight) stay apart, so that an example
    seen twice an epoch is not seen twice at once. Trees that share only a beginning are merged in small groups, drawn
    by `seed`, so that sequences stay mixed.
    """
    grouped: list[Beginning] = []
    for copies in _apart(beginnings, originals):
        whole = _by_beginning(copies, None)
        copies = [each for group in whole for each in _merged(group, len(group[0].root) // 4, max_length, seed)]
        longest = max(len(each.root) // 4 for each in copies)
        for power in range(longest.bit_length(), MIN_SHARED_TOKENS.bit_length() - 2, -1):
            left: list[Beginning] = []
            for group in _by_beginning(copies, 1 << power):
                if len(group) == 1:
                    left += group
                    continue
                shared = len(os.path.commonprefix([each.root for each in group])) // 4  # noqa: RUF071 (of bytes)
                most_tokens = min(max_length, max(4 * shared, max_length // 4))
                grouped += _merged(group, shared, most_tokens, seed)
            copies = left
        grouped += copies
    return [each.of for each in grouped]


def tree_of_group(group: int | Group, tree_at: Callable[[int], Tree]) -> Tree:
    """The tree of a group. tree_at: the tree of an index."""
    if isinstance(group, int):
        return tree_at(group)
    return _merge([tree_of_group(member, tree_at) for member in group.members], group.num_shared)


def _apart(beginnings: Iterable[Beginning], originals: Iterable[int]) -> list[list[Beginning]]:
    """Lists in which no tree occurs twice."""
    seen: dict[int, int] = {}
    lists: defaultdict[int, list[Beginning]] = defaultdict(list)
    for each, original in zip(beginnings, originals, strict=True):
        seen[original] = seen.get(original, -1) + 1
        lists[seen[original]].append(each)
    return list(lists.values())


def _by_beginning(trees: Sequence[Beginning], num_tokens: int | None) -> list[list[Beginning]]:
    """Trees whose first contexts have the same first `num_tokens` (None: are the same); shorter ones alone."""
    groups: dict[object, list[Beginning]] = {}
    end = None if num_tokens is None else 4 * num_tokens
    for number, tree in enumerate(trees):
        alone = not tree.root or (end is not None and len(tree.root) < end)
        groups.setdefault(number if alone else tree.root[:end], []).append(tree)
    return list(groups.values())


def _merged(group: Sequence[Beginning], num_shared: int, most_tokens: int, seed: int) -> list[Beginning]:
    """Groups of at most `most_tokens` that share their first `num_shared` tokens; what is too long stays as it is."""
    if len(group) == 1:
        return list(group)
    rests = [tree.num_tokens - num_shared for tree in group]
    fitting = [number for number, rest in enumerate(rests) if rest + num_shared <= most_tokens]
    plan = plan_sequences([rests[number] for number in fitting], most_tokens - num_shared, seed)
    merged = [_together([group[fitting[place]] for place in sequence], num_shared) for sequence in plan]
    return merged + [tree for tree, rest in zip(group, rests, strict=True) if rest + num_shared > most_tokens]


def _together(group: Sequence[Beginning], num_shared: int) -> Beginning:
    if len(group) == 1:
        return group[0]
    num_tokens = num_shared + sum(each.num_tokens - num_shared for each in group)
    of = Group(num_shared, tuple(each.of for each in group))
    return Beginning(group[0].root[: 4 * num_shared], num_tokens, of)


def _merge(trees: Sequence[Tree], num_shared: int) -> Tree:
    first = trees[0].segments[0]
    text = first.text if len(first.ids) == num_shared else ""
    segments = [Segment("context", first.ids[:num_shared], None, text)]
    for tree in trees:
        place = {0: 0}  # segment of this tree -> segment of the merged one
        rest = tree.segments[0].ids[num_shared:]
        if rest:
            place[0] = len(segments)
            segments.append(Segment("context", rest, 0))
        for index, segment in enumerate(tree.segments[1:], start=1):
            assert segment.parent is not None
            place[index] = len(segments)
            segments.append(segment._replace(parent=place[segment.parent]))
    return Tree(f"{trees[0].source} and {len(trees) - 1} more", tuple(segments))
