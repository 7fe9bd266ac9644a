"""A training step on a CPU against its limit: the time of its own matrix products alone, at their shapes.

    python benchmarks/step_limit.py [--hidden 384 1024 2048] [--rounds 3] [--threads N] [--cpu-time]

A Qwen3 of random weights of each hidden size takes steps over one row of 2,048 tokens: eight conversations of 128
tokens of context and 128 of answer. Every matrix product of a step (of linear layers, head, loss and, in bfloat16, of
attention's backward; torch's fused attention is none) is recorded: operation, shapes, strides, types. Then steps and
products take turns, twice at least; of each the least time counts, and of two steps in a row the second.
`step_of_products`: what a step takes, of what its products take.
--cpu-time: seconds of the processor in place of the clock's, for a machine that has other work; best with --threads 1.
Writes benchmarks/results/step_limit.json.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import describe  # before torch: it sets what torch reads when it is imported

# isort: split
import numpy as np
import torch
from shapes import random_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from preceptor import config
from preceptor.data.forest import PackedSequence, Segment, Tree, pack_trees
from preceptor.train.checkpoint import State
from preceptor.train.optimizer import build_optimizer
from preceptor.train.step import take_step

RESULTS = Path(__file__).parent / "results" / "step_limit.json"
CONVERSATIONS, CONTEXT, ANSWER, VOCABULARY = 8, 128, 128, 8192
MODELS = {  # layers, query heads, key-value heads, head size
    384: (8, 6, 2, 64),
    1024: (2, 8, 4, 128),
    2048: (1, 16, 8, 128),
}
PRECISIONS = ("float32", "bfloat16")
_NAMES = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")

Form = tuple[str, tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]]
"""An operation, and shape, strides and type of each of its matrices; of a sum the first is what is added to."""


class RecordedProducts(TorchDispatchMode):
    """Counts the matrix products within the block, by form."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: Counter[Form] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in _NAMES:
            matrices = [each for each in arguments if isinstance(each, Tensor)]
            self.forms[name, tuple((tuple(m.shape), m.stride(), m.dtype) for m in matrices)] += 1
        return function(*arguments, **(named or {}))


def product_of(form: Form) -> Callable[[], object]:
    """The product alone, on random matrices that are made here, into memory that is made here."""
    name, matrices = form
    given = [torch.empty_strided(shape, stride, dtype=dtype).normal_() for shape, stride, dtype in matrices]
    operation = {"mm": torch.mm, "bmm": torch.bmm}.get(name, torch.baddbmm if "b" in name[:1] else torch.addmm)
    out = torch.empty(*given[-2].shape[:-1], given[-1].shape[-1], dtype=given[-1].dtype)
    return lambda: operation(*given, out=out)


def row() -> PackedSequence:
    rng = np.random.default_rng(0)
    trees = []
    for number in range(CONVERSATIONS):
        context, answer = (tuple(rng.integers(VOCABULARY, size=size).tolist()) for size in (CONTEXT, ANSWER))
        trees.append(Tree(f"random:{number}", (Segment("context", context, None), Segment("target", answer, 0))))
    return pack_trees(trees)


def measure(hidden: int, precision: str, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    layers, heads, kv_heads, head_size = MODELS[hidden]
    model = random_model(
        {"model_type": "qwen3", "hidden_size": hidden, "intermediate_size": 3 * hidden, "vocab_size": VOCABULARY}
        | {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
        | {"head_dim": head_size, "tie_word_embeddings": True}
    )
    settings, sequence = config.Optimizer(), row()
    state = State(model, build_optimizer(model, settings.weight_decay, settings.betas))

    def step() -> None:
        take_step(state, [sequence], 1e-5, settings.max_grad_norm, precision)

    with RecordedProducts() as recorded:
        step()
    steps: list[float] = []
    products: dict[Form, list[float]] = {form: [] for form in recorded.forms}
    for _ in range(rounds):
        step()  # behind the products memory and caches hold other things than behind a step
        steps.append(seconds_of(step, clock))
        for form, found in products.items():
            found.append(seconds_of(product_of(form), clock))
    alone = sum(recorded.forms[form] * min(found) for form, found in products.items())
    return {
        "layers": layers,
        "step_seconds": min(steps),
        "product_seconds": alone,
        "step_of_products": min(steps) / alone,
    }


def seconds_of(work: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    work()
    return clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3, help="at least 2: what is new is slow once")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    command = f"python benchmarks/step_limit.py --threads {arguments.threads} --rounds {arguments.rounds}"
    command += " --cpu-time" if arguments.cpu_time else ""
    result: dict[str, Any] = {}
    for hidden in arguments.hidden:
        result[str(hidden)] = {}
        for precision in PRECISIONS:
            result[str(hidden)][precision] = found = measure(hidden, precision, arguments.rounds, clock)
            print(f"hidden {hidden:5} {precision:9} {found}", flush=True)
            about = {"command": command, **describe(), "tokens": row().num_tokens, "result": result}
            RESULTS.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
