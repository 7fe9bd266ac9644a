"""The trees that a run takes of one table, by their number, and what was counted of its examples.

Memory holds 8 bytes for each tree, its tokens and its trained tokens. All else is an array in the cache, or in memory
where there is none:

    pointers   for each tree: which portion holds its record (or the table's own records: those of examples that were
               shortened, and all without a cache), where, how many bytes; the number of its row; which part of how many
    digests    of each record: a run's fingerprint is made from them, and a record that is read is compared with its own
    targets    tokens of each target, and `num_targets` how many each tree has
"""

import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from preceptor.data.cache import Cache
from preceptor.data.examples import Example, Rejection
from preceptor.data.forest import Tree, has_branches, leaf_path_lengths, turn_lengths
from preceptor.data.records import DIGEST_BYTES, FlatFile, decode_tree, digest, encode_tree
from preceptor.data.sources import Entry
from preceptor.data.truncation import Fitter, Shortened
from preceptor.data.workers import Targets
from preceptor.errors import DataError

_PLACE = re.compile(r"(:|:row )(\d+)(?: \(part (\d+) of (\d+)\))?")
_POINTER = 6  # numbers of a tree's pointer: portion, offset, size, row, part, parts
_COLUMNS = {  # of int32, int64 and uint8
    **dict.fromkeys(("lengths", "trained", "targets", "num_targets"), "i"),
    **dict.fromkeys(("samples", "pointers"), "q"),
    **dict.fromkeys(("branches", "digests", "records"), "B"),
}
_OWN = -1  # instead of the number of a portion: the table's own records


class StoredRecord(NamedTuple):
    """Where the record of a tree is; of no bytes for an example that is rejected."""

    portion: str
    num_portion_bytes: int
    offset: int
    size: int
    digest: bytes


class RenderedExample(NamedTuple):
    """An entry, what of it was rendered (a Rejection is not), the outcome, and where its record is kept, if it is."""

    entry: Entry
    content: Example | Rejection
    outcome: Tree | Rejection
    stored: StoredRecord | None


@dataclass(frozen=True, eq=False)
class MemoryArrays:
    """Arrays by name, as in a FlatFile, but held in memory, and what is said of them."""

    about: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]

    def load(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def rows(self, name: str, start: int, end: int) -> np.ndarray:
        return self.arrays[name][start:end]


class TableTrees:
    """Trees of a table. Raises DataError where the cache was altered since it was written."""

    def __init__(self, name: str, arrays: FlatFile | MemoryArrays, portion_path: Callable[[str], Path] | None) -> None:
        """portion_path: the file of a portion; None where all records are the table's own."""
        self.name, self.about = name, arrays.about
        self._arrays, self._portion_path = arrays, portion_path
        self._portions: dict[int, FlatFile] = {}
        self._kept = {name: arrays.load(name) for name in ("lengths", "trained")}

    @cached_property
    def rejections(self) -> list[Rejection]:
        return [Rejection(self.name + place, code, said) for place, code, said in self.about["rejections"]]

    @classmethod
    def cached(cls, name: str, cache: Cache, key: str) -> "TableTrees | None":
        """What the cache has; None where it has nothing, or what it has is damaged, and then removed."""
        file = cache.table(key)
        try:
            return None if file is None else cls(name, file, cache.portion_path)
        except DataError as error:
            cache.damaged(cache.table_path(key), error)
            return None

    def __len__(self) -> int:
        return len(self._kept["lengths"])

    def tree(self, number: int) -> Tree:
        portion, offset, size, row, part, parts = self._arrays.rows("pointers", number, number + 1)[0].tolist()
        arrays = self._arrays if portion == _OWN else self._portion(portion)
        record = arrays.rows("records", offset, offset + size).tobytes()
        if digest(record) != self._arrays.rows("digests", number, number + 1).tobytes():
            assert isinstance(arrays, FlatFile), "records in memory do not change"
            raise _removed(arrays.path)
        source = f"{self.name}{self.about['place']}{row}" + (f" (part {part} of {parts})" if parts else "")
        return decode_tree(record, source)

    def load(self, name: str) -> np.ndarray:
        """One of the arrays, as a whole."""
        return self._kept[name] if name in self._kept else self._arrays.load(name)

    def _portion(self, number: int) -> FlatFile:
        if number not in self._portions:
            if len(self._portions) >= 256:
                self._portions.clear()
            assert self._portion_path is not None
            path = self._portion_path(self.about["portions"][number])
            try:
                self._portions[number] = FlatFile(path)
            except DataError:
                raise _removed(path) from None
        return self._portions[number]


def _removed(path: Path) -> DataError:
    """The error to raise for a file of the cache that is damaged; it is removed."""
    with suppress(OSError):
        path.unlink()
    return DataError(f"{path}: was altered since it was written; the same command renders it again")


class TableBuilder:
    """Takes the rendered examples of a table and makes its TableTrees."""

    def __init__(self, name: str, fitter: Fitter) -> None:
        self._name, self._fitter, self._counts = name, fitter, fitter.renderer.new_counts()
        self._columns = {name: array(kind) for name, kind in _COLUMNS.items()}
        self._portions: dict[str, tuple[int, int]] = {}  # number, bytes
        self._formats: Counter[str] = Counter()
        self._rejections: list[tuple[str, str, str]] = []
        self._shortened = Shortened()
        self._ids: set[int] = set()
        self._place = ""

    def add(self, example: RenderedExample) -> None:
        self._formats[example.entry.format] += 1
        if example.stored is not None:
            portion = (len(self._portions), example.stored.num_portion_bytes)
            self._portions.setdefault(example.stored.portion, portion)
        self._fitter.shortened = self._shortened
        fitted = self._fitter.fit(example.content, example.outcome)
        if isinstance(fitted, Rejection):
            self._rejections.append((fitted.source.removeprefix(self._name), fitted.code, fitted.message))
            return
        for own, tree in fitted:
            self._counts.add(own, tree)
            self._add_tree(tree, example.stored if tree is example.outcome else None)

    def _add_tree(self, tree: Tree, stored: StoredRecord | None) -> None:
        columns = self._columns
        columns["lengths"].append(tree.num_tokens)
        columns["trained"].append(tree.num_trained)
        columns["samples"].append(num_sample_tokens(tree, self._fitter.renderer.targets))
        targets = [len(segment.ids) for segment in tree.segments if segment.kind == "target"]
        columns["targets"].extend(targets)
        columns["num_targets"].append(len(targets))
        columns["branches"].append(has_branches(tree))
        for segment in tree.segments:
            self._ids.update(segment.ids)
        match = _PLACE.fullmatch(tree.source.removeprefix(self._name))
        assert match, f"{tree.source}: no place in {self._name}"
        self._place = match[1]
        if stored is None:
            record = encode_tree(tree)
            stored = StoredRecord("", 0, len(columns["records"]), len(record), digest(record))
            columns["records"].frombytes(record)
            portion = _OWN
        else:
            portion, _ = self._portions[stored.portion]
        row, part, parts = (int(found or 0) for found in match.groups()[1:])
        columns["pointers"].extend((portion, stored.offset, stored.size, row, part, parts))
        columns["digests"].frombytes(stored.digest)

    def built(self) -> MemoryArrays:
        """All that was added."""
        about = {
            "names": [self._name],
            "num_trees": len(self._columns["lengths"]),
            "place": self._place,
            "portions": list(self._portions),
            "portion_bytes": [num_bytes for _, num_bytes in self._portions.values()],
            "formats": dict(self._formats),
            "rejections": self._rejections,
            "counts": self._counts.of_table(self._name),
            "shortened": asdict(self._shortened),
        }
        arrays = {name: np.frombuffer(column, column.typecode) for name, column in self._columns.items()}
        arrays["pointers"] = arrays["pointers"].reshape(-1, _POINTER)
        arrays["digests"] = arrays["digests"].reshape(-1, DIGEST_BYTES)
        return MemoryArrays(about, {**arrays, "token_ids": np.array(sorted(self._ids), np.int64)})

    def finish(self, cache: Cache | None, key: str | None) -> TableTrees:
        """All that was added; written to the cache under the key where there are both."""
        built, file = self.built(), None
        if cache is not None and key is not None:
            file = cache.write(cache.table_path(key), built.about, built.arrays)
        return TableTrees(self._name, file or built, None if cache is None else cache.portion_path)


def num_sample_tokens(tree: Tree, targets: Targets) -> int:
    """Tokens of the tree as one sample for each turn; where prompts are trained too, for each of its conversations."""
    return sum(leaf_path_lengths(tree) if targets == "all" else map(sum, turn_lengths(tree)))
