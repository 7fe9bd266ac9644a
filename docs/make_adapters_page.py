"""Writes the table of docs/adapters.md from benchmarks/results/adapters.json.

python docs/make_adapters_page.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "adapters.md"
MEASURED = re.compile(r"(?<=## Measured\n\n).*", re.DOTALL)


def measured() -> str:
    found = json.loads((ROOT / "benchmarks" / "results" / "adapters.json").read_text(encoding="utf-8"))
    settings, items = found["settings"], found["num_items"]
    says = (
        f"`python experiments/adapters.py` measured this on {found['date']}: {found['machine']}, torch "
        f"{found['torch']}, bitsandbytes\n{found['bitsandbytes']}. Each setting trains the scholar on the package's "
        f"1,000 conversations for {settings['steps']} steps of {settings['max_length']} tokens,\nunder "
        f"{settings['seeds']} seeds, with rank {settings['rank']}. *Loss*: mean of the last {settings['last']} steps. "
        f"*Answers*: exact answers to {items['heldout']} held-out\nquestions. *Tax*: bits per byte on "
        f"{items['pages']} new pages of the library, above the base. Brackets hold 95 % intervals over\nseeds and "
        "items; *from LoRA* is the difference to the first row in points. *MB*: weights, gradients and states.\n"
        "The scholar's embedding and head are not quantized, and are a large part of it."
    )
    head = ["setting", "rate", "MB", "loss", "answers", "from LoRA", "tax"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    lines += [f"| {' | '.join(_cells(row))} |" for row in found["adapters"]]
    return "\n".join([says, "", *lines, ""])


def _cells(row: dict[str, Any]) -> list[str]:
    exact, change, tax = row["figures"]["exact"], row["from_lora"]["exact"], row["tax"]
    return [
        row["label"],
        f"{row['learning_rate']:g}",
        f"{sum(row['bytes'].values()) / 1e6:.1f}",
        f"{sum(row['last_loss']) / len(row['last_loss']):.3f}",
        f"{100 * exact['value']:.1f} %",
        "" if row["name"] == "lora" else _interval(change, 100, 1),
        _interval(tax, 1, 4),
    ]


def _interval(own: dict[str, float], unit: float, digits: int) -> str:
    value, low, high = (f"{unit * own[edge]:+.{digits}f}".replace("-", "−") for edge in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MEASURED.sub(lambda _: measured(), page), encoding="utf-8")
