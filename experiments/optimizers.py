"""Optimizers and types of weights, compared on the scholar: bytes, loss, skill and tax. About 25 minutes on 2 cores.

    python experiments/optimizers.py        # or: make optimizers

Each setting trains on the package's 1,000 conversations under three seeds, at a learning rate of its own: the best of
a few, by the training loss under another seed. The training is short (40 steps of 512 tokens, a sixth of the demo's
epoch), so that what an optimizer makes of each step counts. Every training is a trial (trial.py): an interrupted
comparison continues where it stopped. Writes benchmarks/results/optimizers.json; docs/make_optimizers_page.py makes the
tables of docs/optimizers.md of it.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lima_curve import ROOT, describe
from measures import EXACT, HELDOUT, PAGE_BITS, PAGES, write_new_pages
from preceptor.plan.memory import Setup, state_bytes
from preceptor.plan.parameters import Parameters
from trial import Result, Trial, Yardstick, run_all

STEPS, MAX_LENGTH, SEEDS = 40, 512, 3
QUESTIONS, NEW_PAGES = 120, 80
LAST = 10  # steps whose mean loss is told
MEASURES = (EXACT, PAGE_BITS)


@dataclass(frozen=True, slots=True)
class Setting:
    """label: as the page shows it."""

    name: str
    label: str
    learning_rate: float
    optimizer: str = "adamw"
    rounding: str | None = None

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.rounding else "float32"

    def changes(self, steps: int) -> dict[str, Any]:
        return {
            "train.duration": f"{steps} steps",
            "data.max_length": MAX_LENGTH,
            "model.dtype": self.dtype,
            "optimizer.name": self.optimizer,
            "optimizer.rounding": self.rounding,
            "optimizer.momentum": None,
            "optimizer.learning_rate": self.learning_rate,
        }

    def bytes_by_parameter(self, parameters: Parameters) -> dict[str, float]:
        setup = Setup(self.dtype, optimizer=self.optimizer, rounding=self.rounding)  # type: ignore[arg-type]
        total = parameters.num_trained
        return {name: round(count / total, 3) for name, count in state_bytes(setup, parameters).items()}


SETTINGS = (
    Setting("float32", "adamw, float32 weights", 4e-4),
    Setting("nearest", "adamw, bfloat16, nearest (plain)", 4e-4, rounding="nearest"),
    Setting("stochastic", "adamw, bfloat16, stochastic", 4e-4, rounding="stochastic"),
    Setting("exact", "adamw, bfloat16, exact", 4e-4, rounding="exact"),
    Setting("adamw_8bit", "adamw_8bit, float32 weights", 4e-4, "adamw_8bit"),
    Setting("exact-8bit", "adamw_8bit, bfloat16, exact", 4e-4, "adamw_8bit", "exact"),
    Setting("muon", "muon, float32 weights", 1e-3, "muon"),
    Setting("adafactor", "adafactor, float32 weights", 1e-2, "adafactor"),
    Setting("sgd", "sgd, float32 weights", 2e-2, "sgd"),
)
REFERENCE = "float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers"), help="folder for what has been measured")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each training")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "optimizers.json")
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
        "command": shlex.join(["python", "experiments/optimizers.py", *sys.argv[1:]]),
        **describe(),
        "preceptor": version("preceptor"),
        "processes": given.processes,
        "settings": {"steps": given.steps, "max_length": MAX_LENGTH, "seeds": given.seeds, "last": LAST},
        "num_items": {own.task: len(own.read().items) for own in tasks},
        "base": {measure.name: asdict(measure.of([results["base"]["model"]])) for measure in MEASURES},
        "optimizers": figures_of(results, given.seeds),
    }
    given.result.parent.mkdir(parents=True, exist_ok=True)
    given.result.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(given.result)


def figures_of(results: dict[str, Result], num_seeds: int) -> list[dict[str, Any]]:
    """A row for each setting: what it takes, what it reached, and how far that is from float32."""
    parameters, base = scholar_parameters(), results["base"]["model"]

    def of(name: str) -> list[Result]:
        return [results[f"{name}-{seed}"] for seed in range(num_seeds)]

    rows = []
    for setting in SETTINGS:
        own, reference = of(setting.name), of(REFERENCE)
        models, others = ([result["model"] for result in each] for each in (own, reference))
        rows.append(
            {
                **asdict(setting),
                "dtype": setting.dtype,
                "bytes_per_parameter": setting.bytes_by_parameter(parameters),
                "loss": mean_curve(own),
                "last_loss": [round(last_loss(result), 4) for result in own],
                "figures": {measure.name: asdict(measure.of(models)) for measure in MEASURES},
                "tax": asdict(PAGE_BITS.between([base], models)),
                "from_float32": {measure.name: asdict(measure.between(others, models)) for measure in MEASURES},
                "seconds": round(sum(result["seconds"] for result in own)),
            }
        )
    return rows


def scholar_parameters() -> Parameters:
    from preceptor import config
    from preceptor.plan.dry_run import dry_run_of

    return dry_run_of(config.Model(path="scholar")).parameters()


def mean_curve(results: Sequence[Result]) -> list[float]:
    """The loss of each step, a mean over seeds."""
    return [round(sum(step) / len(step), 4) for step in zip(*(own["losses"] for own in results), strict=True)]


def last_loss(result: Result) -> float:
    return float(sum(result["losses"][-LAST:]) / LAST)


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


if __name__ == "__main__":
    main()
