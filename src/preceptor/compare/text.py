"""Results of `preceptor compare` and `preceptor merge --sweep` as tables and sentences for the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from preceptor.compare.sweep import gain
from preceptor.compare.verdict import HEADLINES, short_names
from preceptor.evaluate.figures import range_text, shown
from preceptor.evaluate.intervals import Interval


def print_comparison(found: Mapping[str, Any], console: Console) -> None:
    """Print the results of `preceptor compare`."""
    settings = found["settings"]
    table = Table(title=f"{found['base']} -> {found['tuned']}", title_justify="left")
    for column in ("task", "", "items", "figure", "base", "tuned", "difference", "95 % interval"):
        table.add_column(column, justify="left" if column in ("task", "", "figure") else "right", no_wrap=True)
    for entry in found["tasks"]:
        for place, (name, figure) in enumerate(entry["figures"].items()):
            first = (entry["task"], entry["role"], f"{entry['num_items']:,}") if place == 0 else ("", "", "")
            sides = (shown(entry["kind"], figure[side]["value"]) for side in ("base", "tuned"))
            difference = figure["difference"]
            signed = shown(entry["kind"], difference["value"], sign=True)
            table.add_row(*first, name, *sides, signed, range_text(entry["kind"], difference, sign=True))
    if found["tasks"]:
        console.print(table)
    for entry in found["tasks"]:
        if entry["repeated"]:
            line = f"{entry['task']}, the tuned model: {entry['repeated']}"
            console.print(line, highlight=False, markup=False, style="yellow")
    if found["shift"] is not None:
        for line in _shift_lines(found["shift"]):
            console.print(line, highlight=False)
    for line in found["verdict"]:
        console.print(line, highlight=False, style="bold")
    console.print(
        f"Prompt format of the base: {settings['base_prompt_format']}; of the tuned model: "
        f"{settings['tuned_prompt_format']}. Intervals: {settings['num_resamples']:,} paired bootstrap resamples of "
        f"the items, seed {settings['seed']}.",
        highlight=False,
    )


def _shift_lines(shift: Mapping[str, Any]) -> Iterator[str]:
    if "skipped" in shift:
        yield f"token-distribution shift: not measured: {shift['skipped']}"
        return
    shares = ", ".join(f"{name} {_share(own)}" for name, own in shift["shares"].items())
    yield (
        f"token-distribution shift over {shift['num_prompts']:,} answers, {shift['num_tokens']:,} tokens: {shares}; "
        f"{shift['num_added']:,} tokens that the base lacks are not counted"
    )
    yield f"    by position: {_positions(shift['by_position'])}"
    tokens = [f"{each['token']!r} {each['num_shifted']} of {each['num']}" for each in shift["most_shifted"][:12]]
    yield f"    most often shifted: {', '.join(tokens) or 'none'}"


def _share(own: Mapping[str, Any]) -> str:
    """`76.4% (74.5% to 78.2%)`."""
    return f"{own['value']:.1%}" + ("" if own["low"] is None else f" ({own['low']:.1%} to {own['high']:.1%})")


def _positions(entries: Sequence[Mapping[str, Any]]) -> str:
    """Shares of shifted tokens and mean KL over growing spans of positions."""
    parts = []
    first = 1
    for last in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        own = [entry for entry in entries if first <= entry["position"] <= last]
        num = sum(entry["num"] for entry in own)
        if num:
            shifted, kl = (sum(entry["num"] * entry[key] for entry in own) / num for key in ("shifted", "mean_kl"))
            span = f"{first}" if first == last else f"{first}-{last}"
            parts.append(f"{span}: {shifted:.0%} shifted, KL {kl:.2f}")
        first = last + 1
    return "; ".join(parts)


def print_sweep(found: Mapping[str, Any], console: Console) -> None:
    """Print the skill as it is and each tax as the loss against the base, with 95 % intervals in brackets."""
    table = Table(title=f"{found['base']} -> {found['tuned']}, averaged", title_justify="left")
    table.add_column("weight", justify="right")
    names = short_names(entry["task"] for entry in found["tasks"])
    for entry in found["tasks"]:
        metric = HEADLINES[entry["kind"]]
        unit = metric.value_unit if entry["role"] == "trained" else f"tax, {metric.unit}"
        table.add_column(f"{names[entry['task']]}: {unit}", justify="right", no_wrap=True)
    for place, point in enumerate(found["tasks"][0]["points"]):
        table.add_row(f"{point['weight']:g}", *(_cell(entry, entry["points"][place]) for entry in found["tasks"]))
    console.print(table)
    for sentence in found["verdict"]:
        console.print(f"{sentence}.", highlight=False)


def _cell(entry: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    """`+0.0312 (+0.0290 to +0.0333)`; without the brackets where the spread is unknown."""
    metric = HEADLINES[entry["kind"]]
    if entry["role"] == "trained":
        own, sign = Interval(*(point[key] for key in ("value", "low", "high", "num"))).times(metric.scale), ""
    else:
        own, sign = gain(entry, point, "base").times(-1), "+"
    value, low, high = (
        "" if number is None else f"{number + 0.0:{sign}.{metric.digits}f}" for number in (own.value, own.low, own.high)
    )
    return f"{value} ({low} to {high})" if low else value
