"""What a source's path names: one or several tables, each a file or a split of a data set. Nothing is read here yet.

    a file             .jsonl, .ndjson, .json, .csv or .tsv, each also as .gz, .bz2, .xz, .zst, or .parquet;
                       `scholar:NAME`
    a folder           of such files, whatever lies deeper too; or one that Hugging Face `datasets` saved
    a pattern          files by `*`, `?`, `[...]`, and `**` for folders in one another
    a named pipe       of JSON lines or CSV, which is read once, as a stream (stream.py)
    a URL              s3://, gs://, hf:// ...: a file, a folder, a pattern; http(s)://: a file (remote_files.py)
    owner/name         a data set of the Hugging Face Hub, where no file or folder has that name

`split` chooses in a folder (train-00000-of-00002.parquet, train.jsonl, train/...), and must where the names of the
files tell of several splits, or of one that is not for training beside files of none, so that no test set is trained on
unseen.
"""

import difflib
import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from preceptor.config import Source
from preceptor.config.held import LiveSource
from preceptor.data.formats import arrow, text_files
from preceptor.data.formats.remote_files import RemoteFile, as_found, find_remote, protocol_of
from preceptor.data.formats.values import Columns, TableRows, Unreadable
from preceptor.errors import ConfigError, DataError
from preceptor.files import MEMORY
from preceptor.scholar import data_file


@dataclass(frozen=True)
class RecordList:
    """Records that a program holds, as JSON lines would have them; read again each time, so that a change is seen."""

    records: Sequence[Any]
    name: str

    def files(self) -> list[Path]:
        return []

    def identity(self, sha256_of: Callable[[Path], str]) -> list[str]:
        """By the content of the records, in their order."""
        return ["records", _sha256_of(self.records)]

    def columns(self) -> None:
        return None

    def num_rows(self) -> int:
        return len(self.records)

    def rows(self, wanted: Columns) -> TableRows:
        for number, record in enumerate(self.records, start=1):
            is_record = isinstance(record, Mapping)
            what = f"it is {type(record).__name__}, not a dict such as {{'messages': [...]}}"
            yield f"{self.name}:row {number}", dict(record) if is_record else Unreadable("unreadable", what)


def _sha256_of(values: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for value in values:
        found.update(repr(value).encode(errors="surrogatepass") + b"\n")  # to JSON a tuple is a list
    return found.hexdigest()


PACKAGED = "scholar:"

_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_SUFFIXES = (*_TEXT_SUFFIXES, ".parquet")
_UNREAD_PACKINGS = (".zip", ".lz4", ".br", ".7z", ".z", ".zstd", ".tar", ".tgz")
_TRAIN_SPLITS = ("train", "training")
_SPLITS = (*_TRAIN_SPLITS, "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation", "heldout")


@dataclass(frozen=True, slots=True)
class TableFile:
    """JSON lines, JSON, CSV or Parquet. is_pipe: it can be read once; to ask for its size or content would read it."""

    file: Path | RemoteFile
    name: str
    is_pipe: bool = False

    @property
    def _kind(self) -> str:
        return text_files.suffix_of(self.file)

    def files(self) -> list[Path]:
        return [self.file] if isinstance(self.file, Path) and not self.is_pipe else []

    def identity(self, sha256_of: Callable[[Path], str]) -> list[str] | None:
        if self.is_pipe:
            return None
        own = [sha256_of(self.file)] if isinstance(self.file, Path) else self.file.identity()
        return None if own is None else [self._kind, self.file.suffix.lower(), *own]

    def columns(self) -> Sequence[str] | None:
        if self._kind == ".parquet":
            with arrow.open_parquet(self.file, self.name) as parquet:
                return list(parquet.schema_arrow.names)
        is_csv = self._kind in (".csv", ".tsv") and not self.is_pipe
        return text_files.csv_columns(self.file, self.name) if is_csv else None

    def num_rows(self) -> int | None:
        if self._kind == ".parquet":
            with arrow.open_parquet(self.file, self.name) as parquet:
                return int(parquet.metadata.num_rows)
        if not isinstance(self.file, Path) or self.is_pipe or self.file.suffix.lower() not in (".jsonl", ".ndjson"):
            return None
        with self.file.open("rb") as pieces:
            return sum(piece.count(b"\n") for piece in iter(lambda: pieces.read(1 << 20), b""))

    def lines(self) -> Iterator[tuple[str, str]] | None:
        """Each row as its line spells it, for `text_files.parse_line`, with its place; None where rows are no lines."""
        return text_files.jsonl_lines(self.file, self.name) if self._kind in (".jsonl", ".ndjson") else None

    def rows(self, wanted: Columns) -> TableRows:
        if self._kind == ".parquet":
            return arrow.parquet_rows(self.file, self.name, wanted)
        read = {".json": text_files.json_rows, ".csv": text_files.csv_rows, ".tsv": text_files.csv_rows}
        return read.get(self._kind, text_files.jsonl_rows)(self.file, self.name)


@dataclass(frozen=True)
class HuggingFaceDataset:
    """A Hugging Face data set, loaded when it is first asked. place: a folder where it is saved; its source, on the
    Hub; or a `datasets.Dataset` that a program holds."""

    place: Any
    name: str

    @cached_property
    def _loaded(self) -> Any:
        if isinstance(self.place, Path):
            return arrow.load_saved(self.place, self.name)
        if isinstance(self.place, Source):
            return arrow.load_hub(self.place.path, self.place.name, self.place.split, self.place.revision)
        return self.place

    def files(self) -> list[Path]:
        return sorted(file for file in self.place.rglob("*") if file.is_file()) if isinstance(self.place, Path) else []

    def identity(self, sha256_of: Callable[[Path], str]) -> list[str] | None:
        if isinstance(self.place, Path):
            return ["datasets", *(part for file in self.files() for part in (file.name, sha256_of(file)))]
        if not isinstance(self.place, Source):
            return ["datasets", self._sha256]
        fingerprint = getattr(self._loaded, "_fingerprint", None)
        return None if fingerprint is None else ["hub", str(fingerprint)]

    @cached_property
    def _sha256(self) -> str:
        """Of the rows: the fingerprint of a data set that a program has made may be drawn at random."""
        return _sha256_of(chain([repr(self._loaded.features)], self._loaded.with_format(None).iter(1000)))

    def columns(self) -> Sequence[str]:
        return list(self._loaded.column_names)

    def num_rows(self) -> int:
        return len(self._loaded)

    def rows(self, wanted: Columns) -> TableRows:
        return arrow.dataset_rows(self._loaded, self.name, wanted)


DataTable = TableFile | HuggingFaceDataset | RecordList
"""Rows under one name, in a fixed order.

files: from which it is read; none for a data set of the Hub, which its id and revision name. identity: what changes
where its rows may; None where only reading them would tell. columns: None where each row has keys of its own. num_rows:
for a progress display; None where only reading them would tell. rows: each with its source; where there are columns,
only the `wanted` ones (None: all). All but `files` raise DataError.
"""


def find_tables(source: Source) -> list[DataTable]:
    """The tables of a source. Raises DataError if there are none, ConfigError for a key that does not apply."""
    if isinstance(source, LiveSource):
        _only_keys(source, (), "data in memory")
        return [source.table]
    if source.path.startswith(MEMORY) and "://" not in source.path:
        raise DataError(f"{source.path}: data that a Python program held; the same program goes on with this run")
    if source.path.startswith(PACKAGED):
        _only_keys(source, (), "a file")
        return [_file(data_file(source.path.removeprefix(PACKAGED)), source.path)]
    place = Path(source.path)
    if place.is_dir():
        return _in_folder(source, place)
    if place.is_file():
        _only_keys(source, (), "a file")
        return [_file(place, source.path)]
    if place.is_fifo():
        _only_keys(source, (), "a pipe")
        if text_files.suffix_of(place) not in (".jsonl", ".ndjson", ".csv", ".tsv"):
            raise DataError(
                f"{source.path}: a pipe is read once and in order, so it must be JSON lines or CSV by its name"
            )
        return [TableFile(place, source.path, is_pipe=True)]
    if protocol_of(source.path) is not None:
        return _remote(source)
    if re.search(r"[*?\[]", source.path):
        _only_keys(source, (), "a pattern")
        return _matching(source.path)
    if place.is_symlink():
        raise DataError(f"{source.path}: a link to nowhere; {place.readlink()} does not exist")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source.path) and text_files.suffix_of(place) not in _SUFFIXES:
        parts = (source.path, source.name, source.split)
        return [HuggingFaceDataset(source, "/".join(part for part in parts if part))]
    raise DataError(f"{source.path}: no such data file{_near(place)}")


def _matching(pattern: str) -> list[DataTable]:
    """The data files of a pattern. Raises DataError if there are none."""
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207 (also absolute ones)
    files = [path for path in found if path.is_file() and _is_data(path)]
    if not files:
        raise DataError(f"{pattern}: no data file has such a name ({', '.join(_SUFFIXES)})")
    return [_file(path, str(path)) for path in files]


def _remote(source: Source) -> list[DataTable]:
    """The data files of a URL: itself, or those of a folder or pattern."""
    files = find_remote(source.path)
    if [file.url for file in files] == [source.path]:
        _only_keys(source, (), "a file")
        return [_file(files[0], source.path)]
    is_pattern = re.search(r"[*?\[]", source.path) is not None
    _only_keys(source, () if is_pattern else ("split",), "a pattern" if is_pattern else "a folder")
    data = {Path(file.url): file for file in files if _is_data(Path(file.url))}
    chosen = list(data) if is_pattern and data else _of_split(source, list(data), Path(as_found(source.path)))
    return [_file(data[path], data[path].url) for path in chosen]


def _only_keys(source: Source, applying: Sequence[str], what: str) -> None:
    for key in ("split", "name", "revision"):
        if getattr(source, key) is not None and key not in applying:
            whose = "folders and Hub ids" if key == "split" else "Hub ids"
            raise ConfigError(f"{source.path}: is {what}, and `{key}` goes with {whose}; remove it")


def _near(place: Path) -> str:
    """A hint at a file of nearly that name."""
    names = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, names, n=1, cutoff=0.7)
    return f"; did you mean {str(place.parent / near[0])!r}?" if near else ""


def _file(file: Path | RemoteFile, name: str) -> DataTable:
    if _has_data_name(file):
        return TableFile(file, name)
    raise DataError(
        f"{name}: what kind of file it is cannot be told from its name; it must end in {', '.join(_SUFFIXES)}, "
        f"or, if it is text, in one of those and {', '.join(text_files.COMPRESSED)}"
    )


def _in_folder(source: Source, folder: Path) -> list[DataTable]:
    """The data set that was saved there, or the data files; of a split, if there are several."""
    _only_keys(source, ("split",), "a folder")
    splits, split = arrow.saved_splits(folder), source.split
    if splits is None:
        files = [path for path in _all_files(folder) if _is_data(path)]
        return [_file(path, str(path)) for path in _of_split(source, files, folder)]
    names = ", ".join(splits)
    if split is not None and not splits:
        raise DataError(f"{source.path}: holds a single data set without splits; remove `split: {split}`")
    if split is None and len(splits) > 1:
        raise DataError(f"{source.path}: has the splits {names}; name one with `split`")
    if split is not None and split not in splits:
        raise DataError(f"{source.path}: has no split {split!r}; it has {names}")
    if not splits:
        return [HuggingFaceDataset(folder, source.path)]
    place = folder / (split or splits[0])
    return [HuggingFaceDataset(place, str(place))]


def _of_split(source: Source, files: list[Path], folder: Path) -> list[Path]:
    """The files of a folder that are read, by `split`. Raises DataError if there are none, or of several splits."""
    files = [path for path in files if not re.fullmatch(r"(dataset_infos?|state)\.json", path.name)]
    if not files:
        raise DataError(f"{source.path}: the folder holds no data file ({', '.join(_SUFFIXES)})")
    if source.split is not None:
        chosen = [path for path in files if _is_of_split(path.relative_to(folder), source.split)]
        if not chosen:
            names = ", ".join(str(path.relative_to(folder)) for path in files[:5])
            raise DataError(f"{source.path}: no file of the folder is named for split {source.split!r}; it has {names}")
        return chosen
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    found = sorted({split for split in splits.values() if split is not None})
    if len(found) > 1:
        raise DataError(
            f"{source.path}: the folder's files are of the splits {', '.join(found)}; name one with `split`"
        )
    of_none = next((path for path, split in splits.items() if split is None), None)
    named = any(split and _is_of_split(path.relative_to(folder), split) for path, split in splits.items())
    if named and of_none is not None and found[0] not in _TRAIN_SPLITS:
        raise DataError(
            f"{source.path}: some of the folder's files are of the split {found[0]}, others, such as "
            f"{of_none.relative_to(folder)}, are named for none; name the split with `split`, or the files to read"
        )
    return files


def _all_files(folder: Path) -> list[Path]:
    """All files of a folder but hidden ones, in the order of their names. Raises DataError for what cannot be read."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}")

    found = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent) / name for name in (*folders, *names) if not name.startswith(".")):
            if path.is_symlink() and (path.is_dir() or (not path.exists() and _is_data(path))):
                what = "a link to a folder, which is not followed" if path.is_dir() else "a link to nowhere"
                raise DataError(f"{path}: {what}; name its target as a source of its own, or remove it")
            if path.is_file():
                found.append(path)
    return sorted(found)


def _has_data_name(file: Path | RemoteFile) -> bool:
    return file.suffix.lower() == ".parquet" or text_files.suffix_of(file) in _TEXT_SUFFIXES


def _is_data(path: Path) -> bool:
    """Whether the name is one of a data file. Raises DataError for one that is packed so that it cannot be read."""
    if _has_data_name(path):
        return True
    if path.with_suffix("").suffix.lower() in _SUFFIXES and path.suffix.lower() in _UNREAD_PACKINGS:
        raise DataError(f"{path}: unpack it, or compress it as one of {', '.join(text_files.COMPRESSED)}")
    return False


def _is_of_split(relative: Path, split: str) -> bool:
    stem = relative.name.removesuffix("".join(relative.suffixes))
    return split in relative.parts[:-1] or re.fullmatch(re.escape(split) + r"([-_.]\d.*)?", stem) is not None


def _split_of(relative: Path) -> str | None:
    words = re.split(r"[/\\_.\s-]", str(relative).lower())
    return next((word for word in words if word in _SPLITS), None)
