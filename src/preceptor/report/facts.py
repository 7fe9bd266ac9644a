"""The figures of a run that stand in a table: alone, or beside those of other runs."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from preceptor.report.reading import RunRecord, flat
from preceptor.report.verdict import ends

Table = list[tuple[str, list[str]]]


def facts(run: RunRecord) -> dict[str, str]:
    """Label -> figure, in words; what is not known is not there."""
    tokens, summary, data = run.data.get("tokens", {}), run.summary, run.data
    found: dict[str, Any] = {
        "rows of data": _number(data.get("num_examples")),
        "rejected": _number(len(run.rejections)),
        "conversations an epoch": _number(data.get("examples_per_epoch", summary.get("examples_per_epoch"))),
        "tokens an epoch": _number(tokens.get("computed")),
        "of them trained": _number(tokens.get("trained")),
        "rows' room filled": _share(data.get("fill")),
        "steps": _steps(run),
        **_losses(run),
        "answers exactly": _share(summary.get("intern_exact_match")),
        "tokens a second (median)": _number(_throughput(run)),
        **_memory(run),
        "time": _seconds(summary.get("seconds")),
    }
    return {label: text for label, text in found.items() if text}


def _losses(run: RunRecord) -> dict[str, str]:
    both = ends(run)
    found = {"training loss, first and last tenth": f"{both[0]:.4f}, {both[1]:.4f}"} if both else {}
    looks = [look for look in run.looks if "loss" in look]
    if looks:
        best = min(looks, key=lambda look: float(look["loss"]))
        found["held-out loss, first and last"] = f"{looks[0]['loss']:.4f}, {looks[-1]['loss']:.4f}"
        found["lowest held-out loss"] = f"{best['loss']:.4f} after step {best['step']:,}"
        if "bits_per_byte" in looks[-1] and "bits_per_byte" in looks[0]:
            pair = (looks[0]["bits_per_byte"], looks[-1]["bits_per_byte"])
            found["held-out bits per byte, first and last"] = f"{pair[0]:.4f}, {pair[1]:.4f}"
        if "token_accuracy" in looks[-1]:
            found["held-out tokens guessed right"] = f"{looks[-1]['token_accuracy']:.1%}"
    return found


def _steps(run: RunRecord) -> str:
    planned = run.data.get("num_steps")
    return f"{run.num_steps:,}" + (f" of {planned:,}" if planned and planned != run.num_steps else "")


def _throughput(run: RunRecord) -> float | None:
    rates = [step["num_tokens"] / step["seconds"] for step in run.steps if step.get("seconds") and "num_tokens" in step]
    return median(rates) if rates else None


def _memory(run: RunRecord) -> dict[str, str]:
    """The peak, and the plan's prediction beside it.

    On a processor the peak is the whole process; what it held before the model came is no part of the prediction, which
    is of tensors alone.
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


def held_out_groups(run: RunRecord) -> list[tuple[str, list[str], Table]]:
    """(what by, columns, rows) of the held-out figures by source, kind and turn, where there are several of them."""
    looks = [look for look in run.looks if "loss" in look]
    found = []
    for key, by in (("by_source", "source"), ("by_kind", "kind of message"), ("by_turn", "turn")):
        groups: dict[str, Any] = looks[-1].get(key, {}) if looks else {}
        if len(groups) < 2:
            continue
        before = looks[0].get(key, {})
        columns = [f"loss at step {look['step']:,}" for look in (looks[0], looks[-1])]
        rows = [
            (
                str(name),
                [
                    f"{before[name]['loss']:.4f}" if name in before else "–",
                    f"{own['loss']:.4f}",
                    f"{own['token_accuracy']:.1%}",
                    f"{own['num_trained']:,}",
                ],
            )
            for name, own in groups.items()
        ]
        found.append((by, [*columns, "tokens guessed right", "tokens"], rows))
    return found


def side_by_side(columns: Sequence[dict[str, Any]], differing: bool = False) -> Table:
    """(label, a cell for each run), labels in the order in which they first occur. differing: only rows that differ."""
    labels = list(dict.fromkeys(label for column in columns for label in column))
    rows = [(label, [_cell(column, label) for column in columns]) for label in labels]
    return [(label, cells) for label, cells in rows if not differing or len(set(cells)) > 1]


def _cell(column: dict[str, Any], label: str) -> str:
    if label not in column:
        return "–"
    value = column[label]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def config_differences(runs: Sequence[RunRecord]) -> Table:
    """The keys of the run files whose values differ; `out` differs always and is left out."""
    return [row for row in side_by_side([flat(run.config) for run in runs], differing=True) if row[0] != "out"]


def environment_differences(runs: Sequence[RunRecord]) -> Table:
    """Where the surroundings of runs differ: versions, machine, hashes of model and data."""
    columns = []
    for run in runs:
        known = {
            key: value for key, value in run.environment.items() if key not in ("command", "date", "resumed", "data")
        }
        files = {f"data {file['name']}": file.get("sha256") or "not known" for file in run.environment.get("data", ())}
        columns.append({**flat(known), **files})
    return side_by_side(columns, differing=True)
