"""Writes the measured tables of docs/optimizers.md and docs/adapters.md from benchmarks/results.

python docs/make_settings_pages.py
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class SettingsPage:
    """place: of what is made in the page. says: the paragraph above the table. heads, cells: its columns of memory."""

    what: str
    reference: str
    reference_says: str
    place: re.Pattern[str]
    says: Callable[[dict[str, Any]], str]
    heads: tuple[str, ...]
    cells: Callable[[dict[str, Any]], list[str]]

    @property
    def file(self) -> Path:
        return ROOT / "docs" / f"{self.what}.md"

    def measured(self) -> str:
        found = json.loads((ROOT / "benchmarks" / "results" / f"{self.what}.json").read_text(encoding="utf-8"))
        head = ["setting", "rate", *self.heads, "loss", "answers", f"from {self.reference_says}", "tax"]
        lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
        lines += [f"| {' | '.join(self._row(row))} |" for row in found[self.what]]
        says = self.says(found) if "intervals" in found else f"{self.says(found)}\n{_not_widened(found)}"
        return "\n".join([says, "", *lines])

    def _row(self, row: dict[str, Any]) -> list[str]:
        change = row[f"from_{self.reference}"]["exact"]
        return [
            row["label"],
            f"{row['learning_rate']:g}",
            *self.cells(row),
            f"{sum(row['last_loss']) / len(row['last_loss']):.3f}",
            f"{100 * row['figures']['exact']['value']:.1f} %",
            "" if row["name"] == self.reference else _interval(change, 100, 1),
            _interval(row["tax"], 1, 4),
        ]

    def write(self) -> None:
        page = self.file.read_text(encoding="utf-8")
        self.file.write_text(self.place.sub(lambda _: self.measured(), page), encoding="utf-8")


def _not_widened(found: dict[str, Any]) -> str:
    return (
        f"The intervals of {found['date']} are the bootstrap's alone: `preceptor compare` widens those of differences "
        "of shares by the\nitems that changed ([evaluate](evaluate.md#intervals)), so that a small difference in "
        "answers is less sure than it\nlooks here."
    )


def _interval(own: dict[str, float], unit: float, digits: int) -> str:
    value, low, high = (f"{unit * own[edge]:+.{digits}f}".replace("-", "−") for edge in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _of_optimizers(found: dict[str, Any]) -> str:
    settings, items = found["settings"], found["num_items"]
    return (
        f"`python experiments/optimizers.py` measured this on {found['date']}: {found['machine']}, torch "
        f"{found['torch']}.\nEach setting trains the scholar on the package's 1,000 conversations for "
        f"{settings['steps']} steps of {settings['max_length']}\ntokens, under {settings['seeds']} seeds, at a "
        "learning rate of its own: the best of three to five by the training loss under\nanother seed. *Loss*: mean of "
        f"the last {settings['last']} steps. *Answers*: exact answers to {items['heldout']} held-out questions. *Tax*: "
        f"bits\nper byte on {items['pages']} new pages of the library, above the base. Brackets hold 95 % intervals "
        "over seeds and items, and\n*from float32* is the difference to the first row in points."
    )


def _of_adapters(found: dict[str, Any]) -> str:
    settings, items = found["settings"], found["num_items"]
    return (
        f"`python experiments/adapters.py` measured this on {found['date']}: {found['machine']}, torch "
        f"{found['torch']}, bitsandbytes\n{found['bitsandbytes']}. Each setting trains the scholar on the package's "
        f"1,000 conversations for {settings['steps']} steps of {settings['max_length']} tokens,\nunder "
        f"{settings['seeds']} seeds, with rank {settings['rank']}. *Loss*: mean of the last {settings['last']} steps. "
        f"*Answers*: exact answers to {items['heldout']} held-out\nquestions. *Tax*: bits per byte on "
        f"{items['pages']} new pages of the library, above the base. Brackets hold 95 % intervals over\nseeds and "
        "items; *from LoRA* is the difference to the first row in points. *MB*: weights, gradients and states.\n"
        "The scholar's embedding and head are not quantized, and are a large part of it. Only the rates of LoRA and "
        "PiSSA were\nsearched: the best of two or three by the training loss under another seed. DoRA and QLoRA take "
        "LoRA's, rsLoRA and LoRA+ a quarter\nof it, full fine-tuning a tenth. So a difference may be one of rates."
    )


def _bytes_per_parameter(row: dict[str, Any]) -> list[str]:
    each = row["bytes_per_parameter"]
    return [*(f"{each[name]:.2f}" for name in ("weights", "gradients", "optimizer")), f"{sum(each.values()):.2f}"]


PAGES = (
    SettingsPage(
        "optimizers",
        "float32",
        "float32",
        re.compile(r"`python experiments/optimizers.py` measured.*?(?=\n\n## )", re.DOTALL),
        _of_optimizers,
        ("weights", "gradients", "states", "all"),
        _bytes_per_parameter,
    ),
    SettingsPage(
        "adapters",
        "lora",
        "LoRA",
        re.compile(r"`python experiments/adapters.py` measured.*?(?=\n$)", re.DOTALL),
        _of_adapters,
        ("MB",),
        lambda row: [f"{sum(row['bytes'].values()) / 1e6:.1f}"],
    ),
)

if __name__ == "__main__":
    for settings_page in PAGES:
        settings_page.write()
