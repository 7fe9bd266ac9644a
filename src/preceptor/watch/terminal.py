"""Watched runs in a terminal: a panel for each run, drawn again as it grows; elsewhere a line for what is new."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel as Frame
from rich.table import Table
from rich.text import Text

from preceptor.console import visible
from preceptor.report.run_record import RunRecord
from preceptor.watch.live_run import RunLook
from preceptor.watch.status import after, figures, left_in_words, status_of, step_in_words
from preceptor.watch.text_plot import COLOURS, Curve, plot

_NARROWEST = 64  # letters of a panel that stands beside another
_LOW = 3  # lines of a panel that has nothing but its state
_PLOT_ROWS = (5, 14)  # fewest and most
_STATE_STYLE = {"training": "green", "finished": "green", "stopped": "red", "unknown": "yellow"}
_MARKS = {"error": ("✗", "red"), "warning": ("!", "yellow"), "note": ("·", "dim"), "good": ("✓", "green")}
_ASCII_MARKS = {"error": "x", "warning": "!", "note": "-", "good": "+"}


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
        lines = None if whole else (_LOW if is_low else max(_LOW, room)) - 2
        table.add_row(*(_panel(look, width // beside - 4, lines, unicode) for look in row))
    return table


def _panel(look: RunLook, width: int, height: int | None, unicode: bool) -> RenderableType:
    status = status_of(look)
    head, tail = [*_head(status, width, unicode)], [*_findings(status, unicode)]
    if height is None:
        rest = [*_plot(look.record, width, _PLOT_ROWS[1], unicode), *_samples(status["samples"], width, 1000)]
    else:
        free = height - len(head) - len(tail)
        share = min(_PLOT_ROWS[1], free * 2 // 3 if free > 2 * _PLOT_ROWS[0] else free)
        drawn = _plot(look.record, width, share, unicode) if share >= _PLOT_ROWS[0] else []
        rest = [*drawn, *_samples(status["samples"], width, free - len(drawn))]
    lines = [*head, *tail, *rest]
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
        if finding["level"] in ("error", "warning"):
            mark, style = _MARKS[finding["level"]]
            text = f"{mark if unicode else _ASCII_MARKS[finding['level']]} {finding['seen']} {finding['advice']}"
            yield Text(text.rstrip(), style)


def _plot(run: RunRecord, width: int, rows: int, unicode: bool) -> list[Text]:
    """Training and held-out loss, with a legend."""
    curves = []
    for name, lines, marks in (("training", run.steps, False), ("held out", run.held_out, True)):
        points = [(line["step"], line["loss"]) for line in lines if isinstance(line.get("loss"), int | float)]
        if points:
            x, y = zip(*points, strict=True)
            curves.append(Curve(name, x, y, marks, colour=int(marks)))
    drawn = plot(curves, width, rows - 1, unicode)
    if not drawn:
        return []
    legend = Text(" " * 9)
    for curve in curves:
        letter = ("●" if curve.marks else "⠤⠤") if unicode else ("o" if curve.marks else "..")
        legend.append(f"{letter} ", COLOURS[curve.colour]).append(f"{curve.name}   ", "dim")
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
