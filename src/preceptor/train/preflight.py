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
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from preceptor.data.forest import PackedSequence, Tree, pack_trees
from preceptor.data.loader import Loader, StreamLoader
from preceptor.errors import ModelError, PreceptorError, explaining_out_of_memory, first_line, is_out_of_memory
from preceptor.model.attention.cuda import kernels, with_kernels_that_run
from preceptor.model.attention.runs import attention_dropout
from preceptor.model.checks import (
    check_compiled,
    check_fused,
    check_head,
    check_isolation,
    check_phases,
    check_sequential,
)
from preceptor.model.compiled import ADAPTED_EXPERTS, CARRIES, adapts_experts, compile_seconds, no_compiler, num_graphs
from preceptor.model.forward import Engine
from preceptor.model.numerics import autocast, require_close
from preceptor.model.optimisations import give_up_compiling
from preceptor.model.parts import decoder_of, evaluating, exact_routing, has_experts, model_type
from preceptor.model.sharding import SPREAD, is_sharded, own_part
from preceptor.train.optimizer import accumulate_in_float32
from preceptor.train.step import CROSS_ENTROPY_LOSS, Objective, accumulate_gradients, does_not_fit, update_does_not_fit
from preceptor.world import ONE, World

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
    reserved: tuple[int, int] = (0, 0),
    world: World = ONE,
) -> tuple[Loader | StreamLoader, float]:
    """Prove all that can be proved before step 1; `say` gets a line for each proof. reserved: as
    `optimizer_memory`.

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
                loader = _Proofs(Engine.of(model), loader, precision, say, objective, reserved, world).all()
        finally:
            model.zero_grad(set_to_none=True)
            model.train(was_training)
            if devices:
                torch.cuda.empty_cache()
    seconds = time.perf_counter() - started
    say(f"all proved in {seconds:.1f} s")
    return loader, seconds


@dataclass
class _Proofs:
    """Of a model (in its engine) with the loader, precision and objective of a run. reserved: as `optimizer_memory`.

    Of several processes each tries again by itself what it fails in, up to where gradients are summed. Those that share
    a sharded model go through its layers together, so there all must have failed.
    """

    engine: Engine
    loader: Loader | StreamLoader
    precision: str
    say: Callable[[str], None]
    objective: Objective
    reserved: tuple[int, int]
    world: World = ONE
    _num_failed: int = 0
    _in_step: bool = True

    def all(self) -> Loader | StreamLoader:
        """Prove all; the loader of sequences that the model can read."""
        engine, model = self.engine, self.engine.model
        for kernel, error in kernels().get("kernels_given_up", {}).items():  # when the optimisations were installed
            self._say_switched_off(kernel, error)
        self._prove("the loss uses the model's own logits", lambda: engine.call(lambda: check_head(model)))
        try:
            self._prove(
                "packed conversations do not see each other (random tokens)",
                lambda: engine.call(lambda: check_isolation(model)),
                compares=True,
            )
        except ModelError as error:
            reason = str(error).partition(" Use a")[0].rstrip(".")  # there is another way than another model
            self._prove(
                f"each conversation goes through the model alone, as {reason}",
                lambda: engine.call(lambda: check_sequential(model)),
            )
            self.loader = self.loader.apart()
            accumulate_in_float32(model)  # of the several passes of a step
        trees: list[Tree] = []
        if not self.loader.alone:
            self._prove("", lambda: engine.call(lambda: check_phases(model, self.objective.policy)), compares=True)
            if (dropout := attention_dropout(decoder_of(model).config)) is not None:
                self.say(
                    "{} of {:g} is off: packed conversations are trained without dropout in attention".format(*dropout)
                )
            trees = _sample(self.loader)
        if len(trees) > 1:
            of_this_run = f"{len(trees)} of this run, {sum(tree.num_tokens for tree in trees):,} tokens"
            apart, summed = (lambda: self._isolated(trees)), (lambda: self._summed(trees))
            self._prove(f"packed conversations do not see each other ({of_this_run})", apart, compares=True)
            self._prove("the loss of a sequence is the sum of its conversations' losses", summed, compares=True)
        if engine.state.compiles:
            self._settle_compiling(trees)
        is_plain = not engine.state.optimisations
        if not is_plain and not engine.state.compiles and no_compiler(model.device) is None:
            self._settle_fusing()
        largest = self.loader.largest_sequences()
        sizes = (
            f"{max(sequence.num_tokens for sequence in largest):,} tokens, "
            f"{max(sequence.num_trained for sequence in largest):,} trained"
        )
        fit = f"the largest sequences ({sizes}) fit in memory, forward and backward, with finite results"
        started, differ = time.perf_counter(), 1.0
        while differ:  # what fails in a later sequence is not used for the first ones either
            ways = [self._prove_fit(sequence) for sequence in largest]
            (differ,) = self.world.max(float(ways[0] != ways[-1]))
        self._say_proved(fit, started)
        return self.loader

    def _prove_fit(self, sequence: PackedSequence) -> tuple[list[str], bool]:
        """Prove, alone, so that gradients are summed once, however often it is tried; again without compiled parts
        where they fail. In what way it is proved: kernels that are not used, and whether parts are compiled.
        """
        engine = self.engine
        try:
            self._prove("", lambda: self._fits(sequence))
        except Exception as error:  # Triton's own errors are of no common kind
            is_other = not engine.state.fused or isinstance(error, PreceptorError) or is_out_of_memory(error)
            if is_other or not self._may_repeat():
                raise
            engine.state.optimisations.discard("fused")
            self.say(f"norms, gated units and loss are compiled no more: {type(error).__name__}: {first_line(error)}")
            self._prove("", lambda: self._fits(sequence))
        return list(kernels().get("kernels_given_up", {})), engine.state.fused

    def _prove(self, proved: str, prove: Callable[[], None], compares: bool = False) -> None:
        """Prove; again without the fused attention that fails, or, where `compares`, whose numbers differ."""

        def prove_anew() -> None:
            self.engine.model.zero_grad(set_to_none=True)  # of a backward that failed
            prove()

        started = time.perf_counter()
        with_kernels_that_run(prove_anew, self._say_switched_off, self._may_repeat, compares)
        if proved:
            self._say_proved(proved, started)

    def _say_proved(self, proved: str, started: float) -> None:
        self.say(f"proved: {proved} ({time.perf_counter() - started:.1f} s)")

    def _may_repeat(self) -> bool:
        """After a failure of this process, whether the others will be where it begins anew: once not, never."""
        if not is_sharded(self.engine):
            return True
        if self._in_step:
            self._num_failed += 1
            self._in_step = self.world.fails_everywhere(f"failure {self._num_failed} before step 1")
        if self._in_step:
            cast(Any, self.engine).reset_iter_state()  # FSDP2's, of a pass that was broken off
        return self._in_step

    def _say_switched_off(self, kernel: str, error: str) -> None:
        self.say(f"attention kernel {kernel} failed on this GPU and is switched off for this run: {error}")

    @contextmanager
    def _exact(self) -> Iterator[str]:
        """Evaluating, with routers that round nothing away (see `exact_routing`); the precision that is proved in."""
        model = self.engine.model
        precision = "float32" if has_experts(model) else self.precision
        with torch.no_grad(), evaluating(model), exact_routing(model), autocast(model.device, precision):
            yield precision

    def _isolated(self, trees: Sequence[Tree]) -> None:
        """Other tokens in the first conversation must not move the hidden states of those that follow it."""
        engine, (first, *others) = self.engine, trees
        vocab_size = engine.call(lambda: len(engine.model.get_input_embeddings().weight))
        changed = replace(
            first,
            segments=tuple(s._replace(ids=tuple((token + 1) % vocab_size for token in s.ids)) for s in first.segments),
        )
        with self._exact() as precision:
            before_TD, after_TD = (
                engine.hidden_states(pack_trees([tree, *others]))[first.num_tokens :] for tree in (first, changed)
            )
        require_close(
            after_TD,
            before_TD,
            f"hidden states of {others[0].source} move when {first.source} changes, which is in the same sequence",
            dtype=before_TD.dtype if precision == "float32" else torch.bfloat16,
        )

    def _summed(self, trees: Sequence[Tree]) -> None:
        engine = self.engine
        with self._exact() as precision:
            together = self.objective(engine, pack_trees(trees)).item()
            alone = math.fsum(self.objective(engine, pack_trees([tree])).item() for tree in trees)
        require_close(
            torch.tensor(together, dtype=torch.float64),
            torch.tensor(alone, dtype=torch.float64),
            f"{len(trees)} conversations beginning with {trees[0].source} have another loss in one sequence "
            f"({together:.6g}) than each alone, summed ({alone:.6g})",
            dtype=torch.bfloat16 if precision == "bfloat16" else next(engine.model.parameters()).dtype,
        )

    def _settle_compiling(self, trees: Sequence[Tree]) -> None:
        """trees: a sample of the run's; none of a model that reads each conversation alone."""
        engine, model = self.engine, self.engine.model

        def check() -> None:
            model.train()
            check_compiled(model, loss, self._computed_in())

        def loss() -> torch.Tensor:
            with autocast(model.device, self.precision):
                return self.objective(engine, pack_trees(trees))

        before = compile_seconds(), num_graphs()
        try:
            whys = {
                "each conversation goes through it alone": not trees,
                SPREAD: is_sharded(engine),
                CARRIES: "mixers" in engine.state.optimisations,
                ADAPTED_EXPERTS: adapts_experts(model),
            }
            for why in (why for why, holds in whys.items() if holds):
                raise ModelError(
                    f"{model_type(model)}: {why}, so its layers cannot be compiled. Set `engine: efficient`."
                )
            self._prove("compiled layers give the loss and the gradient of layers as they are written", check)
        except ModelError as error:
            if engine.state.asked_to_compile:
                raise
            reason = str(error).partition(" Set `engine")[0].rstrip(".")
            give_up_compiling(model, engine.state, reason)
            self.say(f"layers are not compiled: {reason}")
        else:
            self.say(f"compiled in {compile_seconds() - before[0]:.1f} s, {num_graphs() - before[1]} graphs")

    def _computed_in(self) -> torch.dtype:
        half = self.precision == "bfloat16" or next(self.engine.model.parameters()).dtype == torch.bfloat16
        return torch.bfloat16 if half else torch.float32

    def _settle_fusing(self) -> None:
        engine, before = self.engine, (compile_seconds(), num_graphs())

        def check() -> None:
            with autocast(engine.model.device, self.precision):
                check_fused(engine.model, self.objective.options, self._computed_in())

        try:
            self._prove("compiled norms, gated units and loss are exact", check)
        except ModelError as error:
            self.say(f"norms, gated units and loss are not compiled: {str(error).rstrip('. ')}")
        else:
            engine.state.optimisations.add("fused")
            self.say(f"compiled in {compile_seconds() - before[0]:.1f} s, {num_graphs() - before[1]} graphs")

    def _fits(self, sequence: PackedSequence) -> None:
        """Beside what a step has: the optimizer's state, and the gradients of sequences before."""
        engine: Any = self.engine
        model, where = engine.model, "the largest sequence of the run"
        trained = [p for p in model.parameters() if p.requires_grad]
        with explaining_out_of_memory(does_not_fit(sequence, where)):
            if self.loader.batch_size > 1 or self.loader.alone:
                for p in trained:
                    p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
            state = torch.empty(self.reserved[0], dtype=torch.uint8, device=model.device)
        divisor = max(1.0, sequence.divisor)
        (share,), _ = accumulate_gradients(engine, [sequence], divisor, self.precision, self.objective, where)
        loss = share.item()
        with explaining_out_of_memory(update_does_not_fit("the first step")):
            update = torch.empty(self.reserved[1], dtype=torch.uint8, device=model.device)
        del state, update
        finite = all(p.grad is None or bool(own_part(p.grad).isfinite().all()) for p in trained)
        if not (finite and math.isfinite(loss)):
            raise ModelError(
                f"a sequence of {sequence.num_tokens:,} tokens has a loss of {loss:.4g} or a gradient that is not "
                f"finite before the first step: look for broken weights, or use train.precision: float32"
            )


def _sample(loader: Loader | StreamLoader) -> list[Tree]:
    """The shortest conversations of one of the first sequences; two at least, if a sequence holds two."""
    planned = loader.trees(0, _SAMPLE_SEQUENCES)
    several = [trees for trees in planned if len(trees) > 1]
    ordered = [sorted(trees, key=lambda tree: tree.num_tokens) for trees in several or planned]
    trees = min(ordered, key=lambda trees: sum(tree.num_tokens for tree in trees[:2]))
    ends = np.cumsum([tree.num_tokens for tree in trees])
    return trees[: max(2, int((ends <= _SAMPLE_TOKENS).sum()))]
