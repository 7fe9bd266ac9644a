"""A sweep over the average of base and tuned model (interpolate.py): how much skill remains for how much tax.

Both ends are always among the weights: 1 is the tuned model itself, 0 the base's weights with the tuned model's
tokenizer, chat template and added rows. `sweep` returns, and `write` leaves as `sweep.json`:

    {"base", "tuned", "settings",
     "tasks": [{"task", "kind", "role": "trained" | "tax" | "text", "figure", "num_items",
                "points": [{"weight", "value", "low", "high", "num",
                            "from_base", "from_tuned": {"value", "low", "high", "num"}}]}],
     "verdict": [sentence]}

Differences are paired: the same items before and after. One merged model is on disk and in memory at a time.
"""

import gc
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from preceptor.compare.compare import EvaluationSuite
from preceptor.compare.verdict import HEADLINES, change, is_finite, short_names, tells
from preceptor.evaluate.figures import figures, paired
from preceptor.evaluate.intervals import Interval
from preceptor.evaluate.model import EvaluatedModel
from preceptor.evaluate.run import ItemResult, evaluation_settings
from preceptor.evaluate.tasks import Task
from preceptor.files import write_atomically, write_json
from preceptor.model.interpolate import merge_weights

WEIGHTS = tuple(round(0.1 * tenth, 1) for tenth in range(11))


def sweep(
    base: str,
    tuned: str,
    weights: Sequence[float],
    suite: EvaluationSuite,
    load: Callable[[str], EvaluatedModel],
    folder: Path,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """folder: where each merged model is written while it is evaluated. say: shows what is being done.

    Raises ModelError and CheckpointError as `merge_weights`, DataError for an item that a model cannot read.
    """
    by_weight: dict[float, list[list[ItemResult]]] = {}
    settings: dict[str, Any] = {}
    for weight in sorted({0.0, 1.0, *weights}):
        place = folder / f".weight-{weight:g}"
        shutil.rmtree(place, ignore_errors=True)  # of a sweep that was killed
        try:
            if weight != 1:
                merge_weights(base, tuned, weight, place)
            evaluated = load(tuned if weight == 1 else str(place))
            settings = evaluation_settings(evaluated, suite.seed, suite.max_new_tokens)
            by_weight[weight] = suite.run(evaluated, say)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        del evaluated
        gc.collect()
        torch.cuda.empty_cache()
    tasks = [
        _task(task, role, {weight: results[index] for weight, results in by_weight.items()}, suite.seed)
        for index, (task, role) in enumerate(suite.tasks)
    ]
    return {"base": base, "tuned": tuned, "settings": settings, "tasks": tasks, "verdict": verdict(tasks)}


def write(folder: Path, found: dict[str, Any], plots: Mapping[str, str]) -> list[Path]:
    """`sweep.json` and the plots, file name -> SVG (report/tradeoff.py). Raises CheckpointError."""
    write_json(folder / "sweep.json", found)
    for name, text in plots.items():
        write_atomically(folder / name, text)
    return [folder / name for name in ("sweep.json", *plots)]


def _task(task: Task, role: str, by_weight: dict[float, list[ItemResult]], seed: int) -> dict[str, Any]:
    name = HEADLINES[task.kind].name
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


def verdict(tasks: Sequence[dict[str, Any]]) -> list[str]:
    """For each skill and each tax, the weights that pay less and lose nothing; one sentence each."""
    names = short_names(entry["task"] for entry in tasks)
    return [_sentence(skill, tax, names) for skill, tax in pairs(tasks)]


def pairs(tasks: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each task that was trained with each task or text that shows the tax."""
    skills, taxes = ([entry for entry in tasks if (entry["role"] == "trained") == wanted] for wanted in (True, False))
    return list(product(skills, taxes))


def gain(entry: Mapping[str, Any], point: Mapping[str, Any], end: str) -> Interval:
    """How much better a point is than the base or tuned model: points, or bits per byte less."""
    metric = HEADLINES[entry["kind"]]
    return Interval(**point[f"from_{end}"]).times(metric.scale * metric.better)


def _sentence(skill: dict[str, Any], tax: dict[str, Any], names: Mapping[str, str]) -> str:
    metric, skill_name, tax_name = HEADLINES[tax["kind"]], names[skill["task"]], names[tax["task"]]
    whole = _compared(tax, tax["points"][-1], "base")
    if not is_finite(whole):
        return f"no finite figures on {tax_name}"
    if change(whole) >= 0:
        none = "no significant tax" if change(whole) > 0 or tells(whole) else "no tax that so few items can show"
        return f"On {tax_name} the tuned model pays {none}"
    paid = f"The tuned model pays {_paid(tax, tax['points'][-1])} {metric.unit} on {tax_name}"
    if not is_finite(_compared(skill, skill["points"][-1], "base")):
        return f"{paid}; no finite figures on {skill_name}"
    for kept, point in zip(skill["points"][1:-1], tax["points"][1:-1], strict=True):  # neither end
        ours, theirs = _compared(skill, kept, "tuned"), _compared(tax, point, "tuned")
        if is_finite(ours) and change(ours) >= 0 and is_finite(theirs) and change(theirs) > 0:
            few = "" if change(ours) > 0 or tells(ours) else " that so few items can show"
            loss = f"a {'' if few else 'significant '}loss on {skill_name}{few}"
            return f"{paid}; a weight of {point['weight']:g} pays {_paid(tax, point)}, without {loss}"
    return f"{paid}; no weight pays less without a loss on {skill_name}"


def _paid(tax: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    return f"{-gain(tax, point, 'base').value:.{HEADLINES[tax['kind']].digits}f}"


def _compared(entry: Mapping[str, Any], point: Mapping[str, Any], end: str) -> dict[str, Any]:
    """A point against the base or tuned model, in the form of a compared task."""
    before = entry["points"][0 if end == "base" else -1]
    figures = {"base": before, "tuned": point, "difference": point[f"from_{end}"]}
    return {**entry, "figures": {HEADLINES[entry["kind"]].name: figures}}
