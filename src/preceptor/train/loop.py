"""Training loop: sequences in, a trained model out, every step recorded."""

import math
import resource
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from preceptor import config
from preceptor.console import Display
from preceptor.data.forest import PackedSequence, empty_sequence
from preceptor.data.loader import Loader
from preceptor.errors import ModelError
from preceptor.files import append_line
from preceptor.model.activations.context import StepContext
from preceptor.model.activations.phases import num_levels
from preceptor.model.activations.policy import ActivationPolicy
from preceptor.model.adapters.adapted import FirstUpdate, without_gradient
from preceptor.model.forward import Engine
from preceptor.model.loss.linear_cross_entropy import HeadCast
from preceptor.model.out_of_memory import is_out_of_memory
from preceptor.model.parts import evaluating, has_dropout
from preceptor.model.sharding import begin_sequence, is_sharded, sum_gradients
from preceptor.train.checkpoint import Checkpoints, State
from preceptor.train.evaluations import Evaluations
from preceptor.train.improvement import best_of, stopped_early
from preceptor.train.objective import CROSS_ENTROPY_LOSS, Objective
from preceptor.train.optimizer import apply_learning_rate, clip_gradients, schedule
from preceptor.train.precision import autocast
from preceptor.train.run_folder import RunFolder
from preceptor.train.signals import Stopped, StopRequest
from preceptor.world import ONE, World

_NAMED_EXAMPLES = 8  # of a step whose loss is not finite


def train(
    run: config.Run,
    objective: Objective,
    state: State,
    loader: Loader,
    evaluations: Evaluations,
    display: Display,
    folder: RunFolder,
    checkpoints: Checkpoints,
    stop: StopRequest,
    world: World = ONE,
) -> None:
    """Train `state` to the end of the run. A step's summed loss is divided once, by its number of trained tokens (or
    conversations, data/mixture.py), however they are spread. Raises ModelError as `skip_step`, `require_finite`;
    Stopped, with all steps saved.
    """
    optimizer = run.optimizer
    total_steps = run.train.duration.steps(loader.steps_per_epoch)
    learning_rates = schedule(optimizer, loader.steps_per_epoch, total_steps)
    saving, evaluating = (Clock(each.every, loader.steps_per_epoch, total_steps) for each in (run.checkpoint, run.eval))

    def evaluate(due: bool) -> bool:
        """Whether the run ends here because evaluations no longer improve."""
        if due or state.step in (0, total_steps):
            with stop.at_once():
                evaluations.evaluate(state)
        if (best := best_of(evaluations.lines, run)) and best[0] == state.step:
            checkpoints.best = state.step
            save()
        return stopped_early(evaluations.lines, run.train.patience) is not None

    def save(wait: bool = False) -> None:
        if state.step:
            checkpoints.save(state)
        if wait:
            checkpoints.wait()
            stop.answered()
        if world.is_first and checkpoints.found():
            folder.drop_replaced()

    try:
        ends = evaluate(evaluating.due(state.step))  # unless the session before has done so
        while state.step < total_steps and not ends:
            values = _logged_step(run, objective, state, loader, learning_rates(state.step), folder, world)
            display.step(values)
            if unmoved := without_gradient(values.get("without_gradient", [])):
                display.say(unmoved)
            checkpoints.check()
            asked, saves, evaluates = stop.after_step([saving.due(state.step), evaluating.due(state.step)])
            if asked or saves:
                save(wait=asked)
            ends = evaluate(evaluates)
            stop.check()
    except Stopped as stopped:
        save(wait=True)
        raise Stopped(stopped.number, state.step) from None
    checkpoints.wait()


def _logged_step(
    run: config.Run,
    objective: Objective,
    state: State,
    loader: Loader,
    learning_rate: float,
    folder: RunFolder,
    world: World,
) -> dict[str, Any]:
    """Take the next step, or leave out its update; the logged line of it. Raises as `take_step`, `skip_step`."""
    started, step, skipped = time.perf_counter(), state.step, {}
    sequences, precision = loader.batch(step, world.rank, world.size), run.train.precision
    assert precision is not None
    first = FirstUpdate(state.model) if run.adapter is not None and step == 0 else None
    try:
        loss, grad_norm = take_step(
            state, sequences, learning_rate, run.optimizer.max_grad_norm, precision, objective, run.train.seed, world
        )
    except NotFiniteError as error:
        own = loader.sources(step, world.rank, world.size)
        broken = [source for of_rank in world.gather([own[at] for at in error.broken]) for source in of_rank]
        num_skipped = world.gather(folder.num_skipped if world.is_first else 0)[0]
        skipped = skip_step(state, error, broken, loader.sources(step), num_skipped, run.train.max_skipped)
        loss, grad_norm, first = error.loss, error.grad_norm, None
    values = {
        "step": state.step,
        "epoch": round(state.step / loader.steps_per_epoch, 4),
        "loss": loss,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        **_of_all(state, sequences, time.perf_counter() - started, world),
        **skipped,
        **({} if first is None else _unmoved(first, state, world)),
    }
    if world.is_first:
        append_line(folder.path / "metrics.jsonl", values)
    return values


def _unmoved(first: FirstUpdate, state: State, world: World) -> dict[str, list[str]]:
    """The adapted layers that no process has moved in the first step."""
    of_ranks = world.gather(first.unmoved(state.model))
    found = [layer for layer in of_ranks[0] if all(layer in own for own in of_ranks)]
    return {"without_gradient": found} if found else {}


class NotFiniteError(ModelError):
    """Loss or gradient of a step is NaN or infinite. broken: places of this process's sequences whose own loss is."""

    def __init__(self, step: int, loss: float, grad_norm: float, broken: Sequence[int]) -> None:
        super().__init__(f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite")
        self.loss, self.grad_norm, self.broken = loss, grad_norm, broken


def skip_step(
    state: State,
    error: NotFiniteError,
    broken: Sequence[Sequence[str]],
    sources: Sequence[Sequence[str]],
    num_skipped: int,
    most: int,
) -> dict[str, Any]:
    """Go on without the update of this step; what the log says of it. Raises ModelError where too many were skipped.

    sources: the examples of each sequence of the step; broken: of those whose own loss is not finite.
    """
    examples = list(dict.fromkeys(source for own in broken or sources for source in own))
    shown = ", ".join(examples[:_NAMED_EXAMPLES])
    shown += f" and {len(examples) - _NAMED_EXAMPLES} more" if len(examples) > _NAMED_EXAMPLES else ""
    whose = "in the sequence of" if broken else "in one of the sequences of"
    if num_skipped >= most:
        skipped = f"; {num_skipped} steps were skipped before" if num_skipped else ""
        raise ModelError(
            f"{error}, {whose} {shown}{skipped}. The weights were left as they are. Look at these examples, lower "
            "optimizer.learning_rate, lengthen optimizer.warmup, use precision float32, or allow some steps to be "
            "skipped with train.max_skipped"
        )
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return {"skipped": f"{error}, {whose} {shown}; skipped, {num_skipped + 1} of {most}", "examples": examples}


def _of_all(state: State, sequences: Sequence[PackedSequence], seconds: float, world: World) -> dict[str, Any]:
    """Tokens of a step over all processes, the time of the slowest and the memory of the largest."""
    num_tokens = sum(sequence.num_tokens for sequence in sequences)
    num_trained = sum(sequence.num_trained for sequence in sequences)
    sums, most = world.sum(num_tokens, num_trained), world.max(seconds, peak_memory_bytes(state.model.device))
    return {
        "num_tokens": int(sums[0]),
        "num_trained": int(sums[1]),
        "seconds": most[0],
        "peak_memory_bytes": int(most[1]),
    }


def take_step(
    state: State,
    sequences: Sequence[PackedSequence],
    learning_rate: float,
    max_grad_norm: float,
    precision: str,
    objective: Objective = CROSS_ENTROPY_LOSS,
    seed: int = 0,
    world: World = ONE,
) -> tuple[float, float]:
    """One optimizer step: (mean loss in nats, by default per trained token; norm of the gradient, not clipped).

    sequences: of several processes those of this one; what is returned is of all.
    seed: of the run; with the number of the step and a sequence's tokens it determines what is drawn for that sequence.
    Raises NotFiniteError, before any weight is touched, when loss or gradient is not finite; ModelError when memory
    runs out.
    """
    divisor = world.sum(math.fsum(sequence.divisor for sequence in sequences))[0] or 1.0
    where = f"step {state.step + 1}: a sequence"
    losses = accumulate_gradients(
        state.engine, sequences, divisor, precision, objective, where, (seed, state.step), world
    )
    loss = 0.0
    for own in losses:  # one after the other: `sum` rounds otherwise from Python 3.12 on
        loss += own
    (loss,) = world.sum(loss)
    grad_norm = clip_gradients(state.optimizer, max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        broken = [place for place, own in enumerate(losses) if not math.isfinite(own)]
        raise NotFiniteError(state.step + 1, loss, grad_norm, broken)
    apply_learning_rate(state.optimizer, learning_rate)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return loss, grad_norm


@torch.no_grad()
def require_finite_loss(state: State, sequence: PackedSequence, precision: str, objective: Objective) -> None:
    """Raises ModelError where the loss of a sequence is not finite: weights may be finite and far too large."""
    with evaluating(state.model), autocast(state.model.device, precision):
        loss = objective(state.engine, sequence).item()
    if not math.isfinite(loss):
        raise ModelError(
            f"after step {state.step} the loss is {loss}: the model is not saved. Lower optimizer.learning_rate, or "
            "lengthen optimizer.warmup"
        )


def accumulate_gradients(
    engine: Engine,
    sequences: Sequence[PackedSequence],
    divisor: float,
    precision: str,
    objective: Objective,
    where: str,
    seed: tuple[int, int] = (0, 0),
    world: World = ONE,
) -> list[float]:
    """Forward and backward of each sequence: the loss of each over `divisor`, whose gradients join `.grad`.

    sequences: of this process; the gradients are those of all processes, summed, or this one's part of them.
    seed: of the run, and the step. Random numbers (dropout) are drawn anew for each sequence, so that they do not
    depend on the sequences before it, and no generator's state has to survive. Raises ModelError, which begins with
    `where`, when memory runs out.
    """
    step = StepContext(divisor, accumulates=True, head_cast=HeadCast(), noise=objective.noise(seed[1]))
    device = engine.model.device
    engine.train()
    losses = []
    passes = _in_step_with_others(engine, sequences, objective.policy, world)
    for place, (sequence, levels) in enumerate(passes):
        torch.manual_seed(sequence_seed(*seed, sequence))
        begin_sequence(engine, is_last=place == len(passes) - 1)
        with _explaining_out_of_memory(sequence, where):
            with autocast(device, precision):
                share = objective(engine, sequence, replace(step, num_levels=levels))
            share.backward()
        losses.append(share.item())
    sum_gradients(engine)
    return losses


def _in_step_with_others(
    engine: Engine, sequences: Sequence[PackedSequence], policy: ActivationPolicy, world: World
) -> list[tuple[PackedSequence, int]]:
    """The passes of this process, each a sequence and its number of levels (activations/phases.py): as many as on the
    others, where they share the weights of a model, and so must ask for them equally often.
    """
    padded = list(sequences)
    if world.size > 1 and is_sharded(engine):
        num, alone = world.max(len(sequences), any(sequence.alone for sequence in sequences))
        padded += [empty_sequence(bool(alone))] * (int(num) - len(sequences))
    if policy.context_gradient == "full":
        return [(sequence, 0) for sequence in padded]
    levels: Iterable[float] = [0] * len(padded)
    if has_dropout(engine.model):  # what is added draws as well, so it follows the step, not the processes
        levels = world.max(max(map(num_levels, sequences), default=0)) * len(padded)
    elif world.size > 1 and is_sharded(engine):
        levels = world.max(*map(num_levels, padded))
    return list(zip(padded, map(int, levels), strict=True))


def sequence_seed(seed: int, step: int, sequence: PackedSequence) -> int:
    """The seed of what is drawn for a sequence in a step: the same wherever, and after whatever, it is computed."""
    return int(np.random.SeedSequence([seed, step, zlib.crc32(sequence.ids_T.tobytes())]).generate_state(1)[0])


@contextmanager
def _explaining_out_of_memory(sequence: PackedSequence, where: str) -> Iterator[None]:
    """Raises ModelError, with the sequence's size and the keys that help, where memory runs out inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"{where}, {sequence.num_tokens:,} tokens, {sequence.num_trained:,} of them trained, does not fit in "
            f"memory beside weights, gradients and optimizer state. Lower data.max_length, save activations "
            f"(memory.context_gradient, memory.activation_checkpointing), or train an adapter"
        ) from error


def peak_memory_bytes(device: torch.device | str) -> int:
    """The peak so far: allocated by torch on a CUDA device, else the resident memory of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes


class Clock:
    """When something that happens `every` so often is due: after certain steps, or when so much time has passed."""

    def __init__(self, every: config.Duration | None, steps_per_epoch: int, total_steps: int) -> None:
        self._seconds = None if every is None else every.seconds
        self._steps = None
        if every is not None and every.seconds is None:
            self._steps = max(1, every.steps(steps_per_epoch, total_steps))
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is after this step. For one in time, asking says that it happens now."""
        if self._steps is not None:
            return step % self._steps == 0
        if self._seconds is None or time.monotonic() - self._last < self._seconds:
            return False
        self._last = time.monotonic()
        return True
