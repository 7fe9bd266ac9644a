"""Graphs and exactness of compiled layers: traced as for a GPU, then run operation by operation, on any machine.

    python benchmarks/compiled.py [--out FILE]

Each case trains three sequences of different lengths, chains and trees, by compiled layers and by the same layers as
they are written. Where a case says so, only the formulas of norms and gated units and the loss are compiled, each by
itself, as on a GPU where layers are not. What a kernel rounds is not seen here; what a graph computes is.
"""

import argparse
import json
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny_types
from machine import describe
from preceptor.data.forest import PackedSequence, Segment, Tree, pack_trees
from preceptor.model import compiled
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.forward import Engine
from preceptor.model.numerics import autocast
from preceptor.model.optimisations import install
from preceptor.model.options import ActivationPolicy, LoraOptions
from preceptor.model.quantization import quantize

BACKEND = "aot_eager"
FULL, RECOMPUTE, DETACH = ActivationPolicy(), ActivationPolicy("recompute", "all"), ActivationPolicy("detach")
GEMMA2 = {"sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}


@dataclass(frozen=True)
class Case:
    """adapter: options; a quantized base goes with one. base: the type of weights. settings: of the model's config.

    compiled: `compile`, the layers; or `fused`, the formulas by themselves.
    """

    kind: str = "llama"
    policy: ActivationPolicy = FULL
    precision: str = "float64"
    adapter: LoraOptions | None = None
    quantized: bool = False
    base: torch.dtype = torch.float32
    settings: dict[str, Any] = field(default_factory=dict)
    compiled: str = "compile"

    def model(self) -> Any:
        settings = {**tiny_types.BASE, "tie_word_embeddings": False, **self.settings}
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(self.kind, **settings), attn_implementation="eager"
        )
        model = model.to(torch.float64 if self.precision == "float64" else self.base)
        if self.quantized:
            quantize(model, "nf4", True, "cpu")
        if self.adapter is not None:
            model = add_adapter(model, 4, 8.0, 0.0, None, [], seed=0, options=self.adapter)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        state = install(model.train(), "compiled" if self.compiled == "compile" else "efficient")
        state.optimisations.add(self.compiled)
        return model


CASES = {
    "Llama": Case(),
    "Llama, 6 layers": Case(settings={"num_hidden_layers": 6}),
    "Llama, checkpointing": Case(policy=ActivationPolicy("full", "all")),
    "Llama, recompute, checkpointing": Case(policy=RECOMPUTE),
    "Llama, detach": Case(policy=DETACH),
    "Llama, bfloat16 autocast": Case(precision="bfloat16"),
    "Qwen 3, tied": Case("qwen3", settings={"tie_word_embeddings": True}),
    "Gemma 2, soft-caps, windows": Case("gemma2", settings=GEMMA2),
    "Llama, LoRA": Case(precision="float32", adapter=LoraOptions()),
    "Llama, LoRA, bfloat16 autocast": Case(precision="bfloat16", adapter=LoraOptions()),
    "Llama, DoRA": Case(precision="float32", adapter=LoraOptions(dora=True)),
    "Llama, bfloat16, DoRA": Case(precision="bfloat16", adapter=LoraOptions(dora=True), base=torch.bfloat16),
    "Llama, QLoRA": Case(precision="float32", adapter=LoraOptions(), quantized=True),
    "Llama, formulas alone": Case(precision="float32", compiled="fused"),
    "Llama, formulas alone, bfloat16 autocast": Case(precision="bfloat16", compiled="fused"),
    "Gemma 2, formulas alone": Case("gemma2", precision="float32", settings=GEMMA2, compiled="fused"),
    "Qwen 3, mixture of experts, formulas alone": Case("qwen3_moe", precision="float32", compiled="fused"),
}


def sequence(seed: int) -> PackedSequence:
    """Two chains and a tree, all longer by some tokens than those of the seed before."""
    rng = np.random.default_rng(seed)

    def tree(lengths: tuple[int, ...], parents: tuple[int | None, ...]) -> Tree:
        ids = [tuple(rng.integers(3, tiny_types.VOCABULARY, size=length).tolist()) for length in lengths]
        kinds = ("context", "target")
        return Tree(
            f"made:{seed}",
            tuple(
                Segment(kinds[place % 2], own, parent)  # type: ignore[arg-type]
                for place, (own, parent) in enumerate(zip(ids, parents, strict=True))
            ),
        )

    chain = (None, 0, 1, 2)
    more = 3 * seed
    made = [tree((9 + more, 5, 3 + seed, 4), chain), tree((7, 6 + more), chain[:2])]
    return pack_trees([*made, tree((8, 4 + seed, 5, 6), (None, 0, 0, 2))])


def forget() -> None:
    """As in a new process: nothing compiled, nothing counted."""
    for made in (compiled._compiled, compiled.watch):
        made.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def measure(case: Case, backend: str = BACKEND) -> dict[str, Any]:
    """Graphs after each sequence; greatest relative errors of loss and gradient; seconds of tracing."""
    forget()
    former, compiled.BACKEND = compiled.BACKEND, backend
    try:
        model = case.model()
        engine, graphs, errors = Engine(model), [], []
        for seed in range(3):
            given = sequence(seed)
            found = _loss_and_gradient(engine, given, case)
            graphs.append(compiled.num_graphs())
            engine.state.optimisations.discard(case.compiled)
            true = _loss_and_gradient(engine, given, case)
            engine.state.optimisations.add(case.compiled)
            errors.append([float((one - other).norm() / other.norm()) for one, other in zip(found, true, strict=True)])
        assert compiled.num_graphs() == graphs[-1], "the layers as they are written were compiled too"
        loss, gradient = (max(each) for each in zip(*errors, strict=True))
        seconds = compiled.compile_seconds()
        return {"graphs": graphs, "loss_error": loss, "gradient_error": gradient, "trace_seconds": round(seconds, 2)}
    finally:
        compiled.BACKEND = former


def _loss_and_gradient(engine: Engine, given: PackedSequence, case: Case) -> tuple[torch.Tensor, ...]:
    model = engine.model
    with autocast(torch.device("cpu"), case.precision):
        own: Any = engine(given, case.policy)
    own.backward()
    gradient = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return own.detach().double(), gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compiled.json")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")  # torch's own, in tracing
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        started = time.perf_counter()
        found[name] = measure(case) | {"precision": case.precision}
        print(f"{name}: {found[name]} ({time.perf_counter() - started:.1f} s)", flush=True)
    about = describe() | {"command": "python benchmarks/compiled.py"}
    asked.out.write_text(json.dumps(about | {"backend": BACKEND, "cases": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
