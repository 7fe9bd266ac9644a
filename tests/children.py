"""Runs of the command in forked processes that are killed, or whose disk fills up, at a chosen file operation."""

import contextlib
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

TORTURE = int(os.environ.get("PRECEPTOR_TORTURE", "0"))  # how many times more than in the fast suite

_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


@dataclass(frozen=True)
class Ended:
    """code: exit code, or minus the signal that ended it. num_operations: those on files of the folder."""

    code: int
    shown: str
    num_operations: int


def command(*arguments, folder, kill_at=None, full_at=None, fails_at=None, kill_after=None, signal_at=None):
    """`preceptor ARGUMENTS` in a child, with nothing imported anew.

    At its n-th operation on a file of `folder` it is killed (kill_at), or finds that no file can grow any more
    (full_at), or that this one operation fails for want of room (fails_at), or receives a signal (signal_at: number and
    signal). kill_after: killed after so many seconds.
    """
    reader, writer = os.pipe()
    counter = Path(folder).with_suffix(".count")
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.close(reader)
            code = _in_child(arguments, writer, Path(folder), counter, (kill_at, full_at, fails_at, signal_at))
        finally:
            os._exit(code)
    os.close(writer)
    if kill_after is not None:
        threading.Timer(kill_after, lambda: _kill(pid)).start()
    with os.fdopen(reader, errors="replace") as output:
        shown = output.read()
    _, status = os.waitpid(pid, 0)
    counted = int(counter.read_text()) if counter.exists() else 0
    counter.unlink(missing_ok=True)
    return Ended(os.waitstatus_to_exitcode(status), shown, counted)


def _kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _in_child(arguments, writer, folder, counter, moments):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    kill_at, full_at, fails_at, signal_at = moments
    num, prefix, own = 0, str(folder), os.getpid()

    def hook(event, values):
        nonlocal num
        if event not in _OPERATIONS or os.getpid() != own:
            return
        path = values[0]
        if not isinstance(path, str | os.PathLike) or not str(path).startswith(prefix) or str(path) == str(counter):
            return
        num += 1
        if num == kill_at:
            os.kill(own, signal.SIGKILL)
        if signal_at and num == signal_at[0]:
            os.kill(own, signal_at[1])
        if num == full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        if num == fails_at:
            raise OSError(28, "No space left on device")

    sys.addaudithook(hook)
    from preceptor import cli

    sys.argv = ["preceptor", *map(str, arguments)]
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    counter.write_text(str(num))
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def result_of(folder):
    """All that a run must leave the same, however often it was stopped: without times, dates and ids."""
    timed = ("seconds", "peak_memory_bytes")
    logs = {
        name: [
            {key: value for key, value in json.loads(line).items() if key not in timed}
            for line in (folder / name).read_text().splitlines()
        ]
        for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl", "rejections.jsonl", "examples.jsonl")
    }
    summary = json.loads((folder / "summary.json").read_text())
    kept = {key: value for key, value in summary.items() if "seconds" not in key and "memory" not in key}
    model = {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "model").rglob("*"))
        if path.is_file()
    }
    names = sorted(path.name for path in folder.iterdir())
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return {"logs": logs, "summary": kept, "model": model, "names": names, "checkpoints": checkpoints}


def moments(total, num, seed=0):
    """So many of the numbers 1 to `total`, spread over all of them; all of them in the long form."""
    if TORTURE or num >= total:
        return list(range(1, total + 1))
    drawn = random.Random(seed)
    width = total / num
    return sorted({1 + int(width * at + drawn.random() * width) for at in range(num)} & set(range(1, total + 1)))


def seconds_of(action):
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
