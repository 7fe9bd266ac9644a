"""Plots of the course of a run, or of several runs in one picture each."""

from collections.abc import Iterator, Sequence
from typing import Any

from preceptor.report.plots import NUM_COLOURS, Panel, Series, smooth, thin
from preceptor.report.run_record import JsonObject, RunRecord, tokens_per_second

MEGABYTE = 1e6
PREDICTED = "predicted_memory_bytes"
_BARS = "; bars: 95 % intervals"
_SMOOTH_SHARE = 25  # a curve is smoothed over 1/25 of its steps


def panels(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Panel]:
    """Plots of whatever was recorded: losses, held-out figures, learning rate, gradient norm, throughput, memory."""
    one = len(runs) == 1
    found: list[Panel | None] = (
        [_loss(runs[0])] if one else [_over_steps(runs, names, "Training loss", "nats per trained token", "loss")]
    )
    if not one:
        found.append(_over_evaluations(runs, names, "Held-out loss", "nats per trained token", "loss"))
    found.append(_over_evaluations(runs, names, "Held-out token accuracy", "%", "token_accuracy", 100.0))
    found.append(_over_evaluations(runs, names, "Held-out bits per byte", "bits per byte", "bits_per_byte"))
    found.append(_over_steps(runs, names, "Learning rate", "", "learning_rate", plain=True, from_zero=True))
    limits = {run.config.get("optimizer", {}).get("max_grad_norm") for run in runs}
    limit = limits.pop() if len(limits) == 1 else None
    level = None if limit is None else (f"max_grad_norm {limit:g}", float(limit))
    found.append(
        _over_steps(runs, names, "Gradient norm", "before it is scaled down", "grad_norm", log=True, level=level)
    )
    note = "of the routers, before loss.router_aux_coef"
    found.append(_over_steps(runs, names, "Load-balancing loss", note, "router_aux_loss"))
    found += _tasks(runs, names)
    found.append(_over_steps(runs, names, "Throughput", "tokens per second", tokens_per_second, from_zero=True))
    found.append(_memory(runs, names))
    return [panel for panel in found if panel is not None and panel.series]


def lengths(run: RunRecord) -> Iterator[Panel]:
    """Histograms of the lengths of trees and of targets."""
    for key, title in (("trees", "Length of a conversation"), ("targets", "Length of a trained answer")):
        known = run.data.get("lengths", {}).get(key)
        if known:
            note = (
                f"{known['min']:,} to {known['max']:,} tokens, median {known['median']:,}, 95% up to {known['p95']:,}"
            )
            yield Panel(title, "", [], note, "tokens", bars=(known["edges"], known["counts"]))


def _loss(run: RunRecord) -> Panel:
    x, y = _points(run.steps, "loss")
    shown_x, shown_y = thin(x, y)
    width = _window(len(y))
    series = []
    if width > 1:
        series.append(Series("training", shown_x, shown_y, faint=True))
        x, y = thin(x, smooth(y, width))
        series.append(Series(f"training, mean of {width} steps", x, y))
    elif y:
        series.append(Series("training", shown_x, shown_y))
    held_x, held_y = _points(run.evaluations, "loss")
    ends = _intervals(run, held_y)
    if held_y:
        series.append(Series("held out", held_x, held_y, colour=2, marks=True, y_ends=ends))
    return Panel("Loss", "nats per trained token", series, f"nats per trained token{_BARS if ends else ''}")


def _over_steps(
    runs: Sequence[RunRecord],
    names: Sequence[str],
    title: str,
    note: str,
    key: Any,
    plain: bool = False,
    **settings: Any,
) -> Panel | None:
    """plain: the values themselves; otherwise smoothed, with the values behind the curve if there is only one run."""
    series: list[Series] = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        x, y = _points(run.steps, key)
        width = 1 if plain else _window(len(y))
        colour = 1 + index % NUM_COLOURS
        if width > 1 and len(runs) == 1:
            series.append(Series(name, *thin(x, y), colour=colour, faint=True))
        if y:
            smoothed = f", mean of {width} steps" if width > 1 and len(runs) == 1 else ""
            label = title.lower() + smoothed if len(runs) == 1 else name
            series.append(Series(label, *thin(x, smooth(y, width)), colour=colour))
    return Panel(title, note, series, note, **settings) if series else None


def _over_evaluations(
    runs: Sequence[RunRecord], names: Sequence[str], title: str, note: str, key: Any, factor: float = 1.0
) -> Panel | None:
    series = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        x, y = _points(run.evaluations, key)
        label = title.lower() if len(runs) == 1 else name
        ends = _intervals(run, y) if key == "loss" else []
        if y:
            y = [factor * value for value in y]
            series.append(Series(label, x, y, 1 + index % NUM_COLOURS, marks=True, y_ends=ends))
    around = _BARS if any(each.y_ends for each in series) else ""
    return Panel(title, note, series, f"{note}{around}") if series else None


def _tasks(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[Panel | None]:
    """A plot of the first figure of each task."""
    known = {
        (task["task"], next(iter(task["figures"])))
        for run in runs
        for evaluation in run.evaluations
        for task in evaluation.get("tasks", ())
    }
    for task, figure in sorted(known):

        def value(evaluation: JsonObject, task: str = task, figure: str = figure) -> float | None:
            tasks = evaluation.get("tasks", ())
            return next((own["figures"][figure]["value"] for own in tasks if own["task"] == task), None)

        yield _over_evaluations(runs, names, f"Task {task}", figure, value)


def _memory(runs: Sequence[RunRecord], names: Sequence[str]) -> Panel | None:
    panel = _over_steps(runs, names, "Memory", "peak so far, MB", _megabytes, plain=True, from_zero=True)
    predicted = runs[0].summary.get(PREDICTED)
    if panel is None or len(runs) > 1 or predicted is None:
        return panel
    level = ("predicted", float(predicted) / MEGABYTE)
    return Panel(panel.title, panel.y_label, panel.series, panel.note, level=level, from_zero=True)


def _points(lines: Sequence[JsonObject], key: Any) -> tuple[list[float], list[float]]:
    """(steps, values) of the lines that have a value. key: its name, or a function of the line."""
    pairs = [(line["step"], key(line) if callable(key) else line.get(key)) for line in lines]
    known = [(step, value) for step, value in pairs if isinstance(value, int | float) and value == value]
    return [float(step) for step, _ in known], [float(value) for _, value in known]


def _intervals(run: RunRecord, losses: Sequence[float]) -> list[tuple[float, float]]:
    """Of each held-out loss, the interval that was measured, else the loss itself; [] where none was."""
    measured = [line.get("loss_interval") for line in run.held_out]
    if not any(measured) or len(measured) != len(losses):
        return []
    return [(own[0], own[1]) if own else (loss, loss) for own, loss in zip(measured, losses, strict=True)]


def _window(num: int) -> int:
    """An odd number of values to smooth over; 1 for short curves."""
    return 2 * (num // (2 * _SMOOTH_SHARE)) + 1


def _megabytes(step: JsonObject) -> float | None:
    return step["peak_memory_bytes"] / MEGABYTE if step.get("peak_memory_bytes") else None
