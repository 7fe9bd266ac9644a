"""Results of `preceptor eval` as tables and sentences for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_LARGEST_GROUPS = 24  # values of a group key that are shown; all are in the JSON


def print_evaluation(found: Mapping[str, Any], console: Console) -> None:
    """Print the results of `preceptor eval`."""
    settings = found["settings"]
    table = Table(title=f"{found['model']}: prompts as {found['prompt_format']}", title_justify="left")
    for column in ("task", "items", "figure", "value", "95 % interval"):
        table.add_column(column, justify="left" if column in ("task", "figure") else "right", no_wrap=True)
    for entry in found["tasks"]:
        for place, (name, figure) in enumerate(entry["figures"].items()):
            first = (entry["task"], f"{entry['num_items']:,}") if place == 0 else ("", "")
            table.add_row(*first, name, shown(entry["kind"], figure["value"]), range_text(entry["kind"], figure))
    console.print(table)
    for entry in found["tasks"]:
        console.print(f"{entry['task']}: {_counted(entry['kind'], entry['counts'])}", highlight=False)
        for line in _group_lines(entry):
            console.print(line, highlight=False)
        if entry["repeated"]:
            console.print(f"{entry['task']}: {entry['repeated']}", highlight=False, markup=False, style="yellow")
    console.print(
        f"Intervals: {settings['num_resamples']:,} bootstrap resamples of the items, seed {settings['seed']}; "
        f"{settings['dtype']} on {settings['device']}.",
        highlight=False,
    )


def shown(kind: str, value: float, sign: bool = False) -> str:
    """A share in percent, a difference of shares in points, bits per byte with four digits."""
    if kind == "perplexity":
        return f"{value:{'+' if sign else ''}.4f}"
    return f"{value * 100:+.1f} pt" if sign else f"{value * 100:.1f} %"


def range_text(kind: str, figure: Mapping[str, Any], sign: bool = False) -> str:
    if figure["low"] is None:
        return "one item"
    return f"{shown(kind, figure['low'], sign)} to {shown(kind, figure['high'], sign)}"


def _counted(kind: str, counts: Mapping[str, Any]) -> str:
    if kind == "generation":
        named = {"stop_token": "stopped by a stop token", "until": "by a text", "length": "by the limit"}
        return ", ".join(f"{counts[key]:,} {name}" for key, name in named.items() if counts[key])
    if kind == "multiple choice":
        return f"chance {counts['chance']:.1%}"
    return f"{counts['num_bytes']:,} bytes, {counts['num_tokens']:,} tokens, perplexity {counts['perplexity']:.3f}"


def _group_lines(entry: Mapping[str, Any]) -> Iterator[str]:
    """One line per group key: its values with their first metric."""
    for key, values in entry["groups"].items():
        firsts = [(value, next(iter(figures.values()))) for value, figures in values.items()]
        parts = [f"{value} {shown(entry['kind'], figure['value'])}" for value, figure in firsts[:_LARGEST_GROUPS]]
        more = f" and {len(firsts) - len(parts)} more" if len(firsts) > len(parts) else ""
        yield f"{entry['task']} by {key}: {', '.join(parts)}{more}"
