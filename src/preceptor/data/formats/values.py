"""Rows of a file and the values in them: texts, lists and objects, which may be written as JSON strings."""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from preceptor.data.formats.nulls import ParsedObject
from preceptor.data.rejections import CODES
from preceptor.errors import short


class Unreadable(Exception):
    """What is wrong with a row: a code and a sentence. `to_example` makes it a Rejection."""

    def __init__(self, code: str, message: str) -> None:
        assert code in CODES, code
        super().__init__(message)
        self.code = code


RawRecord = Mapping[str, Any]
Row = dict[str, Any] | Unreadable
TableRows = Iterator[tuple[str, Row]]
"""The rows of a file, each with its place, "file:line" or "file:row N"; Unreadable: what is wrong with this one."""
Columns = Collection[str] | None
"""The columns to read; None: all."""

_DEEPEST = 100  # lists and objects in one another; deeper ones end in errors of the libraries that go through them
_LARGEST_DIGITS = 300  # of an integer; larger ones are no number to any other program


class JsonReader:
    """JSON text -> values. Tells of keys given twice and of huge integers, of which Python's own reader makes less."""

    def __init__(self) -> None:
        self._problem: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._integer)

    def read(self, text: str) -> Any:
        """The only value of a text. Raises JSONDecodeError, RecursionError, and Unreadable for what the class names."""
        self._problem = None
        return self._checked(self._decoder.decode(text))

    def read_next(self, text: str, at: int) -> tuple[Any, int]:
        """The value that begins at `at`, or an Unreadable in its place, and where it ends. Raises as `json` does."""
        self._problem = None
        value, end = self._decoder.raw_decode(text, at)
        return (value if self._problem is None else Unreadable("unreadable", self._problem)), end

    def _checked(self, value: Any) -> Any:
        if self._problem is not None:
            raise Unreadable("unreadable", self._problem)
        return value

    def _object(self, pairs: list[tuple[str, Any]]) -> ParsedObject:
        made = ParsedObject(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self._problem = f"the key {short(twice)} is given twice in one object; keep one of them"
        return made

    def _integer(self, text: str) -> int:
        if len(text) <= _LARGEST_DIGITS:
            return int(text)
        self._problem = f"an integer of {len(text):,} digits; write it as a string"
        return 0


_reader = JsonReader()


def text_in(row: RawRecord, key: str) -> str:
    """The row's text under `key`, "" if there is none. Raises Unreadable for anything but a text."""
    value = row.get(key, "")
    if not isinstance(value, str):
        raise Unreadable("not_text", f"{key} is {short(value)}; it must be a string")
    return value


def parsed(value: Any) -> Any:
    """A list or object that is written as a JSON string, parsed; anything else as it is.

    Nulls in it are meant: its objects are plain ones. Raises Unreadable for what `JsonReader` tells of.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = _plain(_reader.read(value))
        except (json.JSONDecodeError, RecursionError):
            return value
        check_values(value, "")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def check_values(value: Any, where: str, depth: int = 0) -> None:
    """Raises Unreadable for half of a surrogate pair, which JSON can spell and no tokenizer can read, for numbers that
    are none, and for what is nested too deeply."""
    if isinstance(value, str):
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError as error:
            half = f"{value[error.start]!r} at character {error.start}"
            raise Unreadable(
                "broken_character", f"{where or 'a key'} holds half of a surrogate pair ({half}); fix or remove it"
            ) from None
    elif isinstance(value, dict):
        _check_depth(where, depth)
        for key, inner in value.items():
            if not (isinstance(key, str) and key.isascii()):
                check_values(key, where)
            if not (isinstance(inner, str) and inner.isascii()):  # most are, and a call for each takes its time
                check_values(inner, f"{where}.{key}" if where else str(key), depth + 1)
    elif isinstance(value, list):
        _check_depth(where, depth)
        for index, inner in enumerate(value):
            check_values(inner, f"{where}[{index}]", depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise Unreadable("unreadable", f"{where or 'the value'} is {value}, which is no number of JSON; write null")


def _check_depth(where: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise Unreadable("unreadable", f"{short(where)} is nested more than {_DEEPEST} deep")
