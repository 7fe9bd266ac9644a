"""Growing the tree of one conversation, turn by turn (step 6 of the proof).

Each turn brings a context (the tokens before it) and a target (the tokens that it generates). A context that starts
with what is there already continues it; where the two part, the tree branches, and the segment in which they part is
split there. Shared prefixes exist once.

    turn 0   c0 ── t0                        c0 ─┬─ t0               a template that drops turn 0's reasoning
    turn 1   c0 ── t0 ── c1 ── t1      or        └─ c1 ── t1         from the history of turn 1
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from preceptor.chat.origins import shared_length
from preceptor.data.forest import Segment, SegmentKind, Tree


@dataclass(eq=False, slots=True)
class Node:
    """A segment that may still be split, and what follows it, in the order in which it was said."""

    kind: SegmentKind
    ids: tuple[int, ...]
    text: str = ""
    weight: float = 1.0
    message: int | None = None
    children: list["Node"] = field(default_factory=list)

    def split(self, at: int) -> None:
        """Keep the first `at` tokens here; the rest, and all that follows, becomes the only child."""
        assert 0 < at < len(self.ids)
        tail = Node(self.kind, self.ids[at:], "", self.weight, self.message, self.children)
        self.ids, self.text, self.children = self.ids[:at], "", [tail]


@dataclass(eq=False, slots=True)
class GrowingTree:
    """The branches of one conversation while its turns are added in order. all_targets: contexts are trained too."""

    all_targets: bool = False
    _path: list[Node] = field(default_factory=lambda: [Node("context", ())])  # from the root to the last turn's target
    _ends: list[int] = field(default_factory=lambda: [0])  # how many tokens the path has up to the end of each node
    _text: str = ""  # what the path spells
    _text_ends: list[int] = field(default_factory=lambda: [0])  # as `_ends`, in characters of the text; -1: not known

    def add(
        self,
        context: Sequence[int],
        target: tuple[int, ...],
        texts: tuple[str, str],
        weight: float,
        num_shared: int = 0,
        message: int | None = None,
    ) -> None:
        """Add one turn, message `message` of its conversation; texts: what context and target spell.

        num_shared: how many of the context's tokens are known to be the first of the last turn's context: those are not
        compared again.
        """
        end = self._follow(context, texts[0], num_shared)
        node = Node("target", target, texts[1], weight, message)
        end.children.append(node)
        self._path.append(node)
        self._ends.append(len(context) + len(target))
        self._text = texts[0] + texts[1]
        self._text_ends.append(len(self._text))

    def _follow(self, context: Sequence[int], text: str, num_shared: int) -> Node:
        """The node at which the context ends, made where the tree does not hold it yet."""
        num_nodes = len(self._path)
        kept = bisect_right(self._ends, num_shared, lo=1)  # nodes of the path that the context has from the start
        at = self._ends[kept - 1]
        while kept < num_nodes:  # the usual case: all of the last turn's tokens are this context's first
            ids = self._path[kept].ids
            if tuple(context[at : at + len(ids)]) != ids:
                break
            at += len(ids)
            kept += 1
        del self._path[kept:], self._ends[kept:], self._text_ends[kept:]
        while at < len(context):
            rest = tuple(context[at:])
            node, shared = _longest_child(self._path[-1], rest)
            if node is None:
                spelled = self._text_ends[-1]
                known = spelled >= 0 and text.startswith(self._text[:spelled])
                kind: SegmentKind = "target" if self.all_targets else "context"
                node, shared = Node(kind, rest, text[spelled:] if known else ""), len(rest)
                self._path[-1].children.append(node)
            elif shared < len(node.ids):
                node.split(shared)
            at += shared
            self._path.append(node)
            self._ends.append(at)
            self._text_ends.append(len(text) if at == len(context) else -1)
        return self._path[-1]

    def finish(
        self,
        source: str,
        decode: Callable[[tuple[int, ...]], str],
        switched: tuple[tuple[int, bool], ...] = (),
        left_out: tuple[str, ...] = (),
    ) -> Tree:
        """The segments, parents before children; `decode` spells those that were cut out of longer ones."""
        segments: list[Segment] = []
        stack: list[tuple[Node, int | None]] = [(child, None) for child in reversed(self._path[0].children)]
        while stack:
            node, parent = stack.pop()
            text = node.text or decode(node.ids)
            number = len(segments)
            segments.append(Segment(node.kind, node.ids, parent, text, node.weight, message=node.message))
            stack += [(child, number) for child in reversed(node.children)]
        return Tree(source, tuple(segments), switched, left_out)


def _longest_child(node: Node, ids: tuple[int, ...]) -> tuple[Node | None, int]:
    """The child that shares most first tokens with `ids`, and how many; (None, 0) if none shares any."""
    shared = [(child, shared_length(child.ids, ids)) for child in node.children]
    best, length = max(shared, key=itemgetter(1), default=(None, 0))
    return (best, length) if length else (None, 0)
