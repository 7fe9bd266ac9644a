"""Rendering a template with strings that know where they came from.

transformers renders templates in a sandbox that turns every `str` subclass back into a plain string, so this module has
an environment of its own: the same sandbox, settings, filters and globals (`template.prepare_environment`), in which
the few places that would copy characters without asking the string (joining the output, `~`, `in`, filters such as
`tojson`) are made to ask. What it renders is the same text, byte for byte; callers check that against the plain render.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import filters, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

from preceptor.data.marked import Atom, Marked, MarkedLength, Tape, atoms_of, join, json_body, plain
from preceptor.data.template import GenerationTag, prepare_environment


@dataclass(frozen=True, slots=True)
class Leaf:
    """One string of a message: the message's index, the keys that lead to it, its text."""

    message: int
    path: tuple[str | int, ...]
    text: str


def leaves_of(message: Mapping[str, Any], index: int) -> list[Leaf]:
    """The strings of a message in the order in which they stand; `role` and `type` are names, not text."""
    leaves: list[Leaf] = []

    def walk(value: Any, path: tuple[str | int, ...]) -> None:
        if isinstance(value, str):
            leaves.append(Leaf(index, path, value))
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                if key not in ("role", "type"):
                    walk(inner, (*path, key))
        elif isinstance(value, list | tuple):
            for place, inner in enumerate(value):
                walk(inner, (*path, place))

    walk(message, ())
    return leaves


def marked_message(message: Mapping[str, Any], tape: Tape, first_leaf: int) -> dict[str, Any]:
    """The message with every leaf marked; leaves are numbered from `first_leaf`, in the order of `leaves_of`."""
    number = itertools.count(first_leaf)

    def mark(value: Any) -> Any:
        if isinstance(value, str):
            return Marked.leaf(tape, next(number), value)
        if isinstance(value, Mapping):
            return {key: inner if key in ("role", "type") else mark(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [mark(inner) for inner in value]
        return value

    return mark(message)


@dataclass(frozen=True, eq=False, slots=True)
class Rendered:
    """A rendered text in pieces, each with the number of the leaf that it came from (None: the template's own text)."""

    pieces: Sequence[str]
    origins: Sequence[int | None]

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def span(self, leaves: range) -> tuple[int, int] | None:
        """From the first to after the last character that came from these leaves; None if none did."""
        start, end, at = None, 0, 0
        for piece, origin in zip(self.pieces, self.origins, strict=True):
            if origin is not None and piece and origin in leaves:
                start = at if start is None else start
                end = at + len(piece)
            at += len(piece)
        return None if start is None else (start, end)

    def runs(self) -> list[tuple[str, bool]]:
        """The text in runs, each with whether it came from a message."""
        return [(piece, origin is not None) for piece, origin in zip(self.pieces, self.origins, strict=True)]

    def runs_in(self, text: str, leaves: range) -> list[tuple[str, bool]]:
        """Another text, in which the pieces of these leaves stand in the same order, in runs as above."""
        runs: list[tuple[str, bool]] = []
        at = 0
        for piece, origin in zip(self.pieces, self.origins, strict=True):
            place = text.find(piece, at) if piece and origin is not None and origin in leaves else -1
            if place >= 0:
                runs += [(text[at:place], False), (piece, True)]
                at = place + len(piece)
        return [*runs, (text[at:], False)]

    def spelled(self, leaf: int) -> str:
        """All characters that came from this leaf, in order."""
        return "".join(piece for piece, origin in zip(self.pieces, self.origins, strict=True) if origin == leaf)


class MarkedCode(CodeGenerator):
    """Jinja's compiler, with `~` and `in` as calls that marked strings can see."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_outputs((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        if len(node.ops) != 1 or node.ops[0].op not in ("in", "notin"):
            super().visit_Compare(node, frame)
            return
        self.write("(not " if node.ops[0].op == "notin" else "(")
        self.write("environment.contains(")
        self.visit(node.ops[0].expr, frame)
        self.write(", ")
        self.visit(node.expr, frame)
        self.write("))")


def _concat(texts: Iterable[str]) -> str:
    """`"".join` for the output of macros and set blocks."""
    texts = list(texts)
    for text in texts:
        if isinstance(text, Marked):
            return join(text.tape, texts)
    return "".join(texts)


def _first_marked(values: Iterable[Any]) -> Marked | None:
    return next((value for value in values if isinstance(value, Marked)), None)


class MarkedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers for marked strings."""

    code_generator_class = MarkedCode
    concat = staticmethod(_concat)  # type: ignore[assignment]

    @staticmethod
    def join_outputs(values: Iterable[Any]) -> str:
        return _concat([value if isinstance(value, str) else str(value) for value in values])

    @staticmethod
    def contains(container: Any, item: Any) -> bool:
        if isinstance(item, Marked) and isinstance(container, str) and not isinstance(container, Marked):
            return item._observed(plain(item) in container, _is_part_of, container)
        return item in container

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """A method of a plain string that is given marked ones is the marked method."""
        if type(getattr(obj, "__self__", None)) is str and args:
            items = args[0] if obj.__name__ == "join" and isinstance(args[0], list | tuple) else args
            marked = _first_marked(items)
            if marked is not None:
                owner = Marked.make(marked.tape, obj.__self__, atoms_of(marked.tape, obj.__self__))
                return getattr(owner, obj.__name__)(*args, **kwargs)
        return super().call(context, obj, *args, **kwargs)


def _is_part_of(item: str, container: str) -> bool:
    return item in container


STAND_IN = re.compile(r"\\u0000leaf (\d+)\\u0000")  # as JSON spells it


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers' `tojson`; marked strings inside keep their origins.

    Every marked string is replaced by a stand-in that JSON leaves as it is, the whole is encoded by `json.dumps`, and
    the stand-ins are then replaced by the strings as JSON spells them.
    """
    found: list[Marked] = []

    def stand_in(item: Any) -> Any:
        if isinstance(item, Marked):
            found.append(item)
            return f"\x00leaf {len(found) - 1}\x00"
        if isinstance(item, Mapping):
            return {key: stand_in(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [stand_in(inner) for inner in item]
        return item

    replaced = stand_in(value)
    encoded = json.dumps(replaced, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if not found:
        return encoded
    tape = found[0].tape
    texts: list[str] = []
    for index, part in enumerate(STAND_IN.split(encoded)):
        if index % 2 == 0:
            texts.append(part)
            continue
        marked = found[int(part)]
        for atom, text in zip(marked.atoms, marked.pieces(), strict=True):
            body = json_body(text, ensure_ascii)
            ref = tape.step(json_body, atom.ref, tape.constant(ensure_ascii))
            texts.append(Marked.make(tape, body, (Atom(len(body), atom.origin, ref),)))
    return join(tape, texts)


def _join_filter(
    eval_context: nodes.EvalContext, value: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    items = list(value)
    if attribute is not None:
        items = [filters.make_attrgetter(eval_context.environment, attribute)(item) for item in items]
    marked = _first_marked([d, *items])
    if marked is None:
        return filters.sync_do_join(eval_context, items, d)
    texts: list[str] = []
    for item in items:
        text = item if isinstance(item, str) else str(item)
        texts += [d, text] if texts else [text]
    return join(marked.tape, texts)


def _indent_filter(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if not isinstance(s, Marked):
        return filters.do_indent(s, width, first, blank)
    indention = width if isinstance(width, str) else " " * width
    lines = (s + "\n").splitlines()  # as jinja2.filters.do_indent: the added newline keeps a last empty line
    if blank:
        texts = _with_separator(lines, "\n" + indention)
    else:
        texts = [lines[0]]
        for line in lines[1:]:
            texts += ["\n", indention, line] if line else ["\n", line]
    return join(s.tape, [indention, *texts] if first else texts)


def _with_separator(items: Sequence[str], separator: str) -> list[str]:
    return [text for item in items for text in (separator, item)][1:]


def _replace_filter(eval_context: nodes.EvalContext, s: str, old: str, new: str, count: int | None = None) -> str:
    marked = _first_marked((s, old, new))
    if marked is None:
        return filters.do_replace(eval_context, s, old, new, count)
    owner = s if isinstance(s, Marked) else Marked.make(marked.tape, s, atoms_of(marked.tape, s))
    return owner.replace(old, new, -1 if count is None else count)


def _trim_filter(value: str, chars: str | None = None) -> str:
    return value.strip(chars) if isinstance(value, str) else str(value).strip(chars)


def _length_filter(value: Any) -> int:
    return MarkedLength.of(value) if isinstance(value, Marked) else len(value)


def _is_sequence(value: Any) -> bool:
    return True if isinstance(value, Marked) else jinja2.tests.test_sequence(value)


def _text_filter(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _losing(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that would read marked strings without asking them gets plain ones, and the tape says so."""

    def call(*args: Any, **kwargs: Any) -> Any:
        marked = _first_marked((*args, *kwargs.values()))
        if marked is not None:
            marked.tape.exact, marked.tape.lost = False, True
            args = tuple(plain(a) if isinstance(a, Marked) else a for a in args)
        return function(*args, **kwargs)

    return functools.update_wrapper(call, function)  # with the mark by which Jinja knows that it wants its context


# These return their arguments, or the items of one, without looking at characters.
_TRANSPARENT = frozenset(
    ["attr", "batch", "d", "default", "dictsort", "first", "groupby", "items", "last", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum", "unique"]
)


@lru_cache(maxsize=1)
def marked_environment() -> jinja2.Environment:
    environment = MarkedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    prepare_environment(environment)
    for name, function in list(environment.filters.items()):
        if name not in _TRANSPARENT:
            environment.filters[name] = _losing(function)
    environment.filters |= {
        "capitalize": lambda value: _text_filter(value).capitalize(),
        "count": _length_filter,
        "indent": _indent_filter,
        "join": jinja2.pass_eval_context(_join_filter),
        "length": _length_filter,
        "lower": lambda value: _text_filter(value).lower(),
        "replace": jinja2.pass_eval_context(_replace_filter),
        "safe": _text_filter,
        "string": _text_filter,
        "tojson": _tojson,
        "trim": _trim_filter,
        "upper": lambda value: _text_filter(value).upper(),
    }
    environment.tests["sequence"] = _is_sequence
    return environment


@lru_cache(maxsize=64)
def compiled_marked(text: str) -> jinja2.Template:
    return marked_environment().from_string(text)


def render_marked(text: str, tape: Tape, variables: Mapping[str, Any]) -> tuple[Rendered, list[Atom]]:
    """Render a template whose variables hold marked strings; the pieces with their origins, and their atoms.

    Raises what the template raises.
    """
    template = compiled_marked(text)
    context = template.new_context(dict(variables))
    try:
        outputs = list(template.root_render_func(context))
    except Exception:
        template.environment.handle_exception()
    atoms: list[Atom] = []
    pieces: list[str] = []
    for output in outputs:
        if isinstance(output, Marked):
            atoms += output.atoms
            pieces += output.pieces()
        elif output:
            atoms.append(Atom(len(output), None, tape.constant(output)))
            pieces.append(output)
    return Rendered(pieces, [atom.origin for atom in atoms]), atoms
