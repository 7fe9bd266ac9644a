"""The cost of a token by sequence length, by conversations per sequence, and by answers per prompt.

    python benchmarks/scaling.py [--model small] [--precision float32] [--seconds 3]
    python benchmarks/scaling.py --model llama-3.1-8b --dtype bfloat16 --precision bfloat16                   (a GPU)

Forward and backward of single rows through a model of random weights, the loss on the answers (a quarter of each
conversation). Four curves:

    packed    rows of 512 to 16,384 tokens, in conversations of 128: a token should cost the same in all
    one       rows of 512 to 16,384 tokens, one conversation each: attention adds a cost that grows with the length
    shared    rows of 4,096 tokens in 1 to 128 conversations: the shorter they are, the less a token costs
    answers   1 to 32 answers of 64 tokens to one prompt of 1,024: in one tree, and each with a prompt of its own

To each of `packed` and `one`, cost per token = constant + slope * length is fitted by least relative squares; `packed`
should have no slope. Each point is the least time of a few repetitions; but for `answers`, its operations a second are
given as a share of the machine's rate at a plain matrix product. Writes benchmarks/results/scaling.json, of another
model scaling-MODEL.json.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import SHAPES, matrix_product_rate, operations_of, random_model

from machine import describe
from preceptor.data.dataset import Dataset
from preceptor.data.forest import PackedSequence, Segment, Tree, pack_trees
from preceptor.model.forward import Engine
from preceptor.model.numerics import autocast

RESULTS = Path(__file__).parent / "results"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384)
NUM_SHARING = (1, 2, 4, 8, 16, 32, 64, 128)
NUM_ANSWERS = (1, 2, 4, 8, 16, 32)
MODELS: dict[str, dict[str, Any]] = {
    "small": {"model_type": "qwen3", "vocab_size": 8192, "hidden_size": 192, "intermediate_size": 512}
    | {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32},
    **SHAPES,
}


def conversation(rng: np.random.Generator, num_tokens: int, vocab_size: int) -> Tree:
    """A context of three quarters and an answer of one."""
    ids = tuple(rng.integers(vocab_size, size=num_tokens).tolist())
    at = num_tokens * 3 // 4
    return Tree("made up", (Segment("context", ids[:at], None), Segment("target", ids[at:], 0)))


def answers(rng: np.random.Generator, num: int, vocab_size: int) -> list[Tree]:
    prompt = tuple(rng.integers(vocab_size, size=1024).tolist())
    return [
        Tree("made up", (Segment("context", prompt, None), Segment("target", tuple(ids), 0)))
        for ids in rng.integers(vocab_size, size=(num, 64)).tolist()
    ]


def points(vocab_size: int) -> Iterator[tuple[str, int, list[PackedSequence]]]:
    """(curve, number of conversations, rows)."""
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        yield "packed", length // 128, [pack_trees([conversation(rng, 128, vocab_size) for _ in range(length // 128)])]
        yield "one", 1, [pack_trees([conversation(rng, length, vocab_size)])]
    for num in NUM_SHARING:
        yield "shared", num, [pack_trees([conversation(rng, 4096 // num, vocab_size) for _ in range(num)])]
    for num in NUM_ANSWERS:
        trees = answers(rng, num, vocab_size)
        yield "answers, one tree", num, [pack_trees(list(Dataset.of(trees).with_shared_prefixes(4096, 0)))]
        yield "answers, separate", num, [pack_trees(trees[at : at + 3]) for at in range(0, num, 3)]


def seconds_of(model: Any, rows: list[PackedSequence], precision: str, limit_seconds: float) -> float:
    """The least time in which the rows go forward and backward, of as many tries as the limit holds; two at least."""
    least, begun, tries = float("inf"), time.perf_counter(), 0
    while tries < 2 or (time.perf_counter() - begun < limit_seconds and tries < 10):
        start = time.perf_counter()
        for row in rows:
            with autocast(model.device, precision):
                loss = Engine(model)(row) / row.num_trained
            loss.backward()  # type: ignore[no-untyped-call]
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        least = min(least, time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
        tries += 1
        if tries == 1 and least > limit_seconds:
            break
    return least


def fit(found: list[dict[str, Any]]) -> dict[str, float]:
    """cost per token = constant + slope * length, and the largest relative distance of a point from that line."""
    length_P = np.array([point["num_tokens"] for point in found], dtype=float)
    cost_P = np.array([point["microseconds_per_token"] for point in found])
    terms_P2 = np.stack([np.ones_like(length_P), length_P], axis=1)
    constant, slope = np.linalg.lstsq(terms_P2 / cost_P[:, None], np.ones_like(cost_P), rcond=None)[0]
    return {
        "microseconds_per_token": round(float(constant), 3),
        "more_per_1000_tokens_of_length": round(float(slope) * 1000, 4),
        "largest_deviation": round(float(np.abs((constant + slope * length_P) / cost_P - 1).max()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=3, help="time for the repetitions of one point")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="leave out rows of more tokens")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = MODELS[options.model]
    model = random_model(shape, options.dtype, device, LENGTHS[-1])
    rate = matrix_product_rate(options.precision, model.device)
    curves: dict[str, list[dict[str, Any]]] = {}
    seconds_of(
        model, next(points(shape["vocab_size"]))[2], options.precision, 1
    )  # what is only done once, such as threads
    for curve, num, rows in points(shape["vocab_size"]):
        num_tokens = sum(row.num_tokens for row in rows)
        if max(row.num_tokens for row in rows) > options.longest:
            continue
        seconds = seconds_of(model, rows, options.precision, options.seconds)
        point = {
            "num_tokens": num_tokens,
            "num_trained": sum(row.num_trained for row in rows),
            "num_conversations": num,
            "seconds": round(seconds, 4),
            "microseconds_per_token": round(1e6 * seconds / num_tokens, 3),
            "milliseconds_per_conversation": round(1e3 * seconds / num, 3),
        }
        if not curve.startswith("answers"):
            length = num_tokens // num
            work = num * operations_of(model, ((length * 3 // 4, length - length * 3 // 4),))
            point["share_of_matrix_product_rate"] = round(work / seconds / rate, 3)
        curves.setdefault(curve, []).append(point)
        print(
            f"{curve:<18}{num:>5} conversations {num_tokens:>7,} tokens {seconds:>8.3f} s "
            f"{point['microseconds_per_token']:>9.1f} us/token {point['milliseconds_per_conversation']:>9.2f} ms each",
            flush=True,
        )
    fits = {name: fit(curves[name]) for name in ("packed", "one")}
    for name, found in fits.items():
        print(name, found)
    arguments = (
        f"--model {options.model} --dtype {options.dtype} --precision {options.precision} --seconds {options.seconds:g}"
    )
    name = "scaling.json" if options.model == "small" else f"scaling-{options.model}.json"
    (RESULTS / name).write_text(
        json.dumps(
            {
                "command": f"python benchmarks/scaling.py {arguments}",
                **describe(),
                "threads": torch.get_num_threads(),
                "model": shape,
                "curves": curves,
                "fits": fits,
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
