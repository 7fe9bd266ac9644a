"""The study: the effect of fine-tuning on the scholar, by data and mitigation. Under 30 minutes on 2 cores.

    python experiments/study.py             # or: make study

Base and intern, the LIMA curve (lima_curve.py), the alignment tax by mitigation (mitigations.py) and the
token-distribution shift. Every training is a trial (trial.py) whose measurements are kept in --out, so that an
interrupted study continues where it stopped. `--page` only rewrites the page from the result. Writes docs/study.md,
docs/study/*.svg and benchmarks/results/study.json; the page's sentences are made from the figures (study_page.py).
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from lima_curve import (
    LEARNING_RATE,
    ROOT,
    SIZES,
    STEPS,
    curve_claims,
    curve_trials,
    describe,
    point_figures,
    points_of,
    write_sets,
)
from measures import (
    EXACT,
    HELDOUT,
    SKILLS,
    STOPS,
    TAXES,
    Claim,
    Outcome,
    all_changes,
    all_figures,
    by_level,
    by_sign,
    shown,
    write_new_pages,
    yardsticks,
)
from mitigations import mitigated, mitigation_claims, mitigation_figures, mitigation_trials, write_replay
from seeds import INTERVALS
from study_page import write_page
from trial import Measured, Result, Trial, Yardstick, run_all

NUM_SAMPLES, NUM_SHIFTED_TOKENS = 4, 12
MEASURES = (*SKILLS, *TAXES)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. steps: of each training of the curve. duration: of intern and mitigations."""

    seeds: int = 3
    sets: tuple[int, ...] = SIZES
    steps: int = STEPS
    duration: str = "3 epochs"
    questions: int = 250
    others: int | None = None
    prompts: int = 100


QUICK = Sizes(seeds=2, sets=(10, 100), steps=2, duration="3 steps", questions=12, others=12, prompts=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for what has been measured")
    parser.add_argument("--quick", action="store_true", help="a miniature that only shows that all parts work")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="trainings at a time")
    parser.add_argument("--page", action="store_true", help="measure nothing; only rewrite the page from the result")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "study.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder for study.md and study/")
    given = parser.parse_args()
    if given.page:
        result = json.loads(given.result.read_text(encoding="utf-8"))
    else:
        result = run_study(QUICK if given.quick else Sizes(), given.out, given.processes)
        given.result.parent.mkdir(parents=True, exist_ok=True)
        given.result.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_page(result, given.docs)
    print(f"{given.docs / 'study.md'}; all figures: {given.result}")
    for section in result["claims"].values():
        for claim in section:
            print(f"{claim['outcome']:>8}  {claim['expected']}: {claim['found']}")


def run_study(sizes: Sizes, out: Path, processes: int) -> dict[str, Any]:
    """All trials, those that are kept from earlier among them, and the figures."""
    clock = Clock(out)
    disable_progress_bar()  # transformers' own, for models that load in a blink
    sets = write_sets(out / "sets", sizes.sets, sizes.seeds, _say)
    replay = write_replay(out / "replay.jsonl")
    tasks = yardsticks(sizes.questions, sizes.others, write_new_pages(out / "pages.jsonl"))
    others = mitigation_trials(sizes.seeds, sizes.duration, replay, sizes.prompts)
    trials = [Trial("base", trained=False), *others, *curve_trials(sets, sizes.steps)]

    def say(line: str) -> None:
        clock.tick()
        _say(line)

    results = run_all(trials, tasks, out, processes, say)
    found = figures_of(results, sets, sizes, tasks)
    return {
        "command": shlex.join(["python", "experiments/study.py", *sys.argv[1:]]),
        **describe(),
        "preceptor": version("preceptor"),
        "seconds": round(clock.tick()),
        "trial_seconds": {name: result["seconds"] for name, result in results.items()},
        "processes": processes,
        "intervals": INTERVALS,
        "settings": asdict(sizes)
        | {"learning_rate": LEARNING_RATE, "num_items": {own.task: len(own.read().items) for own in tasks}},
        **found,
    }


class Clock:
    """Seconds that the study has taken, over all of its sessions: kept in its folder, up to the last tick."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "seconds.json"
        self._before = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else 0.0
        self._started = time.perf_counter()

    def tick(self) -> float:
        seconds: float = self._before + time.perf_counter() - self._started
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(seconds), encoding="utf-8")
        return seconds


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def figures_of(
    results: dict[str, Result], sets: dict[str, Any], sizes: Sizes, tasks: Sequence[Yardstick]
) -> dict[str, Any]:
    base = results["base"]["model"]
    points, ways = points_of(sets, results), mitigated(results, sizes.seeds)
    interns = [results[f"none-{seed}"] for seed in range(sizes.seeds)]
    shift = _shift([result["comparison"]["shift"] for result in interns])
    return {
        "base": all_figures(MEASURES, [base]),
        "intern": {
            "figures": all_figures(MEASURES, ways[0].models),
            "from_base": all_changes(MEASURES, [base], ways[0].models),
            "num_steps": interns[0]["num_steps"],
        },
        "curve": point_figures(points, base, MEASURES),
        "mitigations": mitigation_figures(ways, base),
        "shift": shift,
        "samples": _samples(interns[0], tasks),
        "claims": {
            "base and intern": [asdict(claim) for claim in _intern_claims(base, ways[0].models)],
            "the LIMA curve": [asdict(claim) for claim in curve_claims(points, TAXES)],
            "the tax by mitigation": [asdict(claim) for claim in mitigation_claims(ways)],
            "the token-distribution shift": [asdict(_shift_claim(shift))],
        },
    }


def _intern_claims(base: Measured, interns: Sequence[Measured]) -> list[Claim]:
    answers = EXACT.of(interns)
    claims = [
        by_sign("SFT makes the base answer", EXACT, EXACT.between([base], interns), 1),
        by_sign("SFT makes it stop by itself", STOPS, STOPS.between([base], interns), 1),
        by_level("it answers over half of the facts that SFT never mentions", answers, 0.5, shown(EXACT, answers)),
    ]
    for measure in TAXES:
        claims.append(by_sign(f"SFT has a price: {measure.label}", measure, measure.between([base], interns), -1))
    return claims


def _shift(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each seed, and by position over all seeds."""
    places: dict[int, list[dict[str, Any]]] = {}
    for own in found:
        for place in own["by_position"]:
            places.setdefault(place["position"], []).append(place)
    names = ("unshifted", "marginal", "shifted", "mean_kl")
    positions = []
    for position, rows in sorted(places.items()):
        num = sum(row["num"] for row in rows)
        means = {name: sum(row[name] * row["num"] for row in rows) / num for name in names}
        positions.append({"position": position, "num": num, **means})
    kept = ("num_prompts", "num_tokens", "num_added", "shares", "mean_prob", "mean_kl")
    return {
        "by_seed": [{key: own[key] for key in kept} for own in found],
        "by_position": positions,
        "most_shifted": found[0]["most_shifted"][:NUM_SHIFTED_TOKENS],
    }


def _shift_claim(shift: dict[str, Any]) -> Claim:
    shares = [own["shares"]["unshifted"] for own in shift["by_seed"]]
    lows, highs = ([own[edge] for own in shares] for edge in ("low", "high"))
    outcome: Outcome = "shown" if min(lows) > 0.5 else "refuted" if max(highs) < 0.5 else "open"
    values = ", ".join(f"{own['value']:.1%} ({own['low']:.1%} to {own['high']:.1%})" for own in shares)
    expected = "over half of the intern's answer tokens are the base model's own first choice, for each seed"
    return Claim(expected, outcome, values.replace("%", " %"))


def _samples(intern: Result, tasks: Sequence[Yardstick]) -> list[dict[str, Any]]:
    """Answers of base and intern, one of each of the first families."""
    families = {item.source: item.groups.get("family", "") for item in Yardstick(HELDOUT, 10**6, ()).read().items}
    by_family = {families[own["source"]]: own for own in reversed(intern["comparison"]["samples"])}
    return [by_family[family] for family in sorted(by_family)][:NUM_SAMPLES]


if __name__ == "__main__":
    main()
