"""The cost of a context token: activation bytes, time and gradient by `memory.context_gradient`, 500 to 7,000 tokens.

    python benchmarks/context_memory.py [--device auto] [--model small] [--precision float32] [--repeats 3] [--cpu-time]
    python benchmarks/context_memory.py --model llama-3.1-8b --dtype bfloat16 --precision bfloat16            (a GPU)
    python benchmarks/context_memory.py --learning [--seeds 3]

The first form sends one row, a conversation of random tokens, forward and backward through a Qwen3 of random weights.
`held`: bytes that live after the forward pass of the decoder and did not before, parameters left out, so all that
backward needs and the hidden states that the loss reads. `peak`: the most that lives at once in forward, loss and
backward, beyond what is there before (weights and gradients). `seconds`: the least of `repeats`, the modes in turn;
with --cpu-time those of the processor, for a machine that has other work.
`gradient_error`: |g - g_whole| / |g_whole| over all parameters. `whole` is the authors' model under plain autograd,
with transformers' own attention: nothing is spared anywhere. Of `full`, the operations of the row a second as a share
of the machine's rate at a plain matrix product too. What the plan predicts of the memory: benchmarks/plan.py.
Writes benchmarks/results/context_memory.json, of another model context_memory-MODEL.json.

The second form trains the scholar to an intern in each mode, as benchmarks/first_run.py does, and asks it all held-out
questions. Writes benchmarks/results/context_learning.json.
"""

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import SHAPES, matrix_product_rate, operations_of, random_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from machine import describe
from preceptor import config
from preceptor.data.forest import PackedSequence, Segment, Tree, pack_trees
from preceptor.model.activations.passes import StepContext
from preceptor.model.forward import Engine
from preceptor.model.loss.linear_cross_entropy import Head, linear_cross_entropy, output_head
from preceptor.model.numerics import autocast
from preceptor.model.options import ActivationPolicy

RESULTS = Path(__file__).parent / "results"
LENGTHS = ((500, 1500), (1000, 1000), (3000, 1000), (7000, 1000))
TURNS = 4  # of one further row: the same 3,000 and 1,000 tokens in so many turns
MODES: dict[str, ActivationPolicy | None] = {
    "whole": None,
    "full": ActivationPolicy(),
    "recompute": ActivationPolicy("recompute"),
    "detach": ActivationPolicy("detach"),
    "full, checkpointing: all": ActivationPolicy("full", "all"),
    "detach, checkpointing: all": ActivationPolicy("detach", "all"),
}
MODELS: dict[str, dict[str, Any]] = {
    "small": {"model_type": "qwen3", "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8}
    | {"vocab_size": 8192, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64},
    **SHAPES,
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make within the block, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((arguments, named)) if isinstance(t, Tensor)}
        outputs = function(*arguments, **(named or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs | self._known:
                self._add(tensor.untyped_storage())
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, num_bytes)

    def _remove(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


def held_and_peak(device: torch.device, work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that live after `work`, as long as its result does, and the most at any time in it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as live:
            result = work()
            gc.collect()
            held, peak = live.now, live.peak
    del result
    return held, peak


def conversation(context: int, answer: int, num_turns: int, vocab_size: int) -> PackedSequence:
    rng = np.random.default_rng(0)
    segments = []
    for place in range(2 * num_turns):
        length = (answer if place % 2 else context) // num_turns
        ids = tuple(rng.integers(vocab_size, size=length).tolist())
        segments.append(Segment("target" if place % 2 else "context", ids, place - 1 if place else None))
    return pack_trees([Tree("random:1", tuple(segments))])


def states(model: Any, row: PackedSequence, policy: ActivationPolicy | None) -> tuple[Tensor, Tensor]:
    if policy is not None:
        return Engine(model).loss_hidden_states(row, policy)
    ids_T = torch.from_numpy(row.ids_T).to(model.device)
    hidden_TD = model.get_decoder()(input_ids=ids_T[None], use_cache=False).last_hidden_state[0]
    return hidden_TD, torch.from_numpy(row.source_N).to(hidden_TD.device)


def loss_of(model: Any, row: PackedSequence, policy: ActivationPolicy | None) -> Tensor:
    if policy is not None:
        return Engine(model)(row, policy, step=StepContext(accumulates=True))  # as in training
    hidden_TD, source_N = states(model, row, None)
    target_N, weight_N = (torch.from_numpy(array).to(hidden_TD.device) for array in (row.target_N, row.weight_N))
    return linear_cross_entropy(hidden_TD, Head(output_head(model).weight_VD), source_N, target_N, weight_N)


def step(model: Any, row: PackedSequence, policy: ActivationPolicy | None, precision: str) -> float:
    with autocast(model.device, precision):
        loss = loss_of(model, row, policy)
    loss.backward()
    return loss.item()


def measure_row(
    model: Any, row: PackedSequence, precision: str, repeats: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """All modes on one row, each beside `whole`."""
    result: dict[str, dict[str, Any]] = {}
    true: list[Tensor] = []
    for name, policy in MODES.items():
        model.zero_grad(set_to_none=False)
        loss = step(model, row, policy, precision)
        grads = [p.grad for p in model.parameters()]
        true = true or [grad.clone() for grad in grads]
        distance = sum(float((g - t).double().square().sum()) for g, t in zip(grads, true, strict=True))
        error = (distance / sum(float(t.double().square().sum()) for t in true)) ** 0.5
        with autocast(model.device, precision):
            held, _ = held_and_peak(model.device, partial(states, model, row, policy))
        _, peak = held_and_peak(model.device, partial(step, model, row, policy, precision))
        result[name] = {"loss": loss, "gradient_error": error, "held_bytes": held, "peak_bytes": peak}
    seconds: dict[str, list[float]] = {name: [] for name in MODES}
    for _ in range(repeats):
        for name, policy in MODES.items():
            started = clock()
            step(model, row, policy, precision)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - started)
    for name, found in result.items():
        found["seconds"] = min(seconds[name])
    for found in result.values():
        for key, other in itertools.product(("held_bytes", "peak_bytes", "seconds"), ("whole", "full")):
            found[f"{key.partition('_')[0]}_of_{other}"] = found[key] / result[other][key]
    return result


def memory(arguments: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Each row in each mode; `write` takes what was measured so far."""
    cuda = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    model = random_model(MODELS[arguments.model], arguments.dtype, "cuda" if cuda else "cpu")
    rate = matrix_product_rate(arguments.precision, model.device)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    result: dict[str, Any] = {}
    rows = [(*lengths, 1) for lengths in LENGTHS] + [(3000, 1000, TURNS)]
    for context, answer, num_turns in rows[: arguments.rows]:
        name = f"{context}/{answer}" + (f" in {num_turns} turns" if num_turns > 1 else "")
        row = conversation(context, answer, num_turns, model.config.vocab_size)
        result[name] = measure_row(model, row, arguments.precision, arguments.repeats, clock)
        work = operations_of(model, ((context // num_turns, answer // num_turns),) * num_turns)
        result[name]["full"]["share_of_matrix_product_rate"] = work / result[name]["full"]["seconds"] / rate
        print(table(name, result[name]), flush=True)
        write(result)
    return result


def table(name: str, modes: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"{name:22}  held MB of whole  of full  peak MB of whole  of full  seconds of whole  of full  gradient error"
        "      loss"
    ]
    for mode, m in modes.items():
        lines.append(
            f"  {mode:20} "
            f"{m['held_bytes'] / 1e6:8.1f} {m['held_of_whole']:8.1%} {m['held_of_full']:8.1%} "
            f"{m['peak_bytes'] / 1e6:8.1f} {m['peak_of_whole']:8.1%} {m['peak_of_full']:8.1%} "
            f"{m['seconds']:8.3f} {m['seconds_of_whole']:8.1%} {m['seconds_of_full']:8.1%} "
            f"{m['gradient_error']:15.1e} {m['loss']:9.2f}"
        )
    return "\n".join(lines)


def learning(seeds: int) -> dict[str, Any]:
    """The demo's training in each mode, with so many seeds, and all held-out questions."""
    from first_run import measure
    from preceptor.console import standard_console
    from preceptor.demo import QUESTIONS, demo_run
    from preceptor.evaluate.tasks import read_task
    from preceptor.train.session import Session
    from preceptor.train.signals import StopRequest

    questions = read_task(QUESTIONS)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for mode in ("full", "recompute", "detach"):
            result[mode] = []
            for seed in range(seeds):
                out = Path(folder) / f"{mode}-{seed}"
                tree = config.Run.model_dump(demo_run(out), mode="json")
                tree["train"]["seed"] = seed
                tree["memory"]["context_gradient"] = mode
                run = config.build(tree, "context_memory")
                summary = Session(run, standard_console(), StopRequest()).train()
                answers = measure(str(out / "model"), questions)
                result[mode].append(
                    {"seed": seed, "held_out": summary["held_out"], "training_seconds": round(summary["seconds"], 1)}
                    | {"all": answers["all"]}
                )
            exact = [run["all"]["exact_match"] for run in result[mode]]
            print(f"{mode:10} exact {statistics.mean(exact):.1%} ({min(exact):.1%} to {max(exact):.1%})", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=len(LENGTHS) + 1, help="only the first so many rows")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--learning", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    name = "context_learning" if arguments.learning else "context_memory"
    if not arguments.learning and arguments.model != "small":
        name += f"-{arguments.model}"
    said = vars(arguments)
    used = ["seeds"] if arguments.learning else ["device", "model", "dtype", "precision", "repeats", "rows"]
    command = f"python benchmarks/context_memory.py{' --learning' if arguments.learning else ''} "
    command += " ".join(f"--{key} {said[key]}" for key in used)
    command += " --cpu-time" if arguments.cpu_time else ""
    about = {"command": command, **describe(), "threads": torch.get_num_threads()}

    def write(found: dict[str, Any]) -> None:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps({**about, "result": found}, indent=1) + "\n"
        (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")

    write(learning(arguments.seeds) if arguments.learning else memory(arguments, write))


if __name__ == "__main__":
    main()
