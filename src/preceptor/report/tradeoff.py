"""Plots of a sweep (compare/sweep.py): skill against tax, a point for each weight, its intervals as a cross."""

import re
from collections.abc import Mapping
from typing import Any

from preceptor.compare.sweep import gain, pairs
from preceptor.compare.verdict import HEADLINES, short_names
from preceptor.evaluate.intervals import Interval
from preceptor.report.plots import Panel, Series, draw_file


def draw_plots(found: Mapping[str, Any]) -> dict[str, str]:
    """File name -> SVG, for each pair of a trained task and a task or text that shows the tax."""
    plots: dict[str, str] = {}
    names = short_names(entry["task"] for entry in found["tasks"])
    for skill, tax in pairs(found["tasks"]):
        skill_name, tax_name = names[skill["task"]], names[tax["task"]]
        file = re.sub(r"[^\w.-]", "_", f"sweep-{skill_name}-{tax_name}")
        while f"{file}.svg" in plots:  # of other signs, which are `_` here
            file += "_"
        plots[f"{file}.svg"] = draw_file(_panel(skill, tax, skill_name, tax_name))
    return plots


def _panel(skill: Mapping[str, Any], tax: Mapping[str, Any], skill_name: str, tax_name: str) -> Panel:
    paid = [gain(tax, point, "base").times(-1) for point in tax["points"]]
    metric = HEADLINES[skill["kind"]]
    values = [Interval(*(point[key] for key in ("value", "low", "high", "num"))) for point in skill["points"]]
    kept = [value.times(metric.scale) for value in values]
    series = Series(
        "",
        [own.value for own in paid],
        [own.value for own in kept],
        marks=True,
        x_ends=[_ends(own) for own in paid],
        y_ends=[_ends(own) for own in kept],
        labels=[f"{point['weight']:g}" for point in skill["points"]],
    )
    return Panel(
        "Skill against tax, by the tuned model's weight",
        f"{skill_name}, {metric.value_unit}",
        [series],
        x_label=f"tax on {tax_name}, {HEADLINES[tax['kind']].unit}",
        whole=False,
    )


def _ends(own: Interval) -> tuple[float, float]:
    """Low and high; the value itself where one item alone shows no spread."""
    return (own.value if own.low is None else own.low), (own.value if own.high is None else own.high)
