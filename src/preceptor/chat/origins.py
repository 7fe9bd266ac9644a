"""Where the characters of a rendered text came from: strings of messages (leaves), renders in pieces, alignments.

To find where the characters of a turn stand in its render, it need not be rendered with marks each time. Behind its
prompt P, the render F of a turn is the template's own text and the strings of the turn's message (its
*leaves*), each as it is, stripped, or as JSON spells it. Which, and in what order, one render with marks shows
(`marked.py`). That is an *alignment*; it is kept by the kind of message, and tried on the renders of
later messages of that kind: filled with their leaves, it must give what the template rendered, byte for byte. If none
of the kind does, the turn is rendered with marks, and one more is learnt.

    P           ...<|im_start|>assistant\\n
    F           ...<|im_start|>assistant\\n<think>\\nLet me see.\\n</think>\\n\\nIt is so.<|im_end|>\\n
    alignment                            │"<think>\\n"│leaf 1, stripped│"\\n</think>\\n\\n"│leaf 0│"<|im_end|>\\n"│

The template itself gave F; nothing of what it does is assumed. What is concluded from equal texts is which of their
characters came from the message. That is wrong only where the template took something out of the message's text and
wrote the same itself (`</think>`, say), as it does for another of the same kind. So alignments are kept apart by what
the template may ask of a text: the strings that it looks for (`in`, `split`, `startswith`, ...), whether there is any;
and by the role before.
"""

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import nodes

from preceptor.chat.environment import parsed

MessageList = Sequence[Mapping[str, Any]]  # as the chat-completions format has them
Tools = Sequence[Mapping[str, Any]] | None

_NAMES = ("role", "type")  # names that a template reads as such, not text; but inside a call's arguments all is text


def _names_below(key: str, names: Sequence[str]) -> Sequence[str]:
    return () if key == "arguments" else names


class Leaf(NamedTuple):
    """One string of a message: the message's index, the keys that lead to it, its text."""

    message: int
    path: tuple[str | int, ...]
    text: str

    @property
    def name(self) -> str:
        """The field, as `tool_calls[0].function.name`."""
        return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.path).removeprefix(".")


def leaves_of(message: Mapping[str, Any], index: int) -> list[Leaf]:
    """The strings of a message in the order in which they stand."""
    leaves: list[Leaf] = []
    for key, value in message.items():
        if key in _NAMES:
            continue
        if isinstance(value, str):
            leaves.append(Leaf(index, (key,), value))
        elif value is not None:
            _walk(value, (key,), _NAMES, lambda path, text: leaves.append(Leaf(index, path, text)))
    return leaves


def map_leaves(message: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The message with change(text) in place of every leaf, called in the order of `leaves_of`."""
    named = message.items()
    return {k: v if k in _NAMES else _walk(v, (k,), _NAMES, lambda _, text: change(text)) for k, v in named}


def _walk(value: Any, path: tuple[str | int, ...], names: Sequence[str], change: Callable[[Any, str], Any]) -> Any:
    if isinstance(value, str):
        return change(path, value)
    if isinstance(value, Mapping):
        return {
            key: inner if key in names else _walk(inner, (*path, key), _names_below(key, names), change)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_walk(inner, (*path, place), names, change) for place, inner in enumerate(value)]
    return value


def shape_of(value: Any, names: Sequence[str] = _NAMES) -> Any:
    """What a template can see of a message without reading its text: names, types, and values that are not text."""
    if names is _NAMES and isinstance(value, dict) and "type" not in value and {*map(type, value.values())} == {str}:
        return value.get("role"), *value  # most messages: a role and strings
    if isinstance(value, str):
        return str
    if isinstance(value, Mapping):
        return tuple(
            [
                (key, inner if key in names and isinstance(inner, str) else shape_of(inner, _names_below(key, names)))
                for key, inner in value.items()
            ]
        )
    if isinstance(value, list | tuple):
        return (list, *[shape_of(inner, names) for inner in value])
    return (type(value), value)


def json_body(text: str, ensure_ascii: bool) -> str:
    """The text as JSON spells it between the quotes."""
    return json.dumps(text, ensure_ascii=ensure_ascii)[1:-1]


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many tokens or characters the two, of one type, have in common at their start."""
    limit = min(len(one), len(other))
    if one[:limit] == other[:limit]:
        return limit
    low, high = 0, limit  # the first `low` are shared, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


@dataclass(eq=False, slots=True)
class Rendered:
    """A rendered text in pieces, each with the number of the leaf that it came from (None: the template's own text).

    _start: where the pieces begin; none of the leaves that are followed is in what stands before.
    """

    text: str
    _pieces: Sequence[str]
    _origins: Sequence[int | None]
    _start: int = 0

    def parts(self) -> Iterator[tuple[str, int | None]]:
        """All pieces with their origins."""
        if self._start:
            yield self.text[: self._start], None
        yield from zip(self._pieces, self._origins, strict=True)

    def _places(self, leaves: range) -> Iterator[tuple[int, int, int]]:
        """(start, end, leaf) of each piece that came from these leaves."""
        at = self._start
        for piece, origin in zip(self._pieces, self._origins, strict=True):
            end = at + len(piece)
            if origin is not None and origin in leaves and piece:
                yield at, end, origin
            at = end

    def span(self, leaves: range) -> tuple[int, int] | None:
        """From the first to after the last character that came from these leaves; None if none did."""
        places = list(self._places(leaves))
        return (places[0][0], places[-1][1]) if places else None

    def end_before(self, leaves: range, limit: int) -> int:
        """The end of the last character from these leaves that stands before `limit`; 0 if there is none."""
        return max((min(end, limit) for start, end, _ in self._places(leaves) if start < limit), default=0)

    def last_leaf(self, leaves: range, limit: int) -> int | None:
        """Which of these leaves the last of their characters before `limit` came from."""
        return [None, *(leaf for start, _, leaf in self._places(leaves) if start < limit)][-1]

    def spelled(self, leaf: int) -> str:
        """All characters that came from this leaf, in order."""
        return "".join([piece for piece, origin in zip(self._pieces, self._origins, strict=True) if origin == leaf])

    def runs(self, at: int, until: int, leaves: range) -> list[tuple[str, bool]]:
        """A part of the text in runs, each with whether it came from one of these leaves."""
        runs: list[tuple[str, bool]] = []
        for start, end, _ in self._places(leaves):
            if end > at and start < until:
                start, end = max(start, at), min(end, until)
                runs += [(self.text[at:start], False), (self.text[start:end], True)]
                at = end
        return [*runs, (self.text[at:until], False)]


# Alignments -----------------------------------------------------------------------------------------------------------

_MAX_KINDS = 4096
_MAX_PER_KIND = 8
_ASKING = ("startswith", "endswith", "split", "rsplit", "partition", "rpartition", "replace", "find", "index", "count")
_LONGEST_DROPPED = 64  # characters; more, and it is a template that rewrites what came before

# What templates make of a string; the first that gives a text is taken to be the one that made it.
_FORMS: tuple[Callable[[str], str], ...] = (
    str,
    str.strip,
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
    str.rstrip,
    str.lstrip,
    lambda text: text.rstrip("\n"),
    lambda text: json_body(text, ensure_ascii=False),
    lambda text: json_body(text, ensure_ascii=True),
    lambda text: text.partition("</think>")[0].rpartition("<think>")[2].strip("\n"),  # reasoning inside a content
    lambda text: text.rpartition("</think>")[2].lstrip("\n"),  # and the answer behind it
    lambda text: text.partition("</think>")[0].rpartition("<think>")[2].strip(),
    lambda text: text.rpartition("</think>")[2].strip(),
)

Part = str | tuple[int, int]  # the template's own text, or one of the message's leaves and what is made of it


@dataclass(frozen=True, slots=True)
class Alignment:
    """What stands behind the prompt in the render of a turn; dropped: the end of the prompt that the render lacks."""

    dropped: str
    parts: tuple[Part, ...]

    def fit(self, prompt: str, text: str, leaves: Sequence[Leaf], own: range) -> Rendered | None:
        """The render with the places of the turn's own leaves; None where it is not what this alignment gives."""
        pieces: list[str] = []
        origins: list[int | None] = []
        for part in self.parts:
            if isinstance(part, str):
                pieces.append(part)
                origins.append(None)
            else:
                origins.append(own.start + part[0])
                pieces.append(_FORMS[part[1]](leaves[own.start + part[0]].text))
        filled = "".join(pieces)
        start = len(prompt) - len(self.dropped)
        if len(text) != start + len(filled) or not text.endswith(filled):
            return None
        if not prompt.endswith(self.dropped) or not text.startswith(prompt[:start]):
            return None
        return Rendered(text, pieces, origins, start)


def alignment_of(prompt: str, rendered: Rendered, leaves: Sequence[Leaf], own: range) -> Alignment | None:
    """The alignment that a render with marks shows; None where it does something else to the turn's leaves."""
    text, span = rendered.text, rendered.span(own)
    start = min(shared_length(prompt, text), span[0] if span else len(text))
    if len(prompt) - start > _LONGEST_DROPPED:
        return None
    parts: list[Part] = []
    at = 0
    for piece, origin in rendered.parts():
        end = at + len(piece)
        if origin is None or origin not in own:
            if end > start:
                parts.append(piece[max(start - at, 0) :])
        else:
            whole = leaves[origin].text
            form = next((number for number, form in enumerate(_FORMS) if form(whole) == piece), None)
            if form is None:
                return None
            parts.append((origin - own.start, form))
        at = end
    return Alignment(prompt[start:], tuple(parts))


@lru_cache(maxsize=256)
def _questions(template: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """The strings that a template looks for in texts, and those that it compares texts with."""
    tree = parsed(template)
    asking = [call for call in tree.find_all(nodes.Call) if getattr(call.node, "attr", None) in _ASKING]
    replacing = [filter for filter in tree.find_all(nodes.Filter) if filter.name == "replace"]
    contained = _strings(arg for call in asking for arg in call.args)
    contained |= _strings(arg for filter in replacing for arg in filter.args)
    contained |= _strings(assigned.node for assigned in tree.find_all(nodes.Assign))
    equal: set[str] = set()
    for compare in tree.find_all(nodes.Compare):
        for operand in compare.ops:
            found = contained if operand.op in ("in", "notin") else equal
            found |= _strings([compare.expr, operand.expr])
    return tuple(sorted(text for text in contained if text.strip())), frozenset(equal)


def _strings(expressions: Iterable[nodes.Node]) -> set[str]:
    return {node.value for node in expressions if isinstance(node, nodes.Const) and isinstance(node.value, str)}


def kind_of(
    template: str, message: Mapping[str, Any], before: Mapping[str, Any], leaves: Sequence[Leaf], own: range
) -> tuple[Hashable, ...]:
    """What a template can see of a message without its words, and what it may find when it looks into them.

    before: the message before it.
    """
    contained, equal = _questions(template)
    found: list[Any] = []
    for index in own:
        text = leaves[index].text
        found.append((not text, not text.strip(), text in equal and text, *[part in text for part in contained]))
    return template, before.get("role"), shape_of(message), tuple(found)


@dataclass(eq=False, slots=True)
class Alignments:
    """The alignments that were learnt, by the kind of message."""

    _of_kind: dict[Hashable, list[Alignment]] = field(default_factory=dict)

    def fit(self, kind: Hashable, prompt: str, text: str, leaves: Sequence[Leaf], own: range) -> Rendered | None:
        """The render with the places of the turn's own leaves, by the first alignment that gives it."""
        known = self._of_kind.get(kind, [])
        for place, alignment in enumerate(known):
            found = alignment.fit(prompt, text, leaves, own)
            if found is not None:
                if place:
                    known.insert(0, known.pop(place))
                return found
        return None

    def learn(self, kind: Hashable, prompt: str, rendered: Rendered, leaves: Sequence[Leaf], own: range) -> None:
        """Keep what a render with marks shows for this kind."""
        alignment = alignment_of(prompt, rendered, leaves, own)
        if alignment is None:
            return
        if len(self._of_kind) >= _MAX_KINDS:
            self._of_kind.clear()
        known = self._of_kind.setdefault(kind, [])
        known.insert(0, alignment)
        del known[_MAX_PER_KIND:]
