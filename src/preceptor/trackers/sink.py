"""What a tracker is to a replay: where figures, samples and files go; and the trackers that there are."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from preceptor.errors import ConfigError

SINKS: Mapping[str, str] = {
    "tensorboard": "TensorBoardSink",
    "trackio": "TrackioSink",
    "mlflow": "MlflowSink",
    "wandb": "WandbSink",
}
"""Tracker -> its class in NAME_sink.py. The package that it needs and the extra that installs it have its name too."""

OF_EVERY_STEP = "train/num_tokens"  # a step that was skipped may have no loss
PROJECT = "preceptor"  # where the tracker's own environment variable names none


@dataclass(frozen=True)
class TrackedRun:
    """folder: for files of the tracker's own. id: of the run, for ever. tracker_id: what the tracker called it before.

    next_step: the first one that is not sent yet.
    """

    folder: Path
    id: str
    name: str
    config: Mapping[str, Any]
    tracker_id: str | None
    next_step: int


class Sink(Protocol):
    """A tracker that is open for one run. Steps come in their order, each once; an evaluation may be of an earlier one.

    tracker_id: what it calls the run, to be given back next time. where: how to look at it.
    last_step: the last one that it has, 0 where that is an evaluation before the first, -1 where it has nothing; what
    follows is sent, whatever was sent before. None where it cannot tell.
    """

    tracker_id: str | None
    last_step: int | None
    where: str

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def samples(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None: ...

    def attach(self, files: Sequence[Path]) -> None: ...

    def close(self, finished: bool) -> None: ...


def require_installed(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"tracker: {name} is not installed: pip install 'preceptor[{name}]'")


def open_sink(name: str, run: TrackedRun) -> Sink:
    """Raises whatever the tracker raises."""
    module = importlib.import_module(f"preceptor.trackers.{name}_sink")
    sink: Sink = getattr(module, SINKS[name])(run)
    return sink


def table_of(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Samples as columns and rows of text."""
    columns = [key for key in ("source", "prompt", "answer", "reference") if any(key in line for line in lines)]
    return columns, [[str(line.get(column, "")) for column in columns] for line in lines]
