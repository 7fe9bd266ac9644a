"""Trackio: a local database, shown by `trackio show`."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trackio
from trackio.sqlite_storage import SQLiteStorage

from preceptor.trackers.sink import OF_EVERY_STEP, PROJECT, TrackedRun, table_of


class TrackioSink:
    def __init__(self, run: TrackedRun) -> None:
        self.tracker_id: str = run.tracker_id or run.name  # a name is all that it knows a run by
        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        self.where = f"trackio show --project {project}"
        self.last_step = _last_step(project, self.tracker_id)
        self._run = trackio.init(
            project=project,
            name=self.tracker_id,
            config=dict(run.config),
            resume="allow",
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def samples(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        columns, rows = table_of(lines)
        data = [dict(zip(columns, row, strict=True)) for row in rows]
        self._run.log({"samples": trackio.Table(data=data)}, step=step)

    def attach(self, files: Sequence[Path]) -> None:
        """As an artifact of the run."""
        record = trackio.Artifact(re.sub(r"[^A-Za-z0-9._-]", "_", f"{self.tracker_id}-record"), type="run")
        for file in files:
            record.add_file(str(file))
        self._run.log_artifact(record)

    def close(self, finished: bool) -> None:
        self._run.finish()


def _last_step(project: str, run: str) -> int | None:
    if os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"):
        return None  # what is there cannot be asked for
    try:
        lines = SQLiteStorage.get_logs(project, run)
    except Exception:  # Trackio's own storage, which a version may change
        return None
    return max((line["step"] for line in lines if OF_EVERY_STEP in line), default=0 if lines else -1)
