"""Text files -> rows: JSON lines, JSON and CSV, a piece at a time, so that memory does not grow with the file.

Every row comes with its source: for JSON lines and CSV "file:line", the line on which it begins; for JSON, whose rows
need not have lines of their own, "file:row N", counted from 1. A file that cannot be read is a DataError that says
where, since more than one row may be damaged.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO, cast

from preceptor.config import ROW_KEYS
from preceptor.data.formats.remote_files import RemoteFile
from preceptor.data.formats.values import JsonReader, Row, TableRows, Unreadable, check_names, reader
from preceptor.errors import DataError, short

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

_UNPACKING: dict[str, Callable[[IO[bytes]], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_PIECE_CHARACTERS = 1 << 20
_LONGEST_LINE_CHARACTERS = 1 << 26
_LONGEST_CELL_CHARACTERS = 2**31 - 1  # the csv module's own limit is 131,072, less than a long conversation


def suffix_of(file: Path | RemoteFile) -> str:
    """`.jsonl` of x.jsonl and of x.jsonl.gz."""
    return (file.with_suffix("") if file.suffix.lower() in COMPRESSED else file).suffix.lower()


@contextmanager
def _opened(file: Path | RemoteFile) -> Iterator[IO[bytes]]:
    """The content of a file, decompressed."""
    suffix = file.suffix.lower()
    with file.open("rb") as packed:
        if suffix == ".zst":
            import pyarrow as pa

            yield io.BufferedReader(pa.input_stream(packed, compression="zstd"))
        elif suffix in _UNPACKING:
            with _UNPACKING[suffix](packed) as content:
                yield cast(IO[bytes], content)
        else:
            yield packed


@contextmanager
def open_text(file: Path | RemoteFile, name: str, newline: str | None = None) -> Iterator[TextIO]:
    """UTF-8, with or without a byte-order mark; a name that ends in one of COMPRESSED is decompressed.

    Whatever goes wrong below the format, also later while it is read, becomes a DataError.
    """
    try:
        with _opened(file) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeDecodeError:
        raise _not_utf8(file, name) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{name}: cannot be read: {error}") from None


def _not_utf8(file: Path | RemoteFile, name: str) -> DataError:
    """Names the line, which the error of a decoder that sees a piece of the file does not know. A pipe is past it."""
    if isinstance(file, Path) and not file.is_file():
        return DataError(f"{name}: not UTF-8 text; convert it to UTF-8")
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with _opened(file) as content:
        while True:
            piece = content.read(_PIECE_CHARACTERS)
            if line == 1 and piece.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return DataError(f"{name}: UTF-16 text, not UTF-8; convert it, as by `iconv -f UTF-16 -t UTF-8`")
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                bad = error.object[error.start : error.start + 1]
                guess = bad.decode("cp1252", errors="replace")
                latin = f", {guess!r} in Windows-1252" if guess.isalpha() else ""
                how = ", as by `iconv -f CP1252 -t UTF-8`, if that is what it is" if latin else ""
                return DataError(f"{name}:{line}: not UTF-8 text (byte 0x{bad.hex()}{latin}); convert it to UTF-8{how}")
            line += piece.count(b"\n")
            if not piece:
                return DataError(f"{name}: not UTF-8 text; convert it to UTF-8")


def jsonl_lines(file: Path | RemoteFile, name: str) -> Iterator[tuple[str, str]]:
    """The lines, each with its place and for `parse_line`; blank ones are passed over."""
    with open_text(file, name) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.isspace():
                yield f"{name}:{number}", line


def jsonl_rows(file: Path | RemoteFile, name: str) -> TableRows:
    """One JSON object a line."""
    for place, line in jsonl_lines(file, name):
        yield place, parse_line(line, place)


def parse_line(line: str, source: str) -> Row:
    """Raises DataError for what is no JSON object."""
    try:
        row = reader.read(line)
    except Unreadable as error:
        return error
    except json.JSONDecodeError as error:
        helps = "fix or delete the line (a cut-off last line often means that the file was not written to its end)"
        if line.startswith("[") or line.strip() == "{":  # the beginning of a value over several lines
            helps = "write each example on one line; or name the file .json, which may hold a list of examples"
        raise DataError(
            f"{source}: broken JSON: {_said(error)} at column {error.colno}. Each line must be one JSON object; {helps}"
        ) from None
    except RecursionError:
        return Unreadable("unreadable", "the JSON is nested too deeply to be read")
    if isinstance(row, list) and row and isinstance(row[0], dict):
        helps = "name a file that holds a list of examples .json"
        if {"role", "from"} & row[0].keys():
            helps = 'write its messages as {"messages": [...]}'
        raise DataError(f"{source}: an example must be a JSON object, found list: {helps}")
    return _object(row, source)


def _said(error: json.JSONDecodeError) -> str:
    """Its message, without the words that a place should follow."""
    return re.sub(r"( starting)? at$", "", error.msg)


def json_rows(file: Path | RemoteFile, name: str) -> TableRows:
    """A list of objects, an object that holds one such list, or, for many files named .json are that, JSON lines."""
    with open_text(file, name) as text:
        lines = (line.lstrip() for line in iter(lambda: text.readline(_LONGEST_LINE_CHARACTERS), "") if line.strip())
        first, second = next(lines, ""), next(lines, "")
    if first.startswith("{") and _is_row(first, second):
        return jsonl_rows(file, name)
    return _streamed_rows(file, name)


def _is_row(line: str, following: str) -> bool:
    """Whether a line is a whole JSON object, and not one that holds the rows in a list."""
    try:
        value = reader.read(line)
    except (json.JSONDecodeError, RecursionError):
        return False
    except Unreadable:  # an object all the same
        return True
    return following.startswith("{") or any(key in ROW_KEYS for key in value)


def _streamed_rows(file: Path | RemoteFile, name: str) -> TableRows:
    with open_text(file, name) as text:
        stream = _JsonStream(text, name)
        opening = stream.peek()
        if opening == "[":
            for number, row in enumerate(stream.items(), start=1):
                yield f"{name}:row {number}", _object(row, f"{name}:row {number}")
        elif opening == "{":
            yield from _rows_in_object(stream, name)
        elif opening:
            raise stream.broken("a JSON file must hold a list of objects, or an object with one such list")
        if stream.peek():
            raise stream.broken("there is more after the end of the JSON value; for JSON lines name the file .jsonl")


def _rows_in_object(stream: "_JsonStream", name: str) -> TableRows:
    """The rows of the one list of objects in an object; what else the object holds is not data."""
    found: str | None = None
    for key in stream.names():
        if key in ROW_KEYS:
            raise stream.broken(
                f"the file is one object with {key!r}: a single example. Write it on one line, as .jsonl"
            )
        if stream.peek() != "[":
            stream.value()
            continue
        for number, row in enumerate(stream.items(), start=1):
            if found != key and not isinstance(row, dict | Unreadable):
                continue  # a list of something else
            if number == 1 and found is not None:
                raise stream.broken(
                    f"the object has two lists, {found!r} and {key!r}; keep the one that holds the examples"
                )
            found = key
            yield f"{name}:row {number}", _object(row, f"{name}:row {number}")
    if found is None:
        raise DataError(
            f"{name}: the object in the file holds no list of objects; write the examples as a list, or as .jsonl"
        )


def _object(row: Any, source: str) -> Row:
    if not isinstance(row, dict | Unreadable):
        raise DataError(f"{source}: an example must be a JSON object, found {type(row).__name__}")
    return row


class _JsonStream:
    """Reads a JSON text value by value: the part of it in memory is one piece, or one value if that is longer."""

    def __init__(self, text: TextIO, name: str) -> None:
        self._text, self._name = text, name
        self._buffer, self._at, self._lines_before, self._ended = "", 0, 0, False
        self._reader = JsonReader()

    def _more(self) -> bool:
        """Drop what is read and read on, at least as much again as is left; False at the end."""
        if self._ended:
            return False
        self._lines_before += self._buffer.count("\n", 0, self._at)
        rest = self._buffer[self._at :]
        piece = self._text.read(max(_PIECE_CHARACTERS, len(rest)))
        self._buffer, self._at, self._ended = rest + piece, 0, not piece
        return not self._ended

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def take(self, expected: str) -> str:
        found = self.peek()
        if not found or found not in expected:
            wanted = " or ".join(map(repr, expected))
            raise self.broken(
                f"expected {wanted}, found {found!r}" if found else f"the file ends where {wanted} should be"
            )
        self._at += 1
        return found

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._reader.read_next(self._buffer, self._at)
            except json.JSONDecodeError as error:
                # Cut off at the end of the piece, or broken? What is broken well before the end stays so.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._buffer) - 16
                if not cut or self._ended:
                    self._at = min(error.pos, len(self._buffer))
                    raise self.broken(_said(error)) from None
            except RecursionError:
                raise self.broken("JSON nested too deeply to be read") from None
            else:
                if end < len(self._buffer) or self._ended:  # a number at the end of a piece may go on
                    self._at = end
                    return value
            self._more()

    def items(self) -> Iterator[Any]:
        """The items of the list that comes next."""
        for _ in self._parts("[]"):
            yield self.value()

    def names(self) -> Iterator[str]:
        """The keys of the object that comes next; the caller reads the value before it asks for another key."""
        for _ in self._parts("{}"):
            if self.peek() != '"':
                raise self.broken("expected a key in double quotes")
            key = self.value()
            self.take(":")
            yield key

    def _parts(self, brackets: str) -> Iterator[None]:
        """Once for each part between these brackets, which the caller reads."""
        self.take(brackets[0])
        if self.peek() == brackets[1]:
            self.take(brackets[1])
            return
        yield
        while self.take("," + brackets[1]) == ",":
            yield

    def broken(self, message: str) -> DataError:
        line = self._lines_before + self._buffer.count("\n", 0, self._at) + 1
        return DataError(f"{self._name}:{line}: broken JSON: {message}. Fix the file or write it again")


def csv_rows(file: Path | RemoteFile, name: str) -> TableRows:
    """Rows under a header line, separated by commas, or by tabs in a .tsv; a quoted cell may hold line ends."""
    header: list[str] = []
    num_rows = 0
    for number, cells in _csv_lines(file, name):
        if not header:
            header = csv_header(cells, name)
        elif len(cells) != len(header):
            raise DataError(
                f"{name}:{number}: {len(cells)} cells under a header of {len(header)}; a cell with a separator, a "
                "quotation mark or a line end in it must be quoted"
            )
        else:
            num_rows += 1
            yield f"{name}:{number}", dict(zip(header, cells, strict=True))
    if header and not num_rows:
        raise DataError(f"{name}: there is no row under the header {short(','.join(header))}; it needs at least one")


def csv_columns(file: Path | RemoteFile, name: str) -> list[str]:
    """The names in the header; [] if the file is empty."""
    return next((csv_header(cells, name) for _, cells in _csv_lines(file, name)), [])


def csv_header(cells: list[str], name: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    check_names(header, f"{name}:1")
    return header


def _csv_lines(file: Path | RemoteFile, name: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(_LONGEST_CELL_CHARACTERS)
    with open_text(file, name, newline="") as text:
        tabs = suffix_of(file) == ".tsv"
        reader = csv.reader(text, delimiter="\t" if tabs else ",", strict=True)
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{name}:{number}: broken CSV: {error}; fix the quotation marks") from None
            if cells is None:
                return
            if cells:
                yield number, cells
