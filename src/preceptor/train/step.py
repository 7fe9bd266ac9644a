"""One optimizer step: what it minimises, the gradients of its sequences, summed, clipped and applied."""

import math
import resource
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from preceptor import config
from preceptor.config.code import load_code
from preceptor.data.forest import PackedSequence, empty_sequence
from preceptor.errors import ModelError, counted, explaining_out_of_memory
from preceptor.model.activations.inputs import num_levels
from preceptor.model.activations.modules import EmbeddingNoise
from preceptor.model.activations.passes import StepContext
from preceptor.model.forward import Engine
from preceptor.model.kl import ReferenceModel, kl_to_base
from preceptor.model.loss.linear_cross_entropy import Head, HeadCast
from preceptor.model.loss.softmax import TokenLoss, require_token_wise
from preceptor.model.numerics import autocast
from preceptor.model.options import CROSS_ENTROPY, KEEP_ALL, ActivationPolicy, LossOptions
from preceptor.model.parts import causal_lm, evaluating, has_dropout
from preceptor.model.routers import require_routers, router_aux_coef
from preceptor.model.sharding import begin_sequence, is_sharded, sum_gradients
from preceptor.train.checkpoint import State
from preceptor.train.optimizer import apply_learning_rate, clip_gradients
from preceptor.world import ONE, World


def own_loss(loss: config.Loss) -> TokenLoss | None:
    """The loss of the user's own. Raises ConfigError and ModelError for one that cannot be."""
    if loss.code is None:
        return None
    own: TokenLoss = load_code(loss.code, "loss.code").function
    require_token_wise(own)
    return own


@dataclass(frozen=True)
class Objective:
    """Called with an engine and a sequence: the weighted sum over its trained tokens, a scalar with a graph."""

    policy: ActivationPolicy = KEEP_ALL
    options: LossOptions = CROSS_ENTROPY
    kl_coef: float = 0.0
    base: ReferenceModel | None = None
    neftune_alpha: float = 0.0
    seed: int = 0

    @classmethod
    def of(
        cls,
        loss: config.Loss,
        memory: config.Memory,
        model: Any,
        num_base_tokens: int,
        untrained: Sequence[int] = (),
        train: config.Train | None = None,
        base: ReferenceModel | None = None,
    ) -> "Objective":
        """Before the first step and before a checkpoint is read, so that `model` still is the base.

        untrained: tokens of the base that it never saw. base: the base, where `model` was trained before. Raises as
        `own_loss`, and ModelError where a model has no routers that could be balanced.
        """
        router_coef = router_aux_coef(loss.router_aux_coef, causal_lm(model).config)
        if router_coef:
            require_routers(model)
        variant = LossOptions(loss.label_smoothing, loss.z_loss, loss.type == "dft", own_loss(loss), router_coef)
        return cls(
            policy=ActivationPolicy(memory.context_gradient, memory.activation_checkpointing),
            options=variant,
            kl_coef=loss.kl_coef,
            base=(base or ReferenceModel.of(model, num_base_tokens, untrained)) if loss.kl_coef else None,
            neftune_alpha=train.neftune_alpha if train else 0.0,
            seed=train.seed if train else 0,
        )

    def __call__(self, engine: Engine, sequence: PackedSequence, step: StepContext | None = None) -> Tensor:
        """The sum over `step.divisor`; where `step` accumulates, backward must follow.

        The routers' load-balancing loss is part of the gradient, not of the sum.
        """
        penalty = None if self.base is None else self._divergence
        loss: Tensor = engine(sequence, self.policy, self.options, step, penalty)
        return loss

    def _divergence(
        self, hidden_MD: Tensor, source_N: Tensor, head: Head, sequence: PackedSequence, divisor: float
    ) -> Tensor:
        assert self.base is not None
        return self.kl_coef / divisor * kl_to_base(hidden_MD, source_N, head, self.base, sequence)


CROSS_ENTROPY_LOSS = Objective()


# The step -------------------------------------------------------------------------------------------------------------

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
    world: World = ONE,
) -> StepLosses:
    """One optimizer step. sequences: of several processes those of this one.

    Raises NotFiniteError, before any weight is touched, when loss or gradient is not finite; ModelError when memory
    runs out.
    """
    divisor = world.sum(math.fsum(sequence.divisor for sequence in sequences))[0] or 1.0
    where = f"step {state.step + 1}"
    shares, router_aux = accumulate_gradients(
        state.engine, sequences, divisor, precision, objective, f"{where}: a sequence", state.step, world
    )
    with explaining_out_of_memory(lambda: update_does_not_fit(where)):
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
    state.is_whole = False
    with explaining_out_of_memory(lambda: update_does_not_fit(where)):
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.is_whole = True
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
    num_step: int = 0,
    world: World = ONE,
) -> tuple[list[Tensor], list[Tensor]]:
    """Forward and backward of each sequence: the loss of each over `divisor`, whose gradients join `.grad`; and the
    load-balancing loss of each over `divisor`, none where it is off.

    The host waits for none of it: a GPU is still busy with one sequence when the next one's indices are copied.

    sequences: of this process; the gradients are those of all processes, summed, or this one's part of them. num_step:
    of steps before. Random numbers (dropout) are drawn again for each sequence, by the seed of the run, the step and
    the sequence's tokens, so that they do not depend on the sequences before it, and no generator's state has to
    survive. Raises ModelError, which begins with `where`, when memory runs out.
    """
    router_aux: list[Tensor] = []
    noise = EmbeddingNoise(objective.neftune_alpha, objective.seed, num_step) if objective.neftune_alpha else None
    step = StepContext(divisor, accumulates=True, head_cast=HeadCast(), noise=noise, router_aux=router_aux)
    device = engine.model.device
    engine.train()
    losses = []
    passes = _in_step_with_others(engine, sequences, objective.policy, world)
    for place, (sequence, levels) in enumerate(passes):
        torch.manual_seed(sequence_seed(objective.seed, num_step, sequence))
        if engine.state.ranks is not None:
            begin_sequence(engine, is_last=place == len(passes) - 1)
        with explaining_out_of_memory(partial(does_not_fit, sequence, where)):
            with autocast(device, precision):
                share = objective(engine, sequence, replace(step, num_levels=levels))
            share.backward()
        losses.append(share.detach())
    if engine.state.ranks is not None:
        sum_gradients(engine)
    return losses, router_aux


def _in_step_with_others(
    engine: Engine, sequences: Sequence[PackedSequence], policy: ActivationPolicy, world: World
) -> list[tuple[PackedSequence, int]]:
    """The passes of this process, each a sequence and its number of levels (activations/inputs.py): as many as on the
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


def does_not_fit(sequence: PackedSequence, where: str) -> str:
    """That a sequence does not, with its size and the keys that help."""
    return (
        f"{where}, {sequence.num_tokens:,} tokens, {sequence.num_trained:,} of them trained, does not fit in "
        f"memory beside weights, gradients and optimizer state. Lower data.max_length, save activations "
        f"(memory.context_gradient, memory.activation_checkpointing), or train an adapter"
    )


def update_does_not_fit(where: str) -> str:
    """That the update of the weights does not, with the keys that help."""
    return (
        f"{where}: the update of the weights does not fit in memory beside weights, gradients and optimizer state. "
        f"Set optimizer.name: adamw_8bit or optimizer.offload: true, or train an adapter"
    )


class NotFiniteError(ModelError):
    """Loss or gradient of a step is NaN or infinite. broken: places of this process's sequences whose own loss is."""

    def __init__(self, step: int, loss: float, grad_norm: float, broken: Sequence[int]) -> None:
        super().__init__(f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite")
        self.loss, self.grad_norm, self.broken = loss, grad_norm, broken


class TooManySkippedError(ModelError):
    """One more step than `train.max_skipped` is not finite; all processes raise it, and no weight was touched."""


def skip_step(
    state: State,
    error: NotFiniteError,
    broken: Sequence[Sequence[str]],
    sources: Sequence[Sequence[str]],
    num_skipped: int,
    most: int,
) -> dict[str, Any]:
    """Go on without the update of this step; what the log says of it. Raises TooManySkippedError.

    sources: the examples of each sequence of the step; broken: of those whose own loss is not finite.
    """
    examples = list(dict.fromkeys(source for own in broken or sources for source in own))
    shown = ", ".join(examples[:_NAMED_EXAMPLES])
    shown += f" and {len(examples) - _NAMED_EXAMPLES} more" if len(examples) > _NAMED_EXAMPLES else ""
    whose = "in the sequence of" if broken else "in one of the sequences of"
    if num_skipped >= most:
        skipped = f"; {counted(num_skipped, 'step')} skipped before" if num_skipped else ""
        raise TooManySkippedError(
            f"{error}, {whose} {shown}{skipped}. The weights were left as they are. Look at these examples, lower "
            "optimizer.learning_rate, lengthen optimizer.warmup, use precision float32, or allow some steps to be "
            "skipped with train.max_skipped"
        )
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return {"skipped": f"{error}, {whose} {shown}; skipped, {num_skipped + 1} of {most}", "examples": examples}


def begin_peak(device: torch.device | str) -> None:
    """Let the peak of a CUDA device begin here: what was allocated before is gone. That of a process is for life."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device | str) -> int:
    """Allocated by torch on a CUDA device since `begin_peak`, else the resident memory of this process so far."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes
