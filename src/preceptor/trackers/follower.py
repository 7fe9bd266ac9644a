"""A process beside a training run that sends what its folder records to trackers, as it comes.

It reads files only, so that nothing of a tracker can slow or end the training; and it ends when the training's end of a
pipe is closed, however the training ends.
"""

import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from preceptor.errors import CheckpointError, command
from preceptor.trackers.replay import RunReplay, alone

_EVERY_SECONDS = 5.0
_LONGEST_WAIT = 120.0  # seconds for the rest, when the training is over


@contextmanager
def followed(
    trackers: Sequence[str], folder: Path, say: Callable[[str], None], *, begins: bool = True
) -> Iterator[None]:
    """While the block lasts, what the run in `folder` records is sent to `trackers`; the rest of it at its end.

    To be entered by one process of a run, after its data is rendered. begins: a run begins or goes on inside; what the
    folder holds before belongs to an earlier one until then. No error of a tracker is raised.
    """
    if not trackers:
        yield
        return
    since = ["--since", str(changed_at(folder))] if begins else []
    to = [word for name in trackers for word in ("--to", name)]
    words = [sys.executable, "-m", "preceptor", "track", str(folder), *to, "--follow", *since]
    # a session of its own: Ctrl-C stops the training, and then this one sends the rest
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    assert process.stdin is not None
    try:
        yield
    finally:
        process.stdin.close()
        try:
            process.wait(_LONGEST_WAIT)
        except subprocess.TimeoutExpired:
            say(f"the trackers are still being sent to; if that ends early: {command('track', folder)}")


def changed_at(folder: Path) -> int:
    """When the record of the run in a folder was written, in nanoseconds; 0 where there is none."""
    try:
        return (folder / "environment.json").stat().st_mtime_ns
    except OSError:
        return 0


def follow(
    folder: Path, trackers: Sequence[str], since: int | None, stream: TextIO, say: Callable[[str], None]
) -> bool:
    """Send until `stream` ends, and then the rest. Whether all of it was sent. since: as `changed_at`, of before."""
    ended = False
    while since is not None and changed_at(folder) == since:
        if ended:
            return True  # no run began
        ended = _ends(stream)
    with alone(folder):
        replays = {name: RunReplay(folder, name) for name in trackers}
        told: set[str] = set()
        while not _ends(stream):
            for name, replay in list(replays.items()):
                if (error := _tried(replay.send)) is not None:
                    replays[name] = RunReplay(folder, name)  # it is opened again, and goes on with what is not sent
                    if name not in told:
                        say(f"{name}: {error}; tried again while the run lasts")
                        told.add(name)
        return _end(replays, folder, say)


def send_all(folder: Path, trackers: Sequence[str], say: Callable[[str], None]) -> bool:
    """Send all that a run has recorded and that is not sent yet. Whether all of it was sent."""
    with alone(folder):
        return _end({name: RunReplay(folder, name) for name in trackers}, folder, say)


def _end(replays: dict[str, RunReplay], folder: Path, say: Callable[[str], None]) -> bool:
    good = True
    for name, replay in replays.items():
        error = _tried(replay.end)
        if error is None:
            counts = f"{replay.num_steps:,} steps and {replay.num_evaluations:,} evaluations sent"
            say(f"{name}: {counts}{f'; look at it: {replay.where}' if replay.where else ''}")
        else:
            say(f"{name}: {error}; nothing is lost, this sends the rest: {command('track', folder, '--to', name)}")
            good = False
    return good


def _tried(action: Callable[[], None]) -> str | None:
    """What went wrong, in a line. Whatever a tracker raises is no reason to end."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}{f': {first}' if first else ''}"
    return None


def _ends(stream: TextIO) -> bool:
    """Waits; whether the stream has ended."""
    ready, _, _ = select.select([stream], [], [], _EVERY_SECONDS)
    return bool(ready) and stream.read(1) == ""
