"""Plots of the course of a run, or of several runs in one picture each."""

from collections.abc import Iterator, Sequence
from typing import Any

from preceptor.report.plots import NUM_COLOURS, Panel, Series, smooth, thin
from preceptor.report.run_record import NATS, JsonObject, RunRecord, finite, tokens_per_second

MEGABYTE = 1e6
PREDICTED = "predicted_memory_bytes"
_BARS = "; bars: 95 % intervals"
_SMOOTH_SHARE = 25  # a curve is smoothed over 1/25 of its steps


def panels(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Panel]:
    """Plots of whatever was recorded: losses, held-out figures, learning rate, gradient norm, throughput, memory."""
    if len(runs) == 1:
        found = [_loss(runs[0])]
    else:
        units = " or ".join(dict.fromkeys(run.loss_unit for run in runs))
        found = [_over_steps(runs, names, "Training loss", units, "loss")]
        found.append(_over_evaluations(runs, names, "Held-out loss", NATS, "loss"))
    found.append(_over_evaluations(runs, names, "Held-out token accuracy", "%", "token_accuracy", 100.0))
    found.append(_over_evaluations(runs, names, "Held-out bits per byte", "bits per byte", "bits_per_byte"))
    found.append(_over_steps(runs, names, "Learning rate", "", "learning_rate", plain=True, from_zero=True))
    limits = {run.config.get("optimizer", {}).get("max_grad_norm") for run in runs}
    limit = limits.pop() if len(limits) == 1 else None
    level = None if limit is None else (f"max_grad_norm {limit:g}", float(limit))
    note = "before it is scaled down"
    found.append(_over_steps(runs, names, "Gradient norm", note, "grad_norm", log=True, level=level))
    note = "of the routers, before loss.router_aux_coef"
    found.append(_over_steps(runs, names, "Load-balancing loss", note, "router_aux_loss"))
    found += _tasks(runs, names)
    found.append(_over_steps(runs, names, "Throughput", "tokens per second", tokens_per_second, from_zero=True))
    predicted = runs[0].summary.get(PREDICTED) if len(runs) == 1 else None
    level = None if predicted is None else ("predicted", float(predicted) / MEGABYTE)
    found.append(_memory(runs, names, level))
    return [panel for panel in found if panel.series]


def lengths(run: RunRecord) -> Iterator[Panel]:
    """Histograms of the lengths of trees and of targets."""
    for key, title in (("trees", "Length of a conversation"), ("targets", "Length of a trained answer")):
        known = run.data.get("lengths", {}).get(key)
        if known:
            spread = f"{known['min']:,} to {known['max']:,} tokens, median {known['median']:,}"
            note = f"{spread}, 95% up to {known['p95']:,}"
            yield Panel(title, "", [], note, "tokens", bars=(known["edges"], known["counts"]))


def _loss(run: RunRecord) -> Panel:
    training = _smoothed(run, "loss", "training", "training")
    held_x, held_y = _points(run.held_out, "loss")
    ends = _intervals(run, held_y)
    held_out = [Series("held out", held_x, held_y, colour=2, marks=True, y_ends=ends)] if held_y else []
    note = run.loss_unit
    if held_out and note != NATS:
        note = f"training: {note}; held out: {NATS}"
    return Panel("Loss", note, [*training, *held_out], f"{note}{_BARS if ends else ''}")


def _smoothed(run: RunRecord, key: Any, name: str, label: str, colour: int = 1) -> list[Series]:
    """The mean of some steps around each, and behind it the values themselves, by `name`; [] where there are none."""
    x, y = _points(run.steps, key)
    width = _window(len(y))
    if width == 1:
        return [Series(label, *thin(x, y), colour=colour)] if y else []
    mean = Series(f"{label}, mean of {width} steps", *thin(x, smooth(y, width)), colour=colour)
    return [Series(name, *thin(x, y), colour=colour, faint=True), mean]


def _over_steps(
    runs: Sequence[RunRecord],
    names: Sequence[str],
    title: str,
    note: str,
    key: Any,
    plain: bool = False,
    **settings: Any,
) -> Panel:
    """plain: the values themselves; otherwise smoothed, with the values behind the curve if there is only one run."""
    series: list[Series] = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        colour, label = 1 + index % NUM_COLOURS, title.lower() if len(runs) == 1 else name
        if len(runs) == 1 and not plain:
            series += _smoothed(run, key, name, label, colour)
            continue
        x, y = _points(run.steps, key)
        if y:
            series.append(Series(label, *thin(x, smooth(y, 1 if plain else _window(len(y)))), colour=colour))
    return Panel(title, note, series, note, **settings)


def _over_evaluations(
    runs: Sequence[RunRecord],
    names: Sequence[str],
    title: str,
    note: str,
    key: Any,
    factor: float = 1.0,
    task: str | None = None,
) -> Panel:
    """task: None for figures of the held-out examples."""
    series = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        x, y = _points(run.held_out if task is None else run.of_task(task), key)
        ends = _intervals(run, y) if key == "loss" else []
        if y:
            label, y = title.lower() if len(runs) == 1 else name, [factor * value for value in y]
            series.append(Series(label, x, y, 1 + index % NUM_COLOURS, marks=True, y_ends=ends))
    return Panel(title, note, series, note + _BARS * any(each.y_ends for each in series))


def _tasks(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[Panel]:
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

        yield _over_evaluations(runs, names, f"Task {task}", figure, value, task=task)


def _points(lines: Sequence[JsonObject], key: Any) -> tuple[list[float], list[float]]:
    """(steps, values) of the lines that have a value. key: its name, or a function of the line."""
    pairs = [(line["step"], key(line) if callable(key) else line.get(key)) for line in lines]
    known = [(step, value) for step, value in pairs if isinstance(value, int | float) and value == value]
    return [float(step) for step, _ in known], [float(value) for _, value in known]


def _intervals(run: RunRecord, losses: Sequence[float]) -> list[tuple[float, float]]:
    """Of each held-out loss, the interval that was measured, else the loss itself; [] where none was."""
    measured = [line.get("loss_interval") for line in finite(run.held_out)]
    if not any(measured) or len(measured) != len(losses):
        return []
    return [(own[0], own[1]) if own else (loss, loss) for own, loss in zip(measured, losses, strict=True)]


def _window(num: int) -> int:
    """An odd number of values to smooth over; 1 for short curves."""
    return 2 * (num // (2 * _SMOOTH_SHARE)) + 1


def _memory(runs: Sequence[RunRecord], names: Sequence[str], level: tuple[str, float] | None) -> Panel:
    """As the prediction: without what the process held before the model was loaded."""
    series = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        x, y = _points([step for step in run.steps if step.get("peak_memory_bytes")], "peak_memory_bytes")
        grown = [max(0.0, value - run.memory_before_bytes) / MEGABYTE for value in y]
        if y:
            series.append(Series("memory" if len(runs) == 1 else name, *thin(x, grown), 1 + index % NUM_COLOURS))
    before = any(run.memory_before_bytes for run in runs)
    note = "peak so far, MB" + ", without what was held before the model was loaded" * before
    return Panel("Memory", note, series, note, from_zero=True, level=level)
