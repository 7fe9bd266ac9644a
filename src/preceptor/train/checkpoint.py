"""Checkpoints of a run: everything that must survive, written whole or not at all, and read only if undamaged.

    OUT/checkpoints/step-00000200/
      .metadata, *.distcp   trained parameters and optimizer state by name, of torch.distributed.checkpoint (DCP)
      manifest.json         the run's id, the step, in a stream the position, `optimizer: false` if its state is not
                            there, run file and versions; size and SHA-256 of each other file

Each rank writes its part of each tensor; any number of ranks can read them. A checkpoint is written beside its place
and renamed by the first rank when all are done, so a folder named `step-*` is always complete. The order of the data
needs no state: it is a function of the step (data/loader.py), of a stream with the position of its window.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import zeros as distributed_zeros

from preceptor.data.loader import Position
from preceptor.errors import CheckpointError, ModelError, command, first_line
from preceptor.files import (
    Described,
    cannot_write,
    describe_files,
    is_full,
    not_seen,
    prepare_partial,
    publish,
    read_manifest,
    remove,
    remove_folder,
    using,
    write_manifest,
    writing,
)
from preceptor.model.forward import Engine
from preceptor.model.numerics import first_not_finite
from preceptor.train.optimizer import expected_state_bytes, offloads
from preceptor.train.run_folder import CHECKPOINT
from preceptor.train.weightwise import host_zeros
from preceptor.world import ONE, World

_TENSORS_PER_PARAMETER = 5  # at most: the weight, and what an optimizer keeps of it
_BYTES_PER_TENSOR = 3000  # of its record in the file, and of its place in the metadata
_OTHER_BYTES = 1 << 18  # of a checkpoint: manifest, and what the metadata needs
_PARAMETER, _OPTIMIZER = "parameter.", "optimizer."  # what the names in a checkpoint begin with

Content = dict[str, Any]


@dataclass
class State:
    """What a run is between two steps. `step` counts the steps taken. position: in a stream, else None.

    has_optimizer: False where it comes from a checkpoint without the optimizer's state.
    is_whole: False while an update is made: where it fails, weights and step do not belong together.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    step: int = 0
    position: Position | None = None
    has_optimizer: bool = True
    is_whole: bool = True

    @cached_property
    def engine(self) -> Engine:
        return Engine.of(self.model)

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def checkpoint_bytes(state: State, with_optimizer: bool = True) -> int:
    """What a checkpoint takes on the disk, of all ranks."""
    trained = state.trained.values()
    weights = sum(p.numel() * p.element_size() for p in trained)
    num_tensors = len(trained) * (_TENSORS_PER_PARAMETER if with_optimizer else 1)
    states = expected_state_bytes(state.optimizer) if with_optimizer else 0
    return weights + states + num_tensors * _BYTES_PER_TENSOR + _OTHER_BYTES


def require_finite(state: State) -> None:
    """Raises ModelError, naming the first weight, where a trained weight is NaN or infinite."""
    found = first_not_finite(state.trained.items())
    if found is not None:
        raise ModelError(
            f"after step {state.step} {found}; nothing of it was saved. Lower optimizer.learning_rate, or lengthen "
            "optimizer.warmup"
        )


@dataclass
class Checkpoints:
    """The checkpoints of the run `run_id` in `folder`; after each save all but the newest `keep` are deleted.

    about: run file and versions, for the manifest. best: the step of the best evaluation, whose checkpoint is kept too.
    async_save: `save` copies the state to memory and returns; one thread writes it, one checkpoint at a time.
    """

    folder: Path
    run_id: str
    keep: int
    async_save: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    world: World = ONE
    best: int | None = None
    _written: Future[None] | None = None

    def found(self) -> list[Path]:
        """The complete ones, oldest first. Raises CheckpointError where the folder cannot be read."""
        with using(self.folder):
            names = [path for path in self.folder.glob("step-*") if CHECKPOINT.fullmatch(path.name)]
            return sorted(path for path in names if path.is_dir())

    def save(self, state: State, with_optimizer: bool = True, deletes: bool = True) -> None:
        """Write `step-N`, unless it is there; the older ones go when it is on the disk.

        with_optimizer False: only what is needed after the last step. Where there is no room beside the older
        checkpoints, all of them but the newest are deleted first. deletes False: none goes at all. Raises
        CheckpointError; ModelError for a NaN. With `async_save` the error of a write that is under way comes from
        `check`, `wait` or the next `save`.
        """
        self.wait()
        if self.has(state.step):
            if deletes:
                self.prune(state.step)  # another one may be the best now
            return
        require_finite(state)
        content, num_bytes = _content(state, with_optimizer), checkpoint_bytes(state, with_optimizer)
        position = {} if state.position is None else {"position": state.position.to_json()}
        left_out = {} if with_optimizer else {"optimizer": False}
        manifest = {"run": self.run_id, "step": state.step, **position, **left_out, **self.about}
        if not self.async_save:
            self._save(content, num_bytes, manifest, deletes)
            return
        writer = ThreadPoolExecutor(1, "checkpoint writer")
        self._written = writer.submit(self._save, BlockingAsyncStager().stage(content), num_bytes, manifest, deletes)
        writer.shutdown(wait=False)  # the thread ends with what it writes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """What is being written is written to its end, also where the run has failed."""
        if self._written is not None:
            self._written.exception()

    def check(self) -> None:
        """Raises the error of a write that has ended; does not wait for one that has not."""
        if self._written is not None and self._written.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written any more. Raises its error."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def _save(self, content: Content, num_bytes: int, manifest: Mapping[str, Any], deletes: bool) -> None:
        try:
            self._write(content, num_bytes, manifest)
        except CheckpointError as error:
            if not deletes or not is_full(error) or len(self.world.first(self.found)) < 2:
                raise
            self.prune(manifest["step"], keep=1)
            self._write(content, num_bytes, manifest)
        if deletes:
            self.prune(manifest["step"], passed_over=True)

    def _write(self, content: Content, num_bytes: int, manifest: Mapping[str, Any]) -> None:
        """Every rank its part, into a folder beside the place; then the first rank renames it."""
        place = self._place(manifest["step"])
        try:
            partial = self.world.first(lambda: prepare_partial(place, folder=True))
            self.world.together(lambda: _write_part(content, partial, place, num_bytes, self.world))
            parts = self.world.together(lambda: self._own_files(partial, place))
            described = {name: about for part in parts for name, about in sorted(part.items())}

            def finish() -> None:
                for file, about in ((partial / name, about) for name, about in described.items()):
                    if not file.is_file() or file.stat().st_size != about["num_bytes"]:
                        raise not_seen(file)  # by this rank
                with writing(place, num_bytes):
                    write_manifest(partial, manifest, described)
                    publish(partial, place)

            self.world.first(finish)
        finally:
            if self.world.is_first:
                with suppress(OSError):
                    remove(place.with_name(f".{place.name}.partial"))

    def _own_files(self, partial: Path, place: Path) -> Described:
        """Those that this rank has written; the metadata is the first rank's."""
        with writing(place):  # as they are read back
            files = [path for path in partial.iterdir() if path.name.startswith(f"__{self.world.rank}_")]
            return describe_files(partial, sorted(files + [partial / ".metadata"] * self.world.is_first))

    def prune(self, step: int, keep: int | None = None, passed_over: bool = False) -> None:
        """Delete all but the newest `keep` of those up to `step`, and the best. passed_over: also all later ones."""

        def delete() -> None:
            found = self.found()
            until = [path for path in found if path <= self._place(step)]
            kept = until[-(keep or self.keep) :] + ([] if self.best is None else [self._place(self.best)])
            for path in found:
                if path not in kept and (passed_over or path in until):
                    with writing(path):
                        remove_folder(path)

        self.world.first(delete)

    def has(self, step: int) -> bool:
        """Whether there is an undamaged one of this step, on the disk: the first rank says whether it is there, as it
        has published it; then each looks at its share of the hashes.
        """

        def look() -> bool:
            try:
                return bool(self._manifest(self._place(step)))
            except CheckpointError:
                return False

        return self.world.first(self._place(step).is_dir) and all(self.world.together(look))

    def restore(self, state: State, say: Callable[[str], None]) -> None:
        """Bring `state` to the newest undamaged checkpoint, bit for bit; `say` why newer ones are passed over.

        Deletes none: the best is known when the log of evaluations ends at that step. Without any checkpoint `state`
        stays at step 0. Raises CheckpointError if there are some and none can be read.
        """
        found, reasons = self.world.first(self.found), []
        for place in reversed(found):
            try:
                manifest = self._read(place, state)
            except CheckpointError as error:
                reasons.append(str(error))
                say(f"passed over: {error}")
                continue
            state.step, position = int(manifest["step"]), manifest.get("position")
            state.position = None if position is None else Position.from_json(position)
            state.has_optimizer = manifest.get("optimizer", True)
            return
        if found:
            raise CheckpointError(
                f"{self.folder}: no checkpoint can be read: {'; '.join(reasons)}. Start over with --replace"
            )

    def require_optimizer(self, state: State) -> None:
        """Raises CheckpointError where no step can follow, since `state` was restored without that of the optimizer."""
        if not state.has_optimizer:
            place = self._place(state.step)
            raise CheckpointError(
                f"{place}: was saved without the state of the optimizer, as the training was over and its model could "
                "not be saved; no step can follow it. Run it as it was (train.duration, train.patience), which saves "
                f"the model, or make a model of it by `{command('export', place, '--to', 'hf')}`"
            )

    def restore_weights(self, state: State, step: int) -> None:
        """Give the model the weights that it had after `step`; nothing else changes. Raises CheckpointError."""
        self._read(self._place(step), state, with_optimizer=False)

    def _read(self, place: Path, state: State, with_optimizer: bool = True) -> dict[str, Any]:
        """The manifest of the checkpoint that is read, by all ranks. Each looks at its share of the files' hashes."""
        manifest = self.world.together(lambda: self._manifest(place))[0]
        saved = self.world.together(lambda: _saved_tensors(place, state))[0]
        self.world.together(lambda: _load(saved, place, state, self.world, with_optimizer))
        return manifest

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _manifest(self, place: Path) -> dict[str, Any]:
        with suppress(OSError):  # a node may remember for a minute (NFS) that this name was not there
            list(place.parent.iterdir())
        manifest = read_manifest(place, self.world.rank, self.world.size)
        if manifest.get("run") != self.run_id:
            raise CheckpointError(f"{place}: is a checkpoint of another run")
        if manifest.get("step") != int(place.name.removeprefix("step-")):
            raise CheckpointError(f"{place}: is a checkpoint of step {manifest.get('step')}, not of the step it names")
        return manifest


# What is in a checkpoint ---------------------------------------------------------------------------------------------


def _content(state: State, with_optimizer: bool) -> Content:
    """Everything that must survive, by names that do not depend on the number of ranks."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # states that lie in the host's memory may still be on their way there
    content: Content = {f"{_PARAMETER}{name}": p.detach() for name, p in state.trained.items()}
    if with_optimizer:
        for name, parameter in state.trained.items():
            for key, value in state.optimizer.state.get(parameter, {}).items():
                content[f"{_OPTIMIZER}{name}.{key}"] = value
    return content


def _write_part(content: Content, partial: Path, place: Path, num_bytes: int, world: World) -> None:
    writer = FileSystemWriter(partial, single_file_per_rank=True, sync_files=True)
    with _explained(lambda cause: cannot_write(place, cause, num_bytes)):
        save(content, storage_writer=writer, process_group=world.group, no_dist=world.size == 1)


def _saved_tensors(place: Path, state: State) -> dict[str, Any]:
    """DCP's metadata by name. Raises CheckpointError where the checkpoint holds other parameters than are trained."""
    with _explained(partial(_unreadable, place)):
        saved = FileSystemReader(place).read_metadata().state_dict_metadata
        shapes = {name: getattr(tensor, "size", None) for name, tensor in saved.items() if name.startswith(_PARAMETER)}
    if shapes != {f"{_PARAMETER}{name}": p.shape for name, p in state.trained.items()}:
        raise CheckpointError(f"{place}: holds other parameters than this model trains; start over with --replace")
    return saved


def _load(saved: Mapping[str, Any], place: Path, state: State, world: World, with_optimizer: bool) -> None:
    """Read parameters in place, and the optimizer's state, each rank its part."""
    trained = state.trained
    content: Content = {f"{_PARAMETER}{name}": p.detach() for name, p in trained.items()}
    owners: dict[str, tuple[torch.nn.Parameter, str]] = {}
    for full in (full for full in saved if full.startswith(_OPTIMIZER) and with_optimizer):
        name, _, key = full.removeprefix(_OPTIMIZER).rpartition(".")
        owners[full] = trained[name], key
        content[full] = _empty(saved[full], trained[name], state.optimizer)
    with _explained(partial(_unreadable, place)):
        reader = FileSystemReader(place)
        load(content, storage_reader=reader, process_group=world.group, no_dist=world.size == 1)
    if owners:
        state.optimizer.state.clear()
    for full, (parameter, key) in owners.items():
        state.optimizer.state[parameter][key] = content[full]


def _unreadable(place: Path, cause: BaseException) -> CheckpointError:
    return CheckpointError(f"{place}: cannot be read: {first_line(cause)}")


def _empty(saved: Any, parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> Any:
    """Where a value of the optimizer is read to: spread over the ranks as its parameter is, if it has as many rows.

    A number is where the optimizer wants it: torch's fused ones beside the parameter, all others on the CPU.
    """
    if not isinstance(saved, TensorStorageMetadata):
        return None
    size, dtype = saved.size, saved.properties.dtype
    if offloads(optimizer):
        return host_zeros(size, dtype, parameter.device)
    if size == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    if isinstance(parameter, DTensor) and size[:1] == parameter.shape[:1]:
        return distributed_zeros(size, dtype=dtype, device_mesh=parameter.device_mesh, placements=parameter.placements)
    on_cpu = not size and not optimizer.defaults.get("fused")
    return torch.zeros(size, dtype=dtype, device="cpu" if on_cpu else parameter.device)


@contextmanager
def _explained(explain: Callable[[BaseException], CheckpointError]) -> Iterator[None]:
    """Raises CheckpointError for whatever DCP raises inside, and does not warn that there is but one process."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointError:
        raise
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause.__context__, OSError):  # torch's writer, after the file's own error
            cause = cause.__context__
        raise explain(cause) from cause
    except Exception as error:
        raise explain(error) from error
