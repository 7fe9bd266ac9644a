"""Strings that remember which message and field each of their characters came from, and renders with them.

A `Marked` string behaves as a plain one in a template and carries *atoms*: runs of characters of one origin. An origin
is the number of a *leaf* (one string of one message, such as its content), or None for text of the template itself.
Concatenation joins atoms, slicing and stripping cut them, `tojson` escapes them one by one. Where the origin of
characters cannot be followed they count as the template's own; the proof, which then misses the field, rejects.

transformers renders templates in a sandbox that turns every `str` subclass back into a plain string, so there is an
environment for them: the same sandbox, settings, filters and globals (`environment.prepare`), in which the few places
that would copy characters without asking the string (joining the output, `~`, filters such as `tojson`) are made to
ask. What it renders is the same text, byte for byte; callers check that against the plain render.
"""

import functools
import itertools
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Self, SupportsIndex

import jinja2
import markupsafe
from jinja2 import filters, nodes

from preceptor.chat.environment import SETTINGS, Sandbox, check_binop, limited_join, prepare
from preceptor.chat.origins import json_body, map_leaves


class Atom(NamedTuple):
    """A run of characters of one origin."""

    length: int
    origin: int | None


def plain(text: str) -> str:
    """The same characters as an exact `str`."""
    return str.__str__(text)


def _changing(change: Callable[[str], str]) -> Any:
    """The method of marked strings that gives them with `change`, one of plain strings that goes by characters."""
    return lambda self: self._changed(change)


def _splitting(split: Callable[..., Sequence[str]]) -> Any:
    """The method of marked strings that cuts them as `split` does plain ones."""
    return lambda self, *args, **kwargs: self._split(split, *args, **kwargs)


class Marked(str):
    """A string with its atoms; methods that are not defined here give plain strings, whose origins are lost."""

    __slots__ = ("atoms",)
    atoms: tuple[Atom, ...]

    def __new__(cls, text: str = "", atoms: Sequence[Atom] | None = None) -> Self:
        """Without atoms all of the text is the template's own."""
        marked = str.__new__(cls, text)
        marked.atoms = (Atom(len(text), None),) if atoms is None else tuple(atoms)
        return marked

    @classmethod
    def leaf(cls, index: int, text: str) -> "Marked":
        return cls(text, (Atom(len(text), index),))

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
        places = range(len(self))[key]
        if isinstance(places, int):
            return self._part(text, places, places + 1)
        return self._part(text, places.start, places.stop) if places.step == 1 else self._unfollowed(text)

    def _part(self, text: str, start: int, stop: int) -> "Marked":
        kept, at = [], 0
        for atom in self.atoms:
            low, high = max(at, start), min(at + atom.length, stop)
            if low < high:
                kept.append(Atom(high - low, atom.origin))
            at += atom.length
        return Marked(text, kept)

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

    upper, lower = _changing(str.upper), _changing(str.lower)
    title, capitalize = _changing(str.title), _changing(str.capitalize)

    def _changed(self, change: Callable[[str], str]) -> "Marked":
        text = change(plain(self))
        by_atom = changed_by_atom(self, change)
        return by_atom if plain(by_atom) == text else self._unfollowed(text)

    split, rsplit, splitlines = _splitting(str.split), _splitting(str.rsplit), _splitting(str.splitlines)
    partition, rpartition = _splitting(str.partition), _splitting(str.rpartition)

    def _split(self, split: Callable[..., Sequence[str]], *args: Any, **kwargs: Any) -> Sequence["Marked"]:
        """The pieces with their atoms; between any two stands the separator or, where none is given, blank space."""
        named = {name: plain(a) if isinstance(a, str) else a for name, a in kwargs.items()}
        pieces = split(plain(self), *[plain(a) if isinstance(a, str) else a for a in args], **named)
        separator = (args[0] if args else named.get("sep")) or "" if split in (str.split, str.rsplit) else ""
        marked, at = [], 0
        for text in pieces:
            at = str.index(self, text, at)
            marked.append(self._part(text, at, at + len(text)))
            at += len(text) + len(separator)
        return tuple(marked) if isinstance(pieces, tuple) else marked

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

    def _unfollowed(self, text: str) -> "Marked":
        """The result of an operation through which origins are not followed: one origin is kept, several are lost."""
        origins = {atom.origin for atom in self.atoms if atom.length}
        return Marked(text, (Atom(len(text), origins.pop() if len(origins) == 1 else None),))


def atoms_of(text: str) -> tuple[Atom, ...]:
    if isinstance(text, Marked):
        return text.atoms
    return (Atom(len(text), None),) if text else ()


def pieces_of(text: str) -> Iterator[tuple[str, int | None]]:
    """The characters of each atom as a plain string, and their origin."""
    characters, at = plain(text), 0
    for length, origin in atoms_of(text):
        yield characters[at : at + length], origin
        at += length


def changed_by_atom(text: str, change: Callable[[str], str]) -> Marked:
    """The text with change(characters) in place of the characters of each atom."""
    changed = [(change(piece), origin) for piece, origin in pieces_of(text)]
    atoms = [Atom(len(piece), origin) for piece, origin in changed]
    return Marked("".join([piece for piece, _ in changed]), atoms)


def join(texts: Iterable[str]) -> Marked:
    """The texts one after the other, each with its origins."""
    texts = list(texts)
    return Marked("".join(texts), [atom for text in texts for atom in atoms_of(text)])


def with_separator(items: Sequence[str], separator: str) -> list[str]:
    """The items with the separator between any two."""
    return [text for item in items for text in (separator, item)][1:]


# Renders with marked strings ------------------------------------------------------------------------------------------


def marked_message(message: Mapping[str, Any], first_leaf: int) -> dict[str, Any]:
    """The message with every leaf marked; leaves are numbered from `first_leaf`."""
    number = itertools.count(first_leaf)
    return map_leaves(message, lambda text: Marked.leaf(next(number), text))


def split_by_origin(outputs: Iterable[str]) -> tuple[list[str], list[int | None]]:
    """What a template wrote, in pieces of one origin each, and their origins."""
    pieces: list[str] = []
    origins: list[int | None] = []
    for output in outputs:
        for piece, origin in pieces_of(output):
            if origins and origins[-1] == origin:
                pieces[-1] += piece
            elif piece:
                pieces.append(piece)
                origins.append(origin)
    return pieces, origins


def _concat(texts: Iterable[str]) -> str:
    """`"".join` for the output of macros and set blocks."""
    texts = list(texts)
    return join(texts) if _any_marked(texts) else limited_join(texts)


def _any_marked(values: Iterable[Any]) -> bool:
    return any(isinstance(value, Marked) for value in values)


class MarkedEnvironment(Sandbox):
    """The guarded sandbox for marked strings."""

    concat = staticmethod(_concat)  # type: ignore[assignment]

    @staticmethod
    def join_outputs(values: Iterable[Any]) -> str:
        return _concat([_text(value) for value in values])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator != "%" or not isinstance(left, str):
            return super().call_binop(context, operator, left, right)
        check_binop(operator, left, right)
        return _percent(left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """A method of a plain string that is given marked ones is the marked method."""
        if type(getattr(obj, "__self__", None)) is str and args:
            items = args[0] if obj.__name__ == "join" and isinstance(args[0], list | tuple) else args
            if _any_marked(items):
                obj = getattr(Marked(obj.__self__), obj.__name__)
        return super().call(context, obj, *args, **kwargs)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return _printed(value) if isinstance(value, list | tuple | dict) else str(value)


class SafeMarked(Marked):
    """What Jinja's filter `safe` makes: text that escapes what is added to it."""

    __slots__ = ()

    @classmethod
    def of(cls, text: str) -> "SafeMarked":
        return cls(plain(text), atoms_of(text))

    def __add__(self, other: Any) -> Any:
        return SafeMarked.of(join((self, _escaped(other)))) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return SafeMarked.of(join((_escaped(other), self))) if isinstance(other, str) else NotImplemented


def _escaped(text: str) -> str:
    return text if isinstance(text, SafeMarked) else changed_by_atom(text, lambda piece: str(markupsafe.escape(piece)))


# Filters that read characters ----------------------------------------------------------------------------------------


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers' `tojson`; marked strings inside keep their origins."""

    def encoded(item: Any) -> str:
        return json.dumps(item, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def as_json(marked: Marked) -> str:
        return changed_by_atom(marked, lambda piece: json_body(piece, ensure_ascii))

    return _spelled(value, encoded, _IN_JSON, as_json)


def _printed(value: Any) -> str:
    """A list or object as Python prints it, which is how templates spell it that do not ask for JSON."""

    def as_printed(marked: Marked) -> str:
        spelled = repr(plain(marked))
        return join([spelled[0], marked._unfollowed(spelled[1:-1]), spelled[-1]])

    return _spelled(value, str, _IN_PRINT, as_printed)


_IN_JSON = re.compile(r"\\u0000leaf (\d+)\\u0000")  # a stand-in as JSON spells it
_IN_PRINT = re.compile(r"'\\x00leaf (\d+)\\x00'")  # and as Python does


def _spelled(value: Any, spell: Callable[[Any], str], stand_in: re.Pattern[str], leaf: Callable[[Marked], str]) -> str:
    """What `spell` makes of a value, with a stand-in for every marked string in it, which `leaf` spells then."""
    standing, found = _stand_ins(value)
    parts = stand_in.split(spell(standing)) if found else [spell(standing)]
    texts = [leaf(found[int(part)]) if at % 2 else part for at, part in enumerate(parts)]
    return join(texts) if found else texts[0]


def _stand_ins(value: Any) -> tuple[Any, list[Marked]]:
    """The value with a stand-in for every marked string, and these strings in order."""
    found: list[Marked] = []

    def stand_in(item: Any) -> Any:
        if isinstance(item, Marked):
            found.append(item)
            return f"\x00leaf {len(found) - 1}\x00"
        if isinstance(item, Mapping):
            return {key: stand_in(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return type(item)([stand_in(inner) for inner in item])
        return item

    return stand_in(value), found


def _join(context: nodes.EvalContext, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = list(value)
    if attribute is not None:
        items = [filters.make_attrgetter(context.environment, attribute)(item) for item in items]
    if not _any_marked([d, *items]):
        return filters.sync_do_join(context, items, d)
    return join(with_separator([_text(item) for item in items], d))


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if not isinstance(s, Marked):
        return filters.do_indent(s, width, first, blank)
    indention = width if isinstance(width, str) else " " * width
    lines = (s + "\n").splitlines()  # as Jinja's own: the added newline keeps a last empty line
    texts = [lines[0]]
    for line in lines[1:]:
        texts += ["\n", indention, line] if blank or line else ["\n", line]
    return join([indention, *texts] if first else texts)


def _replace(context: nodes.EvalContext, s: Any, old: str, new: str, count: int | None = None) -> str:
    if not isinstance(s, Marked) and _any_marked((old, new)):
        s = Marked(str(s))
    return filters.do_replace(context, s, old, new, count)


_CONVERSION = re.compile(r"%(?:\(([^()]*)\))?([-#0 +]*\d*(?:\.\d+)?[a-zA-Z%])")


def _percent(form: str, values: Any) -> str:
    """`form % values`; what stands for a plain `%s` keeps its origins."""
    text = str.__mod__(plain(form), values)
    given = iter(values if isinstance(values, tuple) else (values,))
    texts: list[str] = []
    at = 0
    for found in _CONVERSION.finditer(form):
        texts.append(form[at : found.start()])
        at = found.end()
        name, conversion = found.groups()
        if conversion == "%":
            texts.append("%")
            continue
        value = next(given) if name is None else values[name]
        texts.append(_text(value) if conversion == "s" else str.__mod__(f"%{conversion}", (value,)))
    made = join([*texts, form[at:]])
    return made if plain(made) == plain(text) else text


def _losing(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that would read marked strings without asking them gets plain ones: their origins are lost."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*[plain(a) if isinstance(a, Marked) else a for a in args], **kwargs)

    return functools.update_wrapper(call, function)  # with the mark by which Jinja knows that it wants its context


# These return their arguments, or items of one, without looking at characters.
_TRANSPARENT = """attr batch count d default dictsort first groupby items last length list map max min random reject
rejectattr reverse select selectattr slice sort sum unique"""

_FILTERS: Mapping[str, Callable[..., Any]] = {
    "capitalize": lambda value: _text(value).capitalize(),
    "format": lambda value, *args, **kwargs: _percent(_text(value), kwargs or args),
    "indent": _indent,
    "join": jinja2.pass_eval_context(_join),
    "lower": lambda value: _text(value).lower(),
    "replace": jinja2.pass_eval_context(_replace),
    "safe": lambda value: SafeMarked.of(_text(value)),
    "string": _text,
    "tojson": _tojson,
    "trim": lambda value, chars=None: _text(value).strip(chars),
    "upper": lambda value: _text(value).upper(),
}


@lru_cache(maxsize=1)
def _marked_environment() -> jinja2.Environment:
    environment = MarkedEnvironment(**SETTINGS, finalize=_text)
    reading = {name: filter for name, filter in environment.filters.items() if name not in _TRANSPARENT.split()}
    environment.filters |= {name: _losing(filter) for name, filter in reading.items()}
    return prepare(environment, _FILTERS)


@lru_cache(maxsize=256)
def compiled_marked(text: str) -> jinja2.Template:
    return _marked_environment().from_string(text)
