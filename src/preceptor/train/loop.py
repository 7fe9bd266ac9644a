"""Training loop: sequences in, a trained model out, every step recorded."""

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from preceptor import config
from preceptor.console import Display
from preceptor.data.forest import PackedSequence
from preceptor.data.loader import Loader
from preceptor.errors import ModelError
from preceptor.files import append_line
from preceptor.model.activations.context import StepContext
from preceptor.model.forward import Engine
from preceptor.model.loss.linear_cross_entropy import HeadCast
from preceptor.model.out_of_memory import is_out_of_memory
from preceptor.model.parts import evaluating
from preceptor.train.checkpoint import Checkpoints, State
from preceptor.train.evaluations import Evaluations
from preceptor.train.objective import CROSS_ENTROPY_LOSS, Objective
from preceptor.train.optimizer import apply_learning_rate, clip_gradients, schedule
from preceptor.train.precision import autocast
from preceptor.train.run_folder import RunFolder
from preceptor.train.signals import Stopped, StopRequest


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
) -> None:
    """Train `state` to the end of the run.

    A step's summed loss is divided once, by its number of trained tokens (or conversations, data/mixture.py), however
    they are spread over sequences. Raises ModelError as `take_step`, `require_finite`; Stopped, with all steps saved.
    """
    optimizer, precision = run.optimizer, run.train.precision
    total_steps = run.train.duration.steps(loader.steps_per_epoch)
    learning_rates = schedule(optimizer, loader.steps_per_epoch, total_steps)
    assert precision is not None, "a run that starts has one"

    def evaluate() -> None:
        if state.step in (0, total_steps) or due(run.eval.every, state.step, loader, total_steps):
            with stop.at_once():
                evaluations.evaluate(state)

    def save() -> None:
        checkpoints.save(state)
        folder.drop_replaced()

    try:
        evaluate()  # unless the session before has done so
        for step in range(state.step, total_steps):
            started = time.perf_counter()
            sequences = loader.batch(step)
            learning_rate = learning_rates(step)
            loss, grad_norm = take_step(state, sequences, learning_rate, optimizer.max_grad_norm, precision, objective)
            values = {
                "step": state.step,
                "epoch": round(state.step / loader.steps_per_epoch, 4),
                "loss": loss,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "num_tokens": sum(sequence.num_tokens for sequence in sequences),
                "num_trained": sum(sequence.num_trained for sequence in sequences),
                "seconds": time.perf_counter() - started,
                "peak_memory_bytes": peak_memory_bytes(state.model.device),
            }
            append_line(folder.path / "metrics.jsonl", values)
            display.step(values)
            if due(run.checkpoint.every, state.step, loader, total_steps):
                save()
            evaluate()
            stop.check()
    except Stopped as stopped:
        if state.step and not checkpoints.has(state.step):
            save()
        raise Stopped(stopped.number, state.step) from None


def take_step(
    state: State,
    sequences: Sequence[PackedSequence],
    learning_rate: float,
    max_grad_norm: float,
    precision: str,
    objective: Objective = CROSS_ENTROPY_LOSS,
) -> tuple[float, float]:
    """One optimizer step: (mean loss in nats, by default per trained token; norm of the gradient, not clipped).

    Raises ModelError, before any weight is touched, when loss or gradient is not finite, or when memory runs out.
    """
    divisor = math.fsum(sequence.divisor for sequence in sequences) or 1.0
    where = f"step {state.step + 1}: a sequence"
    loss = accumulate_gradients(state.engine, sequences, divisor, precision, objective, where, state.step)
    grad_norm = clip_gradients(state.optimizer, max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise ModelError(
            f"step {state.step + 1}: loss {loss}, gradient norm {grad_norm}: not finite, the weights were left as they "
            "are. Lower optimizer.learning_rate, lengthen optimizer.warmup, or use precision float32"
        )
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
    number: int = 0,
) -> float:
    """Forward and backward of each sequence: their loss over `divisor`, whose gradients join `.grad`.

    number: of the step, from 0.

    Raises ModelError, which begins with `where`, when memory runs out.
    """
    step = StepContext(divisor, accumulates=True, head_cast=HeadCast(), noise=objective.noise(number))
    device = engine.model.device
    engine.train()
    loss = 0.0
    for sequence in sequences:
        with _explaining_out_of_memory(sequence, where):
            with autocast(device, precision):
                share = objective(engine, sequence, step)
            share.backward()
        loss += share.item()
    return loss


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


def due(every: Any, step: int, loader: Loader, total_steps: int) -> bool:
    """Whether something that happens `every` so often happens after `step` steps."""
    return every is not None and step % max(1, every.steps(loader.steps_per_epoch, total_steps)) == 0
