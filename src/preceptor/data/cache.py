"""The cache of rendered trees: what was rendered once is read again, by any run on this machine.

    FOLDER/portions/   rendered examples, some megabytes of text in each file, named by what they are made from
    FOLDER/tables/     what a run takes of a table: the trees of its examples, what was rejected, all counts
    FOLDER/files/      SHA-256 of data files, by place, size, time and inode, so that they are hashed once
    FOLDER/evaluations/ figures of base models on tasks (train/evaluations.py)
    FOLDER/locks/      who builds, and who uses what; a lock ends with its process

A file is written aside, flushed and renamed, under a name that says what it is made from: it is never changed, and two
processes that write it at once write the same. A damaged file is treated as one that is not there. Where nothing can be
written, what is rendered is kept in memory.
"""

import errno
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.data.records import FlatFile, close_files, write_flat
from preceptor.errors import CheckpointError, DataError
from preceptor.files import read_json, sha256_of, sync, writing

OFF = "off"
_ENVIRONMENT = "PRECEPTOR_CACHE"
_WAIT_SECONDS = 0.2  # between two looks whether another process is done
_SAY_SECONDS = 60.0
_IDLE_SECONDS = 900.0  # a process that builds and has finished nothing for so long is not waited for
_OLD_PARTIAL_SECONDS = 86_400.0
_RACY_NS = 2_000_000_000  # a file that was changed so shortly before it was hashed may change again unseen


def cache_folder(setting: str | None) -> Path | None:
    """The folder of the cache; None for none. setting: `data.cache`."""
    setting = setting or os.environ.get(_ENVIRONMENT)
    if setting:
        return None if setting == OFF else Path(setting).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "preceptor"


def key_of(*parts: object) -> str:
    """A name for what is made from these values, which JSON can spell."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()[:40]


_using: dict[Path, tuple[int, set[str]]] = {}  # by cache: a file that this process locks, the keys that it uses


class Cache:
    """One folder. After the first failure to write nothing more is written, which `say` is told once."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self._say = folder, say
        self.writes = True

    # What is there

    def portion_path(self, key: str) -> Path:
        return self.folder / "portions" / key[:2] / f"{key}.flat"

    def table_path(self, key: str) -> Path:
        return self.folder / "tables" / f"{key}.flat"

    def table(self, key: str) -> FlatFile | None:
        """What was written for a table, if the portions that it names are there too."""
        found = self.opened(self.table_path(key))
        if found is None:
            return None
        for portion, num_bytes in zip(found.about["portions"], found.about["portion_bytes"], strict=True):
            place = self.portion_path(portion)
            try:
                if place.stat().st_size == num_bytes:
                    continue
                self._say(f"{place}: not what was written, so it is rendered again")
            except OSError:
                self._say(f"{place}: is missing, so its examples are rendered again")
            return None
        return found

    def opened(self, path: Path) -> FlatFile | None:
        """A file of the cache, if it is there and not damaged at its end."""
        if not path.exists():
            return None
        try:
            return FlatFile(path)
        except DataError as error:
            self.damaged(path, error)
            return None

    def damaged(self, path: Path, error: DataError) -> None:
        """Remove a damaged file, so that it is made again."""
        self._say(f"{error}, so it is rendered again")
        close_files()
        with suppress(OSError):
            path.unlink()

    def use(self, paths: Sequence[Path]) -> None:
        """Mark tables and portions as used now, and as in use while this process lives, there yet or not."""
        for path in paths:
            with suppress(OSError):
                os.utime(path)
        with suppress(OSError):  # else it is not protected from `preceptor cache prune`
            if self.folder not in _using:
                place = self.folder / "locks" / f"using-{_who()}.lock"
                place.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
                try:
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.ftruncate(descriptor, 0)  # of an ended process of the same number
                except OSError:
                    os.close(descriptor)
                    raise
                _using[self.folder] = descriptor, set()
            descriptor, used = _using[self.folder]
            added = {path.stem for path in paths} - used
            os.write(descriptor, "".join(f"{key}\n" for key in sorted(added)).encode())
            used |= added

    # Writing

    def write(self, path: Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> FlatFile | None:
        """The file, opened; None where it cannot be written."""
        if not self.writes:
            return None
        try:
            with _published(path) as partial:
                write_flat(partial, about, arrays)
            return FlatFile(path)
        except (CheckpointError, DataError) as error:
            self.fail(error)
            return None
        except TypeError:  # a template argument that JSON cannot spell, such as a date of a Parquet file
            return None

    def fail(self, error: Exception) -> None:
        if self.writes:
            self._say(f"{error}; rendered examples that are not in the cache are kept in memory (data.cache)")
        self.writes = False

    # Building

    @contextmanager
    def building(self, key: str, what: str, is_done: Callable[[], bool]) -> Iterator[None]:
        """Inside, no other process builds the same; where one did until now, `is_done` is true."""
        if not self.writes:
            yield
            return
        place = self.folder / "locks" / f"{key}.lock"
        try:
            with writing(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except CheckpointError as error:
            self.fail(error)
            yield
            return
        try:
            self._wait(descriptor, place, what, is_done)
            self._remove_old_partials()
            yield
        finally:
            os.close(descriptor)  # the file stays: one that is removed would protect nothing

    def _wait(self, descriptor: int, place: Path, what: str, is_done: Callable[[], bool]) -> None:
        said = 0.0
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.utime(place)
                return
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return  # no locks here: several processes may then render the same, and write the same files
            if is_done() or time.time() - place.stat().st_mtime > _IDLE_SECONDS:
                return
            if time.monotonic() - said > _SAY_SECONDS:
                self._say(f"{what} is rendered by another process: waiting until it is done")
                said = time.monotonic()
            time.sleep(_WAIT_SECONDS)

    def still_building(self, key: str) -> None:
        """Say to those who wait that this process goes on."""
        with suppress(OSError):
            os.utime(self.folder / "locks" / f"{key}.lock")

    def _remove_old_partials(self) -> None:
        """What killed processes left half written."""
        for partial in self.folder.glob("**/.*.partial"):
            with suppress(OSError):
                if time.time() - partial.stat().st_mtime > _OLD_PARTIAL_SECONDS:
                    partial.unlink()

    # Hashes of files

    def sha256_of(self, file: Path) -> str:
        """The SHA-256 of a file's content, read only if the file changed since it was hashed."""
        real = Path(os.path.realpath(file))
        about = real.stat()
        stat = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
        place = self.folder / "files" / f"{key_of(str(real))}.json"
        with suppress(CheckpointError):
            known = read_json(place)
            if known.get("stat") == stat and known.get("path") == str(real):
                return str(known["sha256"])
        sha256 = sha256_of(real)
        if self.writes and time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) > _RACY_NS:
            try:
                with _published(place) as partial:
                    partial.write_text(json.dumps({"path": str(real), "stat": stat, "sha256": sha256}))
            except CheckpointError as error:
                self.fail(error)
        return sha256


def _who() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


@contextmanager
def _published(path: Path) -> Iterator[Path]:
    """A name of this process's own beside `path`, flushed and renamed to it at the end. Raises CheckpointError."""
    partial = path.with_name(f".{path.name}.{_who()}.partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)
            yield partial
            sync(partial)
            close_files()
            partial.replace(path)
            sync(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


# What is in it -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheEntry:
    """A table in the cache, or (names: none) portions that no table names: of a run that was killed, or is building.

    in_use: by a living process; while another one renders, all is, as it takes what is there. files: those that count
    for it. portions: the keys of all that it names.
    """

    key: str
    names: list[str]
    last_used: float
    num_bytes: int
    num_trees: int
    in_use: bool
    files: list[Path]
    portions: list[str]


def entries(folder: Path) -> list[CacheEntry]:
    """What is in a cache, the longest unused first. A file that several tables share counts for the first of them."""
    in_use, building = _in_use(folder)
    found = []
    left = {path.stem: path for path in (folder / "portions").glob("*/*.flat")}  # portions that no table names
    for path in sorted((folder / "tables").glob("*.flat"), key=_used_and_size):
        try:
            about = FlatFile(path).about
        except DataError:
            about = {"names": ["damaged"], "portions": [], "num_trees": 0}
        names, num_trees, portions = (about[key] for key in ("names", "num_trees", "portions"))
        files = [path, *(left.pop(key) for key in portions if key in left)]
        last_used, num_bytes = _used_and_size(path)[0], sum(_used_and_size(file)[1] for file in files)
        used = building or path.stem in in_use
        found.append(CacheEntry(path.stem, names, last_used, num_bytes, num_trees, used, files, portions))
    for path in left.values():
        used = building or path.stem in in_use
        found.append(CacheEntry(path.stem, [], *_used_and_size(path), 0, used, [path], []))
    return sorted(found, key=lambda entry: entry.last_used)


def prune(folder: Path, older_than_seconds: float | None, max_bytes: int | None) -> list[CacheEntry]:
    """Remove what was not used for so long, and then the longest unused until at most so many bytes are left.

    Returns what was removed. What a running process uses stays, and so do portions that a table which stays names.
    """
    there = entries(folder)
    left = sum(entry.num_bytes for entry in there)
    now = time.time()
    doomed, still_named = [], _in_use(folder)[0]  # a table that goes may name portions that are read without it
    for entry in there:
        old = older_than_seconds is not None and now - entry.last_used > older_than_seconds
        many = max_bytes is not None and left > max_bytes
        if (old or many) and not entry.in_use:
            doomed.append(entry)
            left -= entry.num_bytes
        else:
            still_named.update(entry.portions)
    for path in (path for entry in doomed for path in entry.files if path.stem not in still_named):
        with suppress(OSError):
            path.unlink()
    return doomed


def _in_use(folder: Path) -> tuple[set[str], bool]:
    """The tables and portions that living processes use, and whether another process renders into the cache.

    The lists of processes that have ended are removed.
    """
    used, building = set[str](), False
    for place in (folder / "locks").glob("*.lock"):
        if folder in _using and place.name == f"using-{_who()}.lock":  # to close it once would end the lock
            used |= _using[folder][1]
            continue
        is_list = place.name.startswith("using-")
        with suppress(OSError), place.open("rb") as file:  # of another user's file only reading may be allowed
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                held = error.errno in (errno.EACCES, errno.EAGAIN)
                building |= held and not is_list
                used.update(file.read().decode().split() if held and is_list else ())
            else:
                if is_list:
                    place.unlink()
    return used, building


def _used_and_size(path: Path) -> tuple[float, int]:
    """When a file was last used, and its bytes; zeros where it is gone."""
    try:
        about = path.stat()
    except OSError:
        return 0.0, 0
    return about.st_mtime, about.st_size
