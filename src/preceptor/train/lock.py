"""The lock of a run folder: one process uses it at a time, and the lock ends with that process. No torch here."""

import errno
import fcntl
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from preceptor.errors import CheckpointError
from preceptor.files import writing

LOCK = ".lock"
_SEEN_SECONDS = 30.0  # after which a lock of another machine is seen on a file system that both have
_LOOK_SECONDS = 0.5
_held: set[tuple[int, str]] = set()  # process and real path: a record lock keeps other processes out, not this one
_guard = threading.Lock()


@contextmanager
def locked(folder: Path, out: str, look: Callable[[], None] = lambda: None) -> Iterator[list[str]]:
    """Hold OUT/.lock; afterwards it is removed, and what was made for it where that is still empty.

    look: called when it is held, before anything is written. Where it raises, a file of that name that was there stays.
    It is a record lock: processes that are forked to render the data do not inherit it, so that it ends with this
    process, whatever becomes of them. The value is a list of what the user should know.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{out}: is a file; choose another `out`")
    with _alone_in_process(folder, out):
        try:
            descriptor, notes = _lock(folder, out, look)
            try:
                yield notes
            finally:
                with suppress(OSError):
                    (folder / LOCK).unlink(missing_ok=True)
                os.close(descriptor)
        finally:
            with suppress(OSError):  # the first that is not empty
                for place in made:
                    place.rmdir()


@contextmanager
def _alone_in_process(folder: Path, out: str) -> Iterator[None]:
    """Raises CheckpointError where this process holds the folder already."""
    place = (os.getpid(), os.path.realpath(folder))
    with _guard:
        if place in _held:
            raise CheckpointError(
                f"{out}: another run of this program uses this folder. If its loop over steps was left, end it: "
                "close() of what steps() gave saves its step; or choose another `out`"
            )
        _held.add(place)
    try:
        yield
    finally:
        with _guard:
            _held.discard(place)


def _lock(folder: Path, out: str, look: Callable[[], None]) -> tuple[int, list[str]]:
    """Raises CheckpointError where another process holds the lock, or it cannot be written; and as `look`."""
    while True:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            was_there = (folder / LOCK).exists()
            try:
                descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # another process has just removed the folder
                continue
        notes = []
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                raise CheckpointError(f"{out}: is used by another run ({holder or 'just starting'})") from None
            notes.append(f"{out}: this file system has no locks ({error.strerror}); let one run alone use the folder")
        try:
            is_same = os.path.samestat(os.fstat(descriptor), (folder / LOCK).stat())
        except FileNotFoundError:
            is_same = False
        if is_same:  # else its holder removed it when it ended, and it protects nothing
            try:
                look()
                with writing(folder):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"{holder_name()}\n".encode())
            except BaseException:
                if not was_there:
                    (folder / LOCK).unlink(missing_ok=True)
                os.close(descriptor)
                raise
            with suppress(OSError):
                os.fsync(descriptor)  # other machines of a file system by network see it then
            return descriptor, notes
        os.close(descriptor)


def holder_name() -> str:
    """What a lock says of this process."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def require_seen(folder: Path, holder: str, out: str, meanwhile: Callable[[], None]) -> None:
    """Raises CheckpointError where this process does not see the folder that another process of its run holds.

    meanwhile: called before each look; what it raises ends the waiting.
    """
    until = time.monotonic() + _SEEN_SECONDS
    while True:
        meanwhile()
        with suppress(OSError):
            if (folder / LOCK).read_text(errors="replace").strip() == holder:
                return
        if time.monotonic() > until:
            raise CheckpointError(
                f"{out}: {holder} holds this folder for the run, and {holder_name()} does not see its lock ({LOCK}): "
                "all nodes need the same `out`, on a file system that all of them mount (NFS, Lustre, a shared "
                "volume), and may read it"
            )
        time.sleep(_LOOK_SECONDS)


@dataclass(frozen=True)
class LockHolder:
    """The process that a run's lock names. is_alive: None where that cannot be told from this machine."""

    pid: int | None
    host: str | None
    is_alive: bool | None


def lock_holder(folder: Path) -> LockHolder | None:
    """Who uses a run folder, or used it until it was killed; None: nobody. The lock is looked at, never taken."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        named = re.match(rb"process (\d+) on (\S+)", os.read(descriptor, 200))
        is_alive = _is_held(descriptor)
    finally:
        os.close(descriptor)
    pid, host = (int(named[1]), named[2].decode(errors="replace")) if named else (None, None)
    if not is_alive and host not in (None, socket.gethostname()):  # locks may not reach from that machine to this one
        is_alive = None
    return LockHolder(pid, host, is_alive)


def _is_held(descriptor: int) -> bool | None:
    """Whether another process holds a record lock of a file; None where the file system or the platform has none."""
    layout, fields = ("=qqihh", (0, 0, 0)) if sys.platform == "darwin" else ("@hhqqi4x", (os.SEEK_SET, 0, 0, 0))
    kind = fcntl.F_WRLCK
    asked = (*fields, kind, os.SEEK_SET) if sys.platform == "darwin" else (kind, *fields)
    try:
        answer = struct.unpack(layout, fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(layout, *asked)))
    except (OSError, AttributeError, struct.error):
        return None
    return bool(answer[3 if sys.platform == "darwin" else 0] != fcntl.F_UNLCK)
