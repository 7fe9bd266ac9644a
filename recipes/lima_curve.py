"""The LIMA curve: how few conversations make an intern of the scholar, chosen at random and by `preceptor select`.

    python recipes/lima_curve.py --seeds 3 --out runs/lima_curve

From a pool that also holds noise, repeats and narrow data (lima_pool.py) the scholar is trained on 10, 30, 100, 300 and
1,000 conversations: drawn at random by the seed, chosen by `select`, and, for the largest sets, narrow ones only.
Every training takes the same number of steps of 1,024 tokens, whatever the size of its set, so small sets are seen in
many epochs and only the data differ. Measured: exact answers to held-out questions and how many end by themselves;
bits per byte on held-out text of the library, whose rise over the base is the alignment tax.

Intervals are bootstraps over questions or texts of the mean over the seeds. Writes a JSON result with machine, versions
and date, and prints the table and what became of three expectations.
"""

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from lima_pool import make_pool, narrow_rows, write_pool
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from preceptor import config
from preceptor.demo import demo_run
from preceptor.study.bootstrap import DIFFERENCE_OF_SHARES, SHARE, Interval, interval, paired_interval
from preceptor.study.examine import examine
from preceptor.study.select import load_reader
from preceptor.study.selection.choice import Settings, choose
from preceptor.study.selection.pool import Pool, sources_of
from preceptor.study.selection.survey import Survey, survey
from preceptor.study.subject import load_subject
from preceptor.study.tasks import Task, read_task
from preceptor.train.execute import execute
from preceptor.train.prepare import prepare

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
from machine import describe  # noqa: E402

SIZES = (10, 30, 100, 300, 1000)
MAX_NEW_TOKENS = 96
ROW_TOKENS = 1024

Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One model: per question whether it was right and whether it stopped; per text its bits and bytes."""

    right: list[float]
    stopped: list[float]
    bits: list[float]
    num_bytes: list[float]


@dataclass(frozen=True)
class Point:
    """One way of choosing at one size: the mean over seeds, question by question and text by text."""

    way: str
    size: int
    by_seed: tuple[Measured, ...]
    planted: dict[str, int]

    def mean(self, name: str) -> list[float]:
        return np.mean([getattr(measured, name) for measured in self.by_seed], axis=0).tolist()  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each training")
    parser.add_argument("--questions", type=int, default=300, help="held-out questions")
    parser.add_argument("--out", type=Path, default=Path("runs/lima_curve"), help="folder for pool, sets and runs")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "lima_curve.json")
    given = parser.parse_args()
    started = time.perf_counter()
    disable_progress_bar()  # transformers' own, for models that load in a blink
    tasks = (_some(read_task("scholar:heldout.jsonl"), given.questions), read_task("scholar:library_heldout.jsonl"))
    rows, pool_file = make_pool(), given.out / "pool.jsonl"
    write_pool(rows, pool_file)
    base = measure("scholar", tasks)
    found = survey(Pool(sources_of([str(pool_file)], {}, None)), load_reader("scholar", ROW_TOKENS), None)
    points = []
    for way in ("random", "select", "narrow"):
        for size in sorted(given.sizes)[-2:] if way == "narrow" else given.sizes:
            sets = [chosen_rows(way, size, seed, rows, found) for seed in range(given.seeds)]
            by_seed = [train_and_measure(s, f"{way}-{size}-{k}", k, given, tasks) for k, s in enumerate(sets)]
            points.append(Point(way, size, tuple(by_seed), dict(Counter(row["planted"] for row in sets[0]))))
            print(f"{time.perf_counter() - started:6.0f} s  {line(points[-1], base)}", flush=True)
    result = to_json(points, base, given) | {"seconds": round(time.perf_counter() - started)}
    given.result.parent.mkdir(parents=True, exist_ok=True)
    given.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join([table(points, base), "", *result["verdicts"]]))


def chosen_rows(way: str, size: int, seed: int, rows: Sequence[Row], found: Survey) -> list[Row]:
    """The set to train on."""
    if way == "narrow":
        return narrow_rows(size, seed)
    if way == "random":
        return [rows[k] for k in np.random.default_rng(seed).permutation(len(rows))[:size].tolist()]
    return [rows[k] for k in found.number_N[choose(found, Settings(size, seed)).kept].tolist()]


def train_and_measure(
    rows: Sequence[Row], name: str, seed: int, given: argparse.Namespace, tasks: tuple[Task, Task]
) -> Measured:
    """One training as the demo does it, on these rows for the given number of steps; its run folder is removed."""
    out = given.out / name
    data = given.out / f"{name}.jsonl"
    write_pool(rows, data)
    tree = demo_run(out).model_dump(mode="json")
    tree["data"] |= {"train": [{"path": str(data)}], "max_row_tokens": ROW_TOKENS}
    tree["train"] |= {"duration": f"{given.steps} steps", "seed": seed}
    execute(prepare(config.build(tree, name)), Console(quiet=True), replace=True)
    measured = measure(str(out / "model"), tasks)
    shutil.rmtree(out)
    return measured


def measure(model: str, tasks: tuple[Task, Task]) -> Measured:
    subject = load_subject(model, "float32", "auto")
    answers, texts = (examine(subject, task, MAX_NEW_TOKENS, batch_size=64) for task in tasks)
    return Measured(
        right=[result.values["right"] for result in answers],
        stopped=[result.values["stop_token"] for result in answers],
        bits=[result.values["bits"] for result in texts],
        num_bytes=[result.values["num_bytes"] for result in texts],
    )


def _some(task: Task, num: int) -> Task:
    """A seeded part of a task's items, in their order."""
    chosen = np.random.default_rng(0).permutation(len(task.items))[:num]
    return replace(task, items=tuple(task.items[k] for k in sorted(chosen.tolist())))


# What came of it -----------------------------------------------------------------------------------------------------


def accuracy(point: Point) -> Interval:
    return interval(point.mean("right"), bounds=SHARE)


def tax(point: Point, base: Measured) -> Interval:
    """Bits per byte over the base's."""
    return paired_interval(base.bits, point.mean("bits"), base.num_bytes, base.num_bytes)


def line(point: Point, base: Measured) -> str:
    right, cost = accuracy(point), tax(point, base)
    seeds = [float(np.mean(measured.right)) for measured in point.by_seed]
    return (
        f"{point.way:<8}{point.size:>6,}{right.value:>8.1%} ({_range(right, 100, '.1f')})  "
        f"{min(seeds):>6.1%} to {max(seeds):<6.1%}{np.mean(point.mean('stopped')):>8.1%}"
        f"{cost.value:>+9.3f} ({_range(cost, 1, '+.3f')})"
    )


def _range(found: Interval, scale: float, form: str) -> str:
    if found.low is None or found.high is None:
        return "one item"
    return f"{found.low * scale:{form}} to {found.high * scale:{form}}"


def table(points: Sequence[Point], base: Measured) -> str:
    header = f"{'way':<8}{'rows':>6}{'exact':>8} {'(95 %)':<16}{'seeds':<17}{'stops':>7}{'tax, bits per byte':>22}"
    base_line = f"{'base':<8}{0:>6}{np.mean(base.right):>8.1%}{'':>33}{np.mean(base.stopped):>8.1%}"
    return "\n".join([header, base_line, *(line(point, base) for point in points)])


def verdicts(points: Sequence[Point], base: Measured) -> list[str]:
    """What was expected and what was found; an interval that holds zero tells neither."""
    at = {(point.way, point.size): point for point in points}
    largest = max(size for way, size in at if way == "random")
    whole = at["random", largest]
    lines = []
    for size in sorted(size for way, size in at if way == "select" and size < largest):
        more = paired_interval(whole.mean("right"), at["select", size].mean("right"), bounds=DIFFERENCE_OF_SHARES)
        says = ("are level with", "answer more than", "fall short of")[more.sign]
        lines.append(
            f"{size:,} chosen rows {says} {largest:,} random ones: {more.value * 100:+.1f} points of exact answers "
            f"({_range(more, 100, '+.1f')})"
        )
    for size in sorted(size for way, size in at if way == "select"):
        gain = paired_interval(base.right, at["select", size].mean("right"), bounds=DIFFERENCE_OF_SHARES)
        says = "answer" if gain.sign > 0 else "do not answer"
        lines.append(
            f"after {size:,} chosen rows, facts that no row mentions: {says} them, {gain.value * 100:+.1f} points"
        )
    for size in sorted(size for way, size in at if way == "narrow"):
        other = at["select", size]
        more = paired_interval(other.mean("bits"), at["narrow", size].mean("bits"), base.num_bytes, base.num_bytes)
        says = ("the same, as far as can be told", "more", "less")[more.sign]
        lines.append(
            f"{size:,} narrow rows cost {says} on general text, beside as many chosen ones: {more.value:+.3f} "
            f"bits per byte ({_range(more, 1, '+.3f')})"
        )
    return lines


def to_json(points: Sequence[Point], base: Measured, given: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": f"python recipes/lima_curve.py --seeds {given.seeds} --steps {given.steps} "
        f"--questions {given.questions} --sizes {' '.join(map(str, given.sizes))}",
        **describe(),
        "seeds": given.seeds,
        "steps": given.steps,
        "row_tokens": ROW_TOKENS,
        "num_questions": len(base.right),
        "base": {
            "exact": float(np.mean(base.right)),
            "stops": float(np.mean(base.stopped)),
            "bits_per_byte": sum(base.bits) / sum(base.num_bytes),
        },
        "points": [
            {
                "way": point.way,
                "rows": point.size,
                "exact": asdict(accuracy(point)),
                "exact_by_seed": [float(np.mean(measured.right)) for measured in point.by_seed],
                "stops": asdict(interval(point.mean("stopped"), bounds=SHARE)),
                "tax_bits_per_byte": asdict(tax(point, base)),
                "planted_of_first_seed": point.planted,
            }
            for point in points
        ],
        "verdicts": verdicts(points, base),
    }


if __name__ == "__main__":
    main()
