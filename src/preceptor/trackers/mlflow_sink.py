"""MLflow: wherever MLFLOW_TRACKING_URI says, else where MLflow itself keeps its runs."""

import os
import posixpath
import re
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from preceptor.trackers.sink import OF_EVERY_STEP, PROJECT, TrackedRun, table_of

_LONGEST_VALUE = 500  # characters of a parameter
_LONGEST_NAME = 240  # of 250 characters, so that `_` may be added
_MOST_PARAMS, _MOST_METRICS = 100, 1000  # of a request
_TAG = "preceptor.run"


class MlflowSink:
    def __init__(self, run: TrackedRun) -> None:
        self._client = MlflowClient()
        self.tracker_id = run.tracker_id or self._found_or_made(run)
        self._client.update_run(self.tracker_id, status="RUNNING")
        history = self._client.get_metric_history(self.tracker_id, OF_EVERY_STEP)
        has_more = self._client.get_run(self.tracker_id).data.metrics
        self.last_step: int | None = max((metric.step for metric in history), default=0 if has_more else -1)
        self.where = f"run {self.tracker_id} in {mlflow.get_tracking_uri()}"

    def _found_or_made(self, run: TrackedRun) -> str:
        """The run with the tag, which an opening that failed may have left, else a new one; with all parameters."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        place = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        found = self._client.search_runs([place], f"tags.`{_TAG}` = '{run.id}'", max_results=1)
        own = found[0] if found else self._client.create_run(place, run_name=run.name, tags={_TAG: run.id})
        params: dict[str, str] = {}
        for key, value in run.config.items():
            name = _allowed(key.replace("[", ".").replace("]", ""))
            while name in params:  # of another pattern
                name += "_"
            params[name] = str(value)[:_LONGEST_VALUE]
        new = [Param(name, value) for name, value in params.items() if name not in own.data.params]
        for start in range(0, len(new), _MOST_PARAMS):
            self._client.log_batch(own.info.run_id, params=new[start : start + _MOST_PARAMS], synchronous=True)
        return str(own.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [Metric(_allowed(name), value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self.tracker_id, metrics[start : start + _MOST_METRICS], synchronous=True)

    def samples(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        columns, rows = table_of(lines)
        text = "\n\n".join(
            "\n".join(f"{name}: {cell}" for name, cell in zip(columns, row, strict=True)) for row in rows
        )
        self._client.log_text(self.tracker_id, text, f"samples/step-{step:08d}.txt")

    def attach(self, files: Sequence[Path]) -> None:
        for file in files:
            self._client.log_artifact(self.tracker_id, str(file))

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.tracker_id, "FINISHED" if finished else "KILLED")


def _allowed(name: str) -> str:
    """The name with `_` for what MLflow takes in none (`*` of a pattern), and as a path that leads nowhere else.

    Of one that is too long the beginning and a hash of all of it.
    """
    allowed = posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", name).replace("..", "_")).lstrip("/")
    if len(allowed) <= _LONGEST_NAME:
        return allowed
    end = f"-{sha256(name.encode()).hexdigest()[:8]}"
    return allowed[: _LONGEST_NAME - len(end)] + end
