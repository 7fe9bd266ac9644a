"""Rendered trees as bytes, in memory and on disk: a record for each tree, and files of arrays that hold the records.

A record is

    head      5 numbers: segments, bytes of the texts, of the rest, and whether there are weights and texts
    segments  kind, parent, number of tokens and message of each; -1 stands for none
    weights   of each segment, where one is not 1
    ids       of all segments, one after the other
    texts     of the segments, where they are kept
    rest      what the template's switch was set to and what it left out, as JSON, where there is any

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
from collections import OrderedDict
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.data.forest import Segment, Tree
from preceptor.errors import DataError

DIGEST_BYTES = 16
_HEAD = struct.Struct("<5i")
_END = struct.Struct("<Q32s8s")  # of a flat file
_MAGIC = b"FLATv001"
_OPEN_FILES = 64


def encode_tree(tree: Tree, with_texts: bool = False) -> bytes:
    """The record of a tree that has not been weighed (dataset.py)."""
    segments = tree.segments
    about = array("i")
    for s in segments:
        kind, parent = int(s.kind == "target"), -1 if s.parent is None else s.parent
        about.extend((kind, parent, len(s.ids), -1 if s.message is None else s.message))
    weighed = any(s.weight != 1.0 for s in segments)
    texts = json.dumps([s.text for s in segments]).encode() if with_texts else b""
    rest = json.dumps([tree.switched, tree.left_out]).encode() if tree.switched or tree.left_out else b""
    parts = [_HEAD.pack(len(segments), len(texts), len(rest), weighed, with_texts), about.tobytes()]
    if weighed:
        parts.append(array("d", [s.weight for s in segments]).tobytes())
    parts.append(array("I", chain.from_iterable([s.ids for s in segments])).tobytes())
    return b"".join([*parts, texts, rest])


def decode_tree(record: bytes, source: str) -> Tree:
    """The tree of a record, as the example at `source`."""
    num, num_text_bytes, num_rest_bytes, weighed, with_texts = _HEAD.unpack_from(record)
    at = _HEAD.size
    about, weights, ids = array("i"), array("d", [1.0]) * num, array("I")
    about.frombytes(record[at : at + 16 * num])
    at += 16 * num
    if weighed:
        weights = array("d")
        weights.frombytes(record[at : at + 8 * num])
        at += 8 * num
    end = len(record) - num_text_bytes - num_rest_bytes
    ids.frombytes(record[at:end])
    texts: list[str] = json.loads(record[end : end + num_text_bytes]) if with_texts else [""] * num
    all_ids, at = ids.tolist(), 0
    segments = []
    for k in range(num):
        kind, parent, length, message = about[4 * k : 4 * k + 4]
        segments.append(
            Segment(
                "target" if kind else "context",
                tuple(all_ids[at : at + length]),
                None if parent < 0 else parent,
                texts[k],
                weights[k],
                message=None if message < 0 else message,
            )
        )
        at += length
    if not num_rest_bytes:
        return Tree(source, tuple(segments))
    switched, left_out = json.loads(record[len(record) - num_rest_bytes :])
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
        self._arrays: Mapping[str, tuple[str, list[int], int, str]] = found["arrays"]
        if end - size != found["num_bytes"]:
            raise self._damaged("it is cut")
        self.num_bytes = end + _END.size

    @property
    def names(self) -> Collection[str]:
        return self._arrays.keys()

    def load(self, name: str) -> np.ndarray:
        kind, shape, offset, sha256 = self._arrays[name]
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
        kind, shape, offset, _ = self._arrays[name]
        width = int(np.dtype(kind).itemsize * np.prod(shape[1:], dtype=np.int64))
        found = _files.read(self.path, offset + start * width, (end - start) * width)
        if len(found) != (end - start) * width:
            raise self._damaged("it is cut")
        return np.frombuffer(found, kind).reshape(end - start, *shape[1:])

    def _damaged(self, how: str) -> DataError:
        return DataError(f"{self.path}: {how}")


class _OpenFiles:
    """The files that were read last, kept open."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[Path, int] = OrderedDict()
        self._process = os.getpid()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Raises DataError where the file is not there; fewer bytes where it ends before."""
        if self._process != os.getpid():  # forked: a descriptor that its parent closes stays open here
            self._descriptors.clear()
            self._process = os.getpid()
        try:
            descriptor = self._descriptors.pop(path, None)
            if descriptor is None:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._descriptors[path] = descriptor
            if len(self._descriptors) > _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            return os.pread(descriptor, size, offset)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None

    def forget(self, path: Path) -> None:
        """Close a file that is replaced."""
        descriptor = self._descriptors.pop(path, None)
        if descriptor is not None and self._process == os.getpid():
            os.close(descriptor)


_files = _OpenFiles()


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(array.data).cast("B") if array.size else memoryview(b"")


def forget(path: Path) -> None:
    """To be called when a file is replaced or removed that may be open for reading."""
    _files.forget(path)


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
