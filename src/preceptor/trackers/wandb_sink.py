"""Weights & Biases: as its own environment variables say; WANDB_MODE=offline keeps it in the run folder."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from preceptor.trackers.sink import PROJECT, TrackedRun, table_of

_STEP = "step"  # a value like others: W&B drops what is logged at a step of its own that lies behind
_ROWS = 3  # of a step: its figures, its evaluation, its samples


class WandbSink:
    def __init__(self, run: TrackedRun) -> None:
        self.tracker_id: str | None = run.id
        folder = run.folder / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or run.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric(_STEP, summary="max")
        self._run.define_metric("*", step_metric=_STEP)
        self._next_row = max(self._run.step, _ROWS * run.next_step)
        offline = os.environ.get("WANDB_MODE") == "offline" or self._run.url is None
        known = (self._run.summary.get(_STEP) or {}).get("max", -1)
        self.last_step: int | None = None if offline else known
        self.where = f"wandb sync {folder}/offline-run-*" if offline else str(self._run.url)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, values)

    def samples(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        columns, rows = table_of(lines)
        self._log(step, {"samples": wandb.Table(columns=columns, data=rows)})

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        """A row. W&B's own step numbers the rows; it rises, also over the sessions of a run that is offline."""
        row = max(self._next_row, _ROWS * step)
        self._run.log({**values, _STEP: step}, step=row, commit=True)
        self._next_row = row + 1

    def attach(self, files: Sequence[Path]) -> None:
        for file in files:
            self._run.save(str(file), base_path=str(file.parent), policy="now", glob=False)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
