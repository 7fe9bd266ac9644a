"""Writes the table and figures of docs/optimizers.md from benchmarks/results/optimizers.json.

python docs/make_optimizers_page.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "optimizers.md"
MEASURED = re.compile(r"`python experiments/optimizers.py` measured.*?(?=\n\n## )", re.DOTALL)


def measured() -> str:
    found = json.loads((ROOT / "benchmarks" / "results" / "optimizers.json").read_text(encoding="utf-8"))
    settings, items = found["settings"], found["num_items"]
    says = (
        f"`python experiments/optimizers.py` measured this on {found['date']}: {found['machine']}, torch "
        f"{found['torch']}.\nEach setting trains the scholar on the package's 1,000 conversations for "
        f"{settings['steps']} steps of {settings['max_length']}\ntokens, under {settings['seeds']} seeds, at a "
        "learning rate of its own: the best of three to five by the training loss under\nanother seed. *Loss*: mean of "
        f"the last {settings['last']} steps. *Answers*: exact answers to {items['heldout']} held-out questions. *Tax*: "
        f"bits\nper byte on {items['pages']} new pages of the library, above the base. Brackets hold 95 % intervals "
        "over seeds and items, and\n*from float32* is the difference to the first row in points."
    )
    head = ["setting", "rate", "weights", "gradients", "states", "all", "loss", "answers", "from float32", "tax"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    lines += [f"| {' | '.join(_cells(row))} |" for row in found["optimizers"]]
    return "\n".join([says, "", *lines])


def _cells(row: dict[str, Any]) -> list[str]:
    each = row["bytes_per_parameter"]
    exact, change, tax = row["figures"]["exact"], row["from_float32"]["exact"], row["tax"]
    return [
        row["label"],
        f"{row['learning_rate']:g}",
        *(f"{each[name]:.2f}" for name in ("weights", "gradients", "optimizer")),
        f"{sum(each.values()):.2f}",
        f"{sum(row['last_loss']) / len(row['last_loss']):.3f}",
        f"{100 * exact['value']:.1f} %",
        "" if row["name"] == "float32" else _interval(change, 100, 1),
        _interval(tax, 1, 4),
    ]


def _interval(own: dict[str, float], unit: float, digits: int) -> str:
    value, low, high = (f"{unit * own[edge]:+.{digits}f}".replace("-", "−") for edge in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MEASURED.sub(lambda _: measured(), page), encoding="utf-8")
