"""Durable files: written whole or not at all, JSON and JSON lines, and hashes."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preceptor.errors import CheckpointError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises CheckpointError, with the path, where writing fails inside."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` for a new file or folder, which is renamed to `path` when the block ends.

    It is flushed to the disk first, so that after a crash `path` holds the old content or the new, never a part. Where
    the block raises, nothing is left. A folder can only replace an empty one. Raises CheckpointError.
    """
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)  # of a process that was killed
    try:
        with writing(path):
            yield partial
            _flush(partial)
            partial.replace(path)
            _sync(path.parent)
    finally:
        _remove(partial)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Raises CheckpointError."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Raises CheckpointError."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """One line for each value, written as they come. Raises CheckpointError."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as lines:
        for value in values:
            lines.write(json.dumps(value, ensure_ascii=False) + "\n")


def append_line(path: Path, value: Any) -> None:
    """Add one JSON line, flushed: a reader sees whole lines while the run goes on. Raises CheckpointError."""
    with writing(path), path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(value, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no file. Raises CheckpointError for anything else."""
    return _parsed(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """One JSON object for each line; [] where there is no file.

    A last line without its line end is still being written and is left out. Raises CheckpointError as `read_json`.
    """
    if not path.is_file():
        return []
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    return [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def sha256_of(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: broken JSON: {error.msg}; was the file changed by hand?") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {type(value).__name__}, not an object; was the file changed by hand?")
    return value


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flush a file, or a folder and everything in it, to the disk."""
    for inner in path.iterdir() if path.is_dir() else ():
        _flush(inner)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
