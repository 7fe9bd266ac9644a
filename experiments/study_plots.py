"""Plots of the study as SVG files that follow the reader's light or dark theme."""

from collections.abc import Mapping, Sequence
from typing import Any

from measures import EXACT, TAX, Measure
from preceptor.report.plots import Panel, Series, draw_file, smooth

COLOURS = {"random": 2, "select": 1, "narrow": 4}
NAMES = {"random": "random", "select": "chosen", "narrow": "narrow"}
FEWEST_TOKENS = 30  # answer tokens at a position; fewer make no curve
SMOOTHED_POSITIONS = 3

Row = Mapping[str, Any]


def plots(result: Row) -> dict[str, str]:
    """File name -> SVG."""
    return {
        "lima-exact.svg": draw_file(_curve(result, EXACT, "figures", "LIMA curve: exact answers")),
        "lima-tax.svg": draw_file(_curve(result, TAX, "from_base", "LIMA curve: tax on new pages of the library")),
        "tax.svg": draw_file(_trade(result)),
        "shift.svg": draw_file(_shift(result["shift"]["by_position"])),
    }


def _curve(result: Row, measure: Measure, what: str, title: str) -> Panel:
    series = []
    for way, colour in COLOURS.items():
        points = [point for point in result["curve"] if point["way"] == way]
        if points:
            own = [point[what][measure.name] for point in points]
            x = [float(point["rows"]) for point in points]
            values = [figure["value"] * measure.unit for figure in own]
            series.append(Series(NAMES[way], x, values, colour, marks=True, y_ends=_ends(own, measure.unit)))
    intern = result["intern"][what][measure.name]["value"] * measure.unit
    sizes = sorted({float(point["rows"]) for point in result["curve"]})
    y_label = "%" if measure.unit > 1 else f"{measure.unit_name} above the base"
    level = ("intern: 1,000 good conversations", intern)
    return Panel(title, y_label, series, x_label="conversations", level=level, ticks=sizes, from_zero=what == "figures")


def _ends(figures: Sequence[Row], unit: float = 1.0) -> list[tuple[float, float]]:
    return [(own["low"] * unit, own["high"] * unit) for own in figures]


def _trade(result: Row) -> Panel:
    """Skill against tax: merged models as a curve that ends in full fine-tuning, the other ways as points."""
    ways = result["mitigations"]
    merged = [way for way in ways if way["weight"] is not None]
    curve = _cross("merged, by weight", [*merged, ways[0]], 1, [*(f"{way['weight']:g}" for way in merged), "1"])
    others = [
        _cross(way["label"].partition(",")[0].partition(":")[0], [way], colour)
        for way, colour in zip((way for way in ways if way["weight"] is None), (2, 3, 4, 6), strict=True)
    ]
    x_label = f"tax on new pages of the library, {TAX.unit_name}"
    return Panel("Skill against tax", "exact answers, %", [curve, *others], x_label=x_label, whole=False)


def _cross(name: str, ways: Sequence[Row], colour: int, labels: Sequence[str] = ()) -> Series:
    taxes = [way["from_base"][TAX.name] for way in ways]
    skills = [way["figures"][EXACT.name] for way in ways]
    return Series(
        name,
        [own["value"] for own in taxes],
        [own["value"] * EXACT.unit for own in skills],
        colour,
        marks=True,
        x_ends=_ends(taxes),
        y_ends=_ends(skills, EXACT.unit),
        labels=labels,
    )


def _shift(places: Sequence[Row]) -> Panel:
    kept = [place for place in places if place["num"] >= FEWEST_TOKENS] or list(places)
    x = [float(place["position"]) for place in kept]
    width = SMOOTHED_POSITIONS if len(x) > 4 * SMOOTHED_POSITIONS else 1
    series = [
        Series(name, x, smooth([100 * place[name] for place in kept], width), colour)
        for name, colour in (("unshifted", 3), ("marginal", 5), ("shifted", 2))
    ]
    return Panel("Shift by position", "% of answer tokens", series, x_label="position in the answer", from_zero=True)
