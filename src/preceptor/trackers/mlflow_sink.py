"""MLflow: wherever MLFLOW_TRACKING_URI says, else where MLflow itself keeps its runs."""

import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient

from preceptor.trackers.sink import PROJECT, TrackedRun, table_of

_LONGEST_VALUE = 500  # characters of a parameter


class MlflowSink:
    def __init__(self, run: TrackedRun) -> None:
        self._client = MlflowClient()
        if run.tracker_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
            experiment = self._client.get_experiment_by_name(name)
            place = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
            made = self._client.create_run(place, run_name=run.name, tags={"preceptor.run": run.id})
            self.tracker_id = str(made.info.run_id)
            sent: set[str] = set()
            for key, value in run.config.items():
                name = _allowed(key.replace("[", ".").replace("]", ""))
                while name in sent:  # of another pattern
                    name += "_"
                sent.add(name)
                self._client.log_param(self.tracker_id, name, str(value)[:_LONGEST_VALUE])
        else:
            self.tracker_id = run.tracker_id
            self._client.update_run(self.tracker_id, status="RUNNING")
        history = self._client.get_metric_history(self.tracker_id, "train/loss")
        self.last_step: int | None = max((metric.step for metric in history), default=None)
        self.where = f"run {self.tracker_id} in {mlflow.get_tracking_uri()}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self.tracker_id, _allowed(name), value, step=step)

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
    """The name with `_` for what MLflow takes in none (`*` of a pattern), and as a path that leads nowhere else."""
    return posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", name).replace("..", "_")).lstrip("/")
