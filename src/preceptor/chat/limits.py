"""Limits of a render: time, memory, and the size of what one operation makes.

A chat template comes with a downloaded model and is a program. Jinja's sandbox keeps it from files and processes, not
from `range(99999)` inside itself, `'a' * 10**10` or `'{:2000000000}'.format(1)`. Operations that make much in one step
are measured before they run (`call_binop`, `check_call`); what grows step by step meets the timer of `limits`.
"""

import atexit
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from preceptor.errors import TemplateError

try:
    import resource
except ImportError:  # Windows has neither this nor the timer
    resource = None  # type: ignore[assignment]

SECONDS = 10.0  # of the processor, for one render
MEMORY_BYTES = 2**30  # by which a render may make the process grow
CHARACTERS = 2**27  # of a text, or items of a list, that an operation may make
_WIDTH = 100_000  # of a field, as in `'%9d'`
_BITS = 2**22  # of an integer
_TICK_SECONDS = 0.1
_MAIN_THREAD = threading.main_thread().ident


class RenderLimit(BaseException):
    """A template went beyond a limit. No Exception, since tests of Jinja's (`is sequence`) take those for an answer."""


def condemned(message: str) -> TemplateError:
    """The error of a template with which nothing may be trained, whatever the example."""
    error = TemplateError(message)
    error.condemns = True
    return error


class Limits:
    """`with limits(name):` around a run of a template; RenderLimit becomes a TemplateError that condemns it.

    A timer of the process's own time fires every tenth of a second while templates run. One that is met in
    the same run for SECONDS, or whose process has grown by MEMORY_BYTES, is stopped. In a thread that is not the main
    one, and where another program uses the timer, there is no limit of time.
    """

    def __init__(self) -> None:
        self._name = ""
        self._num_runs = 0  # that have begun
        self._inside = self._armed = self._mine = False
        self._seen = (0, 0, 0)  # by the timer: the number of a run, how often it was met, memory at first
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._disarmed)

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
            raise condemned(f"template {self._name}: {error}; choose another template") from None

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

    def _disarmed(self) -> None:
        self._armed = False  # a process that was forked has no timer

    def _tick(self, *_: Any) -> None:
        if not self._inside:
            self._stop()
            return
        number, times, memory = self._seen
        if number != self._num_runs:
            self._seen = self._num_runs, 1, _peak_bytes()
            return
        self._seen = number, times + 1, memory
        if (times + 1) * _TICK_SECONDS > SECONDS:
            raise RenderLimit(f"a render took more than {SECONDS:g} s")
        if _peak_bytes() - memory > MEMORY_BYTES:
            raise RenderLimit(f"a render took more than {MEMORY_BYTES / 2**30:.0f} GB of memory")


limits = Limits()


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


# What one operation makes --------------------------------------------------------------------------------------------


def joined(texts: Iterable[str]) -> str:
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
        _require_narrow(left, r"%[^%a-zA-Z]*(?:\d{6}|\*)")


def check_format(form: str) -> None:
    """Raises RenderLimit for a field of `str.format` that is too wide, or whose width another field gives."""
    _require_narrow(form, r"\{[^{}]*(?:\d{6}|:[^{}]*\{)")


def check_date_format(form: str) -> None:
    """Raises RenderLimit for a field of `strftime` that is too wide."""
    _require_narrow(form, r"\d{4}")


def check_call(name: str, text: Any, arguments: Sequence[Any]) -> None:
    """Raises RenderLimit for a method of a text, or a filter on it, that would make too much."""
    _GROWING[name](text, arguments)


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


def _join_filter(items: Any, arguments: Sequence[Any]) -> None:
    _join(arguments[0] if arguments else "", (items,))


def _translate(text: Any, arguments: Sequence[Any]) -> None:
    table = arguments[0] if arguments else None
    if isinstance(table, Mapping):
        _require(_length(text) * max((_length(value) for value in table.values()), default=1))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes) else 0


_GROWING: Mapping[str, Callable[[Any, Sequence[Any]], None]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"), _width),
    "replace": _replace,
    "join": _join,
    "translate": _translate,
}
GROWING_METHODS = frozenset(_GROWING)
GROWING_FILTERS: Mapping[str, Callable[[Any, Sequence[Any]], None]] = {
    **dict.fromkeys(("center", "batch", "slice", "tojson", "wordwrap"), _width),
    "format": lambda form, _: _require_narrow(str(form), r"%[^%a-zA-Z]*(?:\d{6}|\*)"),
    "indent": _indent,
    "replace": _replace,
    "join": _join_filter,
}
