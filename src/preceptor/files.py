"""Durable files: written whole or not at all, JSON and JSON lines, hashes, and the room on a disk."""

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from preceptor.errors import CheckpointError, first_line

MANIFEST = "manifest.json"
LIVE, MEMORY = "live:", "memory:"  # in place of a path: a model or function, and data, that a Python program holds
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK = (*_FULL, errno.EIO, errno.EROFS, errno.ESTALE)


@contextmanager
def writing(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Raises CheckpointError, with the path, where writing fails inside. num_bytes: what is to be written, if known."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise cannot_write(path, error, num_bytes) from error


@contextmanager
def using(folder: Path, only_within: bool = False) -> Iterator[None]:
    """Raises CheckpointError where the disk fails inside, with the file's name, or the folder's where it is unknown.

    only_within: only for a file of the folder; an error of another disk, or of none that is named, stays as it is.
    """
    try:
        yield
    except OSError as error:
        is_other = only_within and not (error.filename and Path(str(error.filename)).is_relative_to(folder))
        if error.errno not in _DISK or is_other:
            raise
        raise CheckpointError(f"{error.filename or folder}: cannot be used: {error.strerror}") from error


def cannot_write(path: Path, error: BaseException, num_bytes: int | None = None) -> CheckpointError:
    """The error to raise where a file or folder cannot be written; with the room that it needs and that there is."""
    reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
    room, free = [], free_bytes(path)
    if isinstance(error, OSError) and error.errno in _FULL:
        room += [] if num_bytes is None else [f"needs {readable_bytes(num_bytes)}"]
        room += [] if free is None else [f"{readable_bytes(free)} free"]
    shown = f" ({', '.join(room)})" if room else ""
    return CheckpointError(f"{path}: cannot be written: {reason}{shown}")


def not_seen(path: Path) -> CheckpointError:
    """The error to raise where a file is not there for this process, and another one of its run has written it."""
    return CheckpointError(
        f"{path}: another process has written it, and this one does not see it: `out` must be on a file system that "
        "all nodes share"
    )


def is_full(error: CheckpointError) -> bool:
    """Whether the disk, a quota or a limit has no room for what was to be written."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL


def free_bytes(path: Path) -> int | None:
    """What may still be written where `path` is or will be; None where the file system does not say."""
    for place in (path, *path.absolute().parents):
        try:
            usage = shutil.disk_usage(place)
        except OSError:
            continue
        return usage.free if usage.total else None
    return None


def readable_bytes(num_bytes: int) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes} bytes"


@contextmanager
def replacing(path: Path, num_bytes: int | None = None) -> Iterator[Path]:
    """A name beside `path` for a new file or folder, which is renamed to `path` when the block ends.

    It is flushed to the disk first, so that after a crash `path` holds the old content or the new, never a part (of a
    folder that is replaced: the old, the new, or nothing). Where the block raises, nothing is left. num_bytes: as
    `writing`. Raises CheckpointError.
    """
    partial = _partial(path)
    try:
        with writing(path, num_bytes):
            yield prepare_partial(path)
            publish(partial, path)
    finally:
        with suppress(OSError):
            remove(partial)


def prepare_partial(path: Path, folder: bool = False) -> Path:
    """The name beside `path` under which it is written, free of what a killed process left. folder: make it."""
    partial = _partial(path)
    with writing(path):
        remove(partial)
        if folder:
            partial.mkdir(parents=True)
    return partial


def publish(partial: Path, path: Path) -> None:
    """Flush what was written beside `path` and rename it to `path`. A folder is replaced by a folder alone.

    Raises CheckpointError.
    """
    if not partial.is_dir():
        _require_no_folder(path)
    _flush(partial)
    if path.is_dir():
        remove_folder(path)
    partial.replace(path)
    sync(path.parent)


def try_file(path: Path) -> None:
    """Raises CheckpointError where no file can be written at `path`. For commands that write when all work is done."""
    _require_no_folder(path)
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: the folder {path.parent} does not exist; make it first")
    with writing(path), tempfile.TemporaryFile(dir=path.parent):
        pass  # the folder can be written to


def _require_no_folder(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, which a file does not replace; name a file, such as one in it")


def remove_folder(path: Path) -> None:
    """Remove a folder. A process that is killed meanwhile leaves nothing under its name."""
    removed = path.with_name(f".{path.name}.removed.partial")
    remove(removed)
    path.rename(removed)
    remove(removed)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Raises CheckpointError."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Raises CheckpointError."""
    write_atomically(path, json_text(value, indent=2) + "\n")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """One line for each value, written as they come. Raises CheckpointError."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as lines:
        for value in values:
            lines.write(json_text(value) + "\n")


def append_line(path: Path, value: Any) -> None:
    """Add one JSON line, flushed: a reader sees whole lines while the run goes on. Raises CheckpointError."""
    with writing(path):
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as lines:
                lines.write(json_text(value) + "\n")
        except OSError:
            with suppress(OSError):  # half a line, to which the next one would be joined
                os.truncate(path, size)
            raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no file. Raises CheckpointError for anything else."""
    return _parsed(_text(path), str(path)) if path.is_file() else {}


def read_json_lines(path: Path, on_broken: Callable[[CheckpointError], None] | None = None) -> list[dict[str, Any]]:
    """One JSON object for each line; [] where there is no file.

    A last line without its line end is still being written and is left out. Raises CheckpointError as `read_json`;
    with `on_broken`, it is called with the error instead, and the line is left out.
    """
    if not path.is_file():
        return []
    errors = "strict" if on_broken is None else "replace"
    *lines, _unfinished = _text(path, errors).split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(_parsed(line, f"{path}:{number}"))
        except CheckpointError as error:
            if on_broken is None:
                raise
            on_broken(error)
    return found


def read_run_file(folder: Path) -> tuple[dict[str, Any], str]:
    """The run file that a run keeps in its folder, and its text. Raises CheckpointError."""
    import yaml

    file = folder / "config.yaml"
    text = _text(file, "strict")
    try:
        tree = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file}: cannot be read: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file}: is no run file, but {type(tree).__name__}")
    return tree, text


def sha256_of(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


Described = Mapping[str, Mapping[str, Any]]


def describe_files(folder: Path, files: Iterable[Path]) -> Described:
    """Size and SHA-256 of files of a folder, by their path in it."""
    return {
        path.relative_to(folder).as_posix(): {"num_bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in files
    }


def write_manifest(folder: Path, about: Mapping[str, Any], described: Described) -> None:
    """Write what is to be known about a folder into it, and what its files are."""
    (folder / MANIFEST).write_text(json_text({**about, "files": described}, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path, part: int = 0, num_parts: int = 1) -> dict[str, Any]:
    """What was written about a folder. Raises CheckpointError where a file is missing or altered since, naming it.

    part, num_parts: of the files, every `num_parts`-th is looked at, from `part` on.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        described: Described = manifest["files"]
        for name, about in list(described.items())[part::num_parts]:
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: is missing")
            if path.stat().st_size != about["num_bytes"]:
                raise CheckpointError(
                    f"{path}: has {path.stat().st_size:,} bytes, not the {about['num_bytes']:,} that were written"
                )
            if sha256_of(path) != about["sha256"]:
                raise CheckpointError(f"{path}: is damaged: its SHA-256 is not that of what was written")
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder / MANIFEST}: is missing or damaged") from None
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}") from error
    return manifest


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON as all readers know it: NaN and infinity are null."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _text(path: Path, errors: str = "replace") -> str:
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; was the file changed by hand?") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise CheckpointError(f"{where}: broken JSON: {reason}; was the file changed by hand?") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {type(value).__name__}, not an object; was the file changed by hand?")
    return value


def distinct_ends(paths: Sequence[Sequence[str]]) -> list[str]:
    """Of each path, given in its parts, as many of the last ones as are needed to make all distinct."""
    for depth in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(parts)} ({number})" for number, parts in enumerate(paths, start=1)]


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flush a file, or a folder and everything in it, to the disk."""
    for inner in path.iterdir() if path.is_dir() else ():
        _flush(inner)
    sync(path)


def sync(path: Path) -> None:
    """Flush a file, or the names of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
