"""Requests to stop or save a run: by a signal, or by a file STOP or SAVE in its folder.

A run that is told to stop finishes its step, saves and ends with `EXIT_CODE`; a second signal ends it at once.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from preceptor.train.run_folder import SAVE_FILE, STOP_FILE
from preceptor.world import ONE, World

EXIT_CODE = 75  # sysexits.h: EX_TEMPFAIL, "the user is invited to retry"
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SignalHandler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None  # of a signal, as Python has them
_FILE = -1  # instead of a signal's number
_SAME_SECONDS = 5.0  # in which a scheduler and a launcher may tell one of several processes the same


class Stopped(BaseException):
    """The run was told to stop. Not an error: no `except Exception` may catch it.

    number: of the signal; -1: by the file. step: how many steps have been taken and saved; None: none has, because the
    training had not begun.
    """

    def __init__(self, number: int, step: int | None = None) -> None:
        super().__init__(number, step)
        self.number, self.step = number, step

    def __str__(self) -> str:
        return f"stopped by {'the file STOP' if self.number == _FILE else signal.Signals(self.number).name}"


class StopRequest:
    """Whether the run has been told to stop, or to save.

    Before the training, and inside `at_once` (where nothing is changed that must be saved), the first signal raises
    Stopped where the program is; else it is kept in `number`, for the loop to look at after each step. What one of
    several ranks was told, `after_step` makes known to all, and none acts on it before: a signal may reach one of them
    when the others have looked. folder: where the files are looked for. listened: the signals, each with the handler
    that it has after the first one.
    """

    def __init__(self, listened: Mapping[int, SignalHandler] | None = None) -> None:
        self.number: int | None = None
        self._known_to_all: int | None = None
        self.folder: Path | None = None
        self._world = ONE
        self._listened = listened or {}
        self._raises = True
        self._process = os.getpid()
        self._told: float | None = None  # when this process itself got its first signal

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        before, self._told = self._told, self._told or time.monotonic()
        if before is not None and self._world.size > 1 and time.monotonic() - before < _SAME_SECONDS:
            return
        if before is not None or self._world.size == 1:
            for each, handler in self._listened.items():
                signal.signal(each, handler)
        if before is not None:  # a second one, after handlers were kept for the first
            os.kill(os.getpid(), number)
        if os.getpid() != self._process:  # forked to render data: nothing to save
            os.kill(os.getpid(), number)
        told_before, self.number = self.number is not None, self.number or number  # by another rank, or by the file
        if self._raises and not told_before:
            raise Stopped(number)
        name = signal.Signals(number).name
        if self._world.is_first:
            _write(f"{name}: the run finishes this step and saves it, then ends; a second signal ends it at once\n")

    @contextmanager
    def while_training(self, folder: Path, world: World = ONE) -> Iterator[None]:
        """Inside, a signal is kept until the loop looks."""
        self._raises, self.folder, self._world = False, folder, world
        try:
            yield
        finally:
            self._raises = True

    def after_step(self, clocks: Sequence[bool] = ()) -> list[bool]:
        """What all ranks know after a step: whether to save at once; and of `clocks` what the first rank's say.

        A request to stop is known to all ranks then.
        """
        first = self._world.is_first
        asked = [first and self._asks(SAVE_FILE), *(first and due for due in clocks)]
        number = self.number or 0
        if not number and first and self._asks(STOP_FILE):
            number = _FILE
        # 1 for the file, twice a signal's number: the largest of all ranks counts
        told, *known = self._world.max(1 if number == _FILE else 2 * number, *asked)
        if told:
            self.number = self._known_to_all = _FILE if told == 1 else int(told) // 2
        return [bool(value) for value in known]

    def _asks(self, name: str) -> bool:
        return self.folder is not None and (self.folder / name).exists()

    def answered(self, name: str = SAVE_FILE) -> None:
        """Remove the file that asked, since what it asked for is done."""
        if self.folder is not None and self._world.is_first:
            with suppress(OSError):
                (self.folder / name).unlink()

    def check(self) -> None:
        """Raises Stopped where the run has been told to stop; of several ranks, on all or on none."""
        number = self.number if self._world.size == 1 else self._known_to_all
        if number is not None:
            raise Stopped(number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises Stopped, also one that has come already; of several ranks, none may leave alone."""
        if self._world.size > 1:
            yield
            return
        self.check()
        before, self._raises = self._raises, True
        try:
            yield
        finally:
            self._raises = before


@contextmanager
def stop_on_signals(of_program: bool = False) -> Iterator[StopRequest]:
    """Listen to SIGINT, SIGTERM, SIGHUP and SIGUSR1, but to none that is ignored already (`nohup`, a background job).

    A second signal ends the process; of_program: it meets the handler of the program that called, so that a second
    Ctrl-C raises KeyboardInterrupt and a notebook's process lives on. Only the main thread can: elsewhere nothing is
    changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return
    before = {number: signal.getsignal(number) for number in _STOPPING}
    listened = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    request = StopRequest({number: before[number] if of_program else signal.SIG_DFL for number in listened})
    for number in listened:
        signal.signal(number, request.receive)
    try:
        yield request
    finally:
        for number in listened:
            signal.signal(number, before[number])


def _write(text: str) -> None:
    """A print may be under way that holds the display's lock; a terminal that is gone is no reason to fail."""
    with suppress(OSError):
        os.write(2, text.encode())
