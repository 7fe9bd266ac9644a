"""Forked processes: runs of the command that are killed, or whose disk fills up, at a chosen file operation."""

import errno
import json
import os
import random
import resource
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

TORTURE = int(os.environ.get("PRECEPTOR_TORTURE", "0"))  # how many times more than in the fast suite, where not 0

_OPERATIONS = ("open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir", "os.truncate")


class Killed(BaseException):
    """What ends a run in this process as a kill does: nothing catches it."""


@contextmanager
def killed_at_step(step):
    """Inside, a run is killed when it is about to take the step after `step`, and the block must end so."""
    from preceptor.train import loop

    take_step = loop.take_step

    def take(state, *arguments):
        if state.step == step:
            raise Killed
        return take_step(state, *arguments)

    loop.take_step = take
    try:
        yield
    except Killed:
        return
    finally:
        loop.take_step = take_step
    raise AssertionError(f"the run was not killed at step {step}")


@dataclass(frozen=True)
class Ended:
    """code: exit code, or minus the signal that ended it. num_operations: those on files of the folder. place: the file
    of the folder at which something was done to it. seconds: how long it took."""

    code: int
    shown: str
    num_operations: int
    place: str
    seconds: float


def command(
    *arguments, folder, kill_at=None, full_at=None, fails_at=None, read_only_at=None, signals=(), kill_after=None
):
    """`preceptor ARGUMENTS` in a child, with nothing imported again.

    At its n-th operation on a file of `folder` it is killed (kill_at), or finds that no file can grow any more
    (full_at), that this one operation fails for want of room (fails_at), or that the folder has become read-only
    (read_only_at). signals: it receives a signal at the n-th operation on a file of this name: (name, n, signal),
    several times. kill_after: it is killed after so many seconds.
    """
    reader, writer = os.pipe()
    started = time.monotonic()
    counter = Path(folder).with_suffix(".count")
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.close(reader)
            code = _in_child(
                arguments, writer, Path(folder), counter, (kill_at, full_at, fails_at, read_only_at, signals)
            )
        finally:
            os._exit(code)
    os.close(writer)
    with _killed_after(pid, kill_after), os.fdopen(reader, errors="replace") as output:
        shown = output.read()
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its pid is nobody else's yet
    _, status = os.waitpid(pid, 0)
    counted, _, place = (counter.read_text() if counter.exists() else "0").partition(" ")
    counter.unlink(missing_ok=True)
    return Ended(os.waitstatus_to_exitcode(status), shown, int(counted), place, time.monotonic() - started)


def program(file, *arguments):
    """`python FILE ARGUMENTS` in a child, with nothing imported again: (exit code, standard output, standard error)."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if not pid:
            code = 70
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
                sys.argv = [str(file), *map(str, arguments)]
                sys.path.insert(0, str(Path(file).parent))
                code = exit_code_of(lambda: runpy.run_path(str(file), run_name="__main__"))
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        shown = []
        for each in (output, errors):
            each.seek(0)
            shown.append(each.read().decode(errors="replace"))
    return code, *shown


def exit_code_of(work):
    """Of a process that does `work`, with all that it prints written."""
    code = 0
    try:
        work()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


@contextmanager
def _killed_after(pid, seconds):
    """Inside, a child that is not waited for is killed after so many seconds; None: it is not."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _in_child(arguments, writer, folder, counter, moments):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    watch = _Watch(folder, counter, *moments)
    sys.addaudithook(watch)
    from preceptor import cli

    sys.argv = ["preceptor", *map(str, arguments)]
    code = exit_code_of(cli.main)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    counter.write_text(f"{watch.num} {watch.place}")
    return code


class _Watch:
    """An audit hook: counts operations on files, and does at one of them what is asked."""

    def __init__(self, folder, counter, kill_at, full_at, fails_at, read_only_at, signals):
        self.num, self.place, self._of_name, self._own = 0, "", Counter(), os.getpid()
        self._folder, self._counter = str(folder), str(counter)
        self._kill_at, self._full_at, self._fails_at = kill_at, full_at, fails_at
        self._read_only_at, self._signals = read_only_at, signals

    def __call__(self, event, values):
        if event not in _OPERATIONS or os.getpid() != self._own or not isinstance(values[0], str | os.PathLike):
            return
        path = str(values[0])
        if path == self._counter:
            return
        own_name = Path(path).name
        self._of_name[own_name] += 1
        for name, number, sent in self._signals:
            if own_name == name and self._of_name[name] == number:
                os.kill(self._own, sent)
        if path.startswith(self._folder):
            writes = event != "open" or bool(values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            self._operation(path, writes)

    def _operation(self, path, writes):
        self.num += 1
        if self.num in (self._kill_at, self._full_at, self._fails_at, self._read_only_at):
            self.place = path.removeprefix(self._folder)
        if self.num == self._kill_at:
            Path(self._counter).write_text(f"{self.num} {self.place}")
            os.kill(self._own, signal.SIGKILL)
        if writes and self._read_only_at is not None and self.num >= self._read_only_at:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        if self.num == self._full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        if self.num == self._fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def result_of(folder):
    """All that a run must leave the same, however often it was stopped: without times, dates and ids."""
    timed = ("seconds", "peak_memory_bytes")
    names = ["metrics", "eval", "samples", "rejections", "examples"]
    if (folder / "windows.jsonl").exists():
        names.append("windows")
    logs = {
        name: [
            {key: value for key, value in json.loads(line).items() if key not in timed}
            for line in (folder / f"{name}.jsonl").read_text().splitlines()
        ]
        for name in names
    }
    summary = json.loads((folder / "summary.json").read_text())
    kept = {key: value for key, value in summary.items() if "seconds" not in key and "memory" not in key}
    model = {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "model").rglob("*"))
        if path.is_file()
    }
    names = sorted(path.name for path in folder.iterdir())
    checkpoints = sorted(path.name for path in (folder / "checkpoints").glob("*"))
    return {"logs": logs, "summary": kept, "model": model, "names": names, "checkpoints": checkpoints}


def moments(total, num, seed=0):
    """So many of the numbers 1 to `total`, spread over all of them; in the long form as many times more."""
    num *= max(1, TORTURE)
    if num >= total:
        return list(range(1, total + 1))
    drawn = random.Random(seed)
    width = total / num
    return sorted({1 + int(width * at + drawn.random() * width) for at in range(num)} & set(range(1, total + 1)))
