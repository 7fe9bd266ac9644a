"""The record of a run, environment.json: of one that begins, or of one that goes on and must be the same."""

from typing import Any
from uuid import uuid4

import torch

from preceptor.errors import CheckpointError, ModelError
from preceptor.train.differences import (
    base_differences,
    changed_keys,
    content_differences,
    evaluation_differences,
    rounding_differences,
)
from preceptor.train.finish import Say
from preceptor.train.prepare import Prepared
from preceptor.train.provenance import origins, session
from preceptor.train.run_folder import RunFolder
from preceptor.world import World


def record_of_first(
    folder: RunFolder,
    prepared: Prepared,
    device: torch.device,
    world: World,
    say: Say,
) -> dict[str, Any]:
    """What is recorded of a run that begins; of one that goes on, what was recorded when it began.

    The first process finds it out for all: it reads the weights of the base model. Raises CheckpointError where the run
    that goes on was made from something else, and says what does not stop it.
    """
    if not world.is_first:
        return dict(world.published("record"))
    now = {**session(device, world.size), **origins(prepared, folder.record)}
    record = _compared(folder, prepared, now, say)
    world.publish("record", record)
    return record


def _compared(folder: RunFolder, prepared: Prepared, now: dict[str, Any], say: Say) -> dict[str, Any]:
    run = prepared.run
    if reasons := base_differences(str(run.model.from_run), now["from_run"], now["model"]):
        raise ModelError("\n".join(reasons))
    if not folder.goes_on:
        return {
            "run": uuid4().hex,
            **now,
            "date": folder.date.isoformat(timespec="seconds"),
            "resumed": [],
        }
    changed = changed_keys(folder.run_file, run, f"{run.out}/config.yaml")
    reasons = [*changed.weights, *content_differences(folder.record, now)]
    if reasons:
        raise CheckpointError(
            f"{run.out}: holds a run that was made from something else; go on with the same, or replace that run with "
            "--replace:\n" + "\n".join(f"  {line}" for line in [*reasons, *changed.by_content])
        )
    rounding = [*changed.rounding, *rounding_differences(folder.record, now)]
    if rounding:
        say(f"no longer equal to the bit to an uninterrupted run, but up to rounding: {'; '.join(rounding)}")
    for measured in evaluation_differences(folder.record, now):
        say(f"{measured} are not those of the run so far: figures before and after cannot be compared")
    has_hash = {
        "loss.code": run.loss.code is None or now["loss_sha256"] is not None,
        "eval.code": all(task.own is None or task.own.sha256 is not None for task in prepared.tasks),
    }
    for key in (key for key, has in has_hash.items() if not has):
        say(f"{key}: nothing tells whether it is the function of the run so far: no hash of a value that it uses")
    return folder.record
