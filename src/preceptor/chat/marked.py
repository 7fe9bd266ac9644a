"""Strings that remember which message and field each of their characters came from.

A `Marked` string behaves as a plain one in a template and carries *atoms*: runs of characters of one origin. An origin
is the number of a *leaf* (one string of one message, such as its content), or None for text of the template itself.
Concatenation joins atoms, slicing and stripping cut them, `tojson` escapes them one by one. Where the origin of
characters cannot be followed they count as the template's own; the proof, which then misses the field, rejects.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex


class Atom(NamedTuple):
    """A run of characters of one origin."""

    length: int
    origin: int | None


def plain(text: str) -> str:
    """The same characters as an exact `str`."""
    return str.__str__(text)


class Marked(str):
    """A string with its atoms; methods that are not defined here give plain strings, whose origins are lost."""

    __slots__ = ("atoms",)
    atoms: tuple[Atom, ...]

    def __new__(cls, text: str = "") -> "Marked":
        return cls.make(text, (Atom(len(text), None),))

    @classmethod
    def make(cls, text: str, atoms: Sequence[Atom]) -> "Marked":
        marked = str.__new__(cls, text)
        marked.atoms = tuple(atoms)
        return marked

    @classmethod
    def leaf(cls, index: int, text: str) -> "Marked":
        return cls.make(text, (Atom(len(text), index),))

    def pieces(self) -> list[str]:
        """The characters of each atom as plain strings."""
        text, at, texts = plain(self), 0, []
        for atom in self.atoms:
            texts.append(text[at : at + atom.length])
            at += atom.length
        return texts

    # What the template makes of it -----------------------------------------------------------------------------------

    def __str__(self) -> str:
        return self  # so that `str(x)`, which Jinja puts around every output, keeps the atoms

    def __add__(self, other: Any) -> Any:
        return join((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return join((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> Any:
        return join((self,) * operator.index(times))

    __rmul__ = __mul__

    def __getitem__(self, key: Any) -> Any:
        text = str.__getitem__(self, key)  # raises IndexError as a plain string would
        if len(self.atoms) == 1:
            return self._all_of_one(text)
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self._part(text, start, stop) if step == 1 else self._unfollowed(text)
        index = operator.index(key)
        index += len(self) if index < 0 else 0
        return self._part(text, index, index + 1)

    def _part(self, text: str, start: int, stop: int) -> "Marked":
        kept, at = [], 0
        for atom in self.atoms:
            low, high = max(at, start), min(at + atom.length, stop)
            if low < high:
                kept.append(Atom(high - low, atom.origin))
            at += atom.length
        return Marked.make(text, kept)

    def __iter__(self) -> Iterator["Marked"]:  # type: ignore[override]
        for index in range(len(self)):
            yield self[index]

    def strip(self, chars: str | None = None) -> Any:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> Any:
        text = plain(self).lstrip(chars)
        return self._part(text, len(self) - len(text), len(self))

    def rstrip(self, chars: str | None = None) -> Any:
        text = plain(self).rstrip(chars)
        return self._part(text, 0, len(text))

    def upper(self) -> Any:
        return self._recased(str.upper)

    def lower(self) -> Any:
        return self._recased(str.lower)

    def title(self) -> Any:
        return self._recased(str.title)

    def capitalize(self) -> Any:
        return self._recased(str.capitalize)

    def _recased(self, method: Callable[[str], str]) -> "Marked":
        text = method(plain(self))
        if len(self.atoms) == 1:
            return self._all_of_one(text)
        cased = [method(piece) for piece in self.pieces()]
        if "".join(cased) != text:
            return self._unfollowed(text)
        return Marked.make(text, [Atom(len(c), atom.origin) for c, atom in zip(cased, self.atoms, strict=True)])

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> Any:
        return self._split(str.split, sep, maxsplit)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> Any:
        return self._split(str.rsplit, sep, maxsplit)

    def splitlines(self, keepends: bool = False) -> Any:
        return self._split(str.splitlines, keepends)

    def partition(self, sep: str) -> Any:
        return tuple(self._split(str.partition, sep))

    def rpartition(self, sep: str) -> Any:
        return tuple(self._split(str.rpartition, sep))

    def _split(self, method: Callable[..., Sequence[str]], *args: Any) -> list["Marked"]:
        """The pieces with their atoms; between any two stands the separator or, where none is given, blank space."""
        pieces = method(plain(self), *[plain(a) if isinstance(a, str) else a for a in args])
        if len(self.atoms) == 1:
            return [self._all_of_one(text) for text in pieces]
        separator = plain(args[0] or "") if method in (str.split, str.rsplit) else ""
        marked, at = [], 0
        for text in pieces:
            at = str.index(self, text, at)
            marked.append(self._part(text, at, at + len(text)))
            at += len(text) + len(separator)
        return marked

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Any:  # type: ignore[override]
        if not old or isinstance(old, Marked):
            return self._unfollowed(str.replace(plain(self), plain(old), plain(new), count))
        return join(with_separator(self.split(old, count), new))

    def removeprefix(self, prefix: str) -> Any:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> Any:
        return self[: -len(suffix)] if suffix and self.endswith(suffix) else self

    def join(self, items: Iterable[str]) -> Any:
        return join(with_separator(list(items), self))

    def _all_of_one(self, text: str) -> "Marked":
        """What was made of this single-atom string; all of it counts as of the same origin."""
        return Marked.make(text, (Atom(len(text), self.atoms[0].origin),))

    def _unfollowed(self, text: str) -> "Marked":
        """The result of an operation through which origins are not followed: one origin is kept, several are lost."""
        origins = {atom.origin for atom in self.atoms if atom.length}
        return Marked.make(text, (Atom(len(text), origins.pop() if len(origins) == 1 else None),))


def atoms_of(text: str) -> tuple[Atom, ...]:
    if isinstance(text, Marked):
        return text.atoms
    return (Atom(len(text), None),) if text else ()


def join(texts: Iterable[str]) -> Marked:
    """The texts one after the other, each with its origins."""
    texts = list(texts)
    return Marked.make("".join(texts), [atom for text in texts for atom in atoms_of(text)])


def with_separator(items: Sequence[str], separator: str) -> list[str]:
    """The items with the separator between any two."""
    return [text for item in items for text in (separator, item)][1:]
