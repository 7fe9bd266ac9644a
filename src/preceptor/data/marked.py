"""Strings that remember which message and field each of their characters came from, and how they were made.

A `Marked` string behaves as a plain one in a template and carries *atoms*: runs of characters of one origin. An origin
is the number of a *leaf* (one string of one message, such as its content), or None for text of the template itself.
Concatenation joins atoms, slicing and stripping cut them, `tojson` escapes them one by one.

A `Tape` records, while a template runs on marked strings, every operation as a step and everything that the template
*observed* (a comparison, a length, `'</think>' in content`) as a guard. On other strings for which all guards hold, the
template would have taken the same path, so running the steps gives what the template would have rendered, without it.
Where an operation cannot be recorded exactly the tape says so (`exact` turns False) and is not used again; where an
origin cannot be followed the text counts as the template's own (`lost` turns True), and the proof, which misses the
field then, refuses.
"""

import json
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex


class Atom(NamedTuple):
    """A run of characters of one origin; `ref` is the value of the tape that spells them, -1 if none does."""

    length: int
    origin: int | None
    ref: int


class Tape:
    """Steps over numbered values. Values 0 to num_leaves - 1 are the leaves; constants and results follow."""

    def __init__(self, num_leaves: int) -> None:
        self.num_leaves = num_leaves
        self.steps: list[tuple[Callable[..., Any] | None, Any]] = []  # (None, constant) or (function, refs)
        self.guards: dict[int, Any] = {}
        self.exact = True
        self.lost = False
        self._refs: dict[Any, int] = {}

    def constant(self, value: Any) -> int:
        key = (None, type(value), value)
        ref = self._refs.get(key)
        return self._append(key, None, value) if ref is None else ref

    def step(self, function: Callable[..., Any], *refs: int) -> int:
        """The value function(*refs); -1 if one of them is unknown."""
        if -1 in refs:
            self.exact = False
            return -1
        key = (function, refs)
        ref = self._refs.get(key)
        return self._append(key, function, refs) if ref is None else ref

    def _append(self, key: Any, function: Callable[..., Any] | None, payload: Any) -> int:
        self.steps.append((function, payload))
        ref = self.num_leaves + len(self.steps) - 1
        self._refs[key] = ref
        return ref

    def guard(self, ref: int, value: Any) -> None:
        if ref >= 0:
            self.guards[ref] = value

    def replay(self, leaves: Sequence[str]) -> list[Any] | None:
        """All values for these leaves; None if a guard fails or a step raises: the template might do otherwise."""
        values: list[Any] = list(leaves)
        append, guards = values.append, self.guards
        try:
            for function, payload in self.steps:
                if function is None:
                    append(payload)
                elif len(payload) == 2:
                    append(function(values[payload[0]], values[payload[1]]))
                else:
                    append(function(*[values[ref] for ref in payload]))
        except (IndexError, ValueError, TypeError):
            return None
        for ref, expected in guards.items():
            if values[ref] != expected:
                return None
        return values


def plain(text: str) -> str:
    """The same characters as an exact `str`."""
    return str.__str__(text)


def join_texts(*texts: str) -> str:
    return "".join(texts)


def cut(text: str, start: int | None, stop: int | None, step: int | None) -> str:
    return text[start:stop:step]


def json_body(text: str, ensure_ascii: bool) -> str:
    """The text as JSON spells it inside the quotes."""
    return json.dumps(text, ensure_ascii=ensure_ascii)[1:-1]


def is_true(value: Any) -> bool:
    return bool(value)


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

    # What the template makes of it -----------------------------------------------------------------------------------

    def __str__(self) -> str:
        return self  # so that `str(x)`, which Jinja puts around every output, keeps the atoms

    def __add__(self, other: Any) -> Any:
        return join(self.tape, (self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return join(self.tape, (other, self)) if isinstance(other, str) else NotImplemented

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, slice):
            index = operator.index(key)
            stop = None if index == -1 else index + 1
            text = str.__getitem__(self, index)  # raises IndexError as a plain string would
            if len(self.atoms) == 1:
                return self._made(text, operator.getitem, int(index))
            return self._cut(slice(index, stop), text)
        return self._cut(key, str.__getitem__(self, key))

    def _cut(self, key: slice, text: str) -> "Marked":
        if len(self.atoms) == 1:
            return self._made(text, cut, key.start, key.stop, key.step)
        start, stop, step = key.indices(str.__len__(self))
        if step != 1:
            return self._unfollowed(text)
        self.tape.exact = False
        return Marked.make(self.tape, text, _between(self.atoms, start, stop))

    def __iter__(self) -> Iterator["Marked"]:  # type: ignore[override]
        for index in range(len(self)):
            yield self[index]

    def __mod__(self, other: Any) -> Any:
        return self._unfollowed(str.__mod__(plain(self), other))

    def __rmod__(self, form: str) -> Any:
        before, found, after = form.partition("%s")
        if found and "%" not in before + after:
            return join(self.tape, (before, self, after))
        return self._unfollowed(form % plain(self))

    def __mul__(self, times: SupportsIndex) -> Any:
        return join(self.tape, (self,) * operator.index(times))

    __rmul__ = __mul__

    def strip(self, chars: str | None = None) -> Any:
        return self._stripped(str.strip, chars)

    def lstrip(self, chars: str | None = None) -> Any:
        return self._stripped(str.lstrip, chars)

    def rstrip(self, chars: str | None = None) -> Any:
        return self._stripped(str.rstrip, chars)

    def _stripped(self, method: Callable[..., str], chars: str | None) -> "Marked":
        """Strip atom by atom from the ends; that an atom has anything left is observed."""
        text = method(plain(self), chars)
        if len(self.atoms) == 1:
            return self._made(text, method, chars)
        texts = [Marked.make(self.tape, piece, (atom,)) for piece, atom in zip(self.pieces(), self.atoms, strict=True)]
        if method is not str.rstrip:
            texts = _strip_first(texts, str.lstrip, chars)
        if method is not str.lstrip:
            texts = _strip_first(texts[::-1], str.rstrip, chars)[::-1]
        return join(self.tape, texts)

    def pieces(self) -> list[str]:
        """The characters of each atom as plain strings."""
        text, at, texts = plain(self), 0, []
        for atom in self.atoms:
            texts.append(text[at : at + atom.length])
            at += atom.length
        return texts

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
        return self._unfollowed(text)

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
        if len(self.atoms) == 1:
            tape = self.tape
            result = tape.step(method, self.atoms[0].ref, *[_ref(tape, a) for a in args])
            tape.guard(tape.step(len, result), len(pieces))
            origin = self.atoms[0].origin
            refs = [tape.step(operator.getitem, result, tape.constant(index)) for index in range(len(pieces))]
            return [
                Marked.make(tape, text, (Atom(len(text), origin, r),)) for text, r in zip(pieces, refs, strict=True)
            ]
        self.tape.exact = False
        marked, at = [], 0
        for text in pieces:
            at = str.index(self, text, at)
            marked.append(Marked.make(self.tape, text, _between(self.atoms, at, at + len(text))))
            at += len(text)
        return marked

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Any:
        if not old or isinstance(old, Marked):
            return self._unfollowed(str.replace(plain(self), plain(old), plain(new), count))
        return join(self.tape, _between_items(self.split(old, count), new))

    def removeprefix(self, prefix: str) -> Any:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> Any:
        return self[: -len(suffix)] if suffix and self.endswith(suffix) else self

    def join(self, items: Iterable[str]) -> Any:
        return join(self.tape, _between_items(list(items), self))

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

    def _observed(self, value: Any, function: Callable[..., Any], *args: Any) -> Any:
        tape = self.tape
        tape.guard(tape.step(function, self.whole(), *[_ref(tape, a) for a in args]), value)
        return value

    def whole(self) -> int:
        """The value of the tape that spells all of it."""
        if len(self.atoms) == 1:
            return self.atoms[0].ref
        return self.tape.step(join_texts, *[atom.ref for atom in self.atoms])

    def __bool__(self) -> bool:
        return self._observed(str.__len__(self) > 0, is_true)

    def __len__(self) -> int:
        return self._observed(str.__len__(self), len)

    def __contains__(self, item: Any) -> bool:
        return self._observed(str.__contains__(self, item), operator.contains, item)

    def __eq__(self, other: object) -> Any:
        if self is other or not isinstance(other, str):
            return self is other
        return self._observed(str.__eq__(self, other), operator.eq, other)

    def __ne__(self, other: object) -> Any:
        return not self.__eq__(other)

    def __lt__(self, other: str) -> Any:
        return self._observed(str.__lt__(self, other), operator.lt, other)

    def __gt__(self, other: str) -> Any:
        return self._observed(str.__gt__(self, other), operator.gt, other)

    def __le__(self, other: str) -> Any:
        return self._observed(str.__le__(self, other), operator.le, other)

    def __ge__(self, other: str) -> Any:
        return self._observed(str.__ge__(self, other), operator.ge, other)

    def __hash__(self) -> int:
        self.tape.exact = False  # a lookup that finds nothing compares nothing
        return str.__hash__(self)

    def startswith(self, *args: Any) -> Any:
        return self._observed(str.startswith(self, *args), str.startswith, *args)

    def endswith(self, *args: Any) -> Any:
        return self._observed(str.endswith(self, *args), str.endswith, *args)

    def find(self, *args: Any) -> Any:
        return self._observed(str.find(self, *args), str.find, *args)

    def rfind(self, *args: Any) -> Any:
        return self._observed(str.rfind(self, *args), str.rfind, *args)

    def count(self, *args: Any) -> Any:
        return self._observed(str.count(self, *args), str.count, *args)


def _unrecorded(name: str, loses: bool) -> Callable[..., Any]:
    """The method of that name on the plain string, and a tape that says that it cannot be replayed."""
    method = getattr(str, name)

    def call(self: Marked, *args: Any, **kwargs: Any) -> Any:
        self.tape.exact = False
        self.tape.lost = self.tape.lost or loses
        return method(plain(self), *args, **kwargs)

    return call


for _name in ["index", "rindex", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric"]:
    setattr(Marked, _name, _unrecorded(_name, loses=False))
for _name in ["isprintable", "isspace", "istitle", "isupper"]:
    setattr(Marked, _name, _unrecorded(_name, loses=False))
for _name in ["format", "format_map", "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "swapcase", "casefold", "encode"]:
    setattr(Marked, _name, _unrecorded(_name, loses=True))
for _name in ("__format__", "__repr__"):
    setattr(Marked, _name, _unrecorded(_name, loses=True))


class MarkedLength(int):
    """The length of a marked string: what it is compared with is a guard, not its exact value."""

    source: Marked

    @classmethod
    def of(cls, text: Marked) -> "MarkedLength":
        length = cls(str.__len__(text))
        length.source = text
        return length

    def _compared(self, function: Callable[[Any, Any], Any], other: Any) -> Any:
        tape = self.source.tape
        value = function(int(self), other)
        if isinstance(other, int | float):
            tape.guard(tape.step(function, tape.step(len, self.source.whole()), tape.constant(other)), value)
        return value

    def __eq__(self, other: object) -> Any:
        return self._compared(operator.eq, other)

    def __ne__(self, other: object) -> Any:
        return self._compared(operator.ne, other)

    def __lt__(self, other: Any) -> Any:
        return self._compared(operator.lt, other)

    def __le__(self, other: Any) -> Any:
        return self._compared(operator.le, other)

    def __gt__(self, other: Any) -> Any:
        return self._compared(operator.gt, other)

    def __ge__(self, other: Any) -> Any:
        return self._compared(operator.ge, other)

    def __bool__(self) -> bool:
        return self._compared(operator.ne, 0)

    def _exactly(self) -> int:
        return len(self.source)  # a guard on the exact length

    def __add__(self, other: Any) -> Any:
        return self._exactly() + other

    def __radd__(self, other: Any) -> Any:
        return other + self._exactly()

    def __sub__(self, other: Any) -> Any:
        return self._exactly() - other

    def __rsub__(self, other: Any) -> Any:
        return other - self._exactly()

    def __str__(self) -> str:
        return str(self._exactly())

    def __hash__(self) -> int:
        return hash(self._exactly())


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
    whole = "".join(texts)
    return Marked.make(tape, whole, [atom for text in texts for atom in atoms_of(tape, text)])


def _strip_first(texts: list[Marked], method: Callable[..., str], chars: str | None) -> list[Marked]:
    for index, text in enumerate(texts):
        stripped = text._made(method(plain(text), chars), method, chars)
        if stripped:  # observed: whether the next one is stripped too hangs on it
            return [stripped, *texts[index + 1 :]]
    return []


def _between_items(items: Sequence[str], separator: str) -> list[str]:
    texts: list[str] = []
    for item in items:
        texts += [separator, item] if texts else [item]
    return texts


def _between(atoms: Sequence[Atom], start: int, stop: int) -> list[Atom]:
    """The atoms of the characters start to stop; those that are cut cannot be spelled by the tape."""
    kept, at = [], 0
    for atom in atoms:
        end = at + atom.length
        low, high = max(at, start), min(end, stop)
        if low < high:
            kept.append(atom if high - low == atom.length else Atom(high - low, atom.origin, -1))
        at = end
    return kept
