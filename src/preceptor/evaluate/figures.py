"""Metrics with confidence intervals, from the results of items: over all items and by group.

    {"task", "kind", "num_items", "figures": {NAME: {"value", "low", "high", "num"}},
     "counts": {"stop_token", "until", "length"} | {"num_tokens", "num_bytes"} | {"chance"},
     "groups": {KEY: {VALUE: {NAME: ...}}}, without groups of texts of which no token could be predicted,
     "repeated": a sentence, where most items get one answer although they ask for different ones; else ""}

For two models each figure is {"base", "tuned", "difference", "num_changed"}: the difference with its paired interval,
and the number of items whose value changed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from preceptor.errors import DataError
from preceptor.evaluate.intervals import DIFFERENCE_OF_SHARES, SHARE, Interval, interval, paired_interval
from preceptor.evaluate.run import OWN, STOP_REASONS, ItemResult, metrics_of
from preceptor.evaluate.tasks import GROUPS, Task, repeated_answer


def comparison(task: Task, base: Sequence[ItemResult], tuned: Sequence[ItemResult], seed: int = 0) -> dict[str, Any]:
    """What `preceptor compare` reports of a task."""

    def figures_of(members: Sequence[int]) -> dict[str, Any]:
        return paired(task, [base[i] for i in members], [tuned[i] for i in members], seed)

    return _reported(task, tuned, figures_of, lambda: {"base": counts(task, base), "tuned": counts(task, tuned)})


def summary(task: Task, results: Sequence[ItemResult], seed: int = 0) -> dict[str, Any]:
    """What `preceptor eval` reports of a task."""

    def figures_of(members: Sequence[int]) -> dict[str, Any]:
        return {name: asdict(own) for name, own in figures(task, [results[i] for i in members], seed).items()}

    return _reported(task, results, figures_of, lambda: counts(task, results))


def _reported(
    task: Task,
    results: Sequence[ItemResult],
    figures_of: Callable[[Sequence[int]], dict[str, Any]],
    counted: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """figures_of: some of the items, by their indices. counted: called after it, which refuses what has no tokens."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    whole = figures_of(range(len(results)))
    for key, values in groups_of(results).items():
        for value, members in values.items():
            with suppress(DataError):  # no token of the group could be predicted
                groups.setdefault(key, {})[value] = figures_of(members)
    answers = [(result.record["answer"], result.item.accepted) for result in results if "answer" in result.record]
    return {
        "task": task.name,
        "kind": task.kind,
        "num_items": len(results),
        "figures": whole,
        "counts": counted(),
        "groups": groups,
        "repeated": repeated_answer(answers),
    }


def figures(task: Task, results: Sequence[ItemResult], seed: int = 0) -> dict[str, Interval]:
    """Each metric of the task's kind with its interval. Raises DataError if no token could be predicted."""
    found = {}
    for name, (above, below) in metrics_of(task).items():
        numerators, weights = _ratio(results, above, below)
        if weights is not None and not sum(weights) > 0:
            raise DataError(f"{task.name}: its texts have no token that could be predicted; give it longer texts")
        bounds = SHARE if not below and above != OWN else None  # of the user's own numbers nothing is known
        own = interval(numerators, weights, bounds=bounds, seed=seed)
        found[name] = own.within(0.0) if below else own
    return found


def paired(
    task: Task, base: Sequence[ItemResult], tuned: Sequence[ItemResult], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Each metric of both models, and the difference on the same items."""
    ours, theirs = figures(task, base, seed), figures(task, tuned, seed)
    found = {}
    for name, (above, below) in metrics_of(task).items():
        (before, before_weights), (after, after_weights) = (_ratio(own, above, below) for own in (base, tuned))
        bounds = DIFFERENCE_OF_SHARES if not below and above != OWN else None
        difference = paired_interval(before, after, before_weights, after_weights, bounds=bounds, seed=seed)
        own = {"base": asdict(ours[name]), "tuned": asdict(theirs[name]), "difference": asdict(difference)}
        found[name] = own | {"num_changed": sum(a != b for a, b in zip(before, after, strict=True))}
    return found


def _ratio(results: Sequence[ItemResult], above: str, below: str) -> tuple[list[float], list[float] | None]:
    return _values(results, above), _values(results, below) if below else None


def counts(task: Task, results: Sequence[ItemResult]) -> dict[str, float]:
    """The counts of a task's kind, beside its metrics."""

    def total(key: str) -> float:
        return sum(_values(results, key))

    if task.kind == "generation":
        return {name: int(total(name)) for name in (*STOP_REASONS, "num_tokens")}
    if task.kind == "multiple choice":
        return {"chance": total("chance") / len(results)}
    num_tokens = int(total("num_tokens"))
    perplexity = math.exp(total("nats") / num_tokens)
    return {"num_tokens": num_tokens, "num_bytes": int(total("num_bytes")), "perplexity": perplexity}


def groups_of(results: Sequence[ItemResult]) -> dict[str, dict[str, list[int]]]:
    """Group key -> value -> indices of the items that have it, without keys that no item has."""
    found: dict[str, dict[str, list[int]]] = {}
    for index, result in enumerate(results):
        for key in GROUPS:
            if key in result.item.groups:
                found.setdefault(key, {}).setdefault(result.item.groups[key], []).append(index)
    return {key: dict(sorted(values.items())) for key, values in found.items()}


def records(task: Task, results: Sequence[ItemResult]) -> list[dict[str, Any]]:
    """One object per item: its place, prompt and groups, its values and what the model did."""
    return [
        {
            "task": task.name,
            "source": result.item.source,
            "asked": result.item.text if result.item.prompt is None else result.item.prompt.last_message,
            **result.item.groups,
            **result.record,
            **result.values,
        }
        for result in results
    ]


def _values(results: Sequence[ItemResult], key: str) -> list[float]:
    return [result.values[key] for result in results]


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
        for line in (f"{entry['task']}: {_counted(entry['kind'], entry['counts'])}", *_group_lines(entry)):
            console.print(line)
        if entry["repeated"]:
            console.print(f"{entry['task']}: {entry['repeated']}", style="yellow")
    console.print(
        f"Intervals: {settings['num_resamples']:,} bootstrap resamples of the items, seed {settings['seed']}; "
        f"{settings['dtype']} on {settings['device']}."
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
