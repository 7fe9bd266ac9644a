"""A comparison in words, from its figures alone. What an interval does not tell from zero is never called a change.

Shares are told in points (hundredths), texts in bits per byte; +- is half the width of the 95 % interval.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.evaluate.intervals import Interval

# The figure of each kind by which a task is told, what one unit of it is called, and whether more of it is better.
TOLD: Mapping[str, tuple[str, float, str, int]] = {
    "generation": ("accuracy", 100.0, "points", 1),
    "multiple choice": ("acc", 100.0, "points", 1),
    "perplexity": ("bits_per_byte", 1.0, "bits per byte", -1),
}


def short_name(task: str) -> str:
    """`arithmetic` of scholar:arithmetic, of some/arithmetic.jsonl and of arithmetic.jsonl.gz."""
    return Path(task.removeprefix("scholar:")).name.partition(".")[0]


def change(row: Mapping[str, Any]) -> int:
    """1: better than before, -1: worse, 0: not distinguishable from zero."""
    name, _, _, better = TOLD[row["kind"]]
    return better * Interval(**row["figures"][name]["difference"]).sign


def amount(row: Mapping[str, Any], signed: bool = False) -> str:
    """ "3.1 ± 0.8 points", by how much the figure changed."""
    name, unit, unit_name, _ = TOLD[row["kind"]]
    difference = Interval(**row["figures"][name]["difference"])
    digits = 1 if unit > 1 else 4
    value = difference.value * unit
    shown = f"{value:+.{digits}f}" if signed else f"{abs(value):.{digits}f}"
    half = difference.half_width
    return (
        f"{shown} {unit_name} on one item, whose spread is unknown"
        if half is None
        else (f"{shown} ± {half * unit:.{digits}f} {unit_name}")
    )


def sentence(row: Mapping[str, Any]) -> str:
    """One task in a sentence without its full stop."""
    name = TOLD[row["kind"]][0]
    figures, task = row["figures"][name], short_name(row["task"])
    if figures["num_changed"] == 0:
        return f"nothing changed on {task} (none of {row['num_items']:,} items)"
    sign = change(row)
    if sign == 0:
        return f"no change on {task} that can be told from zero ({amount(row, signed=True)})"
    if row["kind"] == "perplexity":
        relative = figures["difference"]["value"] / figures["base"]["value"]
        return f"predicts {task} {'better' if sign > 0 else 'worse'} by {amount(row)} ({relative:+.1%})"
    return f"{'gained' if sign > 0 else 'lost'} {amount(row)} on {task}"


def verdict(tasks: Sequence[Mapping[str, Any]], shift: Mapping[str, Any] | None) -> list[str]:
    """The comparison in a few sentences, what was trained first, then the tax, then the shift."""
    sentences = []
    trained = [row for row in tasks if row["role"] == "trained"]
    if trained:
        sentences.append(f"On what was trained: {_joined([sentence(row) for row in trained])}.")
    outside = [row for row in tasks if row["role"] != "trained"]
    if outside:
        sentences.append(f"{'Outside it' if trained else 'The tax'}: {_tax(outside)}.")
    if shift is not None and "shares" in shift:
        shares = {name: own["value"] for name, own in shift["shares"].items()}
        sentences.append(
            f"Of {shift['num_tokens']:,} answer tokens {shares['unshifted']:.1%} are the base's own first choice, "
            f"{shares['marginal']:.1%} its second or third, and {shares['shifted']:.1%} are shifted; the mean KL from "
            f"the base is {shift['mean_kl']['value']:.3f} nats a token."
        )
    return sentences


def _tax(rows: Sequence[Mapping[str, Any]]) -> str:
    lost, gained = ([row for row in rows if change(row) == sign] for sign in (-1, 1))
    same = [row for row in rows if change(row) == 0]
    parts = [sentence(row) for row in lost] or ["lost nothing that can be told from zero"]
    parts += [sentence(row) for row in gained] or ["gained nothing"]
    return _joined(parts + [sentence(row) for row in same])


def _joined(parts: Sequence[str]) -> str:
    return "; ".join(parts)
