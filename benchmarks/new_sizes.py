"""The cost of a new tensor size in bfloat16 on a CPU: first time against later times, and memory kept.

    python benchmarks/new_sizes.py [--sizes 50]

Products of a layer of hidden 384 with so many tokens, forward and for both gradients, and attention of 6 heads of 64
over conversations of so many tokens: torch's own backward, and ours, whose sizes are rounded up (model/sizes.py). Each
number of tokens is new; milliseconds a call, KiB of the process that stay for each. Linux only. Writes
benchmarks/results/new_sizes.json.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from torch import Tensor

from machine import describe
from preceptor.model.attention.cpu import attend_path
from preceptor.model.attention.layout import AttentionOptions, PathMasks

RESULTS = Path(__file__).parent / "results" / "new_sizes.json"
HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD_SIZE = 384, 1152, 6, 2, 64
FIRST_TOKENS = 301


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=50, help="numbers of tokens, one after the other")
    sizes = range(FIRST_TOKENS, FIRST_TOKENS + parser.parse_args().sizes)
    shapes = (WIDTH, HIDDEN), (sizes.stop, HIDDEN), (sizes.stop, WIDTH)
    weight, x, y = (torch.randn(shape).bfloat16() for shape in shapes)
    cases: dict[str, Callable[[int], object]] = {
        "product, forward": lambda n: x[:n] @ weight.T,
        "product, gradient of the input": lambda n: y[:n] @ weight,
        "product, gradient of the weight": lambda n: y[:n].T @ x[:n],
        "attention's backward, torch": backward_of(torch_attention, sizes),
        "attention's backward, ours": backward_of(our_attention(PathMasks([(0, sizes.stop, ())])), sizes),
    }
    result = {}
    for name, call in cases.items():
        result[name] = measure(call, sizes)
        print(f"{name:34} {result[name]}", flush=True)
    found = {**describe(), "command": "python benchmarks/new_sizes.py", "sizes": len(sizes), "result": result}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure(call: Callable[[int], object], sizes: range) -> dict[str, float]:
    before = resident_bytes()
    milliseconds = []
    for _ in range(2):
        started = time.perf_counter()
        for num_tokens in sizes:
            call(num_tokens)
        milliseconds.append((time.perf_counter() - started) / len(sizes) * 1e3)
        if len(milliseconds) == 1:
            kept = resident_bytes() - before
    first, again = (round(value, 2) for value in milliseconds)
    return {"first_ms": first, "again_ms": again, "kept_kib": round(kept / len(sizes) / 1024)}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def torch_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def our_attention(masks: PathMasks) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """masks: one for all calls, as for the conversations of a row."""
    return lambda query, key, value: attend_path(query, key, value, AttentionOptions(HEAD_SIZE**-0.5), masks)


def backward_of(attention: Callable[[Tensor, Tensor, Tensor], Tensor], sizes: range) -> Callable[[int], object]:
    """The forward passes are done here, so that only backward is measured."""
    passes = {}
    for num_tokens in sizes:
        shapes = [(1, heads, num_tokens, HEAD_SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        leaves = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
        passes[num_tokens] = leaves, attention(*leaves)

    def backward(num_tokens: int) -> object:
        leaves, output = passes[num_tokens]
        return torch.autograd.grad(output, leaves, output.detach(), retain_graph=True)

    return backward


if __name__ == "__main__":
    main()
