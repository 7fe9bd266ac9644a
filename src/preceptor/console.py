"""How many rows have been read, on standard error, so that standard output holds results alone."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from preceptor.data.formats.tables import Table

_EVERY_ROWS = 20
_SECONDS = 0.1  # between two drawings


@contextmanager
def row_progress(tables: Sequence[Table], what: str) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, nothing elsewhere; what it yields is to be called after each row.

    Where a table does not know how many rows it has, the bar has no end. It is drawn when rows come, by no thread of
    its own, so that processes can be forked meanwhile (data/workers.py).
    """
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeElapsedColumn())
    progress = Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        auto_refresh=False,
        disable=not console.is_terminal,
    )
    rows, drawn = 0, time.perf_counter()

    def on_row() -> None:
        nonlocal rows, drawn
        rows += 1
        if rows % _EVERY_ROWS == 0 and time.perf_counter() - drawn > _SECONDS:
            progress.update(task, completed=rows, refresh=True)
            drawn = time.perf_counter()

    with progress:
        numbers = [table.num_rows() for table in tables] if console.is_terminal else [None]
        task = progress.add_task(what, total=None if None in numbers else sum(filter(None, numbers)))
        yield on_row
