"""What `preceptor plan` predicts, beside what is measured: activations and the peak of a step, for every mode.

    python benchmarks/plan.py [--tokens 512 1024 2048] [--modes full detach ...] [--device cpu|cuda]
    python benchmarks/plan.py --models llama-3.1-8b --weights bfloat16 --tokens 4096 --device cuda

Small models of three families (4 layers, hidden 128, vocabulary 4,096; random weights), one conversation a row, three
quarters of it context, full fine-tuning with AdamW, in float32 and under bfloat16 autocast. *Activations*: bytes of the
tensors that live after the forward pass and did not before, but for the hidden states that come out. *Peak*: the most
bytes of tensors that live at one time in the second step, weights and optimizer state included; on CUDA the allocator's
own peak. Tensors inside one operation (a matrix product's workspace) are not seen on a CPU. Writes
benchmarks/results/plan.json, of chosen models plan-MODELS.json (with machine, versions, date).
"""

import argparse
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from live_bytes import Tracker
from shapes import SHAPES, random_model

from machine import describe
from preceptor.data.forest import PackedSequence, Segment, Tree, pack_trees
from preceptor.model.activations.context import StepContext
from preceptor.model.activations.policy import ActivationPolicy
from preceptor.model.forward import Engine
from preceptor.plan.activations import Work, kept_for_backward
from preceptor.plan.memory import Setup, predict_memory
from preceptor.plan.shapes import shape_of
from preceptor.train.optimizer import build_optimizer
from preceptor.train.precision import autocast

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


def row_of(num_tokens: int) -> PackedSequence:
    context = num_tokens * 3 // 4
    ids = torch.randint(4096, (num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    segments = (Segment("context", tuple(ids[:context]), None), Segment("target", tuple(ids[context:]), 0))
    return pack_trees([Tree("made-up:1", segments)])


def model_of(kind: str, weights: str, device: str) -> Any:
    small = {"model_type": kind} | COMMON | MODELS.get(kind, {})
    return random_model(SHAPES.get(kind, small), weights, device, max_tokens=1 << 17)


def measured_activations(model: Any, row: PackedSequence, policy: ActivationPolicy, precision: str) -> int:
    """Live after the forward pass and not before, without what comes out of it."""
    gc.collect()
    with Tracker([*model.parameters(), *model.buffers()]) as tracker:
        before = tracker.live_bytes
        with autocast(model.device, precision):
            hidden, _ = Engine(model).loss_hidden_states(row, policy)
        gc.collect()
        out_bytes: int = hidden.untyped_storage().nbytes()
        kept_bytes: int = tracker.live_bytes - before - out_bytes
    return kept_bytes


def measured_peak(model: Any, row: PackedSequence, policy: ActivationPolicy, precision: str) -> int:
    """Of the second step, when the optimizer has its state."""
    optimizer = build_optimizer(model, 0.0, (0.9, 0.95))
    gc.collect()
    with Tracker([*model.parameters(), *model.buffers()]) as tracker:
        for _ in range(2):
            gc.collect()
            tracker.peak_bytes = tracker.live_bytes
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with autocast(model.device, precision):
                loss = Engine(model)(row, policy, step=StepContext(accumulates=True))
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return int(torch.cuda.max_memory_allocated()) if model.device.type == "cuda" else tracker.peak_bytes


def cases(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for kind in arguments.models:
        model = model_of(kind, arguments.weights, arguments.device)
        shape = shape_of(model.config.to_dict())
        with torch.no_grad():
            Engine(model)(row_of(64))  # what it finds out about a model once, it has found out
        for num_tokens in arguments.tokens:
            row = row_of(num_tokens)
            context = num_tokens * 3 // 4
            for precision in ("float32", "bfloat16"):
                for mode in arguments.modes:
                    policy = MODES[mode]
                    again = policy.checkpointed_layers(len(shape.layers))
                    turns = (((context, num_tokens - context),),)
                    work = Work(turns, policy.context_gradient, again)
                    setup = Setup(arguments.weights, precision == "bfloat16", cpu=arguments.device == "cpu")
                    kept = kept_for_backward(shape, work, setup.precision, cpu=setup.cpu)
                    yield {
                        "model": kind,
                        "tokens": num_tokens,
                        "precision": precision,
                        "mode": mode,
                        "activations_predicted": kept.kept_bytes + kept.casts_bytes,
                        "activations_measured": measured_activations(model, row, policy, precision),
                        "peak_predicted": predict_memory(shape, work, setup).peak_bytes,
                        "peak_measured": measured_peak(model, row, policy, precision),
                    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *SHAPES], default=list(MODELS))
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    print(f"{'':<48}{'activations, MB':>28}{'peak of a step, MB':>28}")
    both = f"{'plan':>10}{'measured':>9}{'':9}"
    print(f"{'model':<13}{'tokens':>6}  {'precision':<10}{'mode':<21}{both}{both}")
    found = []
    for case in cases(arguments):
        found.append(case)
        line = f"{case['model']:<13}{case['tokens']:>6}  {case['precision']:<10}{case['mode']:<21}"
        for what in ("activations", "peak"):
            predicted, measured = case[f"{what}_predicted"], case[f"{what}_measured"]
            line += f"{predicted / 1e6:>10.1f}{measured / 1e6:>9.1f} {predicted / measured - 1:>+7.1%} "
        print(line, flush=True)
    worst = {
        what: max(abs(case[f"{what}_predicted"] / case[f"{what}_measured"] - 1) for case in found)
        for what in ("activations", "peak")
    }
    print(f"furthest off: activations {worst['activations']:.1%}, peak {worst['peak']:.1%}")
    name = "plan" if arguments.models == list(MODELS) else f"plan-{'-'.join(arguments.models)}"
    (RESULTS / f"{name}.json").write_text(json.dumps({**describe(), "worst": worst, "cases": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
