"""The results of `preceptor compare` in a run folder (compare/compare.py), prepared for the page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preceptor.compare.verdict import HEADLINES, MARGINAL, SHIFTED, is_finite, short_names
from preceptor.evaluate.intervals import Interval
from preceptor.report.facts import LabelledRows
from preceptor.report.plots import Panel, Series, smooth, thin
from preceptor.report.run_record import JsonObject, in_figures

CLASSES = ("unshifted", "marginal", "shifted")
MOST_ANSWERS = 12
MOST_TOKENS = 25
SMOOTHED_POSITIONS = 5


@dataclass(frozen=True)
class Comparison:
    base: str
    tuned: str
    sentences: Sequence[str]
    rows: LabelledRows
    panels: list[Panel]
    skipped: str
    shares: LabelledRows
    tokens: LabelledRows
    answers: list[tuple[str, list[tuple[str, str, str]]]]  # (source, [(text, class of its rank, explanation)])


def read_comparison(compare: JsonObject) -> Comparison | None:
    """The comparison, or None if there is none."""
    if not compare:
        return None
    shift = compare.get("shift") or {}
    measured = "shares" in shift
    return Comparison(
        base=compare["base"],
        tuned=compare["tuned"],
        sentences=compare["verdict"],
        rows=[row for task in compare["tasks"] for row in _rows(task)],
        panels=[*_differences(compare["tasks"]), *(_by_position(shift) if measured else ())],
        skipped=shift.get("skipped", ""),
        shares=_shares(shift) if measured else [],
        tokens=[
            (repr(own["token"]), [f"{own['num']:,}", f"{own['num_shifted']:,}", in_figures(own["mean_prob"])])
            for own in shift.get("most_shifted", ())[:MOST_TOKENS]
        ],
        answers=[(own["source"], list(_pieces(own))) for own in shift.get("answers", ())[:MOST_ANSWERS]],
    )


def _rows(task: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for name, figure in task["figures"].items():
        base = figure["base"]["value"]
        unit = 100.0 if (base is None or base <= 1) and HEADLINES[task["kind"]].scale > 1 else 1.0
        sides = [_interval(figure[which], unit) for which in ("base", "tuned")]
        difference = _interval(figure["difference"], unit, sign=True)
        yield f"{task['task']} ({task['role']})", [name, *sides, difference, f"{task['num_items']:,}"]


def _interval(figure: Mapping[str, Any], unit: float, sign: bool = False) -> str:
    """`94.1% (92.0 to 95.8)`; differences of shares in points; null is not finite."""
    if figure["value"] is None:
        return in_figures(None)
    digits, after = (1, " points" if sign else "%") if unit > 1 else (4, "")
    value = f"{figure['value'] * unit:{'+' if sign else ''}.{digits}f}{after}"
    if figure["low"] is None or figure["high"] is None:
        return value
    return f"{value} ({figure['low'] * unit:.{digits}f} to {figure['high'] * unit:.{digits}f})"


def _differences(tasks: Sequence[Mapping[str, Any]]) -> Iterator[Panel]:
    """Tuned minus base by the headline metric of each task, with better to the right."""
    names = short_names(task["task"] for task in tasks)
    for unit, title in (("points", "Tasks: tuned minus base"), ("bits per byte", "Texts: base minus tuned")):
        lines = []
        for task in filter(is_finite, tasks):
            metric = HEADLINES[task["kind"]]
            if metric.unit == unit:
                own = Interval(**task["figures"][metric.name]["difference"]).times(metric.better * metric.scale)
                name = names[task["task"]]
                lines.append((name if len(name) <= 18 else name[:17] + "…", own.value, own.low, own.high))
        if lines:
            note = f"{unit}; right of zero is better than before"
            yield Panel(title, unit, [], note, unit, intervals=lines)


def _by_position(shift: Mapping[str, Any]) -> Iterator[Panel]:
    places = shift["by_position"]
    width = SMOOTHED_POSITIONS if len(places) > 4 * SMOOTHED_POSITIONS else 1
    shares = [(name, name, 100.0, colour) for name, colour in zip(CLASSES, (3, 5, 2), strict=True)]
    for title, unit, what, curves in (
        ("Shift by position", "%", "% of answer tokens", shares),
        ("KL from the base by position", "nats", "nats", [("KL", "mean_kl", 1.0, 1)]),
    ):
        series = []
        for name, key, factor, colour in curves:
            known = [place for place in places if place[key] is not None]  # null: not finite
            x, y = ([float(place[of]) for place in known] for of in ("position", key))
            series.append(Series(name, *thin(x, smooth([factor * value for value in y], width)), colour=colour))
        note = f"{what}; mean of {width} positions" if width > 1 else what
        yield Panel(title, unit, series, note, "position in the answer", from_zero=True)


def _shares(shift: Mapping[str, Any]) -> LabelledRows:
    rows = [(name, [_interval(shift["shares"][name], 100.0)]) for name in CLASSES]
    rows.append(("mean probability under the base", [_interval(shift["mean_prob"], 1.0)]))
    rows.append(("mean KL from the base, nats per token", [_interval(shift["mean_kl"], 1.0)]))
    of, added = f"{shift['num_tokens']:,} of {shift['num_prompts']:,} answers", shift["num_added"]
    return [*rows, ("tokens", [f"{of}; {added:,} more that the base lacks"])]


def _pieces(answer: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for text, rank, prob, kl in zip(answer["texts"], answer["ranks"], answer["probs"], answer["kls"], strict=True):
        if rank == 0:
            yield text, "added", "the base lacks this token"
        else:
            name = CLASSES[(rank >= MARGINAL) + (rank >= SHIFTED)]
            about = f"probability {in_figures(prob)}, KL {in_figures(kl, '.3f')} nats"
            yield text, name, f"{name}: rank {rank:,} under the base, {about}"
