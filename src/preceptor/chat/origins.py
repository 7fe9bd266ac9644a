"""Where the characters of a rendered text came from: the strings of messages (leaves), and renders in pieces."""

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


class Head(NamedTuple):
    """The pieces with which several renders of a conversation begin; the first `num_pieces` are meant."""

    text: str
    pieces: Sequence[str]
    origins: Sequence[int | None]
    num_pieces: int

    def upto(self, num_pieces: int) -> "Head":
        """The same with so many of the pieces; of one that goes further only what is new is joined."""
        if num_pieces == self.num_pieces:
            return self
        text, start = (self.text, self.num_pieces) if num_pieces > self.num_pieces else ("", 0)
        return self._replace(text=text + "".join(self.pieces[start:num_pieces]), num_pieces=num_pieces)


NO_HEAD = Head("", (), (), 0)


class Rendered:
    """A rendered text in pieces, each with the number of the leaf that it came from (None: the template's own text)."""

    __slots__ = ("_first_leaf", "_head", "_origins", "_pieces", "_places", "text")

    def __init__(
        self,
        pieces: Sequence[str],
        origins: Sequence[int | None],
        head: Head = NO_HEAD,
        first_leaf: int = 0,
        places: Mapping[int, list[int]] | None = None,
    ) -> None:
        """head: what stands before the pieces; leaves from `first_leaf` on do not occur in it.

        places: `places_of(origins, first_leaf)`, where that is known already.
        """
        self._pieces = pieces
        self._origins = origins
        self._head = head
        self.text = head.text + "".join(pieces)
        self._places = places_of(origins, first_leaf) if places is None else places
        self._first_leaf = first_leaf

    def _places_of(self, leaf: int) -> Sequence[int]:
        if leaf < self._first_leaf:
            self.parts()
        return self._places.get(leaf, ())

    def parts(self) -> Iterator[tuple[str, int | None]]:
        """All pieces with their origins; from now on without a head."""
        if self._first_leaf or self._head.num_pieces:
            head = self._head
            self._pieces = [*head.pieces[: head.num_pieces], *self._pieces]
            self._origins = [*head.origins[: head.num_pieces], *self._origins]
            self._head, self._first_leaf, self._places = NO_HEAD, 0, places_of(self._origins)
        return zip(self._pieces, self._origins, strict=True)

    def span(self, leaves: range) -> tuple[int, int] | None:
        """From the first to after the last character that came from these leaves; None if none did."""
        if leaves and leaves[0] < self._first_leaf:
            self.parts()
        own = [at for leaf in leaves for at in self._places.get(leaf, ()) if self._pieces[at]]
        if not own:
            return None
        first, last = min(own), max(own)
        end = len(self.text) - sum(map(len, self._pieces[last + 1 :]))
        return end - sum(map(len, self._pieces[first : last + 1])), end

    def end_before(self, leaves: range, limit: int) -> int:
        """The end of the last character from these leaves that stands before `limit`; 0 if there is none."""
        at = end = 0
        for piece, origin in self.parts():
            if at >= limit:
                break
            at += len(piece)
            if piece and origin is not None and origin in leaves:
                end = at
        return min(end, limit)

    def last_leaf(self, leaves: range, limit: int) -> int | None:
        """Which of these leaves the last of their characters before `limit` came from."""
        at, last = 0, None
        for piece, origin in self.parts():
            if at >= limit:
                break
            at += len(piece)
            if piece and origin is not None and origin in leaves:
                last = origin
        return last

    def spelled(self, leaf: int) -> str:
        """All characters that came from this leaf, in order."""
        places = self._places_of(leaf)
        return "".join([self._pieces[at] for at in places])

    def runs(self) -> list[tuple[str, bool]]:
        """The text in runs, each with whether it came from a message."""
        return [(piece, origin is not None) for piece, origin in self.parts()]

    def runs_in(self, text: str, leaves: range) -> list[tuple[str, bool]]:
        """Another text, in which the pieces of these leaves stand in the same order, in runs as above."""
        runs: list[tuple[str, bool]] = []
        at = 0
        for piece, origin in self.parts():
            place = text.find(piece, at) if piece and origin is not None and origin in leaves else -1
            if place >= 0:
                runs += [(text[at:place], False), (piece, True)]
                at = place + len(piece)
        return [*runs, (text[at:], False)]


def places_of(origins: Sequence[int | None], first_leaf: int = 0) -> dict[int, list[int]]:
    """For each leaf from `first_leaf` on, the pieces that came from it."""
    places: dict[int, list[int]] = {}
    for place, origin in enumerate(origins):
        if origin is not None and origin >= first_leaf:
            places.setdefault(origin, []).append(place)
    return places
