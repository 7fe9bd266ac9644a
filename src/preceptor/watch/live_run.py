"""A run folder as it grows: what is on record now, and whether the process that trains is alive."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.errors import CheckpointError
from preceptor.files import read_json, read_json_lines, read_run_file
from preceptor.report.run_record import LINES, OBJECTS, RunRecord, record_of_files
from preceptor.trackers.replay import GrowingLines
from preceptor.train.lock import LOCK, LockHolder, lock_holder

_GROWING = ("metrics", "eval", "samples")  # read from where the last look ended: they may be long


@dataclass(frozen=True)
class RunLook:
    """A run at one moment.

    holder: the process that its lock names. seconds_since_written: None where nothing is there.
    """

    record: RunRecord
    holder: LockHolder | None
    has_begun: bool
    seconds_since_written: float | None


class LiveRun:
    """A run folder that is looked at again and again. It need not exist yet, and may be replaced meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._growing = {name: GrowingLines(folder / f"{name}.jsonl") for name in _GROWING}
        self._lines: dict[str, list[dict[str, Any]]] = {name: [] for name in LINES}
        self._small = {
            **{f"{name}.json": _Small(folder / f"{name}.json", read_json, {}) for name in OBJECTS},
            "rejections.jsonl": _Small(folder / "rejections.jsonl", read_json_lines, []),
            "config.yaml": _Small(folder / "config.yaml", lambda path: read_run_file(path.parent), ({}, "")),
        }

    def look(self) -> RunLook:
        """What is there now. A file that cannot be read at this moment is as it was before."""
        for name, file in self._growing.items():
            new = file.read()
            if file.began_anew:
                self._lines[name] = []
            self._lines[name] += new
        self._lines["rejections"] = self._small["rejections.jsonl"].value()
        config, text = self._small["config.yaml"].value()
        objects = {name: self._small[f"{name}.json"].value() for name in OBJECTS}
        has_begun = bool(config) and (self.folder / "config.yaml").exists()
        lines = self._lines if has_begun else {name: [] for name in LINES}
        return RunLook(
            record_of_files(self.folder, config, text, lines, objects),
            lock_holder(self.folder),
            has_begun,
            _seconds_since([self.folder / name for name in (*(f"{name}.jsonl" for name in _GROWING), LOCK)]),
        )


class _Small:
    """A file that is read whole, when it has changed."""

    def __init__(self, path: Path, read: Callable[[Path], Any], absent: Any) -> None:
        self._path, self._read, self._absent = path, read, absent
        self._about: tuple[int, ...] | None = None
        self._value = absent

    def value(self) -> Any:
        try:
            about = self._path.stat()
        except OSError:
            self._about, self._value = None, self._absent
            return self._absent
        now = (about.st_ino, about.st_mtime_ns, about.st_size)
        if now != self._about:
            with suppress(CheckpointError, OSError):
                self._value, self._about = self._read(self._path), now
        return self._value


def _seconds_since(files: Sequence[Path]) -> float | None:
    """Since the last of these files was written, by this machine's clock."""
    times = []
    for file in files:
        with suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(0.0, time.time() - max(times)) if times else None
