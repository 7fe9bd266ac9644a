"""The LIMA curve: the scholar trained on few conversations, random or chosen by `preceptor select`.

    python experiments/lima_curve.py --seeds 3 --out runs/lima_curve

From a pool that also holds noise, repeats and narrow data (lima_pool.py) the scholar is trained on 10, 30, 100, 300 and
1,000 conversations: drawn at random by the seed, chosen by `select`, and, for the largest set, narrow ones only. Every
training takes the same number of steps of 1,024 tokens, whatever the size of its set, so that only the data differ:
with the same number of epochs, ten conversations would be three steps. Small sets are repeated for many epochs. The
measures are in measures.py; trial.py keeps the trials, so that an interrupted run can continue.

Writes a JSON result with machine, versions and date, and prints the table and the outcome of each expectation.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils.logging import disable_progress_bar

from lima_pool import NARROW_FAMILY, Row, make_pool, narrow_rows, write_pool
from measures import (
    CLOZE,
    EXACT,
    SKILLS,
    STOPS,
    TAX,
    TAXES,
    Claim,
    Measure,
    Outcome,
    all_changes,
    all_figures,
    by_level,
    by_margin,
    by_sign,
    changed,
    of_seeds,
    shown,
    write_new_pages,
    yardsticks,
)
from preceptor.select.choice import Settings, choose
from preceptor.select.pool import open_pool
from preceptor.select.select import load_scorer
from preceptor.select.survey import survey
from trial import BASE, ROW_TOKENS, Measured, Result, Trial, Yardstick, run_all

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
from machine import describe as describe  # noqa: E402 (study.py has it from here)

SIZES = (10, 30, 100, 300, 1000)
STEPS, LEARNING_RATE = 80, 2e-4  # an intern of 1,000 in a quarter of the demo's steps, at twice its rate
MARGIN = 0.03  # exact answers; a set that falls short of another by less "reaches" it
ENOUGH = 0.5  # exact answers; facts that no row mentions count as answered above this


@dataclass(frozen=True)
class Point:
    """One way of choosing at one size. models: what was measured, a training seed each. planted: rows of each kind."""

    way: str
    size: int
    models: tuple[Measured, ...]
    planted: Mapping[str, float]


def write_sets(
    folder: Path, sizes: Sequence[int], num_seeds: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The sets as files: WAY-SIZE-SEED -> {"file", "planted"}. Made once; they are seeded, and kept in `folder`."""
    rows, pool_file, index = make_pool(), folder / "pool.jsonl", folder / "sets.json"
    write_pool(rows, pool_file)
    key = hashlib.sha256(pool_file.read_bytes() + repr((tuple(sizes), num_seeds)).encode()).hexdigest()
    if index.is_file():
        kept = json.loads(index.read_text(encoding="utf-8"))
        if kept["key"] == key:
            sets: dict[str, Any] = kept["sets"]
            return sets
    say(f"choosing among {len(rows):,} rows")
    found = survey(open_pool([str(pool_file)], {}, None), load_scorer(BASE, ROW_TOKENS), None)
    sets = {}
    for size in sizes:
        for seed in range(num_seeds):
            drawn = np.random.default_rng(seed).permutation(len(rows))[:size].tolist()
            kept_rows = found.number_N[choose(found, Settings(size, seed)).kept].tolist()
            ways = {"random": [rows[at] for at in drawn], "select": [rows[at] for at in kept_rows]}
            if size == max(sizes):
                ways["narrow"] = narrow_rows(size, seed)
            sets |= {f"{way}-{size}-{seed}": _written(chosen, folder / f"{way}-{size}-{seed}.jsonl")
                     for way, chosen in ways.items()}  # fmt: skip
    index.write_text(json.dumps({"key": key, "sets": sets}, indent=1) + "\n", encoding="utf-8")
    return sets


def _written(rows: Sequence[Row], file: Path) -> dict[str, Any]:
    write_pool(rows, file)
    return {"file": str(file), "planted": dict(Counter(row["planted"] for row in rows))}


def curve_trials(sets: Mapping[str, Any], steps: int) -> list[Trial]:
    """A trial for each set, its seed that of the training too."""
    changes = {"train.duration": f"{steps} steps", "optimizer.learning_rate": LEARNING_RATE}
    return [
        Trial(name, seed=int(name.rpartition("-")[2]), data=own["file"], changes=changes) for name, own in sets.items()
    ]


def points_of(sets: Mapping[str, Any], results: Mapping[str, Result]) -> list[Point]:
    """The trials of one way and size together, ways in turn, sizes rising."""
    together: dict[tuple[str, int], list[str]] = {}
    for name in sets:
        way, size, _ = name.split("-")
        together.setdefault((way, int(size)), []).append(name)
    order = ("random", "select", "narrow")
    return [
        Point(way, size, tuple(results[name]["model"] for name in names), _mean_planted([sets[n] for n in names]))
        for (way, size), names in sorted(together.items(), key=lambda each: (order.index(each[0][0]), each[0][1]))
    ]


def _mean_planted(sets: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    total = sum((Counter(own["planted"]) for own in sets), Counter[str]())
    return {kind: count / len(sets) for kind, count in sorted(total.items())}


def point_figures(points: Sequence[Point], base: Measured, measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """For the JSON: every measure of every point, and the change from the base."""
    return [
        {
            "way": point.way,
            "rows": point.size,
            "planted": point.planted,
            "figures": all_figures(measures, point.models),
            "from_base": all_changes(measures, [base], point.models),
        }
        for point in points
    ]


def curve_claims(points: Sequence[Point], taxes: Sequence[Measure]) -> list[Claim]:
    """What was expected of the curve, and what came of it. taxes: by which a narrow set is judged."""
    at = {(point.way, point.size): point.models for point in points}
    sizes = sorted(size for way, size in at if way == "select")
    largest = sizes[-1]
    claims = [
        by_margin(
            f"{size:,} chosen conversations reach {largest:,} random ones, within {100 * MARGIN:.0f} points",
            EXACT, EXACT.between(at["random", largest], at["select", size]), MARGIN,
        )
        for size in sizes[:-1]
        if size >= 100 or len(sizes) < 4
    ]  # fmt: skip
    claims.append(_better_at_every_size(at, sizes))
    own = EXACT.of(at["select", largest])
    facts = (
        f"over {100 * ENOUGH:.0f} % of the facts that no chosen conversation mentions are answered ({largest:,} chosen)"
    )
    claims.append(by_level(facts, own, ENOUGH, shown(EXACT, own)))
    narrow, wide = at["narrow", largest], at["select", largest]
    for measure in taxes:
        expected = f"{largest:,} narrow conversations cost more than {largest:,} chosen ones: {measure.label}"
        claims.append(by_sign(expected, measure, measure.between(wide, narrow), -1))
    for measure in (EXACT, CLOZE):
        others = outside(measure.task, len(narrow[0][measure.task][measure.above]))
        expected = f"{largest:,} narrow conversations cost more, on other families of facts: {measure.label}"
        claims.append(by_sign(expected, measure, measure.between(wide, narrow, others), -1))
    return claims


def _better_at_every_size(at: Mapping[tuple[str, int], Sequence[Measured]], sizes: Sequence[int]) -> Claim:
    changes = [EXACT.between(at["random", size], at["select", size]) for size in sizes]
    signs = [change.sign for change in changes]
    outcome: Outcome = "shown" if min(signs) == 1 else "refuted" if min(signs) == -1 else "open"
    found = "; ".join(f"{size:,}: {changed(EXACT, change)}" for size, change in zip(sizes, changes, strict=True))
    return Claim("chosen conversations do better than random ones, at every size", outcome, found)


def outside(task: str, num_items: int) -> list[int]:
    """Places of the task's items whose family is not that of the narrow set."""
    items = Yardstick(task, num_items, ()).read().items
    return [place for place, item in enumerate(items) if item.groups.get("family") != NARROW_FAMILY]


def table(points: Sequence[Point], base: Measured) -> str:
    lines = [f"{'way':<8}{'rows':>6}  {'exact, 95 %':<28}{'seeds':<16}{'stops':<28}tax on new pages"]
    for point in points:
        exact, stops = EXACT.of(point.models), STOPS.of(point.models)
        line = f"{point.way:<8}{point.size:>6,}  {shown(EXACT, exact):<28}{of_seeds(EXACT, exact):<16}"
        lines.append(f"{line}{shown(STOPS, stops):<28}{changed(TAX, TAX.between([base], point.models))}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each training")
    parser.add_argument("--questions", type=int, default=300, help="held-out questions")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="trainings at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/lima_curve"), help="folder for sets and measurements")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "lima_curve.json")
    given = parser.parse_args()
    started = time.perf_counter()
    disable_progress_bar()  # transformers' own, for models that load in a blink
    sets = write_sets(given.out / "sets", sorted(given.sizes), given.seeds)
    trials = [Trial("base", trained=False), *curve_trials(sets, given.steps)]
    results = run_all(
        trials,
        yardsticks(given.questions, None, write_new_pages(given.out / "pages.jsonl")),
        given.out,
        given.processes,
    )
    points, base = points_of(sets, results), results["base"]["model"]
    claims = curve_claims(points, TAXES)
    measures = (*SKILLS, *TAXES)
    result = {
        "command": f"python experiments/lima_curve.py --seeds {given.seeds} --steps {given.steps} "
        f"--questions {given.questions} --sizes {' '.join(map(str, given.sizes))}",
        **describe(),
        "seeds": given.seeds,
        "steps": given.steps,
        "learning_rate": LEARNING_RATE,
        "row_tokens": ROW_TOKENS,
        "base": all_figures(measures, [base]),
        "points": point_figures(points, base, measures),
        "claims": [asdict(claim) for claim in claims],
        "seconds": round(time.perf_counter() - started),
    }
    given.result.parent.mkdir(parents=True, exist_ok=True)
    given.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(points, base), "", sep="\n")
    for claim in claims:
        print(f"{claim.expected}: {claim.outcome}; {claim.found}")


if __name__ == "__main__":
    main()
