"""Settings of one short training, compared on the scholar: what each takes, its loss, skill and tax.

Each setting trains on the package's 1,000 conversations under several seeds. The training is short (40 steps of 512
tokens, a sixth of the demo's epoch), so that what a setting makes of each step counts. Every training is a trial
(trial.py): an interrupted comparison continues where it stopped. optimizers.py and adapters.py compare by it.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lima_curve import ROOT, describe
from measures import EXACT, HELDOUT, PAGE_BITS, PAGES, write_new_pages
from seeds import INTERVALS
from trial import Result, Trial, Yardstick, run_all

STEPS, MAX_LENGTH, SEEDS = 40, 512, 3
LAST = 10  # steps whose mean loss is told
MEASURES = (EXACT, PAGE_BITS)


@dataclass(frozen=True, slots=True)
class Setting:
    """label: as the page shows it."""

    name: str
    label: str
    learning_rate: float

    def changes(self) -> dict[str, Any]:
        """Of the run file, beside its length and learning rate."""
        raise NotImplementedError

    def takes(self) -> dict[str, Any]:
        """What it takes of memory, for the table."""
        raise NotImplementedError


def compare(
    what: str,
    description: str | None,
    settings: Sequence[Setting],
    reference: str,
    num_questions: int,
    num_pages: int,
    about: Mapping[str, Any] | None = None,
    packages: Sequence[str] = (),
) -> None:
    """The command `python experiments/WHAT.py`: writes benchmarks/results/WHAT.json. about: of the
    settings, what stands in it too; packages: whose versions do.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / what, help="folder for what has been measured")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each training")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / f"{what}.json")
    given = parser.parse_args()
    tasks = (
        Yardstick(HELDOUT, num_questions, ("right", "stop_token"), max_new_tokens=96),
        Yardstick(PAGES, num_pages, ("bits", "num_bytes"), file=str(write_new_pages(given.out / "pages.jsonl"))),
    )
    same = {"train.duration": f"{given.steps} steps", "data.max_length": MAX_LENGTH}
    trials = [
        Trial(
            f"{own.name}-{seed}",
            seed=seed,
            changes={**same, "optimizer.learning_rate": own.learning_rate, **own.changes()},
        )
        for seed in range(given.seeds)
        for own in settings
    ]
    results = run_all([Trial("base", trained=False), *trials], tasks, given.out, given.processes, _say)
    found = {
        "command": shlex.join(["python", f"experiments/{what}.py", *sys.argv[1:]]),
        **describe(),
        **{package: version(package) for package in ("preceptor", *packages)},
        "processes": given.processes,
        "intervals": INTERVALS,
        "settings": {
            "steps": given.steps,
            "max_length": MAX_LENGTH,
            "seeds": given.seeds,
            "last": LAST,
            **(about or {}),
        },
        "num_items": {own.task: len(own.read().items) for own in tasks},
        "base": {measure.name: asdict(measure.of([results["base"]["model"]])) for measure in MEASURES},
        what: _rows(settings, reference, results, given.seeds),
    }
    given.result.parent.mkdir(parents=True, exist_ok=True)
    given.result.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(given.result)


def _rows(
    settings: Sequence[Setting], reference: str, results: Mapping[str, Result], num_seeds: int
) -> list[dict[str, Any]]:
    """For each setting what it takes, what it reached, and how far that is from the reference."""

    def of(name: str) -> list[Result]:
        return [results[f"{name}-{seed}"] for seed in range(num_seeds)]

    base, others = results["base"]["model"], [result["model"] for result in of(reference)]
    rows = []
    for setting in settings:
        own = of(setting.name)
        models = [result["model"] for result in own]
        rows.append(
            {
                **asdict(setting),
                **setting.takes(),
                "loss": [round(sum(step) / len(step), 4) for step in zip(*(r["losses"] for r in own), strict=True)],
                "last_loss": [round(sum(result["losses"][-LAST:]) / LAST, 4) for result in own],
                "figures": {measure.name: asdict(measure.of(models)) for measure in MEASURES},
                "tax": asdict(PAGE_BITS.between([base], models)),
                f"from_{reference}": {measure.name: asdict(measure.between(others, models)) for measure in MEASURES},
                "seconds": round(sum(result["seconds"] for result in own)),
            }
        )
    return rows


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)
