"""Checkpoints of a run: everything that must survive, written whole or not at all, and read only if undamaged.

    OUT/checkpoints/step-00000200/
      state.pt        trained parameters, optimizer, generator states
      manifest.json   the run's id, the step; size and SHA-256 of each other file

A checkpoint is written beside its place and renamed, so a folder named `step-*` is always complete. The order of the
data needs no state: it is a function of the step (data/loader.py).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from preceptor.errors import CheckpointError, ModelError
from preceptor.files import cannot_write, is_full, read_manifest, remove_folder, replacing, write_manifest, writing
from preceptor.model.finite import first_not_finite
from preceptor.model.forward import Engine
from preceptor.train.optimizer import expected_state_bytes
from preceptor.train.run_folder import CHECKPOINT

STATE = "state.pt"
_OTHER_BYTES = 1 << 20  # of a checkpoint: names, generator states, manifest


@dataclass
class State:
    """What a run is between two steps. `step` counts the steps taken."""

    model: Any
    optimizer: torch.optim.Optimizer
    step: int = 0

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.model)

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def checkpoint_bytes(state: State, with_optimizer: bool = True) -> int:
    """What a checkpoint takes on the disk."""
    weights = sum(p.numel() * p.element_size() for p in state.trained.values())
    return weights + expected_state_bytes(state.optimizer) * with_optimizer + _OTHER_BYTES


def require_finite(state: State) -> None:
    """Raises ModelError, naming the first weight, where a trained weight is NaN or infinite."""
    found = first_not_finite(state.trained.items())
    if found is not None:
        raise ModelError(
            f"after step {state.step} {found}; nothing of it was saved. Lower optimizer.learning_rate, or lengthen "
            "optimizer.warmup"
        )


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of the run `run_id` in `folder`; after each save all but the newest `keep` are deleted."""

    folder: Path
    run_id: str
    keep: int

    def found(self) -> list[Path]:
        """The complete ones, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir())

    def save(self, state: State, with_optimizer: bool = True) -> None:
        """Write `step-N`; the older ones go when it is on the disk. Raises CheckpointError; ModelError for a NaN.

        with_optimizer False: only what is needed after the last step. Where there is no room beside the older
        checkpoints, all of them but the newest are deleted first.
        """
        require_finite(state)
        try:
            self._write(state, with_optimizer)
        except CheckpointError as error:
            if not is_full(error) or len(self.found()) < 2:
                raise
            self._prune(1, state.step)
            self._write(state, with_optimizer)
        self._prune(self.keep, state.step)
        _delete(path for path in self.found() if path > self._place(state.step))  # those that `restore` passed over

    def _write(self, state: State, with_optimizer: bool) -> None:
        place = self._place(state.step)
        num_bytes = checkpoint_bytes(state, with_optimizer)
        content = {
            "parameters": {name: p.detach() for name, p in state.trained.items()},
            "optimizer": state.optimizer.state_dict() if with_optimizer else None,
            "random_cpu": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        with replacing(place, num_bytes) as partial:
            partial.mkdir(parents=True)
            try:
                with (partial / STATE).open("wb") as file:
                    torch.save(content, file)
            except RuntimeError as error:  # torch's writer, after the file's own error
                cause = error.__context__ if isinstance(error.__context__, OSError) else error
                raise cannot_write(place, cause, num_bytes) from cause
            write_manifest(partial, {"run": self.run_id, "step": state.step})

    def _prune(self, keep: int, step: int) -> None:
        """Delete all but the newest `keep` of those up to `step`."""
        _delete([path for path in self.found() if path <= self._place(step)][:-keep])

    def has(self, step: int) -> bool:
        """Whether there is an undamaged one of this step."""
        try:
            return self._place(step).is_dir() and bool(self._manifest(self._place(step)))
        except CheckpointError:
            return False

    def restore(self, state: State, say: Callable[[str], None]) -> None:
        """Bring `state` to the newest undamaged checkpoint, bit for bit; `say` why newer ones are passed over.

        Without any checkpoint `state` stays at step 0. Raises CheckpointError if there are some and none can be read.
        """
        found, reasons = self.found(), []
        for place in reversed(found):
            try:
                manifest = self._manifest(place)
                content = _load(place / STATE)
            except CheckpointError as error:
                reasons.append(str(error))
                say(f"passed over: {error}")
                continue
            _apply(content, state, place)
            state.step = manifest["step"]
            self._prune(self.keep, state.step)
            return
        if found:
            raise CheckpointError(
                f"{self.folder}: no checkpoint can be read: {'; '.join(reasons)}. Start anew with --replace"
            )

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _manifest(self, place: Path) -> dict[str, Any]:
        manifest = read_manifest(place)
        if manifest.get("run") != self.run_id:
            raise CheckpointError(f"{place}: is a checkpoint of another run")
        if manifest.get("step") != int(place.name.removeprefix("step-")):
            raise CheckpointError(f"{place}: is a checkpoint of step {manifest.get('step')}, not of the step it names")
        return manifest


def _delete(places: Iterable[Path]) -> None:
    for place in places:
        with writing(place):
            remove_folder(place)


def _load(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever pickle and zip files raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{file}: cannot be read: {reason}") from error
    return content


def _apply(content: dict[str, Any], state: State, place: Path) -> None:
    """Raises CheckpointError, before anything is changed, where the checkpoint holds other parameters."""
    saved, trained = content["parameters"], state.trained
    if {name: p.shape for name, p in saved.items()} != {name: p.shape for name, p in trained.items()}:
        raise CheckpointError(f"{place}: holds other parameters than this model trains; start anew with --replace")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    if content["optimizer"] is not None:
        state.optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["random_cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(content["random_cuda"][: torch.cuda.device_count()])
