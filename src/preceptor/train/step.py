"""One optimizer step: the gradients of its sequences, summed, clipped and applied."""

import math
import resource
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from preceptor.data.forest import PackedSequence, empty_sequence
from preceptor.errors import ModelError
from preceptor.model.activations.context import StepContext
from preceptor.model.activations.phases import num_levels
from preceptor.model.activations.policy import ActivationPolicy
from preceptor.model.forward import Engine
from preceptor.model.loss.linear_cross_entropy import HeadCast
from preceptor.model.out_of_memory import is_out_of_memory
from preceptor.model.parts import evaluating, has_dropout
from preceptor.model.sharding import begin_sequence, is_sharded, sum_gradients
from preceptor.train.checkpoint import State
from preceptor.train.objective import CROSS_ENTROPY_LOSS, Objective
from preceptor.train.optimizer import apply_learning_rate, clip_gradients
from preceptor.train.precision import autocast
from preceptor.world import ONE, World

_NAMED_EXAMPLES = 8  # of a step whose loss is not finite


class StepLosses(NamedTuple):
    """Of an optimizer step, over all processes.

    loss: the mean in nats, by default per trained token. grad_norm: of the gradient, not clipped. router_aux_loss: the
    mean of the routers' load-balancing loss, without its coefficient; 0 where it is off.
    """

    loss: float
    grad_norm: float
    router_aux_loss: float = 0.0


def take_step(
    state: State,
    sequences: Sequence[PackedSequence],
    learning_rate: float,
    max_grad_norm: float,
    precision: str,
    objective: Objective = CROSS_ENTROPY_LOSS,
    seed: int = 0,
    world: World = ONE,
) -> StepLosses:
    """One optimizer step.

    sequences: of several processes those of this one.
    seed: of the run; with the number of the step and a sequence's tokens it determines what is drawn for that sequence.
    Raises NotFiniteError, before any weight is touched, when loss or gradient is not finite; ModelError when memory
    runs out.
    """
    divisor = world.sum(math.fsum(sequence.divisor for sequence in sequences))[0] or 1.0
    where = f"step {state.step + 1}: a sequence"
    shares, router_aux = accumulate_gradients(
        state.engine, sequences, divisor, precision, objective, where, (seed, state.step), world
    )
    norm = clip_gradients(state.optimizer, max_grad_norm)
    found = torch.stack([each.to(norm) for each in (*shares, *router_aux, norm)]).tolist()  # the step's only wait
    losses, grad_norm = found[: len(shares)], found[-1]
    loss = 0.0
    for own in losses:  # one after the other: `sum` rounds otherwise from Python 3.12 on
        loss += own
    loss, router_aux_loss = world.sum(loss, math.fsum(found[len(shares) : -1]))
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        broken = [place for place, own in zip(range(len(sequences)), losses, strict=False) if not math.isfinite(own)]
        raise NotFiniteError(state.step + 1, loss, grad_norm, broken)
    apply_learning_rate(state.optimizer, learning_rate)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return StepLosses(loss, grad_norm, router_aux_loss)


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
) -> tuple[list[Tensor], list[Tensor]]:
    """Forward and backward of each sequence: the loss of each over `divisor`, whose gradients join `.grad`.

    Also the load-balancing loss of each over `divisor`, none where it is off.

    The host waits for none of it: a GPU is still busy with one sequence when the next one's indices are copied.

    sequences: of this process; the gradients are those of all processes, summed, or this one's part of them.
    seed: of the run, and the step. Random numbers (dropout) are drawn again for each sequence, so that they do not
    depend on the sequences before it, and no generator's state has to survive. Raises ModelError, which begins with
    `where`, when memory runs out.
    """
    noise, router_aux = objective.noise(seed[1]), list[Tensor]()
    step = StepContext(divisor, accumulates=True, head_cast=HeadCast(), noise=noise, router_aux=router_aux)
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
        losses.append(share.detach())
    sum_gradients(engine)
    return losses, router_aux


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


def peak_memory_bytes(device: torch.device | str) -> int:
    """The peak so far: allocated by torch on a CUDA device, else the resident memory of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes
