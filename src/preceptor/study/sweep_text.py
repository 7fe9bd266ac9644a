"""A sweep for the eye: a line a weight, what is trained first, then the taxes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from preceptor.study.bootstrap import Interval
from preceptor.study.sweep import gain
from preceptor.study.verdict import TOLD, short_name


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
