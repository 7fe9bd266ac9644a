"""Windows of a stream: examples without an end, or too many to render first, rendered ahead by another process.

    sources   a a a a a a a a ...     b b b b ...     each in its order; one that ends begins again, but for a pipe
    windows   [ a a a b ] [ a a a b ] ...             so many examples each, of each source a share by its weight

A window is rendered and proved as any data is, and packed and shuffled by the seed and its number, as an epoch is
(packing.py). Which examples it holds depends on the sources, their weights and the size alone. So a run that goes on
reads the sources from their beginning, passes over the windows that it has trained, and compares a hash of them: of
lines of JSON as they are spelled, of other rows by their values. No example is made of any for that.

    another process     reads, renders, writes window 0, then those up to _AHEAD after the one that is asked for
    SPOOL/N.flat        the trees of window N and what was counted; removed when a later one is asked for
    SPOOL/wanted        the number of the window that is trained
    SPOOL/error         why there are no more

One process of each machine starts that other process; all of the run's processes there read what it writes, so memory
and disk hold a few windows, whatever the number of examples.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from itertools import chain, count
from math import floor
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from preceptor.config import Source
from preceptor.console import say
from preceptor.data.cache import Cache
from preceptor.data.reading import rendered_examples
from preceptor.data.records import FlatFile, write_flat
from preceptor.data.sources import OpenSource, UnreadRow
from preceptor.data.table_trees import MemoryArrays, TableBuilder, TableTrees
from preceptor.data.truncation import Fitter
from preceptor.data.workers import start_method
from preceptor.errors import PreceptorError, ProcessError, StreamError
from preceptor.files import write_atomically

_AHEAD = 3  # windows that are there or being rendered, the one that is trained among them
_WAIT_SECONDS = 0.02
_KILLED = "the process that renders the data ahead ended, often for want of memory"
_ENDS_WITH_SECONDS = 1.0  # between two looks whether the process that trains is still there


@dataclass(frozen=True)
class Window:
    """Some examples of a stream, rendered. sha256: of all examples up to its end."""

    number: int
    tables: list[TableTrees]
    num_examples: int
    sha256: str


def window_shares(sources: Sequence[Source], size: int, number: int = 0) -> list[int]:
    """The examples of each source in a window of `size`; over all windows exact."""
    weights = [Fraction(source.weight or 1.0) for source in sources]
    ends = [[floor(at * size * weight / sum(weights)) for weight in weights] for at in (number, number + 1)]
    return [end - start for start, end in zip(*ends, strict=True)]


class WindowReader:
    """Reads sources as windows of `size` examples, from the first on. It can be pickled before it has read.

    Examples of files that are known by their content go through the cache.
    """

    def __init__(
        self, sources: Sequence[Source], size: int, fitter: Fitter, cache: Path | None = None, num_processes: int = 1
    ) -> None:
        self._sources, self._size, self._fitter, self._num_processes = sources, size, fitter, num_processes
        self._cache_folder = cache
        self._read: list[tuple[Iterator[UnreadRow], Cache | None]] | None = None
        self._ended = ""
        self._number = self._num_read = 0

    def read_next(self, folder: Path | None) -> None:
        """Render the next window and write it to the folder; None: only read it.

        Raises StreamError where it is not whole, and DataError.
        """
        if self._read is None:
            self._hash = sha256()
            self._read = [_from_the_start(source, self._cache_folder) for source in self._sources]
        number, start = self._number, self._num_read
        self._number += 1
        builders: dict[str, TableBuilder] = {}
        shares = window_shares(self._sources, self._size, number)
        for source, (examples, cache), num in zip(self._sources, self._read, shares, strict=True):
            taken = self._taken(source.path, examples, num)
            if folder is None:
                deque(taken, maxlen=0)
                continue
            entries = (unread.entry() for unread in taken)
            for example in rendered_examples(entries, self._fitter, self._num_processes, cache):
                table = example.entry.table
                if table not in builders:
                    builders[table] = TableBuilder(table, self._fitter)
                builders[table].add(example._replace(stored=None))  # a window holds all that it needs
        if self._ended:  # a part is not trained: when the run goes on with more, it would hold other examples
            raise StreamError(
                f"{self._ended}: the pipe ended after {self._num_read:,} examples, in window {number:,}, which is not "
                "trained. Each start of a run reads a pipe from the beginning of what is written: it must write the "
                "same examples, and enough of them"
            )
        if folder is not None:
            self._write(folder / f"{number}.flat", self._num_read - start, [own.built() for own in builders.values()])

    def _write(self, place: Path, num_examples: int, tables: Sequence[MemoryArrays]) -> None:
        abouts = [own.about for own in tables]
        about = {"num_examples": num_examples, "sha256": self._hash.hexdigest(), "tables": abouts}
        arrays = {f"{k}.{name}": array for k, own in enumerate(tables) for name, array in own.arrays.items()}
        partial = place.with_suffix(".partial")
        write_flat(partial, about, arrays)
        partial.replace(place)

    def _taken(self, path: str, examples: Iterator[UnreadRow], num: int) -> Iterator[UnreadRow]:
        for _ in range(num):
            example = next(examples, None)
            if example is None:
                self._ended = path
                return
            self._hash.update(f"{example.spelled()}\n".encode())
            self._num_read += 1
            yield example


def _from_the_start(source: Source, cache_folder: Path | None) -> tuple[Iterator[UnreadRow], Cache | None]:
    """The examples of a source, without an end, and the cache where its files are known by their content."""
    opened = OpenSource(source)
    again = () if opened.is_pipe else chain.from_iterable(OpenSource(source).unread() for _ in count())
    is_known = all(table.files() for table in opened.tables)
    cache = Cache(cache_folder, lambda line: say(line, error=True)) if cache_folder and is_known else None
    return chain(opened.unread(), again), cache


class Windows:
    """The windows of a stream, for the processes of one machine. spool: the folder in which they are handed over.

    reader: of the process that starts the one that renders; the others have none. Ended with `close`, at the latest
    when this process ends.
    """

    def __init__(self, spool: Path, reader: WindowReader | None = None) -> None:
        self.spool = spool
        self._process = None if reader is None else _started(reader, spool)
        # When a program ends, multiprocessing calls its own before it waits for the processes that it started.
        self._finalizer = Finalize(self, _end, (self._process, spool), exitpriority=0)

    @classmethod
    def rendered(cls, reader: WindowReader) -> "Windows":
        """Rendered by a process of this one, in a temporary folder."""
        spool = Path(tempfile.mkdtemp(prefix="preceptor-stream-"))
        try:
            return cls(spool, reader)
        except BaseException:
            shutil.rmtree(spool)
            raise

    def close(self) -> None:
        self._finalizer()

    def get(self, number: int, is_trained: bool = True) -> Window:
        """A window, once it is rendered; no earlier one can be had later. is_trained: those after it will be asked for.

        Raises StreamError, in all processes of this machine the same, where it cannot be had; ProcessError where its
        process ended.
        """
        if is_trained and self._process is not None:
            self._say("wanted", str(number))
        place = self.spool / f"{number}.flat"
        while not place.exists():
            error = self.spool / "error"
            if error.exists():
                raise StreamError(error.read_text(encoding="utf-8"))
            if self._process is not None and not self._process.is_alive() and not place.exists():
                self._say("error", _KILLED)
            if not self.spool.exists():  # it is removed when the process that has it rendered ends
                raise ProcessError("the process of this machine that has the data rendered has ended")
            time.sleep(_WAIT_SECONDS)
        file = FlatFile(place)
        tables = []
        for k, about in enumerate(file.about["tables"]):
            arrays = {name.partition(".")[2]: file.load(name) for name in file.arrays if name.startswith(f"{k}.")}
            tables.append(TableTrees(about["names"][0], MemoryArrays(about, arrays), None))
        return Window(number, tables, file.about["num_examples"], file.about["sha256"])

    def _say(self, name: str, text: str) -> None:
        if not (self.spool / "error").exists():
            write_atomically(self.spool / name, text)


def _started(reader: WindowReader, spool: Path) -> Any:
    context = multiprocessing.get_context(start_method())
    process = context.Process(target=_render_ahead, args=(reader, spool, os.getpid()), name="preceptor stream")  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)  # as in workers.py
        with _program_not_run_anew():
            process.start()
    return process


@contextmanager
def _program_not_run_anew() -> Iterator[None]:
    """Meanwhile a fresh interpreter that is started does not import the main file, whose own work would begin again."""
    of_main = vars(sys.modules["__main__"])
    kept: dict[str, Any] = {name: of_main[name] for name in ("__file__", "__spec__") if name in of_main}
    of_main.pop("__file__", None)
    of_main["__spec__"] = None
    try:
        yield
    finally:
        of_main.update(kept)


def _end(process: Any, spool: Path) -> None:
    if process is not None:
        process.kill()
        process.join()
        shutil.rmtree(spool, ignore_errors=True)


# In the other process ------------------------------------------------------------------------------------------------


def _render_ahead(reader: WindowReader, spool: Path, parent: int) -> None:
    """Write one window after the other, and why there are no more."""
    _end_with(parent, spool)
    try:
        for number in count():
            while number and (wanted := _wanted(spool)) + _AHEAD <= number:
                time.sleep(_WAIT_SECONDS)
            reader.read_next(None if number and number < wanted else spool)
            for place in spool.glob("*.flat"):
                if int(place.stem) < _wanted(spool):
                    place.unlink(missing_ok=True)
    except PreceptorError as error:
        write_atomically(spool / "error", str(error))
    except OSError as error:
        said = f"{spool}: cannot be written: {error.strerror or error}; TMPDIR names another folder"
        write_atomically(spool / "error", said)
    except Exception:
        said = f"the process that renders the data ahead failed:\n{traceback.format_exc()}"
        write_atomically(spool / "error", said)


def _wanted(spool: Path) -> int:
    """The window that is trained; before there is one, only the first is rendered."""
    try:
        return int((spool / "wanted").read_text())
    except FileNotFoundError:
        return -_AHEAD


def _end_with(parent: int, spool: Path) -> None:
    """Heed no signals meant for the run; end when the process that trains has ended, however it ended.

    By a timer: a thread would forbid that the processes that render are forked, and a read of a pipe may last.
    """
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)

    def look(*_: object) -> None:
        if os.getppid() != parent:
            with suppress(OSError):
                shutil.rmtree(spool)
            os._exit(1)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _ENDS_WITH_SECONDS, _ENDS_WITH_SECONDS)
    look()
