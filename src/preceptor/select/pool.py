"""The pool that a selection is made from: its rows, read as often as they are needed, and kept rows written again.

A row is written so that it trains exactly as it did: as the object that the file holds, where reading that object back
from JSON gives the same record; else (nulls that a Parquet column added, columns renamed) in a form that does.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.config import Source
from preceptor.data.examples import Completion, Conversation, Document, Example, Rejection
from preceptor.data.formats.rows import to_example
from preceptor.data.sources import OpenSource
from preceptor.errors import ConfigError, DataError
from preceptor.files import replacing

Answered = Conversation | Completion


@dataclass(frozen=True, slots=True)
class Pool:
    """Sources whose rows are numbered through, 0, 1, 2, ..., in the order in which they are named."""

    sources: tuple[OpenSource, ...]

    def records(self) -> Iterator[Answered | Rejection]:
        """Each row as a conversation or completion, or as a Rejection. Raises DataError as `OpenSource.entries`."""
        for source in self.sources:
            for entry in source.entries():
                yield _answered(entry.example)

    def chosen(self, numbers: Collection[int]) -> Iterator[tuple[int, Answered]]:
        """The rows of these numbers, in order. Raises DataError if one of them is no longer a row to train on."""
        for number, record in enumerate(self.records()):
            if number in numbers:
                yield number, _unchanged(record)

    def write(self, numbers: Collection[int], file: Path) -> None:
        """Write the rows of these numbers to `file` as JSON lines, in order; all or nothing.

        Raises DataError for a row that JSON cannot hold, CheckpointError if the file cannot be written.
        """
        with replacing(file) as partial, partial.open("w", encoding="utf-8") as lines:
            for line in self._lines(numbers):
                lines.write(line + "\n")

    def _lines(self, numbers: Collection[int]) -> Iterator[str]:
        number = 0
        for source in self.sources:
            for (_, row), entry in zip(source.rows(), source.entries(), strict=True):
                if number in numbers:
                    yield line_of(row, _unchanged(_answered(entry.example)), source.source)
                number += 1


def _answered(record: Example | Rejection) -> Answered | Rejection:
    if isinstance(record, Document):
        return Rejection(
            record.source,
            "no_assistant_message",
            "the row is plain text, without a prompt and an answer; a selection is made among conversations",
        )
    return record


def _unchanged(record: Answered | Rejection) -> Answered:
    if isinstance(record, Rejection):
        raise DataError(f"{record.source}: the data has changed while it was read; run the command again")
    return record


def line_of(row: dict[str, Any], record: Answered, source: Source) -> str:
    """The row as one line of JSON that reads back as the same record.

    Tried in turn: the row as it is; with `columns`, under the keys that they name; the record's own messages.
    """
    renamed = {ours: row[theirs] for ours, theirs in source.columns.items() if theirs in row}
    for form in (row, renamed, row_of(record)):
        try:
            line = json.dumps(form, ensure_ascii=False)
        except (TypeError, ValueError):
            continue  # a date or bytes in some other column
        if form and to_example(json.loads(line), record.source) == record:
            return line
    raise DataError(f"{record.source}: holds values that JSON does not have, so the row cannot be written; mend it")


def row_of(record: Answered) -> dict[str, Any]:
    """The row that says what the record says, in our own keys."""
    if isinstance(record, Completion):
        return {"prompt": record.prompt, "completion": record.completion}
    row: dict[str, Any] = {"messages": [_message(record, k) for k in range(len(record.messages))]}
    if record.tools:
        row["tools"] = list(record.tools)
    if record.template_kwargs:
        row["chat_template_kwargs"] = dict(record.template_kwargs)
    return row


def _message(record: Conversation, index: int) -> dict[str, Any]:
    message = record.messages[index]
    given = dict(message.given)
    if message.weight != 1.0:
        given["weight"] = message.weight
    if message.role == "assistant" and not message.train and message.weight > 0:
        given["train"] = False
    return given


def open_pool(paths: Sequence[str], columns: dict[str, str], split: str | None) -> Pool:
    """The pool that a command line names. Raises ConfigError for columns that are no keys of a row."""
    from pydantic import ValidationError

    try:
        return Pool(tuple(OpenSource(Source(path=path, columns=columns, split=split)) for path in paths))
    except ValidationError as error:
        raise ConfigError(f"--columns: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
