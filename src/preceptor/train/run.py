"""A run from its prepared data to a trained model in its folder (run_folder.py lists what is in it)."""

import time
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console

from preceptor import config
from preceptor.config.held import LiveModel
from preceptor.console import Display
from preceptor.data.loader import Loader, StreamLoader
from preceptor.errors import CheckpointError, counted, explaining_out_of_memory
from preceptor.files import read_json, write_json
from preceptor.model.attention.cuda import kernels
from preceptor.model.compiled import compile_seconds
from preceptor.model.held import leave_plain
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
from preceptor.train.differences import may_be_lengthened
from preceptor.train.evaluations import build_evaluations
from preceptor.train.finish import Say, finish, require_room, save_at_the_end
from preceptor.train.improvement import outcome, outcome_lines
from preceptor.train.loop import Loop, Step
from preceptor.train.optimizer import optimizer_memory, require_host_memory
from preceptor.train.preflight import preflight
from preceptor.train.prepare import Prepared
from preceptor.train.provenance import amounts, record_of_first, session, write_start
from preceptor.train.quantized import take_adapter
from preceptor.train.run_folder import RunFolder, longer
from preceptor.train.signals import StopRequest
from preceptor.train.step import Objective, own_loss, peak_memory_bytes, require_finite_loss
from preceptor.train.windows import WindowRecord, record_windows
from preceptor.world import ONE, World


@dataclass
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

    def steps(self, dry_run: bool = False) -> Generator[Step]:
        """Take the steps, one at a time, and save the model after the last one.

        What makes the folder a run's is written when the model is loaded and has passed the preflight, so that what
        cannot work leaves nothing behind. dry_run: end there, with nothing written.
        """
        started = time.perf_counter()
        try:
            with self.prepared.streaming():
                ready = self._begin(dry_run)
                if not dry_run:
                    yield from self._train(ready, started)
        finally:
            if isinstance(self.prepared.run.model, LiveModel):
                self.prepared.run.model.held.release()
            elif self.model is not None and self.world.size == 1:
                leave_plain(self.model)

    def _train(self, ready: "_Ready", started: float) -> Generator[Step]:
        folder, world = self.folder, self.world
        state, checkpoints, loader, run = ready.state, ready.checkpoints, ready.loader, self.prepared.run
        record_windows(loader, state.position, WindowRecord(self.prepared, folder, world, self.say))
        with self.stop.while_training(folder.path, world):
            with checkpoints, Display(self.console, ready.num_steps, state.step) as display:
                evaluations = build_evaluations(self.prepared, folder.path, display.say, loader.alone, world)
                self.loop = Loop(
                    run, ready.objective, state, loader, evaluations, display, folder, checkpoints, self.stop, world
                )
                try:
                    yield from self.loop.steps()
                finally:
                    if isinstance(run.model, LiveModel):
                        run.model.held.has_steps = state.step > 0
            require_finite(state)
            assert run.train.precision is not None, "resolved when it began"
            require_finite_loss(state, loader.batch(state.step - 1)[0], run.train.precision, ready.objective)
            _end(state, run, folder, checkpoints, ready.num_steps, world, self.say, self.loop.ends)
            if world.size == 1:  # else it was needed to place the model
                _record_prediction(folder, self.prepared, state.model, loader)
            save_at_the_end(lambda: _save(state, self.prepared, folder, world), state, checkpoints, self.stop, self.say)
            seconds = time.perf_counter() - started
            self.summary = world.first(lambda: finish(folder, self.say, seconds))

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    def _begin(self, dry_run: bool) -> "_Ready":
        """Load, prove, and write what makes the folder this run's, or bring the model to the newest checkpoint."""
        folder, world, say = self.folder, self.world, self.say
        if isinstance(self.prepared.run.model, LiveModel) and not folder.goes_on:
            self.prepared.run.model.held.require_steps_saved(0)
        device = connected(self.prepared, world)
        prepared = self.prepared = with_precision(self.prepared, device, folder, say)
        run = prepared.run
        assert run.train.precision is not None, "resolved above"
        memory_before_bytes = peak_memory_bytes(device)
        own_loss(run.loss)  # what cannot be is said before the model is loaded
        torch.manual_seed(run.train.seed)
        placement = placement_of(prepared, device, world, say)
        restored = world.first(lambda: folder.has_checkpoint)
        with explaining_out_of_memory(does_not_fit(run.model.path, run.model.dtype)):
            self.model, untrained = build(prepared, device, say, placement, world, first_values=not restored)
        record = record_of_first(folder, prepared, device, world, say)
        held = run.model.held if isinstance(run.model, LiveModel) else None
        objective = Objective.of(
            run.loss,
            run.memory,
            self.model,
            prepared.chat.num_base_tokens,
            untrained,
            run.train,
            None if held is None else held.base,
        )
        if held is not None:
            held.base = objective.base
        state = State(self.model, optimizer_of(run, self.model))
        checkpoints = _checkpoints(folder, run, record, world)
        _require_room(run, state, checkpoints)
        require_host_memory(state.optimizer, world.local_size)
        reserved = optimizer_memory(state.optimizer)
        loader, seconds = preflight(self.model, prepared.loader(), run.train.precision, say, objective, reserved)
        num_steps = run.train.duration.steps(loader.steps_per_epoch)
        ready = _Ready(state, objective, loader, checkpoints, num_steps)
        if dry_run:
            announce(self.console, prepared, state, num_steps, loader, "`preceptor check` counts them")
            return ready
        if folder.goes_on:
            _go_on(folder, run, state, checkpoints, num_steps, world, say)
            if isinstance(run.model, LiveModel):
                run.model.held.require_steps_saved(state.step)
        elif world.is_first:
            counts = amounts(prepared, loader, num_steps) | {
                "each_conversation_alone": loader.alone,
                "preflight_seconds": seconds,
                **({"compile_seconds": compile_seconds()} if compile_seconds() else {}),
                "memory_before_bytes": memory_before_bytes,
                **({} if placement is None else {PREDICTED: placement.peak_bytes}),
            }
            record = {**record, "engine": _engine_record(run, state)}  # the proofs may have changed it
            folder.begin(record, config.dump(run), lambda place: write_start(place, prepared, counts))
        announce(self.console, prepared, state, num_steps, loader, f"see {run.out}/rejections.jsonl")
        return ready


@dataclass(frozen=True)
class _Ready:
    """What a training loop needs that has passed all checks."""

    state: State
    objective: Objective
    loader: Loader | StreamLoader
    checkpoints: Checkpoints
    num_steps: int


def _checkpoints(folder: RunFolder, run: config.Run, record: Mapping[str, Any], world: World) -> Checkpoints:
    about = {"versions": record["versions"], "config": run.model_dump(mode="json")}
    place, settings, best = folder.path / "checkpoints", run.checkpoint, world.first(lambda: folder.best_step(run))
    own = world.with_own_group()  # a thread may write while training goes on
    return Checkpoints(place, record["run"], settings.keep, settings.async_save, about, own, best)


def _go_on(
    folder: RunFolder, run: config.Run, state: State, checkpoints: Checkpoints, num_steps: int, world: World, say: Say
) -> None:
    """Bring `state` and the logs to the newest checkpoint. Raises CheckpointError where a longer run has none."""
    with explaining_out_of_memory(
        f"{run.out}: the states of the checkpoint do not fit in memory beside the model, where they have been before. "
        "Look for other processes on this device"
    ):
        checkpoints.restore(state, say)
    if folder.lengthens:
        if not state.step:
            raise CheckpointError(f"{run.out}: has no checkpoint to train on from{longer(run.out)}")
        world.first(lambda: folder.lengthen(config.dump(run), num_steps))
        say(f"lengthened to {counted(num_steps, 'step')}; goes on after step {state.step:,}")
    world.first(lambda: folder.go_on(state.step, session(state.model.device, world.size), say))
    checkpoints.best = world.first(lambda: folder.best_step(run))  # of the evaluations up to there


def _end(
    state: State,
    run: config.Run,
    folder: RunFolder,
    checkpoints: Checkpoints,
    num_steps: int,
    world: World,
    say: Say,
    ended: bool,
) -> None:
    """Record how the training ended; give the model the weights that are to be saved, where they are not the last.

    ended: by the program that took the steps.
    A checkpoint of the last step is kept where the model is of another one, or where the run may be lengthened.
    """
    lines, step = world.first(lambda: folder.evaluations), state.step
    found = outcome(lines, run, step, num_steps, ended)
    best = found["model_step"]
    if best != step and not checkpoints.has(best):
        say(f"the checkpoint of step {best}, the best by {run.checkpoint.best}, is not there: the last is saved")
        found = {**found, "model_step": step}
    may_go_on = run.checkpoint.every is not None and may_be_lengthened(run)
    if found["model_step"] != step or may_go_on:
        checkpoints.save(state)
        checkpoints.wait()
    world.first(lambda: folder.record_outcome(found))
    for line in outcome_lines(found, step, run.out):
        say(line)
    if found["model_step"] != step:
        checkpoints.restore_weights(state, found["model_step"])


def _engine_record(run: config.Run, state: State) -> dict[str, Any]:
    engine = state.engine.state
    why = {} if engine.not_compiled is None else {"not_compiled": engine.not_compiled}
    return {"mode": run.engine, "optimisations": sorted(engine.optimisations), **why, **kernels()}


def _record_prediction(folder: RunFolder, prepared: Prepared, model: Any, loader: Loader | StreamLoader) -> None:
    """What memory a plan predicts, beside what was measured: at the end, as the first step need not wait for it."""
    found = predicted_bytes(prepared, model, loader)
    if found is not None:
        with suppress(CheckpointError):  # a disk that is full is no reason to end here
            write_json(folder.path / "data.json", {**read_json(folder.path / "data.json"), PREDICTED: found})


def _save(state: State, prepared: Prepared, folder: RunFolder, world: World) -> None:
    """The model of a run; of a quantized base its unquantized one with the adapter, made by the first process."""
    dtype, adapter = saved_dtype(prepared.run.model), _saved_adapter(prepared.run)

    def save(model: Any) -> None:
        save_model(model, prepared.chat.tokenizer, folder.path / "model", dtype=dtype, adapter=adapter)

    if prepared.run.model.quantization is None:
        save(state.model)
    else:
        world.first(lambda: save(_unquantized(state.model, prepared)))


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


def _require_room(run: config.Run, state: State, checkpoints: Checkpoints) -> None:
    """Raises CheckpointError where the disk has no room for the model and the checkpoints of this run."""
    model_bytes = saved_bytes(state.model, _saved_adapter(run))
    num = (
        0
        if run.checkpoint.every is None
        else max(1, run.checkpoint.keep + 1 + (run.checkpoint.best is not None) - len(checkpoints.found()))
    )
    require_room(checkpoints.folder.parent, model_bytes, checkpoint_bytes(state), num)
