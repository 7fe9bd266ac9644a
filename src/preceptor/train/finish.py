"""The end of a run: model, summary, report. A finished training is not lost for want of room on the disk."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preceptor.errors import CheckpointError, command, counted
from preceptor.files import free_bytes, readable_bytes
from preceptor.report.page import write_report
from preceptor.train.run_folder import RunFolder

if TYPE_CHECKING:
    from preceptor.train.checkpoint import Checkpoints, State
    from preceptor.train.signals import StopRequest

_ATTEMPTS = 60  # to save a model that cannot be saved, and the seconds between two of them
_SECONDS = 10.0

Say = Callable[[str], None]


def require_room(folder: Path, model_bytes: int, checkpoint_bytes: int, num_checkpoints: int) -> None:
    """Raises CheckpointError where the disk has no room for the model and so many checkpoints."""
    needed, free = model_bytes + num_checkpoints * checkpoint_bytes, free_bytes(folder)
    if free is not None and free < needed:
        checkpoints = f" and {counted(num_checkpoints, 'checkpoint')} of {readable_bytes(checkpoint_bytes)}"
        raise CheckpointError(
            f"{folder}: no room on this disk: the model takes {readable_bytes(model_bytes)}"
            f"{checkpoints if num_checkpoints else ''}, {readable_bytes(needed)} in all, and {readable_bytes(free)} "
            "are free. Free some room, lower checkpoint.keep, set checkpoint.every: null, or choose another `out`"
        )


def save_at_the_end(
    save: Callable[[], None],
    state: "State",
    checkpoints: "Checkpoints",
    stop: "StopRequest",
    say: Say,
    with_optimizer: bool = False,
) -> None:
    """Save the model of a finished training, or what precedes it; where that fails, a checkpoint for the same command.

    with_optimizer: of a training that the program ended, so that its last steps may follow.
    Where there is no room for either, older checkpoints are deleted, and both are tried again for ten minutes. Raises
    CheckpointError where that could not be done, with what is kept and what to do.
    """
    for attempt in range(_ATTEMPTS):
        try:
            save()
            return
        except Exception as error:  # whatever it is, the training is over and must be kept
            reason = str(error) or type(error).__name__
        if checkpoints.has(state.step):
            break
        try:
            checkpoints.save(state, with_optimizer)
            checkpoints.wait()  # of an asynchronous one; room may have come for `save`, too
        except CheckpointError as error:
            if any(checkpoints.world.max(stop.number is not None)):  # of several processes one may have been told
                break
            if attempt == 0:
                minutes = _ATTEMPTS * _SECONDS / 60
                say(f"{reason}; nor can a checkpoint: {error}. Free some room: tried again for {minutes:.0f} minutes")
            time.sleep(_SECONDS)
    if checkpoints.has(state.step):
        raise CheckpointError(
            f"{reason}. The training is finished and kept in {checkpoints.folder}: when the cause is fixed, the same "
            "command saves the model, without training again"
        )
    found = checkpoints.found()
    kept = f"the same command goes on from {found[-1].name}" if found else "there is no checkpoint to go on from"
    raise CheckpointError(f"{reason}. The weights of this training could not be kept; {kept}")


def finish(folder: RunFolder, say: Say, seconds: float | None = None) -> dict[str, Any]:
    """Write summary and report of a run whose model is saved; return the summary. seconds: as `summarise`."""
    folder.drop_replaced()
    summary = folder.summarise(seconds)
    report_safely(folder.path, say)
    return summary


def report_safely(folder: Path, say: Say) -> None:
    """A run is complete without its report, so no error of the report may fail it."""
    try:
        write_report([folder])
    except Exception as error:
        say(
            f"the report could not be written ({type(error).__name__}: {error}); the run itself is complete. "
            f"Try `{command('report', folder)}`"
        )
