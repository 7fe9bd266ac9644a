"""How many rows have been read, on standard error, so that standard output holds results alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from preceptor.data.reading.tables import Table

_EVERY_ROWS = 20  # an update takes as long as rendering a short conversation


@contextmanager
def row_progress(tables: Sequence[Table], what: str) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, nothing elsewhere; what it yields is to be called after each row.

    Where a table does not know how many rows it has, the bar has no end.
    """
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeElapsedColumn())
    progress = Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    )
    rows = 0

    def on_row() -> None:
        nonlocal rows
        rows += 1
        if rows % _EVERY_ROWS == 0:
            progress.update(task, completed=rows)

    with progress:
        numbers = [table.num_rows() for table in tables] if console.is_terminal else [None]
        task = progress.add_task(what, total=None if None in numbers else sum(filter(None, numbers)))
        yield on_row
