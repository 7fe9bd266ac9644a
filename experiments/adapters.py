"""Kinds of adapters and quantized bases, compared on the scholar: bytes, loss, skill and tax. 10 minutes on 2 cores.

    python experiments/adapters.py        # or: make adapters; needs bitsandbytes (extra `quantized`)

Each setting trains on the package's 1,000 conversations under three seeds, as the comparison of optimizers does
(optimizers.py): 40 steps of 512 tokens. All have one rank. The learning rates of LoRA and PiSSA are the best of two or
three by the training loss under another seed; DoRA and QLoRA take LoRA's, rsLoRA and LoRA+ a quarter of it. Full
fine-tuning stands beside them. Writes benchmarks/results/adapters.json;
docs/make_adapters_page.py makes the table of docs/adapters.md of it.
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from optimizers import LAST, MAX_LENGTH, STEPS, last_loss, mean_curve

from lima_curve import ROOT, describe
from measures import EXACT, HELDOUT, PAGE_BITS, PAGES, write_new_pages
from preceptor import config
from preceptor.model.adapters.options import LoraOptions
from preceptor.plan.memory import Setup, state_bytes
from preceptor.plan.parameters import LoraSpec
from trial import Result, Trial, Yardstick, run_all

SEEDS, QUESTIONS, NEW_PAGES = 3, 60, 40
RANK, LEARNING_RATE, SMALL = 16, 4e-3, 1e-3  # of LoRA; and of what takes larger steps
MEASURES = (EXACT, PAGE_BITS)


@dataclass(frozen=True, slots=True)
class Setting:
    """label: as the page shows it. adapter: what differs from LoRA; None: full fine-tuning."""

    name: str
    label: str
    adapter: dict[str, Any] | None = field(default_factory=dict)
    quantization: str | None = None
    learning_rate: float = LEARNING_RATE

    def changes(self, steps: int) -> dict[str, Any]:
        adapter = None if self.adapter is None else {"rank": RANK, "alpha": 2.0 * RANK, **self.adapter}
        quantized = {"model.quantization": self.quantization} if self.quantization else {}
        return {
            "train.duration": f"{steps} steps",
            "data.max_length": MAX_LENGTH,
            "optimizer.learning_rate": self.learning_rate,
            "adapter": adapter,
            **quantized,
        }

    def bytes(self) -> dict[str, int]:
        """Of weights, gradients and states."""
        from preceptor.plan.dry_run import dry_run_of

        adapter = None
        if self.adapter is not None:
            adapter = LoraSpec(RANK, options=LoraOptions.of(config.Adapter(**self.adapter)))
        setup = Setup(
            adapter=adapter,
            quantization=self.quantization,  # type: ignore[arg-type]
            double_quantization=self.quantization == "nf4",
        )
        return state_bytes(setup, dry_run_of(config.Model(path="scholar")).parameters(adapter))


SETTINGS = (
    Setting("lora", "LoRA"),
    Setting("rslora", "rsLoRA, scale 8", {"use_rslora": True}, learning_rate=SMALL),
    Setting("lora-plus", "LoRA+, ratio 16", {"lr_ratio": 16.0}, learning_rate=SMALL),
    Setting("dora", "DoRA", {"kind": "dora"}),
    Setting("pissa", "PiSSA", {"init": "pissa"}, learning_rate=SMALL),
    Setting("int8", "QLoRA, int8", quantization="int8"),
    Setting("nf4", "QLoRA, nf4", quantization="nf4"),
    Setting("full", "full fine-tuning", None, learning_rate=LEARNING_RATE / 10),
)
REFERENCE = "lora"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/adapters"), help="folder for what has been measured")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each training")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "adapters.json")
    given = parser.parse_args()
    tasks = (
        Yardstick(HELDOUT, QUESTIONS, ("right", "stop_token"), max_new_tokens=96),
        Yardstick(PAGES, NEW_PAGES, ("bits", "num_bytes"), file=str(write_new_pages(given.out / "pages.jsonl"))),
    )
    trials = [
        Trial(f"{setting.name}-{seed}", seed=seed, changes=setting.changes(given.steps))
        for seed in range(given.seeds)
        for setting in SETTINGS
    ]
    results = run_all([Trial("base", trained=False), *trials], tasks, given.out, given.processes, _say)
    found = {
        "command": shlex.join(["python", "experiments/adapters.py", *sys.argv[1:]]),
        **describe(),
        "preceptor": version("preceptor"),
        "bitsandbytes": version("bitsandbytes"),
        "processes": given.processes,
        "settings": {
            "steps": given.steps,
            "max_length": MAX_LENGTH,
            "seeds": given.seeds,
            "last": LAST,
            "rank": RANK,
        },
        "num_items": {own.task: len(own.read().items) for own in tasks},
        "base": {measure.name: asdict(measure.of([results["base"]["model"]])) for measure in MEASURES},
        "adapters": figures_of(results, given.seeds),
    }
    given.result.parent.mkdir(parents=True, exist_ok=True)
    given.result.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(given.result)


def figures_of(results: dict[str, Result], num_seeds: int) -> list[dict[str, Any]]:
    """A row for each setting: what it takes, what it reached, and how far that is from LoRA."""
    base = results["base"]["model"]

    def of(name: str) -> list[Result]:
        return [results[f"{name}-{seed}"] for seed in range(num_seeds)]

    rows = []
    for setting in SETTINGS:
        own = of(setting.name)
        models, others = ([result["model"] for result in each] for each in (own, of(REFERENCE)))
        rows.append(
            {
                **asdict(setting),
                "bytes": setting.bytes(),
                "loss": mean_curve(own),
                "last_loss": [round(last_loss(result), 4) for result in own],
                "figures": {measure.name: asdict(measure.of(models)) for measure in MEASURES},
                "tax": asdict(PAGE_BITS.between([base], models)),
                "from_lora": {measure.name: asdict(measure.between(others, models)) for measure in MEASURES},
                "seconds": round(sum(result["seconds"] for result in own)),
            }
        )
    return rows


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


if __name__ == "__main__":
    main()
