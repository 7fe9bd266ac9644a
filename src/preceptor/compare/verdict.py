"""A comparison in words, from its figures alone. A difference whose interval contains zero is never called a change.

Shares are reported in points (hundredths), texts in bits per byte, each with the ends of its 95 % interval.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from preceptor.evaluate.intervals import Interval
from preceptor.files import distinct_ends


class HeadlineMetric(NamedTuple):
    """The one metric that sums up a task."""

    name: str
    scale: float  # from the metric to its unit
    unit: str  # of differences
    better: int  # 1: more is better, -1: less is better

    @property
    def digits(self) -> int:
        return 1 if self.scale > 1 else 4

    @property
    def value_unit(self) -> str:
        """The unit of the metric itself."""
        return "%" if self.scale > 1 else self.unit


MARGINAL, SHIFTED = 2, 4  # the first rank, under the base, of these classes of tokens (shift.py)
_FEW_ITEMS = 30
_POINTS, _RELATIVE = 0.05, 0.02  # a change that matters: of a share, and of bits per byte

HEADLINES: Mapping[str, HeadlineMetric] = {
    "generation": HeadlineMetric("accuracy", 100.0, "points", 1),
    "multiple choice": HeadlineMetric("acc", 100.0, "points", 1),
    "perplexity": HeadlineMetric("bits_per_byte", 1.0, "bits per byte", -1),
}


_ENDING = re.compile(r"(\.(jsonl|ndjson|json|csv|tsv|parquet|txt|ya?ml))?(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)


def short_name(task: str) -> str:
    """`arithmetic` of scholar:arithmetic, of some/arithmetic.jsonl and of arithmetic.jsonl.gz."""
    return _ENDING.sub("", Path(task.removeprefix("scholar:")).name)


def short_names(tasks: Iterable[str]) -> dict[str, str]:
    """The short name of each task, with as many of its folders as are needed to make all distinct."""
    named = list(dict.fromkeys(tasks))
    paths = [(*Path(task).parent.parts, short_name(task)) for task in named]
    if len(set(paths)) < len(named):  # x.jsonl and x.json, scholar:x and x.jsonl
        paths = [Path(task).parts for task in named]
    return dict(zip(named, distinct_ends(paths), strict=True))


def is_finite(entry: Mapping[str, Any]) -> bool:
    """Whether the headline metric of both models is finite. In a JSON file it is null where it is not."""
    figures = entry["figures"][HEADLINES[entry["kind"]].name]
    values = [figures[side]["value"] for side in ("base", "tuned", "difference")]
    return all(value is not None and math.isfinite(value) for value in values)


def change(entry: Mapping[str, Any]) -> int:
    """1: better than before, -1: worse, 0: not distinguishable from zero."""
    metric = HEADLINES[entry["kind"]]
    return metric.better * Interval(**entry["figures"][metric.name]["difference"]).sign


def tells(entry: Mapping[str, Any]) -> bool:
    """Whether the items are enough to show a change that matters: 5 points, or 2 % of the bits per byte."""
    metric = HEADLINES[entry["kind"]]
    figures = entry["figures"][metric.name]
    half = Interval(**figures["difference"]).half_width
    visible = _POINTS if metric.scale > 1 else _RELATIVE * abs(figures["base"]["value"])
    return entry["num_items"] >= _FEW_ITEMS and half is not None and half <= visible


def amount(entry: Mapping[str, Any], signed: bool = False) -> str:
    """ "3.1 points (2.2 to 3.8)", by how much the metric changed; signed: "+3.1 points, +2.2 to +3.8"."""
    metric = HEADLINES[entry["kind"]]
    difference = Interval(**entry["figures"][metric.name]["difference"])
    if not signed and difference.value < 0:
        difference = difference.times(-1)
    shown, low, high = (
        None if value is None else f"{value * metric.scale:{'+' * signed}.{metric.digits}f}"
        for value in (difference.value, difference.low, difference.high)
    )
    if low is None or high is None:
        return f"{shown} {metric.unit} on one item, whose spread is unknown"
    ends = f"{low} to {high}"
    return f"{shown} {metric.unit}, {ends}" if signed else f"{shown} {metric.unit} ({ends})"


def sentence(entry: Mapping[str, Any], name: str = "") -> str:
    """One task in a sentence, without its full stop. name: of `short_names`, where there are several tasks."""
    figures, task = entry["figures"][HEADLINES[entry["kind"]].name], name or short_name(entry["task"])
    if not is_finite(entry):
        return f"no finite figures on {task}"
    num = entry["num_items"]
    few = "" if tells(entry) else f"; {num:,} item{'s are' if num != 1 else ' is'} too few to show a small one"
    if figures["num_changed"] == 0:
        return f"nothing changed on {task} (none of {num:,} items{few})"
    sign = change(entry)
    if sign == 0:
        return f"no significant change on {task} ({amount(entry, signed=True)}{few})"
    if entry["kind"] == "perplexity":
        base = figures["base"]["value"]
        relative = f", {figures['difference']['value'] / base:+.1%}" if base else ""
        return f"predicts {task} {'better' if sign > 0 else 'worse'} by {amount(entry)}{relative}"
    return f"{'gained' if sign > 0 else 'lost'} {amount(entry)} on {task}"


def verdict(tasks: Sequence[Mapping[str, Any]], shift: Mapping[str, Any] | None) -> list[str]:
    """The comparison in a few sentences: first what was trained, then the tax, then the shift."""
    sentences = []
    names = short_names(entry["task"] for entry in tasks)
    trained = [entry for entry in tasks if entry["role"] == "trained"]
    if trained:
        sentences.append(f"On what was trained: {'; '.join(_told(trained, names))}.")
    outside = [entry for entry in tasks if entry["role"] != "trained"]
    if outside:
        sentences.append(f"{'Outside it' if trained else 'The tax'}: {_tax(outside, names)}.")
    if shift is not None and "shares" in shift:
        shares = {name: own["value"] for name, own in shift["shares"].items()}
        sentences.append(
            f"Of {shift['num_tokens']:,} answer tokens, {shares['unshifted']:.1%} are the base's first choice, "
            f"{shares['marginal']:.1%} its second or third, and {shares['shifted']:.1%} are shifted; the mean KL from "
            f"the base is {shift['mean_kl']['value']:.3f} nats per token."
        )
    return sentences


def _told(entries: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[str]:
    return [sentence(entry, names[entry["task"]]) for entry in entries]


def _tax(entries: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    broken = [entry for entry in entries if not is_finite(entry)]
    if not (entries := [entry for entry in entries if is_finite(entry)]):
        return "; ".join(_told(broken, names))
    lost, same, gained = ([entry for entry in entries if change(entry) == sign] for sign in (-1, 0, 1))
    unseen = "no significant loss" if all(map(tells, entries)) else "no loss that so few items can show"
    parts = _told(lost, names) or [unseen]
    parts += _told(gained, names) or ["no gain"]
    return "; ".join([*parts, *_told([*same, *broken], names)])
