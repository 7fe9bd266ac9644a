"""The loss alone: time and peak memory by its budget for logits, beside plain cross-entropy and a matrix product.

    python benchmarks/loss.py [--vocabularies 32000 152000] [--tokens 2048] [--repetitions 3] [--threads 1]

Forward and backward of one row of random trained tokens, hidden size 384, float32 weights, the products in float32 or
under bfloat16 autocast. Each case runs in a process of its own: peak memory is the greatest resident size during the
repetitions less that before them, when weights, their gradient and hidden states are there already. `plain` is
cross_entropy of `hidden @ weight.T`; `own buffer` is ours without head_grad_VD and head_cast. Times are CPU
seconds, so that other programs disturb less, of the fastest repetition; the share is of the rate of a 2048^3 matrix
product in the same type, taken between the repetitions, with 6 N D V operations for a row. Writes
benchmarks/results/loss.json (with machine, versions, date).
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import describe

HIDDEN = 384
BUDGETS_MIB = (16, 64, 128, 256, 512)
SIDE = 2048  # of the plain matrix product


def seconds_of(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def resident_bytes(key: str) -> int:
    """VmRSS (now) or VmHWM (the most since `forget_peak`) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One case, in this process: seconds, bytes and the share of the matrix-product rate."""
    import torch

    from preceptor.model.loss.linear_cross_entropy import Head, HeadCast, linear_cross_entropy
    from preceptor.model.loss.softmax import chunk_tokens

    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    vocab_size, num_tokens, half = case["vocab_size"], case["num_tokens"], case["products"] == "bfloat16"
    weight_VD = torch.nn.Parameter(torch.randn(vocab_size, HIDDEN) * 0.05)
    weight_VD.grad = torch.zeros_like(weight_VD)
    hidden_TD = torch.randn(num_tokens, HIDDEN, requires_grad=True)
    target_N = torch.randint(vocab_size, (num_tokens,))
    arguments = (torch.arange(num_tokens), target_N, torch.full((num_tokens,), 1 / num_tokens))
    side = torch.randn(SIDE, SIDE, dtype=torch.bfloat16 if half else torch.float32)
    product, head_cast = torch.empty_like(side), HeadCast()

    def row() -> None:
        hidden_TD.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            if case["kind"] == "plain":
                logits_NV = (hidden_TD @ weight_VD.T).float()
                loss = torch.nn.functional.cross_entropy(logits_NV, target_N)
            else:
                own = case["kind"] == "own buffer"
                shared: dict[str, Any] = (
                    {} if own else {"head_grad_VD": weight_VD.grad, "head_cast": head_cast, "gradient_is_one": True}
                )
                budget = case["logits_bytes"]
                loss = linear_cross_entropy(hidden_TD, Head(weight_VD), *arguments, logits_bytes=budget, **shared)
        loss.backward()  # type: ignore[no-untyped-call]

    def repeat() -> tuple[list[float], list[float]]:
        row_seconds, product_seconds = [], []
        for _ in range(case["repetitions"]):
            product_seconds.append(seconds_of(lambda: torch.mm(side, side, out=product)))
            row_seconds.append(seconds_of(row))
        return row_seconds, product_seconds

    seconds_of(lambda: torch.mm(side, side, out=product))
    before = resident_bytes("VmRSS")
    forget_peak()
    row()
    row_seconds, product_seconds = repeat()
    logits = num_tokens * vocab_size
    rate = 6 * HIDDEN * logits / min(row_seconds)
    return {
        **case,
        "chunk_tokens": chunk_tokens(num_tokens, vocab_size, 2 if half else 4, case["logits_bytes"]),
        "seconds": round(min(row_seconds), 4),
        "nanoseconds_per_logit": round(min(row_seconds) / logits * 1e9, 2),
        "tflops": round(rate / 1e12, 3),
        "share_of_matrix_product_rate": round(rate / (2 * SIDE**3 / min(product_seconds)), 3),
        "peak_bytes": resident_bytes("VmHWM") - before,
    }


def cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for vocab_size in options.vocabularies:
        for products in options.products:
            same = {"vocab_size": vocab_size, "num_tokens": options.tokens, "products": products}
            same |= {"threads": options.threads, "repetitions": options.repetitions}
            kinds = [("plain", 256), ("own buffer", 256), *(("ours", budget) for budget in BUDGETS_MIB)]
            found += [{"kind": kind, **same, "logits_bytes": budget * 2**20} for kind, budget in kinds]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 152_000])
    parser.add_argument("--products", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=2048, help="trained tokens of the row")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loss.json")
    options = parser.parse_args()
    results = []
    for case in cases(options):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply(measure, (case,))
        results.append(result)
        print(
            f"V {result['vocab_size']:>7,} {result['products']:9s} {result['kind']:10s} "
            f"{result['logits_bytes'] >> 20:4d} MiB, chunk {result['chunk_tokens']:5d}: {result['seconds']:7.3f} s, "
            f"{result['tflops']:.3f} TFLOP/s ({result['share_of_matrix_product_rate']:.0%}), "
            f"peak {result['peak_bytes'] / 2**20:6.0f} MiB",
            flush=True,
        )
    huge_pages = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
    report = {**describe(), "huge_pages": huge_pages, "hidden_size": HIDDEN, "results": results}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
