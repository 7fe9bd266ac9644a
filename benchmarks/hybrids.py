"""What packing buys hybrids: a step over short conversations, packed, and each alone, with equal loss and gradient.

    python benchmarks/hybrids.py [--device auto] [--repeats 3]

Models of random weights (hidden 384, 8 layers, vocabulary 32,000), 48 conversations of 40 to 160 tokens, three quarters
of them context, in float32. `alone`: one conversation a pass, as hybrids go through under `engine: plain`.
`transformers`: its own forward pass over each conversation. Seconds are the least of `repeats`, in turn. Writes
benchmarks/results/hybrids.json.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import random_model
from torch import Tensor

from machine import describe
from preceptor.data.forest import PackedSequence, Segment, Tree, pack_trees
from preceptor.model.checks import check_isolation
from preceptor.model.forward import Engine

RESULT = Path(__file__).parent / "results" / "hybrids.json"
_SIZES = {"vocab_size": 32_000, "hidden_size": 384, "intermediate_size": 1_024, "num_hidden_layers": 8}
_SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}
_DELTA = {
    "linear_num_key_heads": 6,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**_SIZES, **_DELTA, "head_dim": 64},
    "lfm2": {**_SIZES, "layer_types": ["conv", "conv", "conv", "full_attention"] * 2},
}


def conversations() -> list[Tree]:
    rng = np.random.default_rng(0)
    trees: list[Tree] = []
    for num_tokens in rng.integers(40, 161, size=48).tolist():
        ids = tuple(rng.integers(_SIZES["vocab_size"], size=num_tokens).tolist())
        cut = 3 * num_tokens // 4
        trees.append(Tree(f"{len(trees)}", (Segment("context", ids[:cut], None), Segment("target", ids[cut:], 0))))
    return trees


def transformers_loss(model: Any, sequence: PackedSequence) -> Tensor:
    ids = torch.from_numpy(sequence.ids_T).to(model.device)
    logits_TV = model(input_ids=ids[None], use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(
        logits_TV[torch.from_numpy(sequence.source_N).to(model.device)].float(),
        torch.from_numpy(sequence.target_N).to(model.device),
        reduction="sum",
    )


def step(model: Any, losses: Iterator[Tensor]) -> tuple[float, float, Tensor]:
    """Seconds, loss, and gradient."""
    model.zero_grad()
    started, total = time.perf_counter(), 0.0
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    seconds = time.perf_counter() - started
    return seconds, total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def measure(kind: str, device: str, repeats: int) -> dict[str, Any]:
    model = random_model({"model_type": kind, **MODELS[kind]}, device=device)
    engine, trees = Engine(model), conversations()
    check_isolation(model)
    packed, alone = pack_trees(trees), [pack_trees([tree], alone=True) for tree in trees]
    ways: dict[str, Callable[[], Iterator[Tensor]]] = {
        "packed": lambda: (engine(each) for each in (packed,)),
        "alone": lambda: (engine(each) for each in alone),
        "transformers": lambda: (transformers_loss(model, each) for each in alone),
    }
    found: dict[str, list[tuple[float, float, Tensor]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, losses in ways.items():
            found[name].append(step(model, losses()))
    seconds = {name: min(each[0] for each in steps) for name, steps in found.items()}
    true_loss, true_gradient = found["transformers"][0][1:]
    return {
        "tokens": packed.num_tokens,
        "seconds": {name: round(least, 3) for name, least in seconds.items()},
        "packed_is_faster_than": {
            name: round(seconds[name] / seconds["packed"], 2) for name in ("alone", "transformers")
        },
        "loss_difference": {name: abs(steps[0][1] / true_loss - 1) for name, steps in found.items()},
        "gradient_error": {
            name: ((steps[0][2] - true_gradient).norm() / true_gradient.norm()).item() for name, steps in found.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    result = {}
    for kind in MODELS:
        result[kind] = measure(kind, device, options.repeats)
        print(kind, json.dumps(result[kind]), flush=True)
    found = {**describe(), "command": "python benchmarks/hybrids.py", "result": result}
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
