"""Every causal model type of transformers, tiny and random: does a row give transformers' own gradient, and how?

    python benchmarks/model_types.py [TYPE ...]
    python benchmarks/model_types.py --ranks 2 [TYPE ...]       over several processes (model_types_ranks.py)

Of each type: whether the proofs before a run pass, whether conversations share a row or go through alone, the largest
relative error of the gradient against the model's own forward pass over each conversation alone, in each way of keeping
less for backward, and whether every parameter of a LoRA adapter has a part in the loss.
"""

import argparse
import contextlib
import io
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch

from machine import describe
from preceptor.data.forest import PackedSequence, Segment, Tree, pack_trees
from preceptor.data.prefix_sharing import chains_of
from preceptor.errors import ModelError
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.checks import check_head, check_isolation, check_phases, check_sequential
from preceptor.model.forward import Engine
from preceptor.model.options import ActivationPolicy
from preceptor.model.parts import freeze_towers
from tiny_types import VOCABULARY, model_types, tiny_of

RESULTS = Path(__file__).parent / "results"
SECONDS = 60  # of one type at most
MODES = {
    "full": ActivationPolicy(),
    "activation_checkpointing: all": ActivationPolicy(activation_checkpointing="all"),
    "context_gradient: recompute": ActivationPolicy(context_gradient="recompute"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="absent: all, and the result is written")
    parser.add_argument("--ranks", type=int, default=1, help="so many processes, against one")
    arguments = parser.parse_args()
    kinds = arguments.types or model_types()
    if arguments.ranks > 1:
        from model_types_ranks import over_ranks

        found, command, name = over_ranks(kinds, arguments.ranks), f" --ranks {arguments.ranks}", "model_types_ranks"
    else:
        found, command, name = in_one_process(kinds), "", "model_types"
    if not arguments.types:
        result = {"command": f"python benchmarks/model_types.py{command}", **describe(), "types": found}
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def in_one_process(kinds: list[str]) -> dict[str, Any]:
    torch.set_num_threads(1)  # such models are smaller than a thread's start
    signal.signal(signal.SIGALRM, _too_long)
    found = {}
    for kind in kinds:
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found[kind] = examine(kind)
        except _TooLong:
            found[kind] = {"outcome": "not tried", "why": f"took more than {SECONDS} s"}
        except Exception as error:  # a fault of ours, and to be seen as one
            found[kind] = {"outcome": "broke", "why": f"{type(error).__name__}: {error}"}
        finally:
            signal.alarm(0)
        print(kind, json.dumps(found[kind]), flush=True)
    return found


class _TooLong(BaseException):
    """Not an Exception, since those of models are caught where they arise."""


def _too_long(*_: Any) -> None:
    raise _TooLong


def examine(kind: str) -> dict[str, Any]:
    """outcome: packed, alone, rejected or not tried; why, but for packed; errors by mode; lora: whether it works."""
    try:
        model = loaded(kind)
    except ValueError as error:
        return {"outcome": "not tried", "why": str(error)}
    try:
        outcome, why = kind_of(model)
    except ModelError as error:
        return {"outcome": "rejected", "why": str(error)}
    trees = conversations()
    chains = [pack_trees([chain], alone=True) for tree in trees for chain in chains_of(tree)]
    rows = chains if outcome == "alone" else [pack_trees(trees)]
    true = gradient(model, chains, None)
    found: dict[str, Any] = {"outcome": outcome} | ({"why": why} if why else {}) | {"errors": {}}
    for mode, policy in MODES.items():
        if outcome == "alone" and policy.context_gradient != "full":
            continue
        try:
            check_phases(model, policy)
            own = gradient(model, rows, policy)
            found["errors"][mode] = float(f"{(own - true).norm() / true.norm():.1e}")
        except ModelError as error:
            found["errors"][mode] = str(error)
    return found | {"lora": lora(model, rows)}


def loaded(kind: str) -> Any:
    """A tiny model of the type, with its towers frozen. Raises ValueError where none could be made."""
    model = tiny_of(kind)
    with contextlib.suppress(ModelError):  # of which check_head speaks next
        freeze_towers(model)
    return model


def kind_of(model: Any) -> tuple[str, str]:
    """`packed`, or `alone` and why. Raises ModelError for what cannot be trained."""
    check_head(model)
    try:
        check_isolation(model)
    except ModelError as error:
        check_sequential(model)
        return "alone", str(error)
    return "packed", ""


def gradient(model: Any, rows: list[PackedSequence], policy: ActivationPolicy | None) -> torch.Tensor:
    """Of all trained parameters, in float64. policy None: the model's own forward pass and torch's cross-entropy."""
    model.zero_grad(set_to_none=True)
    for row in rows:
        loss = _own_loss(model, row) if policy is None else Engine(model)(row, policy)
        torch.autograd.backward(loss)
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten().double()
            for p in model.parameters()
            if p.requires_grad
        ]
    )


def _own_loss(model: Any, row: PackedSequence) -> torch.Tensor:
    logits_TV = model(input_ids=torch.from_numpy(row.ids_T)[None], use_cache=False).logits[0].float()
    targets_N = torch.from_numpy(row.target_N)
    return torch.nn.functional.cross_entropy(logits_TV[torch.from_numpy(row.source_N)], targets_N, reduction="sum")


def lora(model: Any, rows: list[PackedSequence]) -> str:
    """`works`, or what does not."""
    try:
        adapted = add_adapter(model, 2, 4.0, 0.0, None, [], seed=0)
        for row in rows:
            torch.autograd.backward(Engine(adapted)(row))
    except Exception as error:  # whatever peft and a model make of each other
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
    idle = [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None]
    return f"{len(idle)} parameters have no part in the loss, such as {idle[0]}" if idle else "works"


def conversations() -> list[Tree]:
    rng = np.random.default_rng(0)
    return [_tree(rng, (5, 6, 4, 7)), _branching(rng), _tree(rng, (9, 3))]


def _tree(rng: np.random.Generator, lengths: tuple[int, ...]) -> Tree:
    """A conversation: contexts and targets of these lengths in turn."""
    segments = [_segment(rng, i % 2 == 1, length, i - 1 if i else None) for i, length in enumerate(lengths)]
    return Tree("chain", tuple(segments))


def _branching(rng: np.random.Generator) -> Tree:
    """Two branches after the first context, as a template that rewrites history makes them."""
    parts = ((False, 6, None), (True, 5, 0), (False, 9, 0), (True, 4, 2))
    return Tree("tree", tuple(_segment(rng, target, length, parent) for target, length, parent in parts))


def _segment(rng: np.random.Generator, target: bool, length: int, parent: int | None) -> Segment:
    ids = tuple(rng.integers(VOCABULARY, size=length).tolist())
    return Segment("target" if target else "context", ids, parent)


if __name__ == "__main__":
    main()
