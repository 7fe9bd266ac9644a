"""The peak of a step that `preceptor plan` predicts, beside what is measured, for every mode.

    python benchmarks/plan.py [--tokens 512 1024 2048] [--modes full detach ...] [--device cpu|cuda]
    python benchmarks/plan.py --models llama-3.1-8b --weights bfloat16 --tokens 4096 --device cuda

Small models of three families (4 layers, hidden 128, vocabulary 4,096; random weights), one conversation per sequence,
three quarters of it context, full fine-tuning with AdamW, in float32 and under bfloat16 autocast. *Peak*: the most
bytes of tensors that live at one time in the second step, weights and optimizer state included; on CUDA the allocator's
own peak. Tensors inside one operation (a matrix product's workspace) are not seen on a CPU. Writes
benchmarks/results/plan.json, of chosen models plan-MODELS.json (with machine, versions, date).
"""

import argparse
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, random_model

from machine import describe
from preceptor.data.forest import PackedSequence
from preceptor.model.activations.passes import StepContext
from preceptor.model.forward import Engine
from preceptor.model.loss.linear_cross_entropy import HeadCast
from preceptor.model.numerics import autocast
from preceptor.model.options import ActivationPolicy
from preceptor.plan.dry_run import DryRun, dry_run_like
from preceptor.plan.memory import Setup, step_memory
from preceptor.plan.timeline import LiveBytes
from preceptor.plan.work import Work
from preceptor.train.optimizer import build_optimizer

RESULTS = Path(__file__).parent / "results"
COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 448, "tie_word_embeddings": False},
    "qwen3": {"intermediate_size": 384, "tie_word_embeddings": True},
    "gemma3_text": {"intermediate_size": 768, "sliding_window": 512},
}
MODES = {
    "full": ActivationPolicy(),
    "recompute": ActivationPolicy("recompute"),
    "detach": ActivationPolicy("detach"),
    "full, checkpointing all": ActivationPolicy("full", "all"),
    "detach, checkpointing all": ActivationPolicy("detach", "all"),
}


def model_of(kind: str, weights: str, device: str) -> Any:
    small = {"model_type": kind} | COMMON | MODELS.get(kind, {})
    return random_model(SHAPES.get(kind, small), weights, device, max_tokens=1 << 17)


def predicted_peak(dry_run: DryRun, sequence: PackedSequence, policy: ActivationPolicy, setup: Setup) -> int:
    moments = dry_run.step(setup, policy, sequence, dry_run.num_rows)
    return step_memory(setup, dry_run.parameters(), moments).peak_bytes


def measured_peak(model: Any, sequence: PackedSequence, policy: ActivationPolicy, precision: str) -> int:
    """Of the second step, when the optimizer has its state."""
    optimizer, engine = build_optimizer(model, 0.0, (0.9, 0.95)), Engine(model)
    gc.collect()
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        for _ in range(2):
            gc.collect()
            live.peak_bytes = live.live_bytes
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step = StepContext(accumulates=True, head_cast=HeadCast())
            with autocast(model.device, precision):
                loss = engine(sequence, policy, step=step)
            loss.backward()
            del loss, step
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return int(torch.cuda.max_memory_allocated()) if model.device.type == "cuda" else live.peak_bytes


def cases(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for kind in arguments.models:
        model = model_of(kind, arguments.weights, arguments.device)
        dry_run = dry_run_like(model)
        for num_tokens in arguments.tokens:
            context = num_tokens * 3 // 4
            sequence = Work((((context, num_tokens - context),),)).sequence()
            for precision in ("float32", "bfloat16"):
                setup = Setup(arguments.weights, precision == "bfloat16", device_type=arguments.device)
                for mode in arguments.modes:
                    started = time.perf_counter()
                    predicted = predicted_peak(dry_run, sequence, MODES[mode], setup)
                    yield {
                        "model": kind,
                        "tokens": num_tokens,
                        "precision": precision,
                        "mode": mode,
                        "seconds": time.perf_counter() - started,
                        "peak_predicted": predicted,
                        "peak_measured": measured_peak(model, sequence, MODES[mode], precision),
                    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *SHAPES], default=list(MODELS))
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    print(f"{'model':<13}{'tokens':>6}  {'precision':<10}{'mode':<26}{'plan, MB':>10}{'measured':>10}{'dry run':>19}")
    found = []
    for case in cases(arguments):
        found.append(case)
        predicted, measured = case["peak_predicted"], case["peak_measured"]
        print(
            f"{case['model']:<13}{case['tokens']:>6}  {case['precision']:<10}{case['mode']:<26}{predicted / 1e6:>10.1f}"
            f"{measured / 1e6:>10.1f}{predicted / measured - 1:>+9.2%}{case['seconds']:>9.1f} s",
            flush=True,
        )
    worst = max(abs(case["peak_predicted"] / case["peak_measured"] - 1) for case in found)
    print(f"furthest off: {worst:.2%}")
    name = "plan" if arguments.models == list(MODELS) else f"plan-{'-'.join(arguments.models)}"
    (RESULTS / f"{name}.json").write_text(json.dumps({**describe(), "worst": worst, "cases": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
