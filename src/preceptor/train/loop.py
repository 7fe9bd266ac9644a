"""The loop: rows in, a trained model out, with every step on record."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preceptor import config
from preceptor.console import Display
from preceptor.data.forest import PackedSequence
from preceptor.data.loader import Loader
from preceptor.errors import ModelError
from preceptor.files import append_line
from preceptor.model.activations.embedding import embedding_gradient_in_place
from preceptor.model.loss.linear_cross_entropy import head_cast_once
from preceptor.model.peak import peak_memory_bytes
from preceptor.train import checkpoint
from preceptor.train.checkpoint import State
from preceptor.train.evaluations import Evaluations
from preceptor.train.objective import CROSS_ENTROPY_OF_A_ROW, Objective
from preceptor.train.optimizer import clip_gradients, learning_rate_at
from preceptor.train.precision import autocast
from preceptor.train.room import naming_what_does_not_fit


def train(
    run: config.Run,
    objective: Objective,
    state: State,
    loader: Loader,
    watch: Evaluations,
    display: Display,
    folder: Path,
    fingerprint: str,
) -> None:
    """Train `state` to the end of the run.

    Each step divides the summed loss of its rows once, by the step's number of trained tokens (or of conversations,
    data/mixture.py), so that how tokens are spread over rows changes nothing. Raises ModelError as `take_step` does.
    """
    optimizer = run.optimizer
    total_steps = run.train.duration.steps(loader.steps_per_epoch)
    warmup_steps = optimizer.warmup.steps(loader.steps_per_epoch, total_steps)
    assert optimizer.learning_rate is not None, "a resolved run has a learning rate"
    precision = run.train.precision
    assert precision is not None, "a run that starts has a precision"
    if state.step == 0:
        watch.look(state)
    for step in range(state.step, total_steps):
        started = time.perf_counter()
        rows = loader.batch(step)
        learning_rate = learning_rate_at(
            step, total_steps, warmup_steps, optimizer.learning_rate, optimizer.lr_scheduler, optimizer.min_lr_ratio
        )
        loss, grad_norm = take_step(state, rows, learning_rate, optimizer.max_grad_norm, precision, objective)
        values = {
            "step": state.step,
            "epoch": round(state.step / loader.steps_per_epoch, 4),
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "num_tokens": sum(row.num_tokens for row in rows),
            "num_trained": sum(row.num_trained for row in rows),
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory_bytes(state.model.device),
        }
        append_line(folder / "metrics.jsonl", values)
        display.step(values)
        if due(run.eval.every, state.step, loader, total_steps) or state.step == total_steps:
            watch.look(state)
        if due(run.checkpoint.every, state.step, loader, total_steps):
            checkpoint.save(state, folder / "checkpoints", fingerprint, run.checkpoint.keep)


def take_step(
    state: State,
    rows: Sequence[PackedSequence],
    learning_rate: float,
    max_grad_norm: float,
    precision: str,
    objective: Objective = CROSS_ENTROPY_OF_A_ROW,
) -> tuple[float, float]:
    """One optimizer step over `rows`: (mean loss in nats, by default per trained token; gradient norm, not clipped).

    Raises ModelError, before any weight is touched, when loss or gradient is not finite, or when memory runs out.
    """
    divisor = math.fsum(row.divisor for row in rows) or 1.0
    loss = 0.0
    state.model.train()
    with head_cast_once(), embedding_gradient_in_place(state.model):
        for row in rows:
            with naming_what_does_not_fit(row, f"step {state.step + 1}: a row"):
                with autocast(state.model.device, precision):
                    share = objective(state.model, row, divisor, add_to_grad=True)
                share.backward()
            loss += share.item()
    grad_norm = clip_gradients(state.optimizer, max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise ModelError(
            f"step {state.step + 1}: loss {loss}, gradient norm {grad_norm}: not finite, the weights were left as they "
            "are. Lower optimizer.learning_rate, lengthen optimizer.warmup, or use precision float32"
        )
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return loss, grad_norm


def due(every: Any, step: int, loader: Loader, total_steps: int) -> bool:
    """Whether something that happens `every` so often happens after `step` steps."""
    return every is not None and step % max(1, every.steps(loader.steps_per_epoch, total_steps)) == 0
