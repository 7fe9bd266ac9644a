"""Figures of `preceptor eval` and `preceptor compare` for the eye: tables and sentences."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_LARGEST_GROUPS = 24  # values of a group key that are shown; all are in the JSON


def print_evaluation(found: Mapping[str, Any], console: Console) -> None:
    """What `preceptor eval` found."""
    settings = found["settings"]
    table = Table(title=escape(f"{found['model']}: messages read as {found['reads']}"), title_justify="left")
    for column in ("task", "items", "figure", "value", "95 % interval"):
        table.add_column(column, justify="left" if column in ("task", "figure") else "right", no_wrap=True)
    for row in found["tasks"]:
        for place, (name, figure) in enumerate(row["figures"].items()):
            first = (escape(row["task"]), f"{row['num_items']:,}") if place == 0 else ("", "")
            table.add_row(*first, name, shown(row["kind"], figure["value"]), _range(row["kind"], figure))
    console.print(table)
    for row in found["tasks"]:
        console.print(f"{row['task']}: {_counted(row['kind'], row['counts'])}", highlight=False, markup=False)
        for line in _group_lines(row):
            console.print(line, highlight=False, markup=False)
    console.print(
        f"Intervals: {settings['num_resamples']:,} bootstrap resamples of the items, seed {settings['seed']}; "
        f"{settings['dtype']} on {settings['device']}.",
        highlight=False,
    )


def print_comparison(found: Mapping[str, Any], console: Console) -> None:
    """What `preceptor compare` found."""
    settings = found["settings"]
    table = Table(title=escape(f"{found['base']} -> {found['tuned']}"), title_justify="left")
    for column in ("task", "", "items", "figure", "base", "tuned", "difference", "95 % interval"):
        table.add_column(column, justify="left" if column in ("task", "", "figure") else "right", no_wrap=True)
    for row in found["tasks"]:
        for place, (name, figure) in enumerate(row["figures"].items()):
            first = (escape(row["task"]), row["role"], f"{row['num_items']:,}") if place == 0 else ("", "", "")
            sides = (shown(row["kind"], figure[side]["value"]) for side in ("base", "tuned"))
            difference = figure["difference"]
            signed = shown(row["kind"], difference["value"], sign=True)
            table.add_row(*first, name, *sides, signed, _range(row["kind"], difference, sign=True))
    if found["tasks"]:
        console.print(table)
    if found["shift"] is not None:
        for line in _shift_lines(found["shift"]):
            console.print(line, highlight=False, markup=False)
    for line in found["verdict"]:
        console.print(line, highlight=False, markup=False, style="bold")
    console.print(
        f"Messages were read by the base as {settings['base_reads']}, by the tuned model as "
        f"{settings['tuned_reads']}. Intervals: {settings['num_resamples']:,} paired bootstrap resamples of the items, "
        f"seed {settings['seed']}.",
        highlight=False,
        markup=False,
    )


def shown(kind: str, value: float, sign: bool = False) -> str:
    """A share in percent, a difference of shares in points, bits per byte with four digits."""
    if kind == "perplexity":
        return f"{value:{'+' if sign else ''}.4f}"
    return f"{value * 100:+.1f} pt" if sign else f"{value * 100:.1f} %"


def _range(kind: str, figure: Mapping[str, Any], sign: bool = False) -> str:
    if figure["low"] is None:
        return "one item"
    return f"{shown(kind, figure['low'], sign)} to {shown(kind, figure['high'], sign)}"


def _counted(kind: str, counts: Mapping[str, Any]) -> str:
    if kind == "generation":
        named = {"stop_token": "stopped by its token", "until": "by a text", "length": "by the limit"}
        return ", ".join(f"{counts[key]:,} {name}" for key, name in named.items() if counts[key])
    if kind == "multiple choice":
        return f"chance {counts['chance']:.1%}"
    return f"{counts['num_bytes']:,} bytes, {counts['num_tokens']:,} tokens, perplexity {counts['perplexity']:.3f}"


def _group_lines(row: Mapping[str, Any]) -> Iterator[str]:
    """One line a group key: its values with their first figure."""
    for key, values in row["groups"].items():
        firsts = [(value, next(iter(figures.values()))) for value, figures in values.items()]
        parts = [f"{value} {shown(row['kind'], figure['value'])}" for value, figure in firsts[:_LARGEST_GROUPS]]
        more = f" and {len(firsts) - len(parts)} more" if len(firsts) > len(parts) else ""
        yield f"{row['task']} by {key}: {', '.join(parts)}{more}"


def _shift_lines(shift: Mapping[str, Any]) -> Iterator[str]:
    if "skipped" in shift:
        yield f"token-distribution shift: not measured: {shift['skipped']}"
        return
    shares = ", ".join(f"{name} {_with_range(own)}" for name, own in shift["shares"].items())
    yield (
        f"token-distribution shift over {shift['num_prompts']:,} answers, {shift['num_tokens']:,} tokens: {shares}; "
        f"{shift['num_added']:,} tokens that the base lacks are not counted"
    )
    yield f"    by position: {_positions(shift['by_position'])}"
    tokens = [f"{each['token']!r} {each['num_shifted']} of {each['num']}" for each in shift["most_shifted"][:12]]
    yield f"    most often shifted: {', '.join(tokens) or 'none'}"


def _with_range(own: Mapping[str, Any]) -> str:
    if own["low"] is None:
        return f"{own['value']:.1%}"
    return f"{own['value']:.1%} ({own['low']:.1%} to {own['high']:.1%})"


def _positions(rows: Sequence[Mapping[str, Any]]) -> str:
    """Shares of shifted tokens and mean KL over growing spans of positions."""
    parts = []
    first = 1
    for last in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        own = [row for row in rows if first <= row["position"] <= last]
        num = sum(row["num"] for row in own)
        if num:
            shifted, kl = (sum(row["num"] * row[key] for row in own) / num for key in ("shifted", "mean_kl"))
            span = f"{first}" if first == last else f"{first}-{last}"
            parts.append(f"{span}: {shifted:.0%} shifted, KL {kl:.2f}")
        first = last + 1
    return "; ".join(parts)
