"""Strings that remember which message and field each of their characters came from.

A `Marked` string behaves as a plain one in a template and carries *atoms*: runs of characters of one origin. An origin
is the number of a *leaf* (one string of one message, such as its content), or None for text of the template itself.
Concatenation joins atoms, slicing and stripping cut them, `tojson` escapes them one by one; what is done is noted on
the string's tape.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

from preceptor.chat.tape import Atom, Tape, between, cut, is_true, join_texts, with_separator


def plain(text: str) -> str:
    """The same characters as an exact `str`."""
    return str.__str__(text)


class Marked(str):
    """A string with its atoms and the tape that it is recorded on."""

    __slots__ = ("atoms", "tape")
    atoms: tuple[Atom, ...]
    tape: Tape

    @classmethod
    def make(cls, tape: Tape, text: str, atoms: Sequence[Atom]) -> "Marked":
        marked = str.__new__(cls, text)
        marked.atoms = tuple(atoms)
        marked.tape = tape
        return marked

    @classmethod
    def leaf(cls, tape: Tape, index: int, text: str) -> "Marked":
        return cls.make(tape, text, (Atom(len(text), index, index),))

    def pieces(self) -> list[str]:
        """The characters of each atom as plain strings."""
        text, at, texts = plain(self), 0, []
        for atom in self.atoms:
            texts.append(text[at : at + atom.length])
            at += atom.length
        return texts

    def whole(self) -> int:
        """The value of the tape that spells all of it."""
        if len(self.atoms) == 1:
            return self.atoms[0].ref
        return self.tape.step(join_texts, *[atom.ref for atom in self.atoms])

    # What the template makes of it -----------------------------------------------------------------------------------

    def __str__(self) -> str:
        return self  # so that `str(x)`, which Jinja puts around every output, keeps the atoms

    def __add__(self, other: Any) -> Any:
        return join(self.tape, (self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return join(self.tape, (other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> Any:
        return join(self.tape, (self,) * operator.index(times))

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> Any:
        return self._unfollowed(str.__mod__(plain(self), values))

    def __rmod__(self, form: str) -> Any:
        before, found, after = form.partition("%s")
        if found and "%" not in before + after:
            return join(self.tape, (before, self, after))
        return self._unfollowed(form % plain(self))

    def __getitem__(self, key: Any) -> Any:
        text = str.__getitem__(self, key)  # raises IndexError as a plain string would
        if isinstance(key, slice):
            if len(self.atoms) == 1:
                return self._made(text, cut, key.start, key.stop, key.step)
            start, stop, step = key.indices(str.__len__(self))
            return self._part(text, start, stop) if step == 1 else self._unfollowed(text)
        index = operator.index(key)
        if len(self.atoms) == 1:
            return self._made(text, operator.getitem, index)
        index += str.__len__(self) if index < 0 else 0
        return self._part(text, index, index + 1)

    def _part(self, text: str, start: int, stop: int) -> "Marked":
        self.tape.exact = False  # where an atom is cut hangs on the lengths of those before it
        return Marked.make(self.tape, text, between(self.atoms, start, stop))

    def __iter__(self) -> Iterator["Marked"]:  # type: ignore[override]
        for index in range(len(self)):
            yield self[index]

    def strip(self, chars: str | None = None) -> Any:
        return self._stripped(str.strip, chars)

    def lstrip(self, chars: str | None = None) -> Any:
        return self._stripped(str.lstrip, chars)

    def rstrip(self, chars: str | None = None) -> Any:
        return self._stripped(str.rstrip, chars)

    def _stripped(self, method: Callable[..., str], chars: str | None) -> str:
        """Strip atom by atom from the ends; that an atom has anything left is observed."""
        if len(self.atoms) == 1:
            return self._made(method(plain(self), chars), method, chars)
        texts = [Marked.make(self.tape, text, (atom,)) for text, atom in zip(self.pieces(), self.atoms, strict=True)]
        if method is not str.rstrip:
            texts = _strip_first(texts, str.lstrip, chars)
        if method is not str.lstrip:
            texts = _strip_first(texts[::-1], str.rstrip, chars)[::-1]
        return join(self.tape, texts)

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
            return self._made(text, method)
        cased = [method(piece) for piece in self.pieces()]
        if "".join(cased) != text:
            return self._unfollowed(text)
        if method is not str.upper:  # lower, title and capitalize look at the characters before
            self.tape.exact = False
        refs = [self.tape.step(method, atom.ref) for atom in self.atoms]
        atoms = [Atom(len(c), a.origin, ref) for c, a, ref in zip(cased, self.atoms, refs, strict=True)]
        return Marked.make(self.tape, text, atoms)

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
        pieces = method(plain(self), *[plain(a) if isinstance(a, str) else a for a in args])
        if len(self.atoms) != 1:
            separator = args[0] if method in (str.split, str.rsplit) else None
            return self._split_atoms(pieces, plain(separator or ""))
        tape, origin = self.tape, self.atoms[0].origin
        result = tape.step(method, self.atoms[0].ref, *[_ref(tape, a) for a in args])
        tape.guard(tape.step(len, result), len(pieces))
        refs = [tape.step(operator.getitem, result, tape.constant(index)) for index in range(len(pieces))]
        return [Marked.make(tape, text, (Atom(len(text), origin, r),)) for text, r in zip(pieces, refs, strict=True)]

    def _split_atoms(self, pieces: Iterable[str], separator: str) -> list["Marked"]:
        """The pieces with their atoms; between any two stands the separator or, where none is given, blank space."""
        self.tape.exact = False  # how many pieces there are hangs on all atoms, that there are none as well
        marked, at = [], 0
        for text in pieces:
            at = str.index(self, text, at)
            marked.append(self._part(text, at, at + len(text)))
            at += len(text) + len(separator)
        return marked

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Any:  # type: ignore[override]
        if not old or isinstance(old, Marked):
            return self._unfollowed(str.replace(plain(self), plain(old), plain(new), count))
        return join(self.tape, with_separator(self.split(old, count), new))

    def removeprefix(self, prefix: str) -> Any:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> Any:
        return self[: -len(suffix)] if suffix and self.endswith(suffix) else self

    def join(self, items: Iterable[str]) -> Any:
        return join(self.tape, with_separator(list(items), self))

    def _made(self, text: str, function: Callable[..., str], *args: Any) -> "Marked":
        """The result of a function of this single-atom string; all of it counts as of the same origin."""
        ref = self.tape.step(function, self.atoms[0].ref, *[_ref(self.tape, a) for a in args])
        return Marked.make(self.tape, text, (Atom(len(text), self.atoms[0].origin, ref),))

    def _unfollowed(self, text: str) -> "Marked":
        """The result of an operation through which origins are not followed: one origin is kept, several are lost."""
        origins = {atom.origin for atom in self.atoms if atom.length}
        self.tape.exact = False
        self.tape.lost = self.tape.lost or len(origins) > 1
        return Marked.make(self.tape, text, (Atom(len(text), origins.pop() if len(origins) == 1 else None, -1),))

    # What the template observes of it --------------------------------------------------------------------------------

    def observed(self, value: Any, function: Callable[..., Any], *args: Any) -> Any:
        """`value`, which function(self, *args) gave, as something that the template now knows."""
        self.tape.guard(self.tape.step(function, self.whole(), *[_ref(self.tape, a) for a in args]), value)
        return value

    def __bool__(self) -> bool:
        return bool(self.observed(str.__len__(self) > 0, is_true))

    def __len__(self) -> int:
        return int(self.observed(str.__len__(self), len))

    def __contains__(self, item: Any) -> bool:
        return bool(self.observed(str.__contains__(self, item), operator.contains, item))

    def __eq__(self, other: object) -> Any:
        if self is other or not isinstance(other, str):
            return self is other
        return self.observed(str.__eq__(self, other), operator.eq, other)

    def __ne__(self, other: object) -> Any:
        return not self.__eq__(other)

    def __lt__(self, other: str) -> Any:
        return self.observed(str.__lt__(self, other), operator.lt, other)

    def __gt__(self, other: str) -> Any:
        return self.observed(str.__gt__(self, other), operator.gt, other)

    def __le__(self, other: str) -> Any:
        return self.observed(str.__le__(self, other), operator.le, other)

    def __ge__(self, other: str) -> Any:
        return self.observed(str.__ge__(self, other), operator.ge, other)

    def __hash__(self) -> int:
        self.tape.exact = False  # a lookup that finds nothing compares nothing
        return str.__hash__(self)


def _observing(name: str) -> Callable[..., Any]:
    """The method of that name; what it says is observed."""
    method = getattr(str, name)
    return lambda self, *args: self.observed(method(plain(self), *args), method, *args)


def _unrecorded(name: str) -> Callable[..., Any]:
    """The method of that name, which is not followed: a string that it makes is a plain one."""
    method = getattr(str, name)

    def call(self: Marked, *args: Any, **kwargs: Any) -> Any:
        result = method(plain(self), *args, **kwargs)
        self.tape.exact = False
        self.tape.lost = self.tape.lost or isinstance(result, str)
        return result

    return call


_OBSERVING = """startswith endswith find rfind index rindex count isalnum isalpha isascii isdecimal isdigit
isidentifier islower isnumeric isprintable isspace istitle isupper"""
_UNRECORDED = """__format__ __repr__ format format_map center ljust rjust zfill expandtabs translate swapcase casefold
encode"""
for _name in _OBSERVING.split():
    setattr(Marked, _name, _observing(_name))
for _name in _UNRECORDED.split():
    setattr(Marked, _name, _unrecorded(_name))


def _ref(tape: Tape, argument: Any) -> int:
    """An argument of a step: a marked string by its value, anything else as a constant."""
    if isinstance(argument, Marked):
        return argument.whole()
    return tape.constant(plain(argument) if isinstance(argument, str) else argument)


def atoms_of(tape: Tape, text: str) -> tuple[Atom, ...]:
    if isinstance(text, Marked):
        return text.atoms
    return (Atom(len(text), None, tape.constant(plain(text))),) if text else ()


def join(tape: Tape, texts: Iterable[str]) -> str:
    """The texts one after the other, each with its origins."""
    texts = list(texts)
    return Marked.make(tape, "".join(texts), [atom for text in texts for atom in atoms_of(tape, text)])


def _strip_first(texts: list[Marked], method: Callable[..., str], chars: str | None) -> list[Marked]:
    for index, text in enumerate(texts):
        stripped = text._made(method(plain(text), chars), method, chars)
        if stripped:  # observed: whether the next one is stripped too hangs on it
            return [stripped, *texts[index + 1 :]]
    return []
