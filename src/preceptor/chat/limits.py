"""Limits of a render: time and memory.

A chat template comes with a downloaded model and is a program. Jinja's sandbox keeps it from files and processes, not
from `range(99999)` inside itself, `'a' * 10**10` or `'{:2000000000}'.format(1)`. Operations that make much in one step
are measured before they run (environment.py); what grows step by step meets the timer of `limits`.
"""

import atexit
import os
import signal
import threading
from typing import Any

from preceptor.errors import TemplateError

try:
    import resource
except ImportError:  # Windows has neither this nor the timer
    resource = None  # type: ignore[assignment]

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
