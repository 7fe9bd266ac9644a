"""Where the characters of a rendered text came from: the strings of messages (leaves), and renders in pieces."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
            leaves += _leaves_in(value, index, (key,), _NAMES)
    return leaves


def _leaves_in(value: Any, index: int, path: tuple[str | int, ...], names: Sequence[str]) -> Iterator[Leaf]:
    if isinstance(value, str):
        yield Leaf(index, path, value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in names:
                yield from _leaves_in(inner, index, (*path, key), _names_below(key, names))
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _leaves_in(inner, index, (*path, place), names)


def map_leaves(message: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The message with change(text) in place of every leaf, called in the order of `leaves_of`."""

    def walk(value: Any, names: Sequence[str]) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, Mapping):
            return {k: inner if k in names else walk(inner, _names_below(k, names)) for k, inner in value.items()}
        if isinstance(value, list | tuple):
            return [walk(inner, names) for inner in value]
        return value

    return {key: value if key in _NAMES else walk(value, _NAMES) for key, value in message.items()}


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


class Rendered:
    """A rendered text in pieces, each with the number of the leaf that it came from (None: the template's own text).

    start: where the pieces begin; none of the leaves that are followed is in what stands before.
    """

    __slots__ = ("_origins", "_pieces", "_start", "text")

    def __init__(self, text: str, pieces: Sequence[str], origins: Sequence[int | None], start: int = 0) -> None:
        self.text = text
        self._pieces = pieces
        self._origins = origins
        self._start = start

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
        first, last, at = -1, 0, self._start
        for piece, origin in zip(self._pieces, self._origins, strict=True):
            if origin is not None and origin in leaves and piece:
                first, last = at if first < 0 else first, at + len(piece)
            at += len(piece)
        return None if first < 0 else (first, last)

    def end_before(self, leaves: range, limit: int) -> int:
        """The end of the last character from these leaves that stands before `limit`; 0 if there is none."""
        return max((min(end, limit) for start, end, _ in self._places(leaves) if start < limit), default=0)

    def last_leaf(self, leaves: range, limit: int) -> int | None:
        """Which of these leaves the last of their characters before `limit` came from."""
        return ([None, *(leaf for start, _, leaf in self._places(leaves) if start < limit)])[-1]

    def spelled(self, leaf: int) -> str:
        """All characters that came from this leaf, in order."""
        return "".join([piece for piece, origin in zip(self._pieces, self._origins, strict=True) if origin == leaf])

    def runs(self) -> list[tuple[str, bool]]:
        """The text in runs, each with whether it came from a message."""
        return [(piece, origin is not None) for piece, origin in self.parts()]

    def runs_in(self, text: str, leaves: range) -> list[tuple[str, bool]]:
        """Another text, in which the pieces of these leaves stand in the same order, in runs as above."""
        runs: list[tuple[str, bool]] = []
        at = 0
        for start, end, _ in self._places(leaves):
            piece = self.text[start:end]
            place = text.find(piece, at)
            if place >= 0:
                runs += [(text[at:place], False), (piece, True)]
                at = place + len(piece)
        return [*runs, (text[at:], False)]
