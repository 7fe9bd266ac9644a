"""Signals that stop a run: the first lets it finish its step and save, the second ends it at once."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """The run was told to stop. Not an error: no `except Exception` may catch it.

    step: how many steps have been taken and saved; None: none has, because the training had not begun.
    """

    def __init__(self, number: int, step: int | None = None) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.step = number, step

    @property
    def exit_code(self) -> int:
        return 128 + self.number


class StopRequest:
    """Whether a signal has told the run to stop.

    Before the training, and inside `at_once` (where nothing is changed that must be saved), the first signal raises
    Stopped where the program is; else it is kept in `number`, for the loop to look at after each step.
    """

    def __init__(self, listened: Sequence[int] = ()) -> None:
        self.number: int | None = None
        self._listened = listened
        self._raises = True
        self._process = os.getpid()

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        for each in self._listened:
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() != self._process:  # forked to render data: nothing to save
            os.kill(os.getpid(), number)
        self.number = number
        if self._raises:
            raise Stopped(number)
        name = signal.Signals(number).name
        _write(f"{name}: the run finishes this step and saves it, then ends; a second signal ends it at once\n")

    @contextmanager
    def after_step(self) -> Iterator[None]:
        """Inside, a signal is kept until the loop looks."""
        self._raises = False
        try:
            yield
        finally:
            self._raises = True

    def check(self) -> None:
        """Raises Stopped where a signal has come."""
        if self.number is not None:
            raise Stopped(self.number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises Stopped, also one that has come already."""
        self.check()
        before, self._raises = self._raises, True
        try:
            yield
        finally:
            self._raises = before


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Listen to SIGINT, SIGTERM and SIGHUP, but to none that is ignored already (`nohup`, a shell's background).

    Only the main thread can: elsewhere nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return
    before = {number: signal.getsignal(number) for number in _STOPPING}
    listened = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    request = StopRequest(listened)
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
