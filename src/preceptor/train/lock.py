"""The lock of a run folder: one process uses it at a time, and the lock ends with that process. No torch here."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from preceptor.errors import CheckpointError
from preceptor.files import writing

LOCK = ".lock"


@contextmanager
def locked(folder: Path, out: str) -> Iterator[list[str]]:
    """Hold OUT/.lock; afterwards it is removed, and what was made for it where that is still empty.

    It is a record lock: processes that are forked to render the data do not inherit it, so that it ends with this
    process, whatever becomes of them. The value is a list of what the user should know.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{out}: is a file; choose another `out`")
    descriptor, notes = _lock(folder, out)
    try:
        yield notes
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # the first that is not empty
            for place in made:
                place.rmdir()


def _lock(folder: Path, out: str) -> tuple[int, list[str]]:
    """Raises CheckpointError where another process holds the lock."""
    while True:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
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
            with suppress(OSError):  # it says only who holds it
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor, notes
        os.close(descriptor)
