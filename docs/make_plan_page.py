"""Writes the figures of docs/plan.md: prediction beside measurement, and the plan of a 70B Llama.

python docs/make_plan_page.py
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from preceptor import config
from preceptor.model.options import KEEP_ALL
from preceptor.plan.devices import find_device
from preceptor.plan.dry_run import DryRun, dry_run_of
from preceptor.plan.memory import Setup, Weights, step_memory
from preceptor.plan.model import read_model
from preceptor.plan.parameters import LoraSpec
from preceptor.plan.plan import make_plan
from preceptor.plan.text import size, to_text
from preceptor.plan.work import Work

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plan.md"
MEASURED = re.compile(r"Measured on .*?(?=\n\nThe sequence is)", re.DOTALL)
PLANNED = re.compile(r"\| component \|.*\Z", re.DOTALL)

LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
WAYS: dict[str, tuple[Weights, LoraSpec | None]] = {
    "everything, float32 weights": ("float32", None),
    "LoRA of rank 16, frozen bfloat16": ("bfloat16", LoraSpec(16)),
}
COMPONENTS = ("weights", "gradients", "optimizer", "copies of weights", "activations", "loss")


def measured() -> str:
    found = json.loads((ROOT / "benchmarks" / "results" / "plan.json").read_text(encoding="utf-8"))
    off: dict[str, list[float]] = {}
    for case in found["cases"]:
        off.setdefault(case["mode"], []).append(abs(case["peak_predicted"] / case["peak_measured"] - 1))
    table = "| mode | peak of a step, furthest off |\n|---|---|"
    table += "".join(f"\n| {mode} | {max(errors):.2%} |" for mode, errors in off.items())
    tokens = " and ".join(f"{count:,}" for count in sorted({case["tokens"] for case in found["cases"]}))
    return (
        f"Measured on {found['machine']}, {found['date']}, torch {found['torch']},\n"
        f"transformers {found['transformers']}: {len(found['cases'])} cases (Llama, Qwen 3 and Gemma 3 shapes; "
        f"{tokens} tokens; float32 and bfloat16\n"
        f"autocast), full fine-tuning, from `benchmarks/results/plan.json`:\n\n{table}"
    )


def planned(plan: dict[str, Any]) -> str:
    """Of what `plan_of_70b` returns."""
    config = AutoConfig.for_model(**LLAMA_70B)
    dry_run = DryRun(config, AutoModelForCausalLM.from_config)
    sequence, sides = Work((((3072, 1024),),)).sequence(), []
    for weights, adapter in WAYS.values():
        setup = Setup(weights, True, adapter, device_type="cuda")
        moments = dry_run.step(setup, KEEP_ALL, sequence, dry_run.num_rows)
        sides.append(step_memory(setup, dry_run.parameters(adapter), moments).components)
    lines = [f"| component | {' | '.join(WAYS)} |", "|---|---|---|"]
    for name in COMPONENTS:
        cells = (size(side[name]) if side[name] else "" for side in sides)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    says = (
        "The copies are in bfloat16, while a sequence is computed. What `preceptor plan` says would fit, for\n"
        "sequences of 4,096 tokens (3,072 of them context), several per step:"
    )
    text = to_text({**plan, "change": None})
    table = text[text.index("What would fit") :].rstrip()
    return "\n".join([*lines, "", says, "", "".join(f"    {line}\n" for line in table.splitlines())])


def plan_of_70b() -> dict[str, Any]:
    """As `preceptor plan --json` gives it, of a run whose data is absent."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_70B), encoding="utf-8")
        tree: dict[str, Any] = {
            "model": {"path": folder},
            "data": {"train": [{"path": "absent.jsonl"}], "max_length": 4096},
            "train": {"precision": "bfloat16"},
            "out": "runs/llama-70b",
        }
        run = config.build(tree, "docs/make_plan_page.py")
        return make_plan(run, read_model(run.model), "no data", find_device("H100"), None, dry_run_of(run.model))


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    page = PLANNED.sub(lambda _: planned(plan_of_70b()), MEASURED.sub(lambda _: measured(), page))
    PAGE.write_text(page, encoding="utf-8")
