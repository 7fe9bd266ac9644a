"""Writes the figures of docs/plan.md: prediction beside measurement, and the plan of a 70B Llama.

python docs/make_plan_page.py
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from preceptor import config
from preceptor.plan.activations import Work
from preceptor.plan.devices import find_device
from preceptor.plan.memory import Setup, Weights, predict_memory
from preceptor.plan.model import read_model
from preceptor.plan.plan import make_plan
from preceptor.plan.shapes import shape_of
from preceptor.plan.text import size, to_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plan.md"
MEASURED = re.compile(r"Measured on .*?(?=\n\nThe row is)", re.DOTALL)
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
WAYS: dict[str, tuple[Weights, bool]] = {
    "float32 weights, autocast": ("float32", True),
    "bfloat16 weights, float32 master": ("bfloat16 + float32 master", False),
}
COMPONENTS = ("weights", "gradients", "master weights", "optimizer", "casts of weights")


def measured() -> str:
    found = json.loads((ROOT / "benchmarks" / "results" / "plan.json").read_text(encoding="utf-8"))
    off: dict[str, list[tuple[float, float]]] = {}
    for case in found["cases"]:
        errors = [abs(case[f"{of}_predicted"] / case[f"{of}_measured"] - 1) for of in ("activations", "peak")]
        off.setdefault(case["mode"], []).append((errors[0], errors[1]))
    table = "| mode | activations, furthest off | peak of a step, furthest off |\n|---|---|---|"
    for mode, cases in off.items():
        table += "".join(["\n| ", mode, *(f" | {max(errors):.1%}" for errors in zip(*cases, strict=True)), " |"])
    return (
        f"Measured on {found['machine']}, {found['date']}, torch {found['torch']},\n"
        f"transformers {found['transformers']}: {len(found['cases'])} cases (Llama, Qwen 3 and Gemma 3 shapes; 512, "
        "1,024 and 2,048 tokens; float32\n"
        f"and bfloat16 autocast), full fine-tuning, from `benchmarks/results/plan.json`:\n\n{table}"
    )


def planned() -> str:
    work = Work((((3072, 1024),),))
    sides = [
        predict_memory(shape_of(LLAMA_70B), work, Setup(weights=weights, autocast=autocast)).components
        for weights, autocast in WAYS.values()
    ]
    lines = [f"| component | {' | '.join(WAYS)} |", "|---|---|---|"]
    for name in COMPONENTS:
        cells = (size(side[name]) if side[name] else "" for side in sides)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    says = (
        "The casts are autocast's copies, while a row is computed. What `preceptor plan` says would fit, for rows of\n"
        "4,096 tokens (3,072 of them context), several a step:"
    )
    return "\n".join([*lines, "", says, "", _would_fit()])


def _would_fit() -> str:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_70B), encoding="utf-8")
        tree: dict[str, Any] = {
            "model": {"path": folder},
            "data": {"train": [{"path": "absent.jsonl"}], "max_length": 4096},
            "train": {"precision": "bfloat16"},
            "out": "runs/llama-70b",
        }
        run = config.build(tree, "docs/make_plan_page.py")
        plan = make_plan(run, read_model(run.model), "no data", find_device("H100"), 1, None)
    text = to_text({**plan, "change": None, "four_bits_peak_bytes": None})
    table = text[text.index("What would fit") :].rstrip()
    return "".join(f"    {line}\n" for line in table.splitlines())


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    page = PLANNED.sub(lambda _: planned(), MEASURED.sub(lambda _: measured(), page))
    PAGE.write_text(page, encoding="utf-8")
