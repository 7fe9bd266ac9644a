"""Trees put together and taken apart: what several conversations begin with is computed once, or not.

    "Name a colour." -> "Red."                    c ─┬─ "Red."
    "Name a colour." -> "Teal, for example."  ->     └─ "Teal, for example."

`share_prefixes` makes one tree of those whose first context is the same, token for token, and of those whose first
contexts begin with the same `MIN_SHARED_TOKENS` or more, such as a long system prompt. Only contexts are shared: what
is trained stays trained as often as before, and each target reads exactly what it read before, so loss and gradient
are those of the separate trees. `chains_of` is the way back, for models that can read one chain at a time only.
"""

from collections.abc import Sequence
from dataclasses import replace

from preceptor.data.forest import Segment, Tree, leaf_paths
from preceptor.data.packing import plan_sequences

MIN_SHARED_TOKENS = 64  # a shorter beginning in common, such as a template's header, is not worth a branch


def chains_of(tree: Tree) -> list[Tree]:
    """The tree's paths from root to leaf, each a tree of its own; what several paths share is trained in the first."""
    parents = {segment.parent for segment in tree.segments}
    if len(parents) == len(tree.segments):  # all but the last have one child each
        return [tree]
    trained: set[int] = set()
    chains = []
    for path in leaf_paths(tree):
        segments = []
        for place, index in enumerate(path):
            segment = replace(tree.segments[index], parent=place - 1 if place else None)
            segments.append(replace(segment, kind="context") if index in trained else segment)
        trained.update(path)
        chains.append(Tree(tree.source, tuple(segments)))
    return chains


def share_prefixes(trees: Sequence[Tree], max_length: int, seed: int) -> list[Tree]:
    """The same trained tokens in fewer trees of at most `max_length`, those that share nothing as they were.

    Copies of one tree (a source's weight) stay apart, so that an example seen twice an epoch is not seen twice at once.
    Trees that share only a beginning are merged in small groups, drawn by `seed`, so that sequences stay mixed.
    """
    grouped: list[Tree] = []
    for copies in _apart(trees):
        whole = _by_beginning(copies, None)
        copies = [tree for group in whole for tree in _merged(group, len(_root(group[0])), max_length, seed)]
        longest = max(len(_root(tree)) for tree in copies)
        for power in range(longest.bit_length(), MIN_SHARED_TOKENS.bit_length() - 2, -1):
            left: list[Tree] = []
            for group in _by_beginning(copies, 1 << power):
                if len(group) == 1:
                    left += group
                    continue
                shared = _num_shared([_root(tree) for tree in group])
                most_tokens = min(max_length, max(4 * shared, max_length // 4))
                grouped += _merged(group, shared, most_tokens, seed)
            copies = left
        grouped += copies
    return grouped


def _apart(trees: Sequence[Tree]) -> list[list[Tree]]:
    """Lists in which no tree object occurs twice."""
    seen: dict[int, int] = {}
    lists: list[list[Tree]] = []
    for tree in trees:
        number = seen[id(tree)] = seen.get(id(tree), -1) + 1
        if number == len(lists):
            lists.append([])
        lists[number].append(tree)
    return lists


def _root(tree: Tree) -> tuple[int, ...]:
    """The tree's first context; () where it begins with a target, or with several."""
    num_roots = sum(segment.parent is None for segment in tree.segments)
    return tree.segments[0].ids if num_roots == 1 and tree.segments[0].kind == "context" else ()


def _by_beginning(trees: Sequence[Tree], num_tokens: int | None) -> list[list[Tree]]:
    """Trees whose first contexts have the same first `num_tokens` (None: are the same); shorter ones alone."""
    groups: dict[object, list[Tree]] = {}
    for number, tree in enumerate(trees):
        root = _root(tree)
        alone = not root or (num_tokens is not None and len(root) < num_tokens)
        groups.setdefault(number if alone else root[:num_tokens], []).append(tree)
    return list(groups.values())


def _num_shared(roots: Sequence[tuple[int, ...]]) -> int:
    """How many first tokens are the same in all: of the first and last in order, which differ most."""
    first, last = min(roots), max(roots)
    return next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _merged(group: Sequence[Tree], num_shared: int, most_tokens: int, seed: int) -> list[Tree]:
    """Trees of at most `most_tokens` that share their first `num_shared` tokens; what is too long stays as it is."""
    if len(group) == 1:
        return list(group)
    rests = [tree.num_tokens - num_shared for tree in group]
    fitting = [number for number, rest in enumerate(rests) if rest + num_shared <= most_tokens]
    plan = plan_sequences([rests[number] for number in fitting], most_tokens - num_shared, seed)
    merged = [_merge([group[fitting[place]] for place in sequence], num_shared) for sequence in plan]
    return merged + [tree for tree, rest in zip(group, rests, strict=True) if rest + num_shared > most_tokens]


def _merge(trees: Sequence[Tree], num_shared: int) -> Tree:
    if len(trees) == 1:
        return trees[0]
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
            segments.append(replace(segment, parent=place[segment.parent]))
    return Tree(f"{trees[0].source} and {len(trees) - 1} more", tuple(segments))
