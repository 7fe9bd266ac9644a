"""Rows of a file and the values in them: texts, lists and objects, which may be written as JSON strings."""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

RawRecord = Mapping[str, Any]
TableRows = Iterator[tuple[str, dict[str, Any]]]
"""The rows of a file, each with its place, "file:line" or "file:row N"."""
Columns = Collection[str] | None
"""The columns to read; None: all."""


class Unreadable(Exception):
    """Raised inside a row's reading with a code and a sentence; `to_example` makes it a Rejection."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def text_in(row: RawRecord, key: str) -> str:
    """The row's text under `key`, "" if there is none. Raises Unreadable for anything but a text."""
    value = row.get(key, "")
    if not isinstance(value, str):
        raise Unreadable("not_text", f"{key} is {short(value)}; it must be a string")
    return value


def parsed(value: Any) -> Any:
    """A list or object that is written as a JSON string, parsed; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value


def check_characters(value: Any, where: str) -> None:
    """Raises Unreadable for half of a surrogate pair, which JSON can spell and no tokenizer can read."""
    if isinstance(value, str):
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError as error:
            half = f"{value[error.start]!r} at character {error.start}"
            raise Unreadable(
                "broken_character", f"{where or 'a key'} holds half of a surrogate pair ({half}); fix or remove it"
            ) from None
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not (isinstance(key, str) and key.isascii()):
                check_characters(key, where)
            if not (isinstance(inner, str) and inner.isascii()):  # most are, and a call for each takes its time
                check_characters(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            check_characters(inner, f"{where}[{index}]")


def short(value: object) -> str:
    """The value as it may be shown in a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
