"""Proofs on the user's own model, data and machine before step 1; together they take about as long as a few steps.

1. The output head that the loss uses gives the model's own logits.
2. Conversations and branches of a sequence do not see each other: on random tokens, and on the run's own data. A model
   of which this is not true reads each conversation alone (checks.py), if it is causal then.
3. A sequence of several conversations has the loss of each alone, summed.
4. Layers that are compiled (`engine`) give the same loss and gradient; where they do not, and the choice was left to
   the engine, they are not compiled.
5. The largest sequences of the run go forward and backward as a step takes them, beside gradients and optimizer state,
   and all is finite: what would run out of memory does so now.

Afterwards nothing has changed: no gradient, no weight, no generator of random numbers.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from preceptor.data.forest import PackedSequence, Tree, pack_trees
from preceptor.data.loader import Loader, StreamLoader
from preceptor.errors import ModelError, explaining_out_of_memory
from preceptor.model.attention.cuda import kernels, with_kernels_that_run
from preceptor.model.checks import check_compiled, check_head, check_isolation, check_phases, check_sequential
from preceptor.model.compiled import ADAPTED_EXPERTS, CARRIES, adapts_experts, compile_seconds, num_graphs
from preceptor.model.forward import Engine
from preceptor.model.numerics import autocast, require_close
from preceptor.model.optimisations import give_up_compiling
from preceptor.model.parts import evaluating, exact_routing, has_experts, model_type
from preceptor.model.sharding import SPREAD, is_sharded, own_part
from preceptor.train.optimizer import NOTHING_RESERVED, OptimizerMemory, accumulate_in_float32
from preceptor.train.step import CROSS_ENTROPY_LOSS, Objective, accumulate_gradients, does_not_fit, update_does_not_fit

_SAMPLE_TOKENS = 512  # of the run's data, for proofs 2 and 3; more, where two conversations take more
_SAMPLE_SEQUENCES = 16  # of the plan, to take them from
_NO_ROOM = (
    "the checks before step 1 ran out of memory with the weights loaded. Use bfloat16 weights (model.dtype), a "
    "quantized base under an adapter (model.quantization), or a smaller model"
)


def preflight(
    model: Any,
    loader: Loader | StreamLoader,
    precision: str,
    say: Callable[[str], None],
    objective: Objective = CROSS_ENTROPY_LOSS,
    reserved: OptimizerMemory = NOTHING_RESERVED,
) -> tuple[Loader | StreamLoader, float]:
    """Prove all that can be proved before step 1; `say` gets a line for each proof. reserved: for the optimizer.

    Returns a loader of sequences that this model can read, and how many seconds it took.
    Raises ModelError if the loss would not be the model's own, if the model is not causal, if loss or gradient is not
    finite, or if the largest sequence does not fit in memory.
    """
    started = time.perf_counter()
    devices = list(range(torch.cuda.device_count()))
    was_training = model.training
    with torch.random.fork_rng(devices=devices):
        try:
            with explaining_out_of_memory(_NO_ROOM):
                loader = _prove(Engine.of(model), loader, precision, say, objective, reserved)
        finally:
            model.zero_grad(set_to_none=True)
            model.train(was_training)
            if devices:
                torch.cuda.empty_cache()
    seconds = time.perf_counter() - started
    say(f"all proved in {seconds:.1f} s")
    return loader, seconds


def _prove(
    engine: Engine,
    loader: Loader | StreamLoader,
    precision: str,
    say: Callable[[str], None],
    objective: Objective,
    reserved: OptimizerMemory,
) -> Loader | StreamLoader:
    model = engine.model
    for kernel, error in kernels().get("kernels_given_up", {}).items():  # when the optimisations were installed
        say(_switched_off(kernel, error))
    with _line(say, "the loss uses the model's own logits"):
        engine.call(lambda: check_head(model))
    try:
        with _line(say, "packed conversations do not see each other (random tokens)"):
            _with_kernels_that_run(lambda: engine.call(lambda: check_isolation(model)), engine, say)
    except ModelError as error:
        reason = str(error).partition(" Use a")[0].rstrip(".")  # there is another way than another model
        with _line(say, f"each conversation goes through the model alone, as {reason}"):
            engine.call(lambda: check_sequential(model))
        loader = loader.apart()
        accumulate_in_float32(model)  # of the several passes of a step
    trees: list[Tree] = []
    proved_in = "float32" if has_experts(model) else precision  # see `exact_routing`
    if not loader.alone:
        _with_kernels_that_run(lambda: engine.call(lambda: check_phases(model, objective.policy)), engine, say)
        trees = _sample(loader)
    if len(trees) > 1:
        num_tokens = sum(tree.num_tokens for tree in trees)
        with _line(
            say, f"packed conversations do not see each other ({len(trees)} of this run, {num_tokens:,} tokens)"
        ):
            _with_kernels_that_run(lambda: _check_sample_isolation(engine, trees, proved_in), engine, say)
        with _line(say, "the loss of a sequence is the sum of its conversations' losses"):
            _check_sum(engine, trees, proved_in, objective)
    if engine.state.compiles:
        _with_kernels_that_run(lambda: _settle_compiling(engine, trees, precision, say, objective), engine, say)
    largest = loader.largest_sequences()
    sizes = (
        f"{max(sequence.num_tokens for sequence in largest):,} tokens, "
        f"{max(sequence.num_trained for sequence in largest):,} trained"
    )
    with _line(say, f"the largest sequences ({sizes}) fit in memory, forward and backward, with finite results"):
        _with_kernels_that_run(
            lambda: _check_largest(engine, largest, loader, precision, objective, reserved), engine, say
        )
    return loader


def _with_kernels_that_run(prove: Callable[[], None], engine: Engine, say: Callable[[str], None]) -> None:
    """Prove; again without the fused attention that fails."""

    def prove_anew() -> None:
        engine.model.zero_grad(set_to_none=True)  # of a backward that failed
        prove()

    with_kernels_that_run(prove_anew, lambda kernel, error: say(_switched_off(kernel, error)))


def _switched_off(kernel: str, error: str) -> str:
    return f"attention kernel {kernel} failed on this GPU and is switched off for this run: {error}"


@contextmanager
def _line(say: Callable[[str], None], proved: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    say(f"proved: {proved} ({time.perf_counter() - started:.1f} s)")


def _sample(loader: Loader | StreamLoader) -> list[Tree]:
    """The shortest conversations of one of the first sequences; two at least, if a sequence holds two."""
    planned = loader.trees(0, _SAMPLE_SEQUENCES)
    several = [trees for trees in planned if len(trees) > 1]
    ordered = [sorted(trees, key=lambda tree: tree.num_tokens) for trees in several or planned]
    trees = min(ordered, key=lambda trees: sum(tree.num_tokens for tree in trees[:2]))
    ends = np.cumsum([tree.num_tokens for tree in trees])
    return trees[: max(2, int((ends <= _SAMPLE_TOKENS).sum()))]


@torch.no_grad()
def _check_sample_isolation(engine: Engine, trees: Sequence[Tree], precision: str) -> None:
    """Other tokens in the first conversation must not move the hidden states of those that follow it."""
    first, *others = trees
    vocab_size = engine.call(lambda: len(engine.model.get_input_embeddings().weight))
    changed = replace(
        first,
        segments=tuple(s._replace(ids=tuple((token + 1) % vocab_size for token in s.ids)) for s in first.segments),
    )
    with evaluating(engine.model), exact_routing(engine.model), autocast(engine.model.device, precision):
        before_TD, after_TD = (
            engine.hidden_states(pack_trees([tree, *others]))[first.num_tokens :] for tree in (first, changed)
        )
    require_close(
        after_TD,
        before_TD,
        f"hidden states of {others[0].source} move when {first.source} changes, which is in the same sequence",
        dtype=before_TD.dtype if precision == "float32" else torch.bfloat16,
    )


@torch.no_grad()
def _check_sum(engine: Engine, trees: Sequence[Tree], precision: str, objective: Objective) -> None:
    with evaluating(engine.model), exact_routing(engine.model), autocast(engine.model.device, precision):
        together = objective(engine, pack_trees(trees)).item()
        alone = math.fsum(objective(engine, pack_trees([tree])).item() for tree in trees)
    require_close(
        torch.tensor(together, dtype=torch.float64),
        torch.tensor(alone, dtype=torch.float64),
        f"{len(trees)} conversations beginning with {trees[0].source} have another loss in one sequence "
        f"({together:.6g}) than each alone, summed ({alone:.6g})",
        dtype=torch.bfloat16 if precision == "bfloat16" else next(engine.model.parameters()).dtype,
    )


def _settle_compiling(
    engine: Engine, trees: Sequence[Tree], precision: str, say: Callable[[str], None], objective: Objective
) -> None:
    """trees: a sample of the run's; none of a model that reads each conversation alone."""
    model = engine.model
    half = precision == "bfloat16" or next(model.parameters()).dtype == torch.bfloat16

    def loss() -> torch.Tensor:
        with autocast(model.device, precision):
            return objective(engine, pack_trees(trees))

    before = compile_seconds()
    try:
        whys = {
            "each conversation goes through it alone": not trees,
            SPREAD: is_sharded(engine),
            CARRIES: "mixers" in engine.state.optimisations,
            ADAPTED_EXPERTS: adapts_experts(model),
        }
        for why in (why for why, holds in whys.items() if holds):
            raise ModelError(f"{model_type(model)}: {why}, so its layers cannot be compiled. Set `engine: efficient`.")
        with _line(say, "compiled layers give the loss and the gradient of layers as they are written"):
            model.train()
            check_compiled(model, loss, torch.bfloat16 if half else torch.float32)
    except ModelError as error:
        if engine.state.asked_to_compile:
            raise
        reason = str(error).partition(" Set `engine")[0].rstrip(".")
        give_up_compiling(model, engine.state, reason)
        say(f"layers are not compiled: {reason}")
    else:
        say(f"compiled in {compile_seconds() - before:.1f} s, {num_graphs()} graphs")


def _check_largest(
    engine: Engine,
    largest: Sequence[PackedSequence],
    loader: Loader | StreamLoader,
    precision: str,
    objective: Objective,
    reserved: OptimizerMemory,
) -> None:
    """One after the other, beside what a step has: the optimizer's state, and the gradients of sequences before."""
    model: Any = engine.model
    trained = [p for p in model.parameters() if p.requires_grad]
    several = loader.batch_size > 1 or loader.alone
    where = "the largest sequence of the run"
    for sequence in largest:
        with explaining_out_of_memory(does_not_fit(sequence, where)):
            if several:
                for p in trained:
                    p.grad = torch.zeros_like(p, dtype=p.grad_dtype) if p.grad is None else p.grad  # type: ignore[attr-defined]
            state = torch.empty(reserved.state_bytes, dtype=torch.uint8, device=model.device)
        divisor = max(1.0, sequence.divisor)
        (share,), _ = accumulate_gradients(engine, [sequence], divisor, precision, objective, where)
        loss = share.item()
        with explaining_out_of_memory(update_does_not_fit("the first step")):
            update = torch.empty(reserved.update_bytes, dtype=torch.uint8, device=model.device)
        del state, update
        if not all(p.grad is None or bool(own_part(p.grad).isfinite().all()) for p in trained) or not math.isfinite(
            loss
        ):
            raise ModelError(
                f"a sequence of {sequence.num_tokens:,} tokens has a loss of {loss:.4g} or a gradient that is not "
                f"finite before the first step: look for broken weights, or use train.precision: float32"
            )
        if not several:
            model.zero_grad(set_to_none=True)
