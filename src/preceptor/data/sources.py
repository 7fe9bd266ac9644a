"""The sources of a run file: opened once, read example by example, each with the place that it comes from.

formats/tables.py says what a path may name, formats/rows.py how a row of a file becomes an example. Memory does not
grow with the number of examples. What is no example, or cannot be trained, is a Rejection; a file that cannot be read
is a DataError.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import PurePath
from typing import Any, NamedTuple

from preceptor.config import ROW_KEYS, Data, Source
from preceptor.config.code import OwnFunction, load_code
from preceptor.config.sections import nearest
from preceptor.data.examples import TRAIN_KEYS, Completion, Conversation, Example, Rejection
from preceptor.data.formats.columns import has_format, unknown_format
from preceptor.data.formats.rows import PARTS_OF_A_QUESTION, UNREAD_COLUMNS, read_row
from preceptor.data.formats.tables import DataTable, HuggingFaceDataset, RecordList, TableFile, find_tables
from preceptor.data.formats.text_files import parse_line
from preceptor.data.formats.values import Row, TableRows, Unreadable
from preceptor.errors import ConfigError, DataError, short

# Sides ----------------------------------------------------------------------------------------------------------------

# The side of an example follows from a hash of its question: of a conversation the first message of the user. White
# space and case do not count, as where `check` compares prompts (duplicates.py). So examples that are equal, or answer
# the same question, are on the same side; and examples that are added later, a change of their order or of `train.seed`
# move no other one. The share is met in the mean, as if each question were drawn.


@dataclass(frozen=True, slots=True)
class Side:
    """What is read of a source: of its examples, those that are held out, or the others. share: that is held out."""

    share: float
    held_out: bool

    def has(self, example: Example | Rejection) -> bool:
        """Rejections are counted with what is trained."""
        if isinstance(example, Rejection):
            return not self.held_out
        asked = " ".join(_question(example).split()).lower().encode(errors="surrogatepass")
        drawn = int.from_bytes(hashlib.blake2b(asked, digest_size=8).digest()) / 2**64  # from 0 to 1
        return (drawn < self.share) == self.held_out


def holds_out_nothing(share: float) -> str:
    """What to say where no example is held out that can be measured."""
    return (
        f"data.eval_size: {share:g} holds out no example that can be measured; there are few, or they ask the same. "
        "Set a larger share, or name a file in data.eval"
    )


def _question(example: Example) -> str:
    """Where nothing is asked, all of the text."""
    if isinstance(example, Conversation):
        asked = next((message.content for message in example.messages if message.role == "user"), "")
        return asked or " ".join(message.content for message in example.messages)
    return (example.prompt or example.completion) if isinstance(example, Completion) else example.text


# Sources --------------------------------------------------------------------------------------------------------------

_OTHER_KEYS = ("weight", "train_detail")  # read to be rejected, as UNREAD_COLUMNS
_KEYS = (*ROW_KEYS, *PARTS_OF_A_QUESTION, *UNREAD_COLUMNS, *TRAIN_KEYS, *_OTHER_KEYS)
_FIRST = 100  # examples in which a column that its format needs must occur; that tell if a source holds conversations


@dataclass(frozen=True, slots=True)
class Entry:
    """An example of a source, or its rejection, and where it was read."""

    table: str
    format: str  # its name, for people
    example: Example | Rejection


class UnreadRow(NamedTuple):
    """A row of a table, of which no example is made yet; a line of JSON is not even parsed."""

    table: str
    place: str
    row: str | Row
    opened: "OpenSource"

    def spelled(self) -> str:
        """What differs where the row does in what is read of it; also where a line of JSON has other spaces."""
        if isinstance(self.row, str):
            return self.row.rstrip()
        if isinstance(self.row, Unreadable) or self.opened.own is not None:
            return repr(self.row)
        read = self.opened.keys_read
        return repr({key: value for key, value in self.row.items() if key in read})

    def entry(self) -> Entry:
        """Raises DataError where a line is no JSON object."""
        own, source = self.opened.own, self.opened.source
        row = parse_line(self.row, self.place) if isinstance(self.row, str) else self.row
        if source.columns and own is None and not isinstance(row, Unreadable):
            row = {ours: row[theirs] for ours, theirs in source.columns.items() if theirs in row}
        made = row if own is None else _made(own, row)
        if made is None:
            rejection = Rejection(self.place, "left_out", f"{source.code} gave None for it")
            return Entry(self.table, "left out", rejection)
        return Entry(self.table, *read_row(made, self.place, source.nulls))


class OpenSource:
    """A source with its tables, of which nothing is read yet. It can be read as often as needed.

    side: of its examples only these. Raises DataError and ConfigError for what can be seen so early.
    """

    def __init__(self, source: Source | str, side: Side | None = None) -> None:
        self.source, self.side = Source(path=source) if isinstance(source, str) else source, side
        if self.source.columns and not has_format(list(self.source.columns)):
            raise ConfigError(
                f"{self.source.path}: `columns` names {', '.join(self.source.columns)}, which make no format: "
                f"{unknown_format(dict.fromkeys(self.source.columns), self.source.columns)}"
            )
        self.tables = find_tables(self.source)
        self._begun: tuple[list[Entry], Iterator[Entry]] | None = None

    @property
    def is_pipe(self) -> bool:
        """Whether it can be read only once."""
        return any(isinstance(table, TableFile) and table.is_pipe for table in self.tables)

    def rows(self) -> TableRows:
        """Each row as the file holds it, with its place. Raises DataError for what cannot be read or is empty."""
        for table in self.tables:
            yield from _not_empty(table.name, table.rows(None))

    def examples(self) -> Iterator[Example | Rejection]:
        """Each example. Raises DataError as `rows`, and for columns that are not there."""
        return (entry.example for entry in self.entries())

    def entries(self) -> Iterator[Entry]:
        """Each example, with its table and format. Raises DataError as `examples`."""
        first, rest = self._begun or ([], chain.from_iterable(map(self.entries_of, self.tables)))
        self._begun = None
        return chain(first, rest)

    def unread(self) -> Iterator[UnreadRow]:
        """Each row of all tables, whatever its side. Raises DataError as `examples`, of a line when it is parsed."""
        return chain.from_iterable(map(self._unread_of, self.tables))

    def peek(self) -> list[Example | Rejection]:
        """The first examples, of a pipe none; `entries` goes on from here and reads them no second time."""
        if self.is_pipe:
            return []  # another process reads it
        if self._begun is None:
            rest = self.entries()
            self._begun = list(islice(rest, _FIRST)), rest
        return [entry.example for entry in self._begun[0]]

    def close(self) -> None:
        """Forget what `peek` has read; `entries` begins at the start."""
        self._begun = None

    def entries_of(self, table: DataTable) -> Iterator[Entry]:
        """Each example of one of the tables. Raises DataError as `examples`."""
        entries = (unread.entry() for unread in self._unread_of(table))
        return entries if self.side is None else (entry for entry in entries if self.side.has(entry.example))

    def _unread_of(self, table: DataTable) -> Iterator[UnreadRow]:
        columns = self.source.columns
        names = None if self.own else table.columns()
        if names is not None:
            _check_columns(table.name, names, self.source)
        rows = _not_empty(table.name, self._read(table))
        if columns and names is None:  # each row has keys of its own
            first = list(islice(rows, _FIRST))
            keys = _keys_of(first, columns.values())
            there = [ours for ours, theirs in columns.items() if theirs in keys]
            if has_format(there) and (table.files() or isinstance(table, RecordList)):  # it can be read twice
                keys = _keys_of(chain(first, islice(self._read(table), _FIRST, None)), columns.values())
            _check_columns(table.name, list(keys), self.source)
            rows = chain(first, rows)
        for place, row in rows:
            yield UnreadRow(table.name, place, row, self)

    def _read(self, table: DataTable) -> Iterator[tuple[str, str | Row]]:
        lines = table.lines() if isinstance(table, TableFile) else None
        rows = lines or table.rows(None if self.own else self.keys_read)
        if self.own is None or not isinstance(table, RecordList):
            return rows
        # The function may change its record in place, and these are the program's own.
        return ((place, deepcopy(row) if isinstance(row, dict) else row) for place, row in rows)

    @cached_property
    def keys_read(self) -> frozenset[str]:
        """Of each row, without a function of the user's own."""
        return frozenset(self.source.columns.values() or _KEYS)

    @cached_property
    def own(self) -> OwnFunction | None:
        """What makes a record of each row. Raises ConfigError where it cannot be loaded."""
        return None if self.source.code is None else load_code(self.source.code, "code")


def open_sources(data: Data) -> tuple[list[OpenSource], list[OpenSource]]:
    """The sources to train on and those that are held out. Raises as `OpenSource` and `require_streamable`.

    With `data.eval_size` both have a side of each file of `data.train`; of held-out examples each counts once.
    """
    if data.eval_size is None:
        train = [OpenSource(source) for source in data.train]
        if data.streaming:
            require_streamable(train)
        return train, [OpenSource(source) for source in data.eval]
    trained, held_out = Side(data.eval_size, False), Side(data.eval_size, True)
    once = [source.model_copy(update={"weight": None, "count": None}) for source in data.train]
    return (
        [OpenSource(source, trained) for source in data.train],
        [*(OpenSource(source) for source in data.eval), *(OpenSource(source, held_out) for source in once)],
    )


def require_streamable(sources: Iterable[OpenSource]) -> None:
    """Raises ConfigError for a data set of the Hub: all of it is downloaded before its first example is read."""
    for source in sources:
        if any(isinstance(table, HuggingFaceDataset) and isinstance(table.place, Source) for table in source.tables):
            path = source.source.path
            raise ConfigError(
                f"{path}: a data set of the Hub is downloaded as a whole, and data.streaming reads as it goes: name "
                f"its files, path: hf://datasets/{path} (with `split`, which chooses among them by their names), or a "
                f"pattern, path: hf://datasets/{path}/**/*.parquet. Or remove data.streaming"
            )


def require_no_pipe(sources: Iterable[OpenSource], streaming: bool | None = None) -> None:
    """Raises ConfigError where a pipe is among sources that are read as a whole. streaming: the setting of a run."""
    for source in sources:
        if source.is_pipe:
            helps = "write what it gives to a file first"
            if streaming is not None:
                helps = "only data.train can be streamed" if streaming else "set data.streaming: true"
            raise ConfigError(f"{source.source.path}: is a pipe, which can be read only once: {helps}")


def read_rows(source: Source | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a source as the file holds it, with its place. Raises as `OpenSource`, and for an unreadable row."""
    for place, row in OpenSource(source).rows():
        if isinstance(row, Unreadable):
            raise DataError(f"{place}: {row}")
        yield place, row


def _made(own: OwnFunction, row: Row) -> Row | None:
    """What the user's function makes of a row; whatever it raises is the row's rejection."""
    if isinstance(row, Unreadable):
        return row
    try:
        made = own.function(dict(row))
    except Exception as error:
        return Unreadable("unreadable", f"{own.name} raised {type(error).__name__}: {short(str(error))}")
    if made is None or isinstance(made, dict):
        return made
    return Unreadable("unreadable", f"{own.name} gave {short(made)}, which is neither a dict nor None")


def _not_empty(name: str, rows: Iterator[Any]) -> Iterator[Any]:
    found = False
    for row in rows:
        found = True
        yield row
    if not found:
        raise DataError(f"{name}: the file is empty; it needs at least one example")


def _keys_of(rows: Iterable[tuple[str, str | Row]], wanted: Collection[str]) -> list[str]:
    """The keys that rows have, of as many as it takes to see the wanted ones."""
    found: dict[str, None] = {}
    for place, unread in rows:
        row = parse_line(unread, place) if isinstance(unread, str) else unread
        found |= {} if isinstance(row, Unreadable) else dict.fromkeys(row)
        if found.keys() >= set(wanted):
            break
    return list(found)


def _check_columns(name: str, columns: Sequence[str], source: Source) -> None:
    """Raises DataError if a column that the run file names is not there, or the columns make no format."""
    for theirs in source.columns.values():
        if theirs not in columns:
            raise DataError(
                f"{name}: has no column {theirs!r}, which `columns` names; {nearest(theirs, columns)} "
                f"(it has {', '.join(columns)})"
            )
    if columns and not source.columns and not has_format(columns):
        first = ""
        if {".csv", ".tsv"} & set(PurePath(name).suffixes):
            first = ". Line 1 is read as the header; if it is an example, put one above, such as question,answer"
        raise DataError(f"{name}: {unknown_format(dict.fromkeys(columns))}{first}")
