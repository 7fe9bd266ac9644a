"""The Jinja environment in which transformers renders chat templates, rebuilt with limits: same sandbox, same filters.

A chat template comes with a downloaded model and is a program. Jinja's sandbox keeps it from files and processes, not
from `range(99999)` inside itself, `'a' * 10**10` or `'{:2000000000}'.format(1)`. Operations that make much in one step
are measured before they run; what grows step by step meets the timer of `limits`.
"""

import atexit
import functools
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from types import BuiltinMethodType
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.compiler import CodeGenerator, Frame, optimizeconst
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from preceptor.errors import TemplateError

CHARACTERS = 2**27  # of a text, or items of a list, that an operation may make
_WIDTH = 100_000  # of a field, as in `'%9d'`
_BITS = 2**22  # of an integer
_WIDE_FIELD = r"%[^%a-zA-Z]*(?:\d{6}|\*)"
SETTINGS: Mapping[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}


# What one operation makes --------------------------------------------------------------------------------------------


def limited_join(texts: Iterable[str]) -> str:
    """`"".join`, for the output of a template."""
    texts = list(texts)
    _require(sum(map(len, texts)))
    return "".join(texts)


def check_binop(operator: str, left: Any, right: Any) -> None:
    """Raises RenderLimit for `*`, `**` and `%` that would make too much."""
    if operator == "*":
        for one, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(one, str | bytes | list | tuple):
                _require(len(one) * times)
        if isinstance(left, int) and isinstance(right, int):
            _require_bits(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _require_bits(left.bit_length() * right)
    elif operator == "%" and isinstance(left, str):
        _require_narrow(left, _WIDE_FIELD)


def _require(size: int) -> None:
    if size > CHARACTERS:
        raise RenderLimit(f"a text or list of {size:,} characters or items")


def _require_bits(bits: int) -> None:
    if bits > _BITS:
        raise RenderLimit(f"a number of {bits:,} bits")


def _require_narrow(form: str, wide: str) -> None:
    if re.search(wide, form):
        raise RenderLimit("a field of a text that is wider than 99,999 characters, or as wide as a value says")


def _width(_: Any, arguments: Sequence[Any]) -> None:
    if any(isinstance(argument, int) and argument > _WIDTH for argument in arguments):
        raise RenderLimit(f"a width of more than {_WIDTH:,}")


def _indent(text: Any, arguments: Sequence[Any]) -> None:
    _width(text, arguments)
    width = next((a if isinstance(a, int) else len(a) for a in arguments[:1] if isinstance(a, int | str)), 4)
    _require(_length(text) + width * (str(text).count("\n") + 1))


def _replace(text: Any, arguments: Sequence[Any]) -> None:
    if len(arguments) > 1 and isinstance(text, str | bytes) and type(arguments[0]) is type(arguments[1]):
        old, new = arguments[:2]
        if len(new) > len(old) and len(text) * (len(new) + 1) > CHARACTERS:
            _require(len(text) + str.count(str(text), str(old)) * (len(new) - len(old)))


def _join(text: Any, arguments: Sequence[Any]) -> None:
    items = arguments[0] if arguments else ()
    if isinstance(items, Sequence):
        _require(len(items) * _length(text) + sum(_length(item) for item in items))


def _translate(text: Any, arguments: Sequence[Any]) -> None:
    table = arguments[0] if arguments else None
    if isinstance(table, Mapping):
        _require(_length(text) * max((_length(value) for value in table.values()), default=1))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes) else 0


_GrowthCheck = Callable[[Any, Sequence[Any]], None]  # of what is changed, and of the arguments
_GROWING_METHODS: Mapping[str, _GrowthCheck] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"), _width),
    "replace": _replace,
    "join": _join,
    "translate": _translate,
}
_GROWING_FILTERS: Mapping[str, _GrowthCheck] = {
    **dict.fromkeys(("center", "batch", "slice", "tojson", "wordwrap"), _width),
    "format": lambda form, _: _require_narrow(str(form), _WIDE_FIELD),
    "indent": _indent,
    "replace": _replace,
    "join": lambda items, arguments: _join(arguments[0] if arguments else "", (items,)),
}


# The sandbox ---------------------------------------------------------------------------------------------------------


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` renders its body: the marks of others are not what is trained here.

    As in transformers it is the call of a block: a macro of its own, with its own `caller`, `varargs` and `kwargs`.
    """

    tags = {"generation"}  # noqa: RUF012 (the name and type are Jinja's)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body, lineno=line)

    def _body(self, caller: Any) -> Any:
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
        if (name in _OF_LOOP and of_loop) or name in _OF_STR:
            kind = "LoopContext" if name in _OF_LOOP and of_loop else "str"
            self._read(node.node, frame, f"of.{name}", kind, f"getattr(of, {name!r})")
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
    concat = staticmethod(limited_join)  # type: ignore[assignment]
    intercepted_binops = frozenset(("*", "**", "%"))
    _is_safe: ClassVar[dict[tuple[type, str], bool]] = {}

    @staticmethod
    def join_outputs(values: Iterable[Any]) -> str:
        return limited_join(map(str, values))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        check = _GROWING_METHODS.get(getattr(obj, "__name__", ""))
        if check is None and type(obj) is BuiltinMethodType and type(obj.__self__) is str:
            for name in _OF_CALLS:
                kwargs.pop(name, None)
            return obj(*args, **kwargs)  # `format` is not met here: it has been replaced where it was read
        if check is not None and isinstance(getattr(obj, "__self__", None), str | bytes | int):
            check(obj.__self__, (*args, *kwargs.values()))
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        guarded = super().wrap_str_format(value)
        if guarded is not None:
            _require_narrow(value.__self__, r"\{[^{}]*(?:\d{6}|:[^{}]*\{)")  # or whose width another field gives
        return guarded

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        key = kind, _ = type(obj), attr
        if key not in self._is_safe:
            # What a type of this package is besides; of `dict` as templates have it, what it shows.
            others = [base for base in kind.__mro__ if base is PlainDict or not (base is object or _is_ours(base))]
            shown = not _is_ours(kind) or any(hasattr(base, attr) for base in others)
            self._is_safe[key] = shown and super().is_safe_attribute(obj, attr, value)
        return self._is_safe[key]

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        if _is_ours(type(obj)) and not attribute.startswith("_"):
            return self.undefined(obj=obj, name=attribute)  # as of a plain string
        return super().unsafe_undefined(obj, attribute)


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith("preceptor.")


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


@dataclass(frozen=True)
class FixedClock:
    """`strftime_now` of a template, always at one time."""

    date: datetime

    def __call__(self, form: str) -> str:
        return self.date.strftime(form)


def _strftime_now(form: str) -> str:
    _require_narrow(form, r"\d{4}")
    return datetime.now().strftime(form)


def prepare(environment: jinja2.Environment, filters: Mapping[str, Any]) -> jinja2.Environment:
    """Give a sandboxed environment the tag, globals and filters of transformers, but for those that are given here."""
    environment.add_extension(GenerationTag)
    environment.add_extension(jinja2.ext.loopcontrols)
    environment.filters |= {"tojson": _tojson, **filters}
    for name, check in _GROWING_FILTERS.items():
        environment.filters[name] = _guarded(environment.filters[name], check)
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "dict": PlainDict()}
    return environment


@lru_cache(maxsize=1)
def plain_environment() -> jinja2.Environment:
    return prepare(Sandbox(**SETTINGS), {})


@lru_cache(maxsize=256)
def compiled(text: str) -> jinja2.Template:
    """The template, compiled once. Raises jinja2.TemplateSyntaxError."""
    return plain_environment().from_string(text)


def rendered(text: str, variables: dict[str, Any]) -> str:
    """The template rendered; as `jinja2.Template.render`, which goes through all globals twice for each text."""
    template = compiled(text)
    globals_ = template.environment.globals
    context = Context(template.environment, {**globals_, **variables}, template.name, template.blocks)
    return limited_join(template.root_render_func(context))


def _guarded(function: Callable[..., Any], check: _GrowthCheck) -> Callable[..., Any]:
    num_given = 0 if getattr(function, "jinja_pass_arg", None) is None else 1  # by Jinja: its context, say

    def call(*args: Any, **kwargs: Any) -> Any:
        check(args[num_given], (*args[num_given + 1 :], *kwargs.values()))
        return function(*args, **kwargs)

    return functools.update_wrapper(call, function)  # with the mark by which Jinja knows what it wants


def parsed(text: str) -> jinja2.nodes.Template:
    return plain_environment().parse(text)


try:
    import resource
except ImportError:  # Windows has neither this nor the timer
    resource = None  # type: ignore[assignment]

# Time and memory of a render ------------------------------------------------------------------------------------------

SECONDS = 10.0  # of the processor, for one render
MEMORY_BYTES = 2**30  # by which a render may make the process grow
_TICK_SECONDS = 0.1
_MAIN_THREAD = threading.main_thread().ident


class RenderLimit(BaseException):
    """A template went beyond a limit. No Exception, since tests of Jinja's (`is sequence`) take those for an answer."""


def fatal_template_error(message: str) -> TemplateError:
    """No example may be trained with this template."""
    error = TemplateError(message)
    error.is_fatal = True
    return error


class Limits:
    """`with limits(name):` around a run of a template; RenderLimit becomes a fatal TemplateError.

    A timer of the process's own time fires every tenth of a second while templates run. One that is met in
    the same run for SECONDS, or whose process has grown by MEMORY_BYTES, is stopped. In a thread that is not the main
    one, and where another program uses the timer, there is no limit of time.
    """

    def __init__(self) -> None:
        self._name = ""
        self._num_runs = 0  # that have begun
        self._inside = self._armed = self._mine = False
        self._seen = (0, 0, 0)  # by the timer: the number of a run, how often it was met, memory at first
        if hasattr(os, "register_at_fork"):  # a process that was forked has no timer
            os.register_at_fork(after_in_child=lambda: setattr(self, "_armed", False))

    def __call__(self, name: str) -> "Limits":
        self._name = name
        return self

    def __enter__(self) -> None:
        if threading.get_ident() == _MAIN_THREAD:
            self._num_runs += 1
            self._inside = True
            if not self._armed:
                self._arm()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._inside = False
        if isinstance(error, RenderLimit):
            raise fatal_template_error(f"template {self._name}: {error}; choose another template") from None

    def _arm(self) -> None:
        if not self._mine:
            if not hasattr(signal, "setitimer") or signal.getsignal(signal.SIGPROF) != signal.SIG_DFL:
                return
            signal.signal(signal.SIGPROF, self._tick)
            atexit.register(self._stop)  # Python gives signals back when it ends, and this one would end it at once
            self._mine = True
        signal.setitimer(signal.ITIMER_PROF, _TICK_SECONDS, _TICK_SECONDS)
        self._armed = True

    def _stop(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        self._armed = False

    def _tick(self, *_: Any) -> None:
        if not self._inside:
            self._stop()
            return
        number, times, memory = self._seen
        if number != self._num_runs:
            times, memory = 0, _peak_bytes()
        self._seen = self._num_runs, times + 1, memory
        if (times + 1) * _TICK_SECONDS > SECONDS:
            raise RenderLimit(f"a render took more than {SECONDS:g} s")
        if _peak_bytes() - memory > MEMORY_BYTES:
            raise RenderLimit(f"a render took more than {MEMORY_BYTES / 2**30:.0f} GB of memory")


limits = Limits()


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024
