"""The Jinja environment in which transformers renders chat templates, rebuilt: same sandbox, filters and globals."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.compiler import CodeGenerator, Frame, optimizeconst
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from preceptor.chat.limits import (
    GROWING_FILTERS,
    GROWING_METHODS,
    check_binop,
    check_call,
    check_date_format,
    check_format,
    joined,
)

SETTINGS: Mapping[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` renders its body: the marks of others are not what is trained here."""

    tags = {"generation"}  # noqa: RUF012 (the name and type are Jinja's)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_render_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(lineno)

    def _render_body(self, caller: Any) -> Any:
        return caller()


_OF_DICT = frozenset(dir(dict))
_OF_STR = frozenset(name for name in dir(str) if not name.startswith("_")) - {"format", "format_map"}
_OF_LOOP = frozenset(("index", "index0", "first", "last", "length", "revindex", "revindex0"))
_OF_CALLS = ("_loop_vars", "_block_vars")  # what Jinja's code hands on with every call


class Code(CodeGenerator):
    """Jinja's compiler, with `~` as a call of the environment, and without a call for what templates read most: keys of
    plain objects, methods of plain strings (but for those of which the sandbox gives its own), the state of a loop."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_outputs((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    @optimizeconst
    def visit_Getattr(self, node: jinja2.nodes.Getattr, frame: Frame) -> None:
        name, of_loop = node.attr, isinstance(node.node, jinja2.nodes.Name) and node.node.name == "loop"
        if name in _OF_LOOP and of_loop:
            self._read(node.node, frame, f"of.{name}", "LoopContext", f"getattr(of, {name!r})")
        elif name in _OF_STR:
            self._read(node.node, frame, f"of.{name}", "str", f"getattr(of, {name!r})")
        elif name not in _OF_DICT:
            self._read(node.node, frame, _item(name), "dict", f"getattr(of, {name!r})")
        else:
            super().visit_Getattr(node, frame)

    @optimizeconst
    def visit_Getitem(self, node: jinja2.nodes.Getitem, frame: Frame) -> None:
        key = node.arg.value if isinstance(node.arg, jinja2.nodes.Const) else None
        if isinstance(key, str) and key not in _OF_DICT:
            self._read(node.node, frame, _item(key), "dict", f"getitem(of, {key!r})")
        else:
            super().visit_Getitem(node, frame)

    def _read(self, node: jinja2.nodes.Expr, frame: Frame, value: str, kind: str, otherwise: str) -> None:
        self.write(f"({value} if type(of := ")
        self.visit(node, frame)
        self.write(f") is {kind} else environment.{otherwise})")


def _item(key: str) -> str:
    return f"(of[{key!r}] if {key!r} in of else undefined(obj=of, name={key!r}))"


class Sandbox(ImmutableSandboxedEnvironment):
    """transformers' sandbox, with limits on what an operation makes, in which objects of this package show nothing
    that a string or list has not."""

    code_generator_class = Code
    concat = staticmethod(joined)  # type: ignore[assignment]
    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_safe: dict[tuple[type, str], bool] = {}

    @staticmethod
    def join_outputs(values: Iterable[Any]) -> str:
        return joined(map(str, values))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if type(obj) is BuiltinMethodType and type(obj.__self__) is str and obj.__name__ not in GROWING_METHODS:
            for name in _OF_CALLS:
                kwargs.pop(name, None)
            return obj(*args, **kwargs)  # `format` is not met here: it has been replaced where it was read
        if getattr(obj, "__name__", None) in GROWING_METHODS and isinstance(
            getattr(obj, "__self__", None), str | bytes | int
        ):
            check_call(obj.__name__, obj.__self__, (*args, *kwargs.values()))
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        guarded = super().wrap_str_format(value)
        if guarded is not None:
            check_format(value.__self__)
        return guarded

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        key = type(obj), attr
        if key not in self._is_safe:
            shown = not _is_ours(type(obj)) or any(hasattr(kind, attr) for kind in _others(type(obj)))
            self._is_safe[key] = shown and super().is_safe_attribute(obj, attr, value)
        return self._is_safe[key]

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        if _is_ours(type(obj)) and not attribute.startswith("_"):
            return self.undefined(obj=obj, name=attribute)  # as of a plain string
        return super().unsafe_undefined(obj, attribute)


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith("preceptor.")


def _others(kind: type) -> list[type]:
    """What a type of this package is besides; of `dict` as templates have it, what it shows."""
    if kind is PlainDict:
        return [kind]
    return [base for base in kind.__mro__ if base is not object and not _is_ours(base)]


class PlainDict:
    """`dict` as templates may use it: to build one, without the type's own attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class FixedClock:
    """`strftime_now` of a template, always at one time."""

    def __init__(self, date: datetime) -> None:
        self.date = date

    def __call__(self, form: str) -> str:
        return self.date.strftime(form)


def _strftime_now(form: str) -> str:
    check_date_format(form)
    return datetime.now().strftime(form)


def prepare(environment: jinja2.Environment) -> jinja2.Environment:
    """Give a sandboxed environment the tag, filters and globals that transformers gives its own."""
    environment.add_extension(GenerationTag)
    environment.add_extension(jinja2.ext.loopcontrols)
    environment.filters["tojson"] = _tojson
    guard_filters(environment.filters)
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": PlainDict(),
    }
    return environment


@lru_cache(maxsize=1)
def plain_environment() -> jinja2.Environment:
    return prepare(Sandbox(**SETTINGS))


@lru_cache(maxsize=256)
def compiled(text: str) -> jinja2.Template:
    """The template, compiled once. Raises jinja2.TemplateSyntaxError."""
    return plain_environment().from_string(text)


def rendered(text: str, variables: dict[str, Any]) -> str:
    """The template rendered; as `jinja2.Template.render`, which goes through all globals twice for each text."""
    template = compiled(text)
    context = Context(template.environment, {**_globals(), **variables}, template.name, template.blocks)
    try:
        return joined(template.root_render_func(context))
    except Exception:
        template.environment.handle_exception()


@lru_cache(maxsize=1)
def _globals() -> dict[str, Any]:
    return dict(plain_environment().globals)


def guard_filters(filters: dict[str, Any]) -> None:
    """Put the checks of `limits` before the filters that need them."""
    for name, check in GROWING_FILTERS.items():
        filters[name] = _guarded(filters[name], check)


def _guarded(function: Callable[..., Any], check: Callable[[Any, Sequence[Any]], None]) -> Callable[..., Any]:
    num_given = 0 if getattr(function, "jinja_pass_arg", None) is None else 1  # by Jinja: its context, say

    def call(*args: Any, **kwargs: Any) -> Any:
        check(args[num_given], (*args[num_given + 1 :], *kwargs.values()))
        return function(*args, **kwargs)

    return functools.update_wrapper(call, function)  # with the mark by which Jinja knows what it wants


def parsed(text: str) -> jinja2.nodes.Template:
    return plain_environment().parse(text)
