"""Rendering a template with strings that know where they came from.

transformers renders templates in a sandbox that turns every `str` subclass back into a plain string, so this module has
an environment of its own: the same sandbox, settings, filters and globals (`environment.prepare`), in which the few
places that would copy characters without asking the string (joining the output, `~`, `in`, filters such as `tojson`)
are made to ask. What it renders is the same text, byte for byte; callers check that against the plain render.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.tests
from jinja2 import filters, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

from preceptor.chat.environment import SETTINGS, prepare
from preceptor.chat.marked import Marked, atoms_of, join, plain
from preceptor.chat.marked_length import MarkedLength
from preceptor.chat.one_pass_form import one_pass
from preceptor.chat.origins import Rendered, map_leaves
from preceptor.chat.tape import Atom, Tape, is_part_of, json_body, with_separator


def marked_message(message: Mapping[str, Any], tape: Tape, first_leaf: int) -> dict[str, Any]:
    """The message with every leaf marked; leaves are numbered from `first_leaf`."""
    number = itertools.count(first_leaf)
    return map_leaves(message, lambda text: Marked.leaf(tape, next(number), text))


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
    pieces, atoms = pieces_of(tape, outputs)
    return Rendered(pieces, [atom.origin for atom in atoms]), atoms


def pieces_of(tape: Tape, outputs: Iterable[str]) -> tuple[list[str], list[Atom]]:
    """What a template wrote, in pieces of one origin each, and their atoms."""
    atoms: list[Atom] = []
    pieces: list[str] = []
    for output in outputs:
        atoms += atoms_of(tape, output)
        pieces += output.pieces() if isinstance(output, Marked) else [output] if output else []
    return pieces, atoms


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
    marked = _first_marked(texts)
    return "".join(texts) if marked is None else join(marked.tape, texts)


def _first_marked(values: Iterable[Any]) -> Marked | None:
    for value in values:
        if isinstance(value, Marked):
            return value
    return None


class MarkedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers for marked strings."""

    code_generator_class = MarkedCode
    concat = staticmethod(_concat)  # type: ignore[assignment]

    @staticmethod
    def join_outputs(values: Iterable[Any]) -> str:
        return _concat([_text(value) for value in values])

    @staticmethod
    def contains(container: Any, item: Any) -> bool:
        if isinstance(item, Marked) and isinstance(container, str) and not isinstance(container, Marked):
            return bool(item.observed(plain(item) in container, is_part_of, container))
        return bool(item in container)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """A method of a plain string that is given marked ones is the marked method."""
        if type(getattr(obj, "__self__", None)) is str and args:
            items = args[0] if obj.__name__ == "join" and isinstance(args[0], list | tuple) else args
            marked = _first_marked(items)
            if marked is not None:
                obj = getattr(_as_marked(obj.__self__, marked.tape), obj.__name__)
                return obj(*args, **kwargs)
        return super().call(context, obj, *args, **kwargs)


def _as_marked(text: str, tape: Tape) -> Marked:
    return text if isinstance(text, Marked) else Marked.make(tape, text, atoms_of(tape, text))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


# Filters that read characters ----------------------------------------------------------------------------------------

_STAND_IN = re.compile(r"\\u0000leaf (\d+)\\u0000")  # as JSON spells it


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers' `tojson`; marked strings inside keep their origins.

    Every marked string is replaced by a stand-in, the whole is encoded by `json.dumps`, and the stand-ins are then
    replaced by the strings as JSON spells them.
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

    encoded = json.dumps(
        stand_in(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if not found:
        return encoded
    tape = found[0].tape
    texts: list[str] = []
    for index, part in enumerate(_STAND_IN.split(encoded)):
        texts += _json_bodies(found[int(part)], ensure_ascii) if index % 2 else [part]
    return join(tape, texts)


def _json_bodies(marked: Marked, ensure_ascii: bool) -> list[Marked]:
    """The string as JSON spells it between the quotes, atom by atom."""
    tape, bodies = marked.tape, []
    for atom, text in zip(marked.atoms, marked.pieces(), strict=True):
        body = json_body(text, ensure_ascii)
        ref = tape.step(json_body, atom.ref, tape.constant(ensure_ascii))
        bodies.append(Marked.make(tape, body, (Atom(len(body), atom.origin, ref),)))
    return bodies


def _join(context: nodes.EvalContext, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = list(value)
    if attribute is not None:
        items = [filters.make_attrgetter(context.environment, attribute)(item) for item in items]
    marked = _first_marked([d, *items])
    if marked is None:
        return filters.sync_do_join(context, items, d)
    return join(marked.tape, with_separator([_text(item) for item in items], d))


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if not isinstance(s, Marked):
        return filters.do_indent(s, width, first, blank)
    indention = width if isinstance(width, str) else " " * width
    lines = (s + "\n").splitlines()  # as Jinja's own: the added newline keeps a last empty line
    texts = [lines[0]]
    for line in lines[1:]:
        texts += ["\n", indention, line] if blank or line else ["\n", line]
    return join(s.tape, [indention, *texts] if first else texts)


def _replace(context: nodes.EvalContext, s: str, old: str, new: str, count: int | None = None) -> str:
    marked = _first_marked((s, old, new))
    if marked is None:
        return filters.do_replace(context, s, old, new, count)
    return str(_as_marked(s, marked.tape).replace(old, new, -1 if count is None else count))


def _trim(value: Any, chars: str | None = None) -> str:
    return _text(value).strip(chars)


def _length(value: Any) -> int:
    return MarkedLength.of(value) if isinstance(value, Marked) else len(value)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Marked) or jinja2.tests.test_sequence(value)


def _losing(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that would read marked strings without asking them gets plain ones, and the tape says so."""

    def call(*args: Any, **kwargs: Any) -> Any:
        marked = _first_marked((*args, *kwargs.values()))
        if marked is not None:
            marked.tape.exact, marked.tape.lost = False, True
            args = tuple(plain(a) if isinstance(a, Marked) else a for a in args)
        return function(*args, **kwargs)

    return functools.update_wrapper(call, function)  # with the mark by which Jinja knows that it wants its context


# These return their arguments, or items of one, without looking at characters.
_TRANSPARENT = """attr batch d default dictsort first groupby items last list map max min random reject rejectattr
reverse select selectattr slice sort sum unique"""

_FILTERS: Mapping[str, Callable[..., Any]] = {
    "capitalize": lambda value: _text(value).capitalize(),
    "count": _length,
    "indent": _indent,
    "join": jinja2.pass_eval_context(_join),
    "length": _length,
    "lower": lambda value: _text(value).lower(),
    "replace": jinja2.pass_eval_context(_replace),
    # Jinja's own makes text that escapes what is joined to it; where that shows, the render differs from the plain one.
    "safe": _text,
    "string": _text,
    "tojson": _tojson,
    "trim": _trim,
    "upper": lambda value: _text(value).upper(),
}


@lru_cache(maxsize=1)
def marked_environment() -> jinja2.Environment:
    environment = prepare(MarkedEnvironment(**SETTINGS))
    for name, function in list(environment.filters.items()):
        if name not in _TRANSPARENT.split():
            environment.filters[name] = _losing(function)
    environment.filters |= _FILTERS
    environment.tests["sequence"] = _is_sequence
    return environment


@lru_cache(maxsize=256)
def compiled_marked(text: str) -> jinja2.Template:
    return marked_environment().from_string(text)


@lru_cache(maxsize=256)
def compiled_one_pass(text: str, head_again: bool) -> jinja2.Template | None:
    """The template in its one-pass form for marked strings, where it has one."""
    return one_pass(marked_environment(), text, head_again)
