"""Rendered trees as bytes, in memory and on disk: a record for each tree, and files of arrays that hold the records.

A record is

    size      of what follows, in bytes
    about     all that a tree says but its tokens, as JSON; of each segment the number of its tokens
    ids       of all segments, one after the other

It says nothing of where its example stands, so the same conversation has the same record in every file.

A *flat file* holds arrays and a JSON object, is read in parts and checked by hashes:

    array │ array │ ... │ JSON: what the caller says of them; type, shape, place and SHA-256 of each │ its size and hash

The end is written last and checked first, so a file that is cut or was never finished is known at once. An array is
checked when it is read as a whole. Parts are read by position and not mapped: no page of them counts as memory of this
process, and a file that shrinks is an error and no signal.
"""

import hashlib
import json
import os
import struct
from array import array
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.data.forest import Segment, Tree
from preceptor.errors import DataError

DIGEST_BYTES = 16
_SIZE = struct.Struct("<I")  # of a record's `about`
_END = struct.Struct("<Q32s8s")  # of a flat file
_MAGIC = b"FLATv002"
_OPEN_FILES = 64


def encode_tree(tree: Tree, with_texts: bool = False) -> bytes:
    """The record of a tree that has not been weighed (dataset.py)."""
    segments = [
        (s.kind == "target", s.parent, len(s.ids), s.message, s.weight, s.text if with_texts else "")
        for s in tree.segments
    ]
    about = json.dumps([segments, tree.switched, tree.left_out], separators=(",", ":")).encode()
    ids = array("I", chain.from_iterable([s.ids for s in tree.segments]))
    return _SIZE.pack(len(about)) + about + ids.tobytes()


def decode_tree(record: bytes, source: str) -> Tree:
    """The tree of a record, as the example at `source`."""
    end = _SIZE.size + _SIZE.unpack_from(record)[0]
    described, switched, left_out = json.loads(record[_SIZE.size : end].decode())
    array_of_ids = array("I")
    array_of_ids.frombytes(record[end:])
    ids, at, segments = array_of_ids.tolist(), 0, []
    for is_target, parent, length, message, weight, text in described:
        own = tuple(ids[at : at + length])
        segments.append(Segment("target" if is_target else "context", own, parent, text, weight, message=message))
        at += length
    return Tree(source, tuple(segments), tuple((k, value) for k, value in switched), tuple(left_out))


def digest(record: bytes) -> bytes:
    """16 bytes by which a damaged record is known; for records without texts the same where the tree is the same."""
    return hashlib.blake2b(record, digest_size=DIGEST_BYTES).digest()


# Flat files ----------------------------------------------------------------------------------------------------------


class FlatFile:
    """A flat file, opened for reading. Raises DataError for one that is cut, damaged at its end, or not there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                end = file.seek(0, os.SEEK_END) - _END.size
                file.seek(max(0, end))
                size, sha256, magic = _END.unpack(file.read(_END.size))
                if magic != _MAGIC or size > end:
                    raise ValueError
                file.seek(end - size)
                head = file.read(size)
        except (OSError, ValueError, struct.error):
            raise self._damaged("it is cut or cannot be read") from None
        if hashlib.sha256(head).digest() != sha256:
            raise self._damaged("its end is not what was written")
        found = json.loads(head)
        self.about: Mapping[str, Any] = found["about"]
        self.arrays: Mapping[str, tuple[str, list[int], int, str]] = found["arrays"]  # type, shape, place, SHA-256
        if end - size != found["num_bytes"]:
            raise self._damaged("it is cut")
        self.num_bytes = end + _END.size

    def load(self, name: str) -> np.ndarray:
        """A whole array. Raises DataError if it is damaged."""
        kind, shape, offset, sha256 = self.arrays[name]
        array = np.empty(shape, kind)
        view, at = _bytes_of(array), 0
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                while at < len(view) and (num := file.readinto(view[at:])):
                    at += num
        except OSError as error:
            raise self._damaged(str(error)) from None
        if hashlib.sha256(view).hexdigest() != sha256:
            raise self._damaged(f"its {name} are not what was written")
        return array

    def rows(self, name: str, start: int, end: int) -> np.ndarray:
        """Some rows of an array. Raises DataError if they cannot be read."""
        kind, shape, offset, _ = self.arrays[name]
        width = int(np.dtype(kind).itemsize * np.prod(shape[1:], dtype=np.int64))
        try:
            file = _open(self.path)  # held while it is read: another thread may close all that are kept
            found = os.pread(file.number, (end - start) * width, offset + start * width)
        except OSError as error:
            raise self._damaged(f"cannot be read: {error.strerror or error}") from None
        if len(found) != (end - start) * width:
            raise self._damaged("it is cut")
        return np.frombuffer(found, kind).reshape(end - start, *shape[1:])

    def _damaged(self, how: str) -> DataError:
        return DataError(f"{self.path}: {how}")


class _Descriptor:
    """A file that is open for reading until nothing refers to it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)


@lru_cache(maxsize=_OPEN_FILES)
def _open(path: Path) -> _Descriptor:
    """The files that were read last are kept open."""
    return _Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def close_files() -> None:
    """To be called when a file is replaced or removed that may be open for reading."""
    _open.cache_clear()


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(array.data).cast("B") if array.size else memoryview(b"")


def write_flat(path: Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises OSError, and TypeError for an `about` that is no JSON."""
    described = {}
    with path.open("xb") as file:
        for name, array in arrays.items():
            array = np.ascontiguousarray(array)
            content = _bytes_of(array)
            described[name] = (array.dtype.str, list(array.shape), file.tell(), hashlib.sha256(content).hexdigest())
            file.write(content)
        num_bytes = file.tell()
        head = json.dumps({"about": about, "arrays": described, "num_bytes": num_bytes}).encode()
        file.write(head)
        file.write(_END.pack(len(head), hashlib.sha256(head).digest(), _MAGIC))
