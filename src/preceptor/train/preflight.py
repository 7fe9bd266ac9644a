"""Proofs on the user's own model, data and machine before step 1; together they take about as long as a few steps.

1. The output head that the loss uses gives the model's own logits.
2. Conversations and branches of a row do not see each other: on random tokens, and on rows of the run's own data. A
   model of which this is not true reads each chain alone (sequential.py), if that is what its own forward pass gives.
3. A row of several conversations has the loss of each alone, summed.
4. The largest rows of the run go forward and backward beside gradients and optimizer state, and all is finite: what
   would run out of memory does so now.

Afterwards nothing has changed: no gradient, no weight, no generator of random numbers.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from preceptor.data.forest import PackedSequence, Tree, pack_trees
from preceptor.data.loader import Loader
from preceptor.errors import ModelError
from preceptor.model.checks.levels import check_levels, rounding
from preceptor.model.checks.sequential import check_plain
from preceptor.model.forward import check_head, check_isolation, hidden_states
from preceptor.train.objective import CROSS_ENTROPY_OF_A_ROW, Objective
from preceptor.train.precision import autocast
from preceptor.train.room import naming_what_does_not_fit

_SAMPLE_TOKENS = 512  # of the run's data, for proofs 2 and 3; more, where two conversations take more
_SAMPLE_ROWS = 16  # rows of the plan to take them from
_STATE_PER_PARAMETER = 2  # AdamW's two means


@dataclass(frozen=True)
class Passed:
    """What the proofs found: rows that this model can read, and how long it took."""

    loader: Loader
    seconds: float


def preflight(
    model: Any,
    loader: Loader,
    precision: str,
    say: Callable[[str], None],
    objective: Objective = CROSS_ENTROPY_OF_A_ROW,
) -> Passed:
    """Prove all that can be proved before step 1; `say` gets a line for each proof.

    objective: the summed loss of one row that the run will take. Raises ModelError if the
    loss would not be the model's own, if the model is not causal, if loss or gradient is not finite, or if the largest
    row does not fit in memory.
    """
    started = time.perf_counter()
    devices = list(range(torch.cuda.device_count()))
    was_training = model.training
    with torch.random.fork_rng(devices=devices):
        try:
            loader = _prove(model, loader, precision, say, objective)
        finally:
            model.zero_grad(set_to_none=True)
            model.train(was_training)
            if devices:
                torch.cuda.empty_cache()
    seconds = time.perf_counter() - started
    say(f"all proved in {seconds:.1f} s")
    return Passed(loader, seconds)


def _prove(model: Any, loader: Loader, precision: str, say: Callable[[str], None], objective: Objective) -> Loader:
    with _line(say, "the loss is of the model's own logits"):
        check_head(model)
    try:
        with _line(say, "conversations of a row do not see each other"):
            check_isolation(model)
    except ModelError as error:
        reason = str(error).partition(" Use a")[0].rstrip(".")  # there is another way than another model
        with _line(say, f"each conversation goes through the model alone, as {reason}"):
            check_plain(model)
        loader = loader.apart()
    trees: list[Tree] = []
    if not loader.alone:
        check_levels(model, objective.keep)
        trees = _sample(loader)
    if trees:
        with _line(say, f"nor do {len(trees)} of this run's, {sum(tree.num_tokens for tree in trees):,} tokens"):
            _check_sample_isolation(model, trees, precision)
        with _line(say, "their loss in one row is the sum of the losses of each alone"):
            _check_sum(model, trees, precision, objective)
    rows = loader.largest_sequences()
    sizes = f"{max(row.num_tokens for row in rows):,} tokens, {max(row.num_trained for row in rows):,} trained"
    with _line(say, f"the largest rows ({sizes}) go forward and backward, and all is finite"):
        _check_largest(model, rows, loader, precision, objective)
    return loader


@contextmanager
def _line(say: Callable[[str], None], proved: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    say(f"proved: {proved} ({time.perf_counter() - started:.1f} s)")


def _sample(loader: Loader) -> list[Tree]:
    """The shortest conversations of one of the first rows, two at least; none where no row holds two."""
    rows = [loader.trees(planned) for planned in loader.plan(0)[:_SAMPLE_ROWS]]
    rows = [sorted(trees, key=lambda tree: tree.num_tokens) for trees in rows if len(trees) > 1]
    if not rows:
        return []
    trees = min(rows, key=lambda trees: trees[0].num_tokens + trees[1].num_tokens)
    ends = np.cumsum([tree.num_tokens for tree in trees])
    return trees[: max(2, int((ends <= _SAMPLE_TOKENS).sum()))]


@torch.no_grad()
def _check_sample_isolation(model: Any, trees: list[Tree], precision: str) -> None:
    """Other tokens in the first conversation must not move the hidden states of those that follow it in the row."""
    first, *others = trees
    vocab_size = len(model.get_input_embeddings().weight)
    changed = replace(
        first,
        segments=tuple(replace(s, ids=tuple((token + 1) % vocab_size for token in s.ids)) for s in first.segments),
    )
    model.eval()
    with autocast(model.device, precision):
        before_TD, after_TD = (
            hidden_states(model, pack_trees([tree, *others]))[first.num_tokens :] for tree in (first, changed)
        )
    _require_equal(
        float(before_TD.double().norm()),
        float((after_TD - before_TD).double().norm()),
        before_TD.dtype if precision == "float32" else torch.bfloat16,
        f"hidden states of {others[0].source} move when {first.source} changes, which is in the same row",
    )


@torch.no_grad()
def _check_sum(model: Any, trees: list[Tree], precision: str, objective: Objective) -> None:
    model.eval()
    with autocast(model.device, precision):
        together = objective(model, pack_trees(trees)).item()
        alone = math.fsum(objective(model, pack_trees([tree])).item() for tree in trees)
    dtype = torch.bfloat16 if precision == "bfloat16" else next(model.parameters()).dtype
    found = f"{len(trees)} conversations beginning with {trees[0].source} have another loss in one row ({together:.6g})"
    _require_equal(alone, abs(together - alone), dtype, f"{found} than each alone, summed ({alone:.6g})")


def _require_equal(size: float, difference: float, dtype: torch.dtype, found: str) -> None:
    error, bound = difference / max(abs(size), 1e-30), rounding(dtype)
    if not error <= bound:
        raise ModelError(f"{found}: a relative {error:.1e}, where rounding allows {bound:.1e}. Use another model type")


def _check_largest(
    model: Any, rows: list[PackedSequence], loader: Loader, precision: str, objective: Objective
) -> None:
    """The rows one after the other, beside what a step has: the optimizer's state, and the gradients of rows before."""
    trained = [p for p in model.parameters() if p.requires_grad]
    num_bytes = _STATE_PER_PARAMETER * sum(p.numel() * p.element_size() for p in trained)
    several = loader.batch_size > 1 or loader.alone
    model.train()
    for row in rows:
        with naming_what_does_not_fit(row, "the largest row of the run"):
            if several:
                for p in trained:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            state = torch.empty(num_bytes, dtype=torch.uint8, device=model.device)
            with autocast(model.device, precision):
                loss = objective(model, row) / max(1.0, row.divisor)
            loss.backward()
            del state
        if not all(p.grad is None or bool(p.grad.isfinite().all()) for p in trained) or not loss.isfinite():
            raise ModelError(
                f"a row of {row.num_tokens:,} tokens has a loss of {loss.item():.4g} or a gradient that is not finite "
                f"before the first step: look for broken weights, or use train.precision: float32"
            )
        if not several:
            model.zero_grad(set_to_none=True)
