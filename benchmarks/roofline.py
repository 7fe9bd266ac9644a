"""Operations and bytes of a step's passes at the sizes of 8B and 70B models, from a dry run; no GPU and no weights.

    python benchmarks/roofline.py [--models llama-3.1-8b llama-3.1-70b] [--tokens 4096] [--products 790] [--bytes 4.1]

The engine's own forward pass, loss and backward pass of a packed sequence (conversations of 512 tokens, a quarter of
them trained) run on tensors without values by the choices of a GPU, with 2 and with 3 layers, and are continued from
there. Counted are the operations of matrix products and, of everything else but views, the bytes read and written.
Beside them: what `preceptor plan` says by arithmetic, and the least time at rates that are given in 1e12 a second.
"""

import argparse
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from shapes import SHAPES
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from machine import describe
from preceptor.model.activations.policy import KEEP_ALL, ActivationPolicy
from preceptor.model.loss import linear_cross_entropy, softmax
from preceptor.plan import dry_run
from preceptor.plan.memory import Setup
from preceptor.plan.parameters import LoraSpec
from preceptor.plan.timeline import Timeline
from preceptor.plan.work import Work, operations

_NOT_RUN = {"view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "permute", "as_strided"}
_NOT_RUN |= {"_unsafe_view", "detach", "alias", "split", "split_with_sizes", "unbind", "_reshape_alias", "empty"}
_NOT_RUN |= {"empty_like", "new_empty", "empty_strided", "lift_fresh", "unflatten", "_local_scalar_dense"}
SETUPS = {
    "bfloat16 weights": Setup("bfloat16", True, device_type="cuda", optimizer="adamw_8bit", rounding="exact"),
    "float32 weights, autocast": Setup("float32", True, device_type="cuda"),
    "LoRA 16": Setup("bfloat16", True, LoraSpec(16), device_type="cuda"),
}
Counts = Counter[str]


class Meter(Timeline):  # type: ignore[no-untyped-call]
    """As a dry run counts live bytes, and what its operations do."""

    def __init__(self, counts: Counts, *given: Any) -> None:
        self._counts = counts
        super().__init__(*given)

    def run(self, operation: Any, args: Any, kwargs: Any) -> Any:
        out = super().run(operation, args, kwargs)
        name = operation._schema.name.partition("::")[2]
        if name in ("mm", "addmm", "addmm_", "bmm"):
            left, right = args[-2:]
            self._counts["operations"] += 2 * left.numel() * right.shape[-1]
            self._counts["products"] += 1
        elif "attn" not in name and name not in _NOT_RUN:
            read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            written = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
            self._counts["other bytes"] += sum(_bytes(each) for each in (*read, *written))
            self._counts["others"] += 1
        return out


def _bytes(tensor: Tensor) -> int:
    """Of what it holds: a dimension that is expanded is there once."""
    held = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        held *= size if stride else 1
    return held


def work_of(num_tokens: int, length: int = 512) -> Work:
    turns = ((round(length * 0.5), round(length * 0.125)), (round(length * 0.25), round(length * 0.125)))
    return Work((turns,) * (num_tokens // length))


def counted(shape: dict[str, Any], setup: Setup, work: Work, policy: ActivationPolicy = KEEP_ALL) -> Counts:
    """Of a sequence, forward and backward, through all layers."""
    of_depth = []
    for depth in (2, 3):
        counts: Counts = Counter()
        settings = AutoConfig.for_model(**shape | {"num_hidden_layers": depth, "max_position_embeddings": 1 << 17})
        whole = lambda steps: steps  # noqa: E731 (a dry run leaves out what repeats)
        with (
            patch.object(dry_run, "Timeline", partial(Meter, counts)),
            patch.object(linear_cross_entropy, "representative", whole),
            patch.object(softmax, "representative", whole),
        ):
            dry = dry_run.DryRun(settings, AutoModelForCausalLM.from_config, "efficient")
            dry.step(setup, policy, work.sequence(), dry.num_rows)
        of_depth.append(counts)
    fewer, more = of_depth
    rest = shape["num_hidden_layers"] - 2
    return Counter({name: fewer[name] + rest * (more[name] - fewer[name]) for name in more})


def planned(shape: dict[str, Any], setup: Setup, work: Work) -> dict[str, float]:
    """Operations by arithmetic; of attention, which a kernel of its own computes, apart."""
    settings = AutoConfig.for_model(**shape | {"max_position_embeddings": 1 << 17})
    dry = dry_run.DryRun(settings, AutoModelForCausalLM.from_config, "efficient")
    found = operations(dry.parameters(setup.adapter), work)
    return {"products": found.linear + found.head + found.adapter, "attention": found.attention}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["llama-3.1-8b", "llama-3.1-70b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096])
    parser.add_argument("--products", type=float, default=790.0, help="1e12 operations a second, of matrix products")
    parser.add_argument("--bytes", type=float, default=4.1, help="1e12 bytes a second, of the device's memory")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "roofline.json")
    asked = parser.parse_args()
    cases: dict[str, Any] = {}
    for model in asked.models:
        for num_tokens in asked.tokens:
            for name, setup in SETUPS.items():
                work = work_of(num_tokens)
                found, plan = counted(SHAPES[model], setup, work), planned(SHAPES[model], setup, work)
                own = {**found, "planned": plan, "product_ms": found["operations"] / asked.products / 1e9}
                own["other_ms"] = found["other bytes"] / asked.bytes / 1e9
                cases[f"{model}, {num_tokens} tokens, {name}"] = own
                print(
                    f"{model}, {num_tokens} tokens, {name}: {found['operations'] / 1e12:.0f}e12 operations in "
                    f"{found['products']:,} products (planned {plan['products'] / 1e12:.0f}e12, of attention "
                    f"{plan['attention'] / 1e12:.0f}e12), {found['other bytes'] / 1e9:.0f} GB in {found['others']:,} "
                    f"other operations: {own['product_ms']:.0f} + {own['other_ms']:.0f} ms",
                    flush=True,
                )
    rates = {"products": asked.products, "bytes": asked.bytes}
    about = describe() | {"command": "python benchmarks/roofline.py", "rates": rates, "cases": cases}
    asked.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
