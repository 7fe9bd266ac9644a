"""Trees as records: the bytes in which rendered trees are kept, in memory and on disk.

    head      5 numbers: segments, bytes of the texts, of the rest, and whether there are weights and texts
    segments  kind, parent, number of tokens and message of each; -1 stands for none
    weights   of each segment, where one is not 1
    ids       of all segments, one after the other
    texts     of the segments, where they are kept
    rest      what the template's switch was set to and what it left out, as JSON, where there is any

A record says nothing of where its example stands, so the same conversation has the same record in every file.
"""

import hashlib
import json
import struct
from array import array
from itertools import chain

from preceptor.data.forest import Segment, Tree

DIGEST_BYTES = 16
_HEAD = struct.Struct("<5i")
_KINDS = ("context", "target")


def encode(tree: Tree, with_texts: bool = False) -> bytes:
    """The record of a tree that has not been weighed (mixture.py)."""
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


def decode(record: bytes, source: str) -> Tree:
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
