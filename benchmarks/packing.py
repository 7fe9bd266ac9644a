"""Packing of an epoch: how full and how mixed its sequences are, and the time for a million examples.

    python benchmarks/packing.py [--records 1000000] [--seeds 2]

Lengths are drawn from distributions like those of chats, long-tailed collections, a mixture of short and long
reasoning, and long reasoning alone; what is longer than a row is left out. Beside `plan_sequences` stands best-fit
decreasing, the usual plan. For each: the mean fill of the rows, the share of rows below 98 %, seconds, memory, and how
alike the records of a row are in length: the variance of the rows' means of log length, over what random groups of the
same sizes would have (1: as mixed as chance; more: like beside like). Writes benchmarks/results/packing.json.
"""

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from machine import describe
from preceptor.data import packing
from preceptor.data.packing import plan_sequences

RESULT = Path(__file__).parent / "results" / "packing.json"
MAX_LENGTH = (2048, 4096, 8192, 16_384)
FULL = 0.98

Plan = Callable[[Sequence[int], int, int], list[list[int]]]


def chat(rng: np.random.Generator, num: int) -> np.ndarray:
    """Log-normal, median 200 tokens."""
    return rng.lognormal(np.log(200), 0.9, num)


def long_tail(rng: np.random.Generator, num: int) -> np.ndarray:
    """Pareto with exponent 1.3: most are short, a few in a hundred are longer than a row."""
    return 120 * (rng.pareto(1.3, num) + 0.2)


def bimodal(rng: np.random.Generator, num: int) -> np.ndarray:
    """Three in five are chats of 150 tokens, the others reasoning of 2,000."""
    return np.where(rng.random(num) < 0.6, rng.lognormal(np.log(150), 0.6, num), rng.lognormal(np.log(2000), 0.5, num))


def reasoning(rng: np.random.Generator, num: int) -> np.ndarray:
    """Log-normal, median 3,000 tokens: hard, since a short row holds one or two of them."""
    return rng.lognormal(np.log(3000), 0.7, num)


DISTRIBUTIONS = {draw.__name__: draw for draw in (chat, long_tail, bimodal, reasoning)}


def best_fit_decreasing(lengths: Sequence[int], max_length: int, seed: int) -> list[list[int]]:
    return packing.best_fit_decreasing(np.asarray(lengths), max_length, np.random.default_rng(seed))


def measure(plan_of: Plan, lengths: list[int], max_length: int, num_seeds: int) -> dict[str, float]:
    """Means over the seeds, of seconds the least; memory is the peak while a plan is made, the plan included."""
    fills, below, mixed, seconds, num_rows = [], [], [], [], []
    length_N = np.array(lengths)
    log_N = np.log(length_N)
    for seed in range(num_seeds):
        start = time.perf_counter()
        plan = plan_of(lengths, max_length, seed)
        seconds.append(time.perf_counter() - start)
        assert sum(map(len, plan)) == len(lengths)
        size_R = np.array([len(row) for row in plan])
        order_N, start_R = np.concatenate([np.array(row) for row in plan]), np.cumsum(size_R) - size_R
        fill_R = np.add.reduceat(length_N[order_N], start_R) / max_length
        assert fill_R.max() <= 1
        mean_R = np.add.reduceat(log_N[order_N], start_R) / size_R
        fills.append(float(fill_R.mean()))
        below.append(float((fill_R < FULL).mean()))
        mixed.append(float((size_R * (mean_R - log_N.mean()) ** 2).mean() / log_N.var()))
        num_rows.append(len(plan))
    return {
        "mean_fill": round(float(np.mean(fills)), 5),
        "share_of_rows_below_98": round(float(np.mean(below)), 5),
        "alike": round(float(np.mean(mixed)), 2),
        "fewest_rows": min(num_rows),
        "most_rows": max(num_rows),
        "seconds": round(min(seconds), 2),
    }


def memory_bytes(plan_of: Plan, lengths: list[int], max_length: int) -> int:
    tracemalloc.start()
    plan_of(lengths, max_length, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(
        f"{'lengths':<10} {'row':>6}  {'plan':<20} {'fill':>8} {'< 98 %':>8} {'alike':>8} {'rows':>10} {'seconds':>8}"
    )
    for name, draw in DISTRIBUTIONS.items():
        for max_length in MAX_LENGTH:
            drawn_N = draw(np.random.default_rng(0), options.records).astype(np.int64).clip(8)
            lengths = drawn_N[drawn_N <= max_length].tolist()
            for plan_of in (plan_sequences, best_fit_decreasing):
                found = measure(plan_of, lengths, max_length, options.seeds)
                rows.append(
                    {
                        "lengths": name,
                        "max_length": max_length,
                        "plan": plan_of.__name__,
                        "num_records": len(lengths),
                        "fewest_rows_possible": -(-sum(lengths) // max_length),
                        **found,
                    }
                )
                print(
                    f"{name:<10} {max_length:>6}  {plan_of.__name__:<20} {found['mean_fill']:>8.3%} "
                    f"{found['share_of_rows_below_98']:>8.2%} {found['alike']:>8.1f} {found['fewest_rows']:>10,} "
                    f"{found['seconds']:>8.2f}",
                    flush=True,
                )
    lengths = chat(np.random.default_rng(0), options.records).astype(np.int64).clip(8, 4096).tolist()
    peak = memory_bytes(plan_sequences, lengths, 4096)
    print(f"memory for {len(lengths):,} chats in rows of 4,096: {peak / 1e6:.0f} MB")
    RESULT.write_text(
        json.dumps(
            {
                "command": f"python benchmarks/packing.py --records {options.records} --seeds {options.seeds}",
                **describe(),
                "memory_bytes": peak,
                "plans": rows,
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
