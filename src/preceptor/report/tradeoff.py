"""The plot of a sweep (compare/sweep.py): skill against tax, a point for each weight, with its intervals as a cross."""

import re
from collections.abc import Mapping
from typing import Any

from preceptor.compare.sweep import gain
from preceptor.compare.verdict import TOLD, short_name
from preceptor.evaluate.intervals import Interval
from preceptor.report.plots import Panel, Series, draw_file


def draw_plots(found: Mapping[str, Any]) -> dict[str, str]:
    """File name -> SVG, for each pair of a trained task and a task or text that shows the tax."""
    plots = {}
    skills, taxes = (
        [row for row in found["tasks"] if (row["role"] == "trained") == wanted] for wanted in (True, False)
    )
    for skill in skills:
        for tax in taxes:
            names = [short_name(row["task"]) for row in (skill, tax)]
            stem = re.sub(r"[^\w.-]", "_", f"sweep-{names[0]}-{names[1]}")
            plots[f"{stem}.svg"] = draw_file(_panel(skill, tax, names))
    return plots


def _panel(skill: Mapping[str, Any], tax: Mapping[str, Any], names: list[str]) -> Panel:
    paid = [_negative(gain(dict(tax), point, "base")) for point in tax["points"]]
    unit = TOLD[skill["kind"]][1]
    values = [Interval(*(point[key] for key in ("value", "low", "high", "num"))) for point in skill["points"]]
    series = Series(
        "",
        [own.value for own in paid],
        [unit * own.value for own in values],
        marks=True,
        x_ends=[ends(own) for own in paid],
        y_ends=[ends(own, unit) for own in values],
        labels=[f"{point['weight']:g}" for point in skill["points"]],
    )
    y_label = f"{names[0]}, {'%' if unit > 1 else TOLD[skill['kind']][2]}"
    return Panel(
        "Skill against tax, by the tuned model's weight",
        y_label,
        [series],
        x_label=f"tax on {names[1]}, {TOLD[tax['kind']][2]}",
        whole=False,
    )


def _negative(own: Interval) -> Interval:
    low, high = (None if edge is None else -edge for edge in (own.high, own.low))
    return Interval(-own.value, low, high, own.num)


def ends(own: Interval, unit: float = 1.0) -> tuple[float, float]:
    """Low and high; the value itself where one item alone shows no spread."""
    low, high = (own.value if edge is None else edge for edge in (own.low, own.high))
    return unit * low, unit * high
