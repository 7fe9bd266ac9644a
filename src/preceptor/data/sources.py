"""The sources of a run file -> rows and records, each with the place that it comes from, and the mixture of them.

formats/tables.py says what a path may name, formats/rows.py how a row becomes a record. Rows come one by one:
memory does not grow with their number. A row that is no record, or cannot be trained, is a Rejection; a file that
cannot be read is a DataError.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

import numpy as np

from preceptor.config import ROW_KEYS, Source
from preceptor.config.sections import nearest
from preceptor.data.examples import Example, Rejection
from preceptor.data.formats.rows import PARTS_OF_A_QUESTION, format_of, has_format, to_record, unknown_format
from preceptor.data.formats.tables import Rows, Table, Wanted, find_tables
from preceptor.errors import ConfigError, DataError

Item = TypeVar("Item")

_FIRST_ROWS = 100  # in which a column must occur


@dataclass(frozen=True, slots=True)
class Entry:
    """One row: the table it stands in, the name of the format it was read in, and what it became."""

    table: str
    format: str
    record: Example | Rejection


def resolve(source: Source | str) -> list[Table]:
    """The tables of a source, without reading them. Raises DataError and ConfigError for what can be seen so early."""
    source = _source(source)
    if source.columns and not has_format(list(source.columns)):
        raise ConfigError(
            f"{source.path}: `columns` names {', '.join(source.columns)}, which make no format: "
            f"{unknown_format(dict.fromkeys(source.columns))}"
        )
    return find_tables(source)


def read_rows(source: Source | str) -> Rows:
    """Each row as the file holds it, with its source. Raises DataError for what cannot be read, or holds no row."""
    for table in resolve(source):
        yield from _rows_of(table, None)


def read_records(source: Source | str) -> Iterator[Example | Rejection]:
    """Each row as a record or a rejection. Raises DataError as `read_rows`, and for columns that are not there."""
    for entry in read_entries(source):
        yield entry.record


def read_entries(source: Source | str) -> Iterator[Entry]:
    """Each row as a record or a rejection, with its table and format. Raises DataError as `read_records`."""
    source = _source(source)
    for table in resolve(source):
        for place, row in _named(table, source):
            yield Entry(table.name, format_of(row), to_record(row, place, source.nulls))


def _source(source: Source | str) -> Source:
    return Source(path=source) if isinstance(source, str) else source


def _rows_of(table: Table, wanted: Wanted) -> Rows:
    empty = True
    for place, row in table.rows(wanted):
        empty = False
        yield place, row
    if empty:
        raise DataError(f"{table.name}: the file is empty; it needs at least one row")


def _named(table: Table, source: Source) -> Rows:
    """The rows under the keys of data/formats/rows.py; with `columns`, these keys only."""
    columns = table.columns()
    if columns is not None:
        _check_columns(table.name, columns, source)
    if not source.columns:
        yield from _rows_of(table, (*ROW_KEYS, *PARTS_OF_A_QUESTION))
        return
    rows = _rows_of(table, list(source.columns.values()))
    if columns is None:
        first = list(islice(rows, _FIRST_ROWS))
        _check_columns(table.name, list(dict.fromkeys(key for _, row in first for key in row)), source)
        rows = chain(first, rows)
    for place, row in rows:
        yield place, {ours: row[theirs] for ours, theirs in source.columns.items() if theirs in row}


def _check_columns(name: str, columns: Sequence[str], source: Source) -> None:
    """Raises DataError if a column that the run file names is not there, or the columns make no format."""
    for theirs in source.columns.values():
        if theirs not in columns:
            raise DataError(
                f"{name}: has no column {theirs!r}, which `columns` names; {nearest(theirs, columns)} "
                f"(it has {', '.join(columns)})"
            )
    if columns and not source.columns and not has_format(columns):
        raise DataError(f"{name}: {unknown_format(dict.fromkeys(columns))}")


def mix(per_source: Iterable[tuple[Sequence[Item], Source]], seed: int) -> list[Item]:
    """Rows of several sources in one list: each source `weight` times, or `count` of its rows.

    Whole copies first, then a part of one that `seed` chooses, in the order of the file.
    """
    rng = np.random.default_rng(seed)
    mixed: list[Item] = []
    for rows, source in per_source:
        copies, num_chosen = _copies(source, len(rows))
        for _ in range(copies):
            mixed.extend(rows)
        chosen = rng.permutation(len(rows))[:num_chosen]
        mixed.extend(rows[index] for index in sorted(chosen.tolist()))
    return mixed


def _copies(source: Source, num_rows: int) -> tuple[int, int]:
    """How many whole copies of a source's rows an epoch holds, and how many chosen rows on top."""
    if source.count is not None:
        return divmod(source.count, num_rows) if num_rows else (0, 0)
    copies, part = divmod(source.weight or 1.0, 1)
    return int(copies), round(part * num_rows)
