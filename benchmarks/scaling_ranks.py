"""Memory and bytes sent of each process, beside what the plan predicts, and the time of a step on 1 and 2 processes.

    python benchmarks/scaling_ranks.py [--processes 1 2 4] [--tokens 512]

On the processes of this machine (gloo), by torchrun. Small models of random weights, full fine-tuning with AdamW in
float32, four sequences a step, a quarter of their tokens trained. *Memory*: the most bytes of tensors that live at one
time on a process in a step, weights and optimizer state included. *Sent*: of every collective operation of that step,
what a ring of processes sends, as NCCL does it; by size, not counted on a wire. *Seconds*: the fastest of five steps
without counting. Where more processes than cores compute, the time says nothing. Writes
benchmarks/results/scaling_ranks.json (with machine, versions, date).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from shapes import random_model

from machine import describe
from preceptor.data.forest import PackedSequence
from preceptor.model.forward import Engine
from preceptor.model.sharding import device_mesh, shard_model
from preceptor.plan.dry_run import dry_run_like
from preceptor.plan.memory import BASE, Setup, state_bytes
from preceptor.plan.parameters import Parameters
from preceptor.plan.ranks import rank_peak_bytes
from preceptor.plan.timeline import LiveBytes
from preceptor.plan.work import Work
from preceptor.train.checkpoint import State
from preceptor.train.optimizer import build_optimizer
from preceptor.train.step import Objective, take_step
from preceptor.world import World, num_cores

RESULTS = Path(__file__).parent / "results"
NUM_SEQUENCES, NUM_TIMED = 4, 5
_SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "hidden_size": 256}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SHAPE, "intermediate_size": 1024, "num_hidden_layers": 8}
    | {"vocab_size": 2048, "tie_word_embeddings": False},
    "qwen3, tied": {"model_type": "qwen3", **_SHAPE, "intermediate_size": 768, "num_hidden_layers": 4}
    | {"vocab_size": 8192, "tie_word_embeddings": True},
}
WAYS: dict[str, tuple[Any, bool]] = {
    "replicate": ("replicate", False),
    "shard, gathered once a step": ("shard", False),
    "shard, layer by layer": ("shard", True),
}


class Counted(LiveBytes):  # type: ignore[no-untyped-call]
    """Live bytes, of storages that are resized as well (FSDP2 frees gathered weights so), and bytes sent."""

    def __init__(self, known: list[torch.Tensor], num_ranks: int) -> None:
        self._storages: dict[int, Any] = {}
        self.sent = 0.0
        self._share = (num_ranks - 1) / num_ranks
        super().__init__(known)

    def count(self, tensor: torch.Tensor) -> None:
        if hasattr(tensor, "to_local"):
            tensor = tensor.to_local()
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = weakref.ref(storage)

    def run(self, operation: Any, args: Any, kwargs: Any) -> Any:
        name = str(operation)
        if name.startswith("c10d."):
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            largest = max((tensor.nbytes for tensor in tensors), default=0)
            self.sent += largest * self._share * (2 if "allreduce" in name else 1)
        out = operation(*args, **kwargs)
        self.look()
        return out

    def look(self) -> None:
        live = {key: storage for key, ref in self._storages.items() if (storage := ref()) is not None}
        self._storages = {key: self._storages[key] for key in live}
        self.peak_bytes = max(self.peak_bytes, sum(storage.nbytes() for storage in live.values()))


def sequence_of(num_tokens: int) -> PackedSequence:
    context = num_tokens * 3 // 4
    return Work((((context, num_tokens - context),),)).sequence()


def measure(kind: str, way: str, num_tokens: int, world: World) -> dict[str, Any]:
    """One case, on this process."""
    strategy, regathers = WAYS[way]
    model = random_model(MODELS[kind], max_tokens=num_tokens)
    sequence, own = sequence_of(num_tokens), NUM_SEQUENCES // world.size
    dry_run, setup = dry_run_like(model), Setup(sequences_per_step=own)
    moments = dry_run.step(setup, Objective().policy, sequence, dry_run.num_rows)
    parameters, parts = dry_run.parameters(), 1 if strategy == "replicate" else world.size
    if world.size > 1:
        mesh = device_mesh(strategy, "cpu", world.size, world.size)
        shard_model(Engine(model), mesh, regathers)
    state = State(model, build_optimizer(model, 0.0, (0.9, 0.95)))

    def step() -> None:
        take_step(state, [sequence] * own, 1e-4, 1.0, "float32", Objective(), world)

    seconds = []
    for _ in range(NUM_TIMED + 1):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    optimized = [value for each in state.optimizer.state.values() for value in each.values() if value.dim()]
    counted = Counted([*model.parameters(), *model.buffers(), *optimized], world.size)
    with counted:
        step()
    return {
        "model": kind,
        "way": way,
        "processes": world.size,
        "tokens": num_tokens,
        "seconds": world.max(min(seconds[1:]))[0],
        "memory_measured": int(world.max(counted.peak_bytes)[0]),
        "memory_predicted": rank_peak_bytes(setup, parameters, moments, parts, regathers),
        "sent_measured": round(counted.sent),
        "sent_predicted": rank_sent_bytes(setup, parameters, world.size, parts, regathers, own),
    }


def rank_sent_bytes(
    setup: Setup, parameters: Parameters, num_ranks: int, num_parts: int, regathers: bool, num_passes: int
) -> int:
    """What one process sends in a step of so many sequences, where collectives go round a ring.

    Of N processes each sends (N - 1) / N of what is gathered or scattered, and twice that of what is summed.
    """

    def ring(num: int) -> float:
        return (num - 1) / num

    states = state_bytes(setup, parameters)
    gradients = states["gradients"]
    if num_parts == 1:
        return round(2 * ring(num_ranks) * gradients)
    kept = setup.weight_bytes * parameters.base.get("head", parameters.base.get("embedding", 0))  # by the whole pass
    gathered = (2 * states["weights"] - kept if regathers else states["weights"]) + states.get(BASE, 0)
    times = num_passes if regathers else 1
    between_nodes = 2 * ring(num_ranks // num_parts) * gradients / num_parts
    return round(times * ring(num_parts) * (gathered + gradients) + between_nodes)


def measured_on(num: int, num_tokens: int) -> list[dict[str, Any]]:
    """All cases on so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        command += [f"--nproc-per-node={num}", __file__, "--tokens", str(num_tokens), "--into", str(place)]
        threads = str(max(1, num_cores() // num))
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": threads})
        found: list[dict[str, Any]] = json.loads(place.read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.into is not None:
        with World.launched() as world:
            world.connect("cpu")
            ways = WAYS if world.size > 1 else list(WAYS)[:1]
            found = [measure(kind, way, arguments.tokens, world) for kind in MODELS for way in ways]
            if world.is_first:
                arguments.into.write_text(json.dumps(found))
        return
    found = [case for num in arguments.processes for case in measured_on(num, arguments.tokens)]
    head = f"{'model':<13}{'way':<29}{'processes':>9}{'memory, MB':>12}{'plan':>9}"
    print(f"{head}{'sent, MB':>11}{'plan':>9}{'seconds':>9}")
    for case in found:
        memory, sent = (
            f"{case[f'{what}_measured'] / 1e6:>{width}.1f}"
            f"{case[f'{what}_predicted'] / max(1, case[f'{what}_measured']) - 1:>+9.1%}"
            for what, width in (("memory", 12), ("sent", 11))
        )
        print(f"{case['model']:<13}{case['way']:<29}{case['processes']:>9}{memory}{sent}{case['seconds']:>9.3f}")
    result = {**describe(), "backend": "gloo", "cases": found}
    (RESULTS / "scaling_ranks.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
