"""Watched runs in a terminal: a panel for each run, drawn again as it grows; elsewhere a line for what is new.

Plots are drawn in the letters of a terminal: Braille dots, or ASCII where its encoding has none.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel as Frame
from rich.table import Table
from rich.text import Text

from preceptor.console import visible
from preceptor.report.run_record import RunRecord
from preceptor.watch.status import RunLook, after, figures, left_in_words, status_of, step_in_words

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a Braille letter: rows of two
_NO_DOTS = 0x2800  # the Braille letter without a dot
_LABEL = 7  # letters of a number beside the plot


@dataclass(frozen=True, slots=True)
class Curve:
    """Values by step. marks: a mark at each value in place of a line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False

    @property
    def colour(self) -> str:
        return "yellow" if self.marks else "cyan"


def plot(curves: Sequence[Curve], width: int, height: int, unicode: bool = True) -> list[Text]:
    """`height` lines of at most `width` letters, the last with the steps; none where there is nothing to show."""
    points = [(x, y) for curve in curves for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
    columns, rows = width - _LABEL - 2, height - 1
    if not points or columns < 8 or rows < 2:
        return []
    (x0, x1), (y0, y1) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    x1, y1 = x1 if x1 > x0 else x0 + 1, y1 if y1 > y0 else y0 + max(abs(y0), 1.0) / 10
    cells: dict[tuple[int, int], tuple[str, str]] = {}  # row and column -> letter and style
    for curve in sorted(curves, key=lambda each: each.marks):  # marks lie on top
        known = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
        shares = [((x - x0) / (x1 - x0), (y1 - y) / (y1 - y0)) for x, y in known]  # from the upper left
        if curve.marks:
            places = ((round(y * (rows - 1)), round(x * (columns - 1))) for x, y in shares)
            cells |= dict.fromkeys(places, ("●" if unicode else "o", curve.colour))
            continue
        across, down = (2, 4) if unicode else (1, 1)  # dots of a cell
        for x, y in _line(shares, columns * across, rows * down):
            cell = (y // down, x // across)
            dots = ord(cells[cell][0]) if cell in cells else _NO_DOTS
            cells[cell] = (chr(dots | _DOTS[y % down][x % across]) if unicode else ".", curve.colour)
    labels = {0: _number(y1), rows - 1: _number(y0)}
    bar = "│" if unicode else "|"
    lines = [
        Text(f"{labels.get(row, ''):>{_LABEL}} {bar}", "dim").append_text(
            Text.assemble(*(cells.get((row, column), " ") for column in range(columns)))
        )
        for row in range(rows)
    ]
    first, last = f"{x0:,.0f}", f"step {x1:,.0f}"
    return [*lines, Text(" " * (_LABEL + 2) + first + last.rjust(columns - len(first)), "dim")]


def _line(shares: Sequence[tuple[float, float]], columns: int, rows: int) -> Iterator[tuple[int, int]]:
    """Dots of the mean of the values in each column, joined to the next."""
    places: dict[int, list[float]] = {}
    for x, y in shares:
        places.setdefault(round(x * (columns - 1)), []).append(y)
    before: tuple[int, int] | None = None
    for column in sorted(places):
        dot = (column, round(sum(places[column]) / len(places[column]) * (rows - 1)))
        yield from _between(before or dot, dot)
        before = dot


def _between(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots of a line, its end included."""
    num = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (round(start[0] + (end[0] - start[0]) * at / num), round(start[1] + (end[1] - start[1]) * at / num))
        for at in range(num + 1)
    ]


def _number(value: float) -> str:
    """Three digits or more, in at most _LABEL letters."""
    size = abs(value)
    return f"{value:.2f}" if 0.1 <= size < 1000 else f"{value:.0f}" if size < 1e6 and size >= 1 else f"{value:.1e}"


_NARROWEST = 64  # letters of a panel that stands beside another
_LOW, _HIGHEST = 3, 1000  # lines of a panel that has nothing but its state, and of one that is shown whole
_PLOT_ROWS = (5, 14)  # fewest and most
_STATE_STYLE = {"training": "green", "finished": "green", "stopped": "red", "unknown": "yellow"}
_MARKS = {"error": ("✗", "x", "red"), "warning": ("!", "!", "yellow")}  # of findings; in ASCII; style


def screen(looks: Sequence[RunLook], console: Console, whole: bool = False) -> RenderableType:
    """Panels beside one another as the width allows. whole: as high as they are; else as the window is."""
    width, height = console.size
    beside = max(1, min(len(looks), width // _NARROWEST))
    unicode = console.encoding.startswith("utf")
    rows = [looks[start : start + beside] for start in range(0, len(looks), beside)]
    low = [not any(look.record.steps or look.record.evaluations for look in row) for row in rows]  # nothing to draw yet
    room = (height - _LOW * sum(low)) // max(1, len(rows) - sum(low))
    table = Table.grid(expand=True)
    for _ in range(beside):
        table.add_column(ratio=1)
    for row, is_low in zip(rows, low, strict=True):
        lines = (_HIGHEST if whole else _LOW if is_low else max(_LOW, room)) - 2
        table.add_row(*(_panel(look, width // beside - 4, lines, unicode) for look in row))
    return table


def _panel(look: RunLook, width: int, height: int, unicode: bool) -> RenderableType:
    status = status_of(look)
    head, tail = [*_head(status, width, unicode)], [*_findings(status, unicode)]
    free = height - len(head) - len(tail)
    share = min(_PLOT_ROWS[1], free * 2 // 3 if free > 2 * _PLOT_ROWS[0] else free)
    drawn = _plot(look.record, width, share, unicode) if share >= _PLOT_ROWS[0] else []
    lines = [*head, *tail, *drawn, *_samples(status["samples"], width, free - len(drawn))]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    title = Text(f" {visible(str(look.record.folder))} ", "bold")
    title.truncate(max(4, width - 2), overflow="ellipsis")
    style = _STATE_STYLE.get(status["state"], "dim")
    return Frame(Group(*lines[:height]), title=title, title_align="left", border_style=style, safe_box=not unicode)


# The parts of a panel ------------------------------------------------------------------------------------------------


def _head(status: dict[str, Any], width: int, unicode: bool) -> Iterator[Text]:
    yield Text(status["says"], _STATE_STYLE.get(status["state"], "dim"))
    if status["verdict"]:
        yield Text(f"{status['verdict']['headline']}.", "bold")
    if status["report"]:
        yield Text(f"report: {status['report']}", "bold")
    yield from _progress(status, width, unicode)
    for label, value in figures(status).items():
        yield Text(f"{label:<9} ", "dim").append(value, "default")


def _progress(status: dict[str, Any], width: int, unicode: bool) -> Iterator[Text]:
    if not status["step"] and not status["num_steps"]:
        return
    line = Text(step_in_words(status), "bold")
    left = status["seconds_left"]
    left_over = "" if left is None else f"  {left_in_words(left)}"
    room = width - len(line.plain) - len(left_over) - 8
    if status["num_steps"] and room >= 8:
        done = min(1.0, status["step"] / status["num_steps"])
        full, empty = ("━", "─") if unicode else ("#", ".")
        line.append("  ").append(full * round(done * room), "green").append(empty * (room - round(done * room)), "dim")
        line.append(f" {done:4.0%}")
    yield line.append(left_over)


def _findings(status: dict[str, Any], unicode: bool) -> Iterator[Text]:
    for finding in status["findings"]:
        if finding["level"] in _MARKS:
            mark, in_ascii, style = _MARKS[finding["level"]]
            yield Text(f"{mark if unicode else in_ascii} {finding['seen']} {finding['advice']}".rstrip(), style)


def _plot(run: RunRecord, width: int, rows: int, unicode: bool) -> list[Text]:
    """Training and held-out loss, with a legend."""
    curves = []
    training = "training" if run.is_cross_entropy else f"training, {run.loss_unit}"
    for name, lines, marks in ((training, run.steps, False), ("held out", run.held_out, True)):
        points = [(line["step"], line["loss"]) for line in lines if isinstance(line.get("loss"), int | float)]
        if points:
            x, y = zip(*points, strict=True)
            curves.append(Curve(name, x, y, marks))
    drawn = plot(curves, width, rows - 1, unicode)
    if not drawn:
        return []
    legend = Text(" " * 9)
    for curve in curves:
        letter = ("●" if curve.marks else "⠤⠤") if unicode else ("o" if curve.marks else "..")
        legend.append(f"{letter} ", curve.colour).append(f"{curve.name}   ", "dim")
    return [legend, *drawn]


def _samples(samples: Sequence[dict[str, Any]], width: int, room: int) -> Iterator[Text]:
    """Prompts and answers of the newest evaluation, as many as there is room for."""
    if not samples or room < 3:
        return
    yield Text(f"answers {after(samples[0]['step'])}", "bold")
    for sample in samples[: (room - 1) // 2]:
        yield Text("  ").append(_one_line(sample.get("prompt", ""), width - 2), "dim")
        stops = "" if sample.get("stopped", True) else " (does not stop)"
        yield (
            Text("  > ", "green")
            .append(_one_line(sample.get("answer", ""), width - 4 - len(stops)))
            .append(stops, "yellow")
        )


def _one_line(text: object, width: int) -> str:
    """The beginning of a text, its lines joined."""
    joined = visible(" ".join(str(text)[: 4 * width].split())) or "(nothing)"
    return joined if len(joined) <= width else joined[: max(1, width - 3)] + "..."


# Where it is no terminal ---------------------------------------------------------------------------------------------


@dataclass
class News:
    """What was last said of a run."""

    state: str = ""
    tenth: int = -1
    evaluated: int | None = None

    def line(self, status: dict[str, Any]) -> str | None:
        """A line where the state has changed, a tenth of the steps is done, or the run was evaluated; else None."""
        tenth = 10 * status["step"] // status["num_steps"] if status["num_steps"] else 0
        now = (status["state"], tenth, status["evaluated"])
        if now == (self.state, self.tenth, self.evaluated):
            return None
        told = status["says"] if status["state"] != self.state else ""
        self.state, self.tenth, self.evaluated = now
        parts = [told, *([step_in_words(status)] if status["step"] else [])]
        known = ("loss", "held out", "tasks", "")  # no label: one more task
        parts += [f"{label} {value}".strip() for label, value in figures(status).items() if label.strip() in known]
        if status["verdict"]:
            parts.append(status["verdict"]["headline"])
        if status["report"]:
            parts.append(f"report: {status['report']}")
        return f"{status['run']}: {'; '.join(filter(None, parts))}"
