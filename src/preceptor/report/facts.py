"""Tables of figures of a run, or of several side by side.

And recorded examples as what the page draws: straight lines of segments, and forks from which branches go off.
"""

from collections.abc import Sequence
from statistics import median
from typing import Any

from markupsafe import Markup, escape

from preceptor.report.run_record import NATS, JsonObject, RunRecord, finite, flat, in_figures, tokens_per_second

LabelledRows = list[tuple[str, list[str]]]  # (label, cells)


def facts(run: RunRecord) -> dict[str, str]:
    """Label -> figure as text, without what is not known."""
    tokens, summary, data = run.data.get("tokens", {}), run.summary, run.data
    rates = [rate for step in run.steps if (rate := tokens_per_second(step)) is not None]
    held_out = run.counts.held_out_rejected if run.counts else 0
    best = summary.get("best")
    compiling = (data.get("compile_seconds") or 0) + sum(step.get("compile_seconds") or 0 for step in run.steps)
    of_all = "tokens per epoch" if data.get("num_windows") is None else "tokens in these windows"
    found: dict[str, Any] = {
        "windows begun": _number(data.get("num_windows")),
        "examples in the data" if data.get("num_windows") is None else "examples read": str(run.counts or ""),
        "rejected": f"{len(run.rejections):,}{f', {held_out:,} of them held out' if held_out else ''}",
        "examples per epoch": _number(data.get("examples_per_epoch", summary.get("examples_per_epoch"))),
        of_all: _number(tokens.get("computed")),
        f"trained {of_all}": _number(tokens.get("trained")),
        "sequences filled": _share(data.get("fill")),
        "steps": _steps(run),
        "steps skipped": _number(len(run.skipped) or None),
        # where it is not the last step's as a matter of course
        "model": best and f"that of step {best['step']:,}, the best by {best['metric']} ({best['value']:.4f})",
        **_losses(run),
        "exact answers": _share(summary.get("intern_exact_match")),
        "tokens per second (median)": _number(median(rates) if rates else None),
        **_memory(run),
        "time of all steps" if run.environment.get("resumed") else "time": _seconds(summary.get("seconds")),
        "of it compiling layers": _seconds(compiling or None),  # that of a step is not among its seconds
    }
    return {label: text for label, text in found.items() if text}


def _losses(run: RunRecord) -> dict[str, str]:
    both = run.loss_ends
    unit = "" if run.loss_unit == NATS else f" ({run.loss_unit})"
    found = {f"training loss{unit}, first and last tenth": f"{both[0]:.4f}, {both[1]:.4f}"} if both else {}
    if run.held_out:
        first, last = run.held_out[0], run.held_out[-1]
        found["held-out loss, first and last"] = f"{in_figures(first['loss'])}, {in_figures(last['loss'])}"
        if known := finite(run.held_out):
            best = min(known, key=lambda own: float(own["loss"]))
            found["lowest held-out loss"] = f"{best['loss']:.4f} after step {best['step']:,}"
        if "bits_per_byte" in first and "bits_per_byte" in last:
            pair = f"{in_figures(first['bits_per_byte'])}, {in_figures(last['bits_per_byte'])}"
            found["held-out bits per byte, first and last"] = pair
        own = (run.held_out_of_model or run.held_out)[-1]
        if "token_accuracy" in own:
            found["held-out token accuracy"] = f"{own['token_accuracy']:.1%}"
    return found


def _steps(run: RunRecord) -> str:
    planned = run.data.get("num_steps")
    return f"{run.num_steps:,}" + (f" of {planned:,}" if planned and planned != run.num_steps else "")


def _memory(run: RunRecord) -> dict[str, str]:
    """The measured peak and the plan's prediction.

    On a CPU the peak is that of the whole process; the prediction is of tensors alone, without what the process held
    before the model was loaded.
    """
    peak = max((step.get("peak_memory_bytes") or 0 for step in run.steps), default=0)
    found = {"peak memory": _megabytes(peak)}
    before = run.summary.get("memory_before_bytes")
    if before is None or not peak:
        return found
    if before:
        found["peak memory"] += f", {_megabytes(before)} of them before the model was loaded"
    predicted = run.summary.get("predicted_memory_bytes")
    if predicted is None:
        return found | {"predicted memory": "none: the plan does not know this kind of model or run"}
    grown = peak - before
    return found | {"predicted memory": f"{_megabytes(predicted)} for tensors, {_megabytes(grown) or '0 MB'} measured"}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB" if value else ""


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def held_out_groups(run: RunRecord) -> list[tuple[str, list[str], LabelledRows]]:
    """(name, columns, rows) of the held-out figures by source, kind and turn, if there are several of them."""
    found, evaluations = [], run.held_out_of_model
    for key, by in (("by_source", "source"), ("by_kind", "kind of message"), ("by_turn", "turn")):
        groups: dict[str, Any] = evaluations[-1].get(key, {}) if evaluations else {}
        if len(groups) < 2:
            continue
        before = evaluations[0].get(key, {})
        rows = []
        for name, own in groups.items():
            losses = [in_figures(each["loss"]) if each else "–" for each in (before.get(name), own)]
            rows.append((str(name), [*losses, f"{own['token_accuracy']:.1%}", f"{own['num_trained']:,}"]))
        columns = [f"loss at step {own['step']:,}" for own in (evaluations[0], evaluations[-1])]
        found.append((by, [*columns, "token accuracy", "tokens"], rows))
    return found


def side_by_side(columns: Sequence[dict[str, Any]], differing: bool = False) -> LabelledRows:
    """(label, a cell for each run), labels in the order of their first occurrence. differing: only rows that differ."""
    labels = list(dict.fromkeys(label for column in columns for label in column))
    rows = [(label, [_cell(column.get(label, "–")) for column in columns]) for label in labels]
    return [(label, cells) for label, cells in rows if not differing or len(set(cells)) > 1]


def _cell(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def environment_differences(runs: Sequence[RunRecord]) -> LabelledRows:
    """Where the environments of runs differ: versions, machine, hashes of model and data."""
    columns = []
    for run in runs:
        known = {
            key: value for key, value in run.environment.items() if key not in ("command", "date", "resumed", "data")
        }
        files = {f"data {file['name']}": file.get("sha256") or "not known" for file in run.environment.get("data", ())}
        columns.append({**flat(known), **files})
    return side_by_side(columns, differing=True)


_MARKS = {"\n": '<i class="nl"></i>\n', "\t": '<i class="tab">\t</i>'}


def paths(example: JsonObject) -> list[JsonObject]:
    """The segments of an example from the root on, each with `position`, and a fork before each that has siblings.

    The last child goes straight on, as later turns see it; those before it are the fork's `branches`.
    """
    children: dict[int | None, list[JsonObject]] = {}
    for segment in example["segments"]:
        children.setdefault(segment["parent"], []).append(segment)

    def grow(parent: int | None, position: int) -> list[JsonObject]:
        path: list[JsonObject] = []
        while following := children.get(parent):
            if len(following) > 1:
                branches = [
                    [{**child, "position": position}, *grow(child["id"], position + child["num_tokens"])]
                    for child in following[:-1]
                ]
                path.append({"num_tokens": position, "branches": branches})
            last = following[-1]
            path.append({**last, "position": position})
            parent, position = last["id"], position + last["num_tokens"]
        return path

    return grow(None, 0)


def num_branches(example: JsonObject) -> int:
    parents = {segment["parent"] for segment in example["segments"]}
    return sum(segment["id"] not in parents for segment in example["segments"])


def visible(text: str) -> Markup:
    """Text with its line ends and tabs marked, and characters without a shape shown as their number."""
    shown = []
    for character in text:
        if character in _MARKS:
            shown.append(_MARKS[character])
        elif character.isprintable():
            shown.append(str(escape(character)))
        else:
            shown.append(f'<i class="odd-character" data-name="U+{ord(character):04X}"></i>')
    return Markup("".join(shown))
