"""Weights between base and tuned model (interpolate.py), each put to the same tasks: how much skill for how much tax.

Both ends are always among the weights: 1 is the tuned model itself, 0 the base's weights with the tuned model's
tokenizer, chat template and added rows. `sweep` returns, and `write` leaves as `sweep.json`:

    {"base", "tuned", "settings",
     "tasks": [{"task", "kind", "role": "trained" | "tax" | "text", "figure", "num_items",
                "points": [{"weight", "value", "low", "high", "num",
                            "from_base", "from_tuned": {"value", "low", "high", "num"}}]}],
     "verdict": [sentence]}

Differences are paired: the same items before and after. One merged model is on disk and in memory at a time.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from preceptor.compare.compare import Questions, settings_of
from preceptor.compare.verdict import TOLD, short_name
from preceptor.evaluate.figures import figures, paired
from preceptor.evaluate.intervals import Interval
from preceptor.evaluate.model import EvaluatedModel
from preceptor.evaluate.run import Result, examine
from preceptor.evaluate.tasks import Task
from preceptor.files import write_atomically, write_json
from preceptor.model.interpolate import merge_weights

WEIGHTS = tuple(round(0.1 * tenth, 1) for tenth in range(11))


def sweep(
    base: str,
    tuned: str,
    weights: Sequence[float],
    questions: Questions,
    load: Callable[[str], EvaluatedModel],
    folder: Path,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """folder: where each merged model stands for as long as it is examined. `say` is told what is being done.

    Raises ModelError and CheckpointError as `merge_weights`, DataError for an item that a model cannot read.
    """
    by_weight: dict[float, list[list[Result]]] = {}
    settings: dict[str, Any] = {}
    for weight in sorted({0.0, 1.0, *weights}):
        place = folder / f".weight-{weight:g}"
        shutil.rmtree(place, ignore_errors=True)  # of a sweep that was killed
        try:
            if weight != 1:
                merge_weights(base, tuned, weight, place)
            subject = load(tuned if weight == 1 else str(place))
            settings = settings_of(subject, questions.seed) | {"max_new_tokens": questions.max_new_tokens}
            by_weight[weight] = [_examine(subject, task, weight, questions, say) for task, _ in questions.tasks]
        finally:
            shutil.rmtree(place, ignore_errors=True)
    tasks = [
        _task(task, role, {weight: results[index] for weight, results in by_weight.items()}, questions.seed)
        for index, (task, role) in enumerate(questions.tasks)
    ]
    return {"base": base, "tuned": tuned, "settings": settings, "tasks": tasks, "verdict": verdict(tasks)}


def write(folder: Path, found: dict[str, Any]) -> list[Path]:
    """`sweep.json`, and a plot for each pair of a trained task and a tax. Raises CheckpointError."""
    from preceptor.report.plots import draw_file
    from preceptor.report.tradeoff import panels

    plots = {folder / f"{name}.svg": draw_file(panel) for name, panel in panels(found).items()}
    write_json(folder / "sweep.json", found)
    for file, text in plots.items():
        write_atomically(file, text)
    return [folder / "sweep.json", *plots]


def _examine(
    subject: EvaluatedModel, task: Task, weight: float, questions: Questions, say: Callable[[str], None]
) -> list[Result]:
    say(f"weight {weight:g}: {task.name}")
    return examine(subject, task, questions.max_new_tokens, questions.batch_size)


def _task(task: Task, role: str, by_weight: dict[float, list[Result]], seed: int) -> dict[str, Any]:
    name = TOLD[task.kind][0]
    points = []
    for weight, results in by_weight.items():
        own = figures(task, results, seed)[name]
        ends = {
            f"from_{end}": paired(task, by_weight[at], results, seed)[name]["difference"]
            for end, at in (("base", 0.0), ("tuned", 1.0))
        }
        points.append({"weight": weight, **asdict(own), **ends})
    items = len(by_weight[1.0])
    return {"task": task.name, "kind": task.kind, "role": role, "figure": name, "num_items": items, "points": points}


# In words ------------------------------------------------------------------------------------------------------------


def verdict(tasks: Sequence[dict[str, Any]]) -> list[str]:
    """For each skill and each tax, the weights that pay less and lose nothing; one sentence each."""
    skills, taxes = ([row for row in tasks if (row["role"] == "trained") == wanted] for wanted in (True, False))
    return [_sentence(skill, tax) for skill in skills for tax in taxes]


def gain(row: dict[str, Any], point: dict[str, Any], end: str) -> Interval:
    """How much better a point is than base or tuned model: points, or bits per byte less."""
    unit, better = TOLD[row["kind"]][1], TOLD[row["kind"]][3]
    found = Interval(**point[f"from_{end}"])
    scale = unit * better
    low, high = (None if edge is None else edge * scale for edge in (found.low, found.high))
    return Interval(found.value * scale, *((low, high) if better > 0 else (high, low)), found.num)


def _sentence(skill: dict[str, Any], tax: dict[str, Any]) -> str:
    names = short_name(skill["task"]), short_name(tax["task"])
    whole = gain(tax, tax["points"][-1], "base")
    unit, digits = TOLD[tax["kind"]][2], 1 if TOLD[tax["kind"]][1] > 1 else 4
    if whole.sign >= 0:
        return f"On {names[1]} the tuned model pays no tax that can be told from zero"
    free = [
        (kept["weight"], paid)
        for kept, paid in zip(skill["points"][:-1], tax["points"][:-1], strict=True)
        if gain(skill, kept, "tuned").sign >= 0 and gain(tax, paid, "tuned").sign > 0
    ]
    paid = f"The tuned model pays {-whole.value:.{digits}f} {unit} on {names[1]}"
    if not free:
        return f"{paid}; no weight pays less without losing on {names[0]}"
    weight, point = min(free, key=lambda each: each[0])
    left = gain(tax, point, "base")
    return (
        f"{paid}; a weight of {weight:g} pays {-left.value:.{digits}f} and loses nothing on {names[0]} "
        "that can be told from zero"
    )


def print_sweep(found: Mapping[str, Any], files: Sequence[Path], console: Console) -> None:
    """Skill as it is, taxes as what they are worse than the base's; 95 % intervals in brackets."""
    table = Table(title=escape(f"{found['base']} -> {found['tuned']}, averaged"), title_justify="left")
    table.add_column("weight", justify="right")
    for row in found["tasks"]:
        unit = "%" if TOLD[row["kind"]][1] > 1 else TOLD[row["kind"]][2]
        what = unit if row["role"] == "trained" else f"tax, {TOLD[row['kind']][2]}"
        table.add_column(escape(f"{short_name(row['task'])}: {what}"), justify="right", no_wrap=True)
    for place, point in enumerate(found["tasks"][0]["points"]):
        table.add_row(f"{point['weight']:g}", *(_cell(row, row["points"][place]) for row in found["tasks"]))
    console.print(table)
    for sentence in found["verdict"]:
        console.print(f"{sentence}.", highlight=False, markup=False)
    console.print(f"written: {', '.join(map(str, files))}", highlight=False, markup=False)


def _cell(row: dict[str, Any], point: dict[str, Any]) -> str:
    _, unit, _, _ = TOLD[row["kind"]]
    digits = 1 if unit > 1 else 4
    if row["role"] == "trained":
        own = Interval(*(point[key] for key in ("value", "low", "high", "num")))
        return shown(own.value * unit, own.low, own.high, digits, unit)
    own = gain(row, point, "base")
    low, high = (None if edge is None else -edge for edge in (own.high, own.low))
    return shown(-own.value, low, high, digits, sign="+")


def shown(value: float, low: float | None, high: float | None, digits: int, unit: float = 1.0, sign: str = "") -> str:
    """`+0.0312 (+0.0290 to +0.0333)`; without the brackets where the spread is unknown."""
    form = f"{sign}.{digits}f"
    if low is None or high is None:
        return f"{value + 0.0:{form}}"
    return f"{value + 0.0:{form}} ({low * unit + 0.0:{form}} to {high * unit + 0.0:{form}})"
