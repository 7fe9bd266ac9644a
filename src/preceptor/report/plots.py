"""Curves, bars and their SVG: drawn by matplotlib, coloured by the page's CSS, with their values beside them.

A plot is drawn once, in colours that stand for CSS variables; light, dark and print are then the page's to decide. The
values go along as JSON, from which the page's script reads out what lies under the pointer; without a script the
picture is all there. `draw_file` makes a picture that stands alone, its colours and its legend within.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

MOST_POINTS = 400  # of a curve; more than the plot is wide would only make the page heavy
SIZE_INCHES = (5.6, 3.0)  # small enough that its letters can still be read on a phone
NUM_COLOURS = 6

# Colours of the drawing -> CSS variables of the page.
_VARIABLES = {
    "#010001": "ink",
    "#020002": "faint",
    "#030003": "line",
    **{f"#0400{index:02x}": f"c{index}" for index in range(1, NUM_COLOURS + 1)},
}
_COLOUR = {name: colour for colour, name in _VARIABLES.items()}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "preceptor",
    "font.family": "DejaVu Sans",  # matplotlib's own: measured by, while the page's font is shown
    "font.size": 11,
    "axes.edgecolor": _COLOUR["line"],
    "axes.labelcolor": _COLOUR["faint"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _COLOUR["line"],
    "grid.linewidth": 0.6,
    "xtick.color": _COLOUR["faint"],
    "ytick.color": _COLOUR["faint"],
    "text.color": _COLOUR["ink"],
    "lines.linewidth": 1.8,
    "axes.formatter.useoffset": False,
    "text.parse_math": False,  # names may have dollar signs
}


@dataclass(frozen=True, slots=True)
class Series:
    """One curve. colour: 1 to NUM_COLOURS. faint: what the next series is the mean of. marks: a point at each value.

    x_ends, y_ends: (low, high) of each value, drawn as a cross. labels: what stands beside each point.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 1
    faint: bool = False
    marks: bool = False
    x_ends: Sequence[tuple[float, float]] = ()
    y_ends: Sequence[tuple[float, float]] = ()
    labels: Sequence[str] = ()


LabelledInterval = tuple[str, float, float | None, float | None]  # label, value, low, high


@dataclass(frozen=True, slots=True)
class Panel:
    """What a plot shows. level: (name, height) of a horizontal line to hold the curves against.

    ticks: of the x axis, which is then logarithmic; whole: x has whole numbers only.
    """

    title: str
    y_label: str
    series: Sequence[Series]
    note: str = ""
    x_label: str = "step"
    level: tuple[str, float] | None = None
    log: bool = False
    from_zero: bool = False
    bars: tuple[Sequence[float], Sequence[float]] | None = None  # edges and counts, in place of curves
    intervals: Sequence[LabelledInterval] = ()  # in place of curves
    ticks: Sequence[float] = ()
    whole: bool = True


@dataclass(frozen=True, slots=True)
class Plot:
    """An SVG element, and for the page's script where the axes lie in it and which values it shows."""

    title: str
    note: str
    svg: str
    legend: list[tuple[str, int, bool]] = field(default_factory=list)
    readout: dict[str, Any] = field(default_factory=dict)


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """At most `most` points: the means of runs of equal length (the last may be shorter), each at its last x."""
    size = -(-len(y) // most)
    if size <= 1:
        return list(x), list(y)
    starts = range(0, len(y), size)
    return [x[min(start + size, len(y)) - 1] for start in starts], [
        float(np.mean(y[start : start + size])) for start in starts
    ]


def smooth(y: Sequence[float], width: int) -> list[float]:
    """The mean over `width` values around each, fewer at the ends; width is odd."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(y, dtype=np.float64))])
    at = np.arange(len(y))
    low, high = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(y))
    return ((sums[high] - sums[low]) / (high - low)).tolist()


def draw(panel: Panel, name: str) -> Plot:
    """`name` tells the ids within the SVG from those of other plots on the page."""
    with matplotlib.rc_context(_STYLE):
        width, height = SIZE_INCHES
        if panel.intervals:
            height = 0.6 + 0.32 * len(panel.intervals)
        figure = Figure(figsize=(width, height))
        left = 0.34 if panel.intervals else 0.125
        axes = figure.add_axes((left, 0.3 / height, 0.985 - left, 1 - 0.42 / height))
        _fill(axes, panel)
        svg = _svg_of(figure)
    x0, y0, across, up = axes.get_position().bounds
    shown = [series for series in panel.series if not series.faint]
    readout = {
        "box": [x0, 1 - y0 - up, across, up],
        "x": list(axes.get_xlim()),
        "y": list(axes.get_ylim()),
        "log": panel.log,
        "x_label": panel.x_label,
        "bars": panel.bars and [list(panel.bars[0]), list(panel.bars[1])],
        "series": [_values(series) for series in shown if len(series.x)],
    }
    legend = [(s.name, s.colour, False) for s in shown] if len(shown) > 1 or panel.level else []
    if panel.level is not None:
        legend.append((panel.level[0], 0, True))
    return Plot(panel.title, panel.note, _themed(svg, name, panel.title), legend, readout)


def _values(series: Series) -> dict[str, Any]:
    """What the page's script reads out of a curve."""
    found = {"name": series.name, "colour": series.colour, "x": _short(series.x), "y": _short(series.y)}
    ends = [_short(pair) if pair[0] < pair[1] else None for pair in series.y_ends]
    return {**found, "y_ends": ends} if ends else found


def draw_file(panel: Panel) -> str:
    """An SVG file: title, names of the axes and legend within, in the colours of the reader's theme."""
    with matplotlib.rc_context(_STYLE):
        width = 1.15 * SIZE_INCHES[0]
        height = 1.3 + 0.34 * len(panel.intervals) if panel.intervals else 1.15 * SIZE_INCHES[1]
        figure = Figure(figsize=(width, height))
        left = 0.36 if panel.intervals else 0.115
        axes = figure.add_axes((left, 0.56 / height, 0.97 - left, 1 - 0.98 / height))
        _fill(axes, panel)
        axes.set_title(panel.title, loc="left", x=-left / (0.97 - left) + 0.02, fontsize=12, pad=10)
        axes.set_xlabel(panel.x_label)
        if not panel.intervals:
            axes.set_ylabel(panel.y_label)
        if len([series for series in panel.series if series.name]) > 1 or panel.level:
            axes.legend(frameon=False, fontsize=9.5, handlelength=1.6)
        svg = _themed(_svg_of(figure), "plot", panel.title)
    css = (files("preceptor.report") / "page.css").read_text(encoding="utf-8")
    themes = (dict(re.findall(r"--(\w+): (#\w+)", theme)) for theme in re.findall(r":root {(.*?)}", css, re.DOTALL))
    light, dark = (
        "; ".join([f"--paper: {own['card']}", *(f"--{name}: {own[name]}" for name in _COLOUR)]) for own in themes
    )
    style = f"svg {{ {light} }} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}"
    head, within = svg.replace("<svg ", f'<svg width="{width * 100:.0f}" height="{height * 100:.0f}" ', 1).split(">", 1)
    paper = '<rect width="100%" height="100%" rx="6" fill="var(--paper)"/>'
    return f"{head}><style>{style} text {{ font-family: system-ui, sans-serif }}</style>{paper}{within.rstrip()}\n"


def _svg_of(figure: Figure) -> str:
    FigureCanvasSVG(figure)
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _fill(axes: Axes, panel: Panel) -> None:
    shown = 1  # the number of a curve in the legend; what it is the mean of goes with it
    for number, series in enumerate(panel.series):
        name = f"series-{shown}-{number}"
        colour, mark = _COLOUR[f"c{series.colour}"], "o" if series.marks or len(series.x) == 1 else None
        alpha, width = (0.3, 1.0) if series.faint else (1.0, 1.8)
        (line,) = axes.plot(series.x, series.y, color=colour, alpha=alpha, linewidth=width, marker=mark, markersize=4)
        line.set_gid(name)
        if not series.faint:
            line.set_label(series.name)
            shown += 1
        _fill_ends(axes, series, colour, name)
    if panel.bars is not None:
        edges, counts = panel.bars
        axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=_COLOUR["c1"], alpha=0.85)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, 1.05 * max(counts))
        axes.xaxis.grid(False)
    if panel.intervals:
        _fill_intervals(axes, panel)
        return
    if panel.level is not None:
        name, height = panel.level
        axes.axhline(height, color=_COLOUR["ink"], linewidth=1.2, linestyle=(0, (4, 3)), label=name)
    if panel.log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0,) if high / low > 1000 else (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axes.yaxis.set_major_formatter(_formatter(axes))
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6, integer=panel.bars is not None))
        if panel.from_zero:
            axes.set_ylim(0, 1.1 * max(axes.get_ylim()[1] / 1.05, panel.level[1] if panel.level else 0))
    if panel.ticks:
        axes.set_xscale("log")
        axes.set_xticks(panel.ticks, [f"{tick:,g}" for tick in panel.ticks])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=panel.whole))
    axes.tick_params(length=0, pad=5, which="both")


def _fill_ends(axes: Axes, series: Series, colour: str, name: str) -> None:
    """name: what the ids of the lines begin with, so that they go with the curve where it is hidden."""
    for x, y, (low, high) in zip(series.x, series.y, series.x_ends, strict=bool(series.x_ends)):
        (line,) = axes.plot([low, high], [y, y], color=colour, alpha=0.7, linewidth=1.6, marker="|", markersize=7)
        line.set_gid(f"{name}-{x:g}-across")
        assert not (x < low or x > high)  # nan is neither
    for x, (low, high) in zip(series.x, series.y_ends, strict=bool(series.y_ends)):
        (line,) = axes.plot([x, x], [low, high], color=colour, alpha=0.7, linewidth=1.6, marker="_", markersize=7)
        line.set_gid(f"{name}-{x:g}-up")
    for x, y, label in zip(series.x, series.y, series.labels, strict=bool(series.labels)):
        axes.annotate(label, (x, y), (5, -11), textcoords="offset points", fontsize=9, color=_COLOUR["faint"])


def _fill_intervals(axes: Axes, panel: Panel) -> None:
    """A point and a line for its interval, the first at the top; coloured where it lies wholly beside zero."""
    axes.axvline(0, color=_COLOUR["ink"], linewidth=1)
    for place, (_, value, low, high) in enumerate(reversed(panel.intervals)):
        sure = low is not None and high is not None and (low > 0 or high < 0)
        colour = _COLOUR[("c3" if value > 0 else "c2") if sure else "faint"]
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot([value], [place], color=colour, marker="o", markersize=6)
    axes.set_yticks(range(len(panel.intervals)), [label for label, *_ in reversed(panel.intervals)])
    axes.set_ylim(-0.6, len(panel.intervals) - 0.4)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6))
    axes.tick_params(length=0, pad=5, which="both")


def _formatter(axes: Axes) -> ticker.Formatter:
    """Of the y axis; small numbers are written out, as their common factor would stand above the plot, in the title."""
    largest = max(map(abs, axes.get_ylim()))
    if largest >= 10_000:
        return ticker.EngFormatter(sep="")
    return ticker.FuncFormatter(lambda value, _: f"{value:g}") if largest < 0.01 else axes.yaxis.get_major_formatter()


def _short(values: Sequence[float]) -> list[float]:
    """Six digits are more than a reader needs, and half of what Python would write."""
    return [float(f"{value:.6g}") for value in values]


def _themed(svg: str, name: str, title: str) -> str:
    """The SVG element alone: colours as CSS variables, ids of its own, a name for screen readers."""
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"#0[1-4]00\w\w", lambda found: f"var(--{_VARIABLES[found[0]]})", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
