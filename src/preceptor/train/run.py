"""A run from its prepared data to a trained model in its folder (run_folder.py lists what is in it)."""

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console

from preceptor import config
from preceptor.config.held import LiveModel
from preceptor.console import Display
from preceptor.data.loader import StreamLoader
from preceptor.errors import CheckpointError, counted, explaining_out_of_memory
from preceptor.files import read_json, write_json
from preceptor.model.attention.cuda import kernels
from preceptor.model.compiled import compile_seconds
from preceptor.model.held import HeldModel, leave_plain
from preceptor.model.load import does_not_fit, save_model, saved_bytes
from preceptor.report.curves import PREDICTED
from preceptor.train.announce import announce
from preceptor.train.build import (
    build,
    build_model,
    connected,
    optimizer_of,
    placement_of,
    predicted_bytes,
    saved_dtype,
    with_precision,
)
from preceptor.train.checkpoint import Checkpoints, State, checkpoint_bytes, require_finite
from preceptor.train.evaluations import Evaluations
from preceptor.train.finish import finish, require_room, save_at_the_end
from preceptor.train.improvement import outcome, outcome_lines
from preceptor.train.loop import Loop, Step
from preceptor.train.optimizer import compile_update, optimizer_memory, require_host_memory
from preceptor.train.preflight import preflight
from preceptor.train.prepare import Prepared
from preceptor.train.provenance import amounts, record_of_first, renew_held_out, session, write_start
from preceptor.train.quantized import take_adapter
from preceptor.train.run_folder import RunFolder, longer
from preceptor.train.signals import StopRequest
from preceptor.train.step import Objective, begin_peak, own_loss, peak_memory_bytes, require_finite_loss
from preceptor.train.windows import WindowRecord
from preceptor.world import ONE, World


@dataclass(repr=False)
class Training:
    """One session of a run in its folder, which has no model yet. A run in it goes on from its newest checkpoint.

    stop: signals that stop the run. world: not connected yet; its first process alone writes in the folder, but for
    checkpoints and model. model, loop: from the first step on. summary: when the run is finished.
    """

    folder: RunFolder
    prepared: Prepared
    console: Console
    stop: StopRequest
    world: World = ONE
    model: Any = None
    loop: Loop | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    _state: State = field(init=False)
    _objective: Objective = field(init=False)

    def steps(self, dry_run: bool = False) -> Generator[Step]:
        """Take the steps, one at a time, and save the model after the last one.

        What makes the folder a run's is written when the model is loaded and has passed the preflight, so that what
        cannot work leaves nothing behind. dry_run: end there, with nothing written.
        """
        started = time.perf_counter()
        try:
            with self.prepared.streaming():
                self._begin(dry_run)
                if not dry_run:
                    yield from self._train(started)
        finally:
            if self._held is not None:
                self._held.release()
                self.model = None if self._held.built is None else self._held.built[0]
            elif self.model is not None and self.world.size == 1:
                leave_plain(self.model)
            self._state = self._objective = None  # type: ignore[assignment]  # whose tensors nobody needs any more

    @property
    def _held(self) -> HeldModel | None:
        model = self.prepared.run.model
        return model.held if isinstance(model, LiveModel) else None

    def _train(self, started: float) -> Generator[Step]:
        folder, world, state, checkpoints = self.folder, self.world, self._state, self._checkpoints
        loader, objective, prepared = self._loader, self._objective, self.prepared
        if isinstance(loader, StreamLoader):
            loader.on_window = WindowRecord(prepared, folder, world, self.say)
            if state.position is not None:
                loader.seek(state.position)
        with self.stop.while_training(folder.path, world):
            with checkpoints, Display(self.console, self._num_steps, state.step) as display:
                evaluations = Evaluations(prepared, folder.path, display.say, loader.alone, world)
                self.loop = Loop(
                    prepared.run, objective, state, loader, evaluations, display, folder, checkpoints, self.stop, world
                )
                begin_peak(state.model.device)  # loading and proofs may have needed more than a step
                try:
                    yield from self.loop.steps()
                finally:
                    if self._held is not None:
                        self._held.ends_at(state.step, folder.path)
            require_finite(state)
            require_finite_loss(state, loader.batch(state.step - 1)[0], self._precision, objective)
            for finishing in (self.loop.keep_last, self.loop.write, self._end, self._save):
                save_at_the_end(finishing, state, checkpoints, self.stop, self.say, with_optimizer=self.loop.ends)
            if world.size == 1:  # else it was needed to place the model
                self._record_prediction()
            seconds = time.perf_counter() - started
            self.summary = world.first(lambda: finish(folder, self.say, seconds))
            if self._held is not None:
                self._held.ends_at(state.step, None)

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    def _begin(self, dry_run: bool) -> None:
        """Load, prove, and write what makes the folder this run's, or bring the model to the newest checkpoint."""
        folder, world, say, held = self.folder, self.world, self.say, self._held
        if held is not None and not folder.goes_on:
            held.require_steps_saved(0)
        device = connected(self.prepared, world)
        prepared = self.prepared = with_precision(self.prepared, device, folder, say)
        run = prepared.run
        assert run.train.precision is not None, "resolved above"
        self._precision = run.train.precision
        begin_peak(device)
        memory_before_bytes = peak_memory_bytes(device)
        own_loss(run.loss)  # what cannot be is said before the model is loaded
        torch.manual_seed(run.train.seed)
        placement = placement_of(prepared, device, world, say)
        restored = world.first(lambda: folder.has_checkpoint)
        with explaining_out_of_memory(does_not_fit(run.model.path, run.model.dtype)):
            self.model, untrained = build(prepared, device, say, placement, world, first_values=not restored)
        record = record_of_first(folder, prepared, device, world, say)
        num_base_tokens, base = prepared.chat.num_base_tokens, None if held is None else held.base
        objective = Objective.of(run.loss, run.memory, self.model, num_base_tokens, untrained, run.train, base)
        if held is not None:
            held.base = objective.base
        self._objective, self._state = objective, State(self.model, optimizer_of(run, self.model))
        self._checkpoints = _checkpoints(folder, run, record, world)
        self._require_room()
        require_host_memory(self._state.optimizer, world.local_size)
        if run.engine != "plain":
            compile_update(self._state.optimizer, device, say, world)
        reserved = optimizer_memory(self._state.optimizer)
        loader, seconds = preflight(self.model, prepared.loader(), self._precision, say, objective, reserved, world)
        self._loader, self._num_steps = loader, run.train.duration.steps(loader.steps_per_epoch)
        where_rejected = f"see {run.out}/rejections.jsonl"
        if dry_run:
            where_rejected = "`preceptor check` counts them"
        elif folder.goes_on:
            if held is not None:
                held.has_steps |= restored
            self._go_on()
            if held is not None:
                held.require_steps_saved(self._state.step)
        elif world.is_first:
            counts = amounts(prepared, loader, self._num_steps) | {
                "each_conversation_alone": loader.alone,
                "preflight_seconds": seconds,
                **({"compile_seconds": compile_seconds()} if compile_seconds() else {}),
                "memory_before_bytes": memory_before_bytes,
                **({} if placement is None else {PREDICTED: placement.peak_bytes}),
            }
            record = {**record, "engine": _engine_record(run, self._state)}  # the proofs may have changed it
            folder.begin(record, config.dump(run), lambda place: write_start(place, prepared, counts))
        announce(self.console, prepared, self._state, self._num_steps, loader, where_rejected)

    def _require_room(self) -> None:
        """Raises CheckpointError where the disk has no room for the model and the checkpoints of this run."""
        run = self.prepared.run
        settings, num = run.checkpoint, 0
        if settings.every is not None:
            num = max(1, settings.keep + 1 + (settings.best is not None) - len(self._checkpoints.found()))
        model_bytes = saved_bytes(self.model, saved_dtype(run.model), _saved_adapter(run))
        require_room(self.folder.path, model_bytes, checkpoint_bytes(self._state), num)

    def _go_on(self) -> None:
        """Bring state and logs to the newest checkpoint. Raises CheckpointError where a longer run has none."""
        folder, run, state, world, say = self.folder, self.prepared.run, self._state, self.world, self.say
        with explaining_out_of_memory(
            f"{run.out}: the states of the checkpoint do not fit in memory beside the model, where they have been "
            "before. Look for other processes on this device"
        ):
            self._checkpoints.restore(state, say)
        if folder.lengthens:
            if not state.step:
                raise CheckpointError(f"{run.out}: has no checkpoint to train on from{longer(run.out)}")
            self._checkpoints.require_optimizer(state)
            world.first(lambda: folder.lengthen(config.dump(run), self._num_steps))
            say(f"lengthened to {counted(self._num_steps, 'step')}; goes on after step {state.step:,}")
        world.first(lambda: folder.go_on(state.step, session(state.model.device, world.size), say))
        world.first(lambda: renew_held_out(folder.path, self.prepared))
        self._checkpoints.best = world.first(lambda: folder.best_step(run))  # of the evaluations up to there
        self._checkpoints.prune(state.step)

    def _end(self) -> None:
        """Record how the training ended; give the model the weights that are to be saved, where they are not the last.

        A checkpoint of the last step is kept then.
        """
        assert self.loop is not None
        folder, run, checkpoints, step = self.folder, self.prepared.run, self._checkpoints, self._state.step
        found = outcome(self.world.first(lambda: folder.evaluations), run, step, self._num_steps, self.loop.ends)
        best, said = found["model_step"], []
        if best != step and not checkpoints.has(best):
            said = [
                f"the checkpoint of step {best}, the best by {run.checkpoint.best}, is not there: the last is saved"
            ]
            found = {key: value for key, value in found.items() if key != "best"} | {"model_step": step}
        if found["model_step"] != step:
            checkpoints.save(self._state)
            checkpoints.wait()
        self.world.first(lambda: folder.record_outcome(found))
        for line in [*said, *outcome_lines(found, step, run.out)]:
            self.say(line)
        if found["model_step"] != step:
            checkpoints.restore_weights(self._state, found["model_step"])

    def _record_prediction(self) -> None:
        """What memory a plan predicts, beside what was measured: at the end, as the first step need not wait for it."""
        try:
            found, file = predicted_bytes(self.prepared, self.model, self._loader), self.folder.path / "data.json"
            if found is not None:
                write_json(file, {**read_json(file), PREDICTED: found})
        except Exception as error:  # whatever it is, the model is saved
            self.say(f"the predicted memory could not be recorded ({type(error).__name__}: {error})")

    def _save(self) -> None:
        """The model of a run; of a quantized base its unquantized one with the adapter, made by the first process."""
        prepared, run = self.prepared, self.prepared.run
        place, dtype, adapter = self.folder.path / "model", saved_dtype(run.model), _saved_adapter(run)

        def save(model: Any) -> None:
            save_model(model, prepared.chat.tokenizer, place, dtype=dtype, adapter=adapter)

        if run.model.quantization is None:
            save(self.model)
        else:
            self.world.first(lambda: save(_unquantized(self.model, prepared)))


def _checkpoints(folder: RunFolder, run: config.Run, record: Mapping[str, Any], world: World) -> Checkpoints:
    about = {"versions": record["versions"], "config": run.model_dump(mode="json")}
    place, settings, best = folder.path / "checkpoints", run.checkpoint, world.first(lambda: folder.best_step(run))
    own = world.with_own_group()  # a thread may write while training goes on
    return Checkpoints(place, record["run"], settings.keep, settings.async_save, about, own, best)


def _engine_record(run: config.Run, state: State) -> dict[str, Any]:
    engine = state.engine.state
    why = {} if engine.not_compiled is None else {"not_compiled": engine.not_compiled}
    return {"mode": run.engine, "optimisations": sorted(engine.optimisations), **why, **kernels()}


def _unquantized(model: Any, prepared: Prepared) -> Any:
    """The unquantized base, on the CPU, with the adapter of `model`."""
    unquantized = {"quantization": None, "double_quantization": None}
    settings = prepared.run.model.model_copy(update=unquantized)
    plain = replace(prepared, run=prepared.run.model_copy(update={"model": settings}))
    twin = build_model(plain, torch.device("cpu"), first_values=False)
    take_adapter(twin, model)
    return twin


def _saved_adapter(run: config.Run) -> Any:
    return "both" if run.adapter is None else run.adapter.save
