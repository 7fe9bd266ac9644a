"""Checkpoints of a run: everything that must survive, written whole or not at all.

    OUT/checkpoints/step-00000200/
      state.pt      trained parameters, optimizer, generator states, the step, the run's fingerprint

A checkpoint is written beside its place and renamed, so a folder named `step-*` is always complete. The order of the
data needs no state: it is a function of the step (data/loader.py).
"""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from preceptor.errors import CheckpointError
from preceptor.files import replacing
from preceptor.model.forward import Engine


@dataclass
class State:
    """What a run is between two steps. `step` counts the steps taken."""

    model: Any
    optimizer: torch.optim.Optimizer
    step: int = 0

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.model)


def save(state: State, folder: Path, fingerprint: str, keep: int) -> None:
    """Write `folder/step-N`, then delete all but the newest `keep` checkpoints."""
    place = folder / f"step-{state.step:08d}"
    content = {
        "fingerprint": fingerprint,
        "step": state.step,
        "parameters": {name: p.detach() for name, p in state.model.named_parameters() if p.requires_grad},
        "optimizer": state.optimizer.state_dict(),
        "random_cpu": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with replacing(place) as partial:
        partial.mkdir(parents=True)
        torch.save(content, partial / "state.pt")
        if place.exists():  # a resumed run comes by the same step again
            shutil.rmtree(place)
    for old in found(folder)[:-keep]:
        shutil.rmtree(old)


def found(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def restore(state: State, folder: Path, fingerprint: str) -> None:
    """Bring `state` to the newest checkpoint, bit for bit.

    Raises CheckpointError if there is none, or if it belongs to another run file or other data.
    """
    checkpoints = found(folder)
    if not checkpoints:
        raise CheckpointError(f"{folder}: no checkpoint to resume from; set checkpoint.every, or start the run anew")
    file = checkpoints[-1] / "state.pt"
    content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    if content["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{checkpoints[-1]}: was written with another run file or other data; resume with the same, or start anew"
        )
    trained = {name: p for name, p in state.model.named_parameters() if p.requires_grad}
    if trained.keys() != content["parameters"].keys():
        raise CheckpointError(f"{checkpoints[-1]}: holds other parameters than this model trains")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(content["parameters"][name])
    state.optimizer.load_state_dict(content["optimizer"])
    state.step = content["step"]
    torch.set_rng_state(content["random_cpu"])
    if content["random_cuda"]:
        torch.cuda.set_rng_state_all(content["random_cuda"])
