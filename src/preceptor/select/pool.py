"""The pool of examples that a selection is made from: read as often as needed, and written again in part.

A kept example is written so that it trains exactly as before: as the row of the file if that reads back from JSON as
the same example; else (nulls of a Parquet column, renamed columns) in a form that does.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.config import Source
from preceptor.data.examples import Completion, Conversation, Document, Example, Message, Rejection
from preceptor.data.formats.rows import read_row
from preceptor.data.formats.values import JsonReader, Unreadable
from preceptor.data.sources import OpenSource, UnreadRow, require_no_pipe
from preceptor.errors import ConfigError, DataError
from preceptor.files import replacing

AnsweredExample = Conversation | Completion


@dataclass(frozen=True, slots=True)
class Pool:
    """Sources whose examples are numbered 0, 1, 2, ..., in their order."""

    sources: tuple[OpenSource, ...]

    def examples(self) -> Iterator[AnsweredExample | Rejection]:
        """Each example as a conversation or completion, or as a Rejection. Raises DataError as `OpenSource.entries`."""
        for source in self.sources:
            for entry in source.entries():
                yield _answered(entry.example)

    def chosen(self, numbers: Collection[int]) -> Iterator[tuple[int, AnsweredExample]]:
        """The examples of these numbers, in order. Raises DataError if one of them can no longer be trained."""
        for number, example in enumerate(self.examples()):
            if number in numbers:
                yield number, _unchanged(example)

    def write(self, numbers: Collection[int], file: Path) -> None:
        """Write the examples of these numbers to `file` as JSON lines, in order; all or nothing.

        Raises DataError for an example that JSON cannot hold, CheckpointError if the file cannot be written.
        """
        with replacing(file) as partial, partial.open("w", encoding="utf-8") as lines:
            lines.writelines(f"{line}\n" for line in self._lines(numbers))

    def _lines(self, numbers: Collection[int]) -> Iterator[str]:
        number = 0
        for source in self.sources:
            for place, row in source.rows():
                if number in numbers:
                    example = _unchanged(_answered(UnreadRow("", place, row, source).entry().example))
                    assert not isinstance(row, Unreadable), "else it is a rejection"
                    yield line_of(row, example, source.source)
                number += 1
        if numbers and max(numbers) >= number:
            raise _changed(self.sources[-1].source.path)


def _answered(example: Example | Rejection) -> AnsweredExample | Rejection:
    if isinstance(example, Document):
        return Rejection(
            example.source,
            "no_assistant_message",
            "plain text has no prompt and answer; only conversations can be selected",
        )
    return example


def _unchanged(example: AnsweredExample | Rejection) -> AnsweredExample:
    if isinstance(example, Rejection):
        raise _changed(example.source)
    return example


def _changed(where: str) -> DataError:
    return DataError(f"{where}: the data changed while it was read; run the command again")


def line_of(row: dict[str, Any], example: AnsweredExample, source: Source) -> str:
    """One line of JSON that reads back as the example.

    Tried in turn: the row as it is; the row under the keys of `columns`; the example in our own keys.
    """
    renamed = {ours: row[theirs] for ours, theirs in source.columns.items() if theirs in row}
    for form in (row, renamed, row_of(example)):
        try:
            line = json.dumps(form, ensure_ascii=False)
        except (TypeError, ValueError):
            continue  # a date or bytes in some other column
        if form and read_row(JsonReader().read(line), example.source)[1] == example:
            return line
    raise DataError(f"{example.source}: has values that JSON does not have, so it cannot be written; fix them")


def row_of(example: AnsweredExample) -> dict[str, Any]:
    """The example as a row in our own keys."""
    if isinstance(example, Completion):
        return {"prompt": example.prompt, "completion": example.completion}
    messages = list(map(_message, example.messages))
    # Answers that are not trained though nothing in them says so: those of a prompt.
    asked = [k for k, m in enumerate(example.messages) if m.role == "assistant" and not m.train and m.weight > 0]
    num_asked = asked[-1] + 1 if asked else 0
    row: dict[str, Any] = {"prompt": messages[:num_asked], "completion": messages[num_asked:]}
    if not asked:
        row = {"messages": messages}
    if example.tools:
        row["tools"] = list(example.tools)
    if example.template_kwargs:
        row["chat_template_kwargs"] = dict(example.template_kwargs)
    return row


def _message(message: Message) -> dict[str, Any]:
    return dict(message.given) if message.weight == 1.0 else {**message.given, "weight": message.weight}


def open_pool(paths: Sequence[str], columns: dict[str, str], split: str | None) -> Pool:
    """The pool that a command line names. Raises ConfigError for unknown columns, and for a pipe."""
    from pydantic import ValidationError

    try:
        sources = tuple(OpenSource(Source(path=path, columns=columns, split=split)) for path in paths)
    except ValidationError as error:
        raise ConfigError(f"--columns: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    require_no_pipe(sources)
    return Pool(sources)
