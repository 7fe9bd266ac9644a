"""What to think of a run, in words: findings of four levels, the worst first. Each says what was seen and what to do.

The thresholds are judgement, not statistics; each stands below with what it is for.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from preceptor.compare.verdict import change, sentence
from preceptor.report.answers import verdict_on_speech
from preceptor.report.reading import Line, RunRecord

Level = Literal["wrong", "look", "note", "good"]
LEVELS: tuple[Level, ...] = ("wrong", "look", "note", "good")

NOTHING_LEARNED = 0.02  # a loss that falls by a smaller share has not moved
OVERFITTED = 0.02  # held-out loss at the end above its lowest by this share
MEMORISED = 0.5  # training loss below this share of the held-out loss
SPIKE = 10.0  # gradient norm over the median of the steps before
SPIKE_STEPS = 50  # steps of that median; fewer than SPIKE_FIRST: no judgement
SPIKE_FIRST = 10
OFTEN_CLIPPED = 0.5  # share of the steps after the first tenth
LOW_FILL = 0.7  # share of the rows' room that tokens take
MANY_REJECTED = 0.05  # share of the data's rows


@dataclass(frozen=True, slots=True)
class Finding:
    """`seen`: a sentence or two. `advice`: what to do about it, or nothing."""

    level: Level
    seen: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    headline: str
    level: Level
    findings: list[Finding]


def judge(run: RunRecord) -> Verdict:
    """All findings of a run, the worst first, and one sentence over them."""
    found = [
        *_whether_finished(run),
        *_training_loss(run),
        *_held_out(run),
        *_gradients(run),
        *(Finding(level, seen, advice) for level, seen, advice in verdict_on_speech(run)),
        *_data(run),
        *_tax(run),
    ]
    found.sort(key=lambda finding: LEVELS.index(finding.level))
    wrong, look = (sum(finding.level == level for finding in found) for level in ("wrong", "look"))
    if wrong:
        return Verdict("Something went wrong", "wrong", found)
    state = "It learned" if run.is_finished else "It is learning" if run.steps else "It has not begun"
    if look:
        return Verdict(f"{state}, but look at {_count(look, 'thing')}", "look", found)
    return Verdict(f"{state}; nothing looks suspicious", "good", found)


def _whether_finished(run: RunRecord) -> Iterator[Finding]:
    planned = run.data.get("num_steps")
    if not run.is_finished:
        of = f" of {planned:,}" if planned else ""
        seen = f"The run is not finished: {run.num_steps:,}{of} steps are on record."
        yield Finding("look", seen, "If it was stopped, `preceptor train ... --resume` goes on from its checkpoint.")
    for resumed in run.environment.get("resumed", ()):
        yield Finding("note", f"It was resumed after step {resumed['step']:,} ({resumed['date']}).")


# The loss ------------------------------------------------------------------------------------------------------------


def mean_loss(steps: Sequence[Line]) -> float:
    """Nats per trained token over some steps."""
    num = sum(step.get("num_trained", 1) for step in steps)
    return sum(step["loss"] * step.get("num_trained", 1) for step in steps) / max(1, num)


def ends(run: RunRecord) -> tuple[float, float] | None:
    """Training loss over the first and the last tenth of the steps; None for fewer than two steps."""
    tenth = max(1, len(run.steps) // 10)
    return (mean_loss(run.steps[:tenth]), mean_loss(run.steps[-tenth:])) if len(run.steps) > 1 else None


def _training_loss(run: RunRecord) -> Iterator[Finding]:
    broken = [step["step"] for step in run.steps if not math.isfinite(step["loss"])]
    if broken:
        yield Finding("wrong", f"The loss is not finite from step {broken[0]:,} on.", "Lower optimizer.learning_rate.")
        return
    both = ends(run)
    if both is None:
        return
    first, last = both
    course = f"{first:.3f} in the first tenth of the steps, {last:.3f} in the last"
    if last > first * (1 + NOTHING_LEARNED):
        yield Finding(
            "wrong", f"The training loss rose: {course}.", "Lower optimizer.learning_rate, lengthen the warm-up."
        )
    elif last > first * (1 - NOTHING_LEARNED):
        advice = (
            "Raise optimizer.learning_rate or train.duration; if the loss was low from the start, the model knew this."
        )
        yield Finding("wrong", f"Nothing was learned: training loss {course}.", advice)
    else:
        yield Finding("good", f"The training loss fell by {_share(1 - last / first)}: {course}.")


def _held_out(run: RunRecord) -> Iterator[Finding]:
    looks = [look for look in run.looks if "loss" in look]
    if not looks:
        advice = "Name a file in data.eval" + (" and set eval.every." if run.config.get("data") else ".")
        yield Finding("note", "No held-out loss: what it learned beyond its training rows is not measured.", advice)
        return
    if len(looks) < 2:
        return
    first, last, best = looks[0], looks[-1], min(looks, key=lambda look: float(look["loss"]))
    began = "before the first step" if first["step"] == 0 else f"after step {first['step']:,}"
    course = f"{first['loss']:.3f} {began}, {last['loss']:.3f} after step {last['step']:,}"
    accuracy = ""
    if "token_accuracy" in last and "token_accuracy" in first:
        accuracy = f" Tokens guessed right: {first['token_accuracy']:.1%}, then {last['token_accuracy']:.1%}."
    if last["loss"] > first["loss"] * (1 - NOTHING_LEARNED):
        advice = "The training rows may be too few or too unlike the held-out ones, or the learning rate wrong."
        yield Finding("look", f"The held-out loss did not fall: {course}.{accuracy}", advice)
    else:
        yield Finding(
            "good", f"The held-out loss fell by {_share(1 - last['loss'] / first['loss'])}: {course}.{accuracy}"
        )
    if last["loss"] > best["loss"] * (1 + OVERFITTED) and best["step"] > 0:
        seen = (
            f"Overfitting: the held-out loss was lowest after step {best['step']:,} ({best['loss']:.3f}) and then rose "
            f"to {last['loss']:.3f} (+{_share(last['loss'] / best['loss'] - 1)})."
        )
        yield Finding("look", seen, f"Train shorter: `train.duration: {best['step']} steps`; or on more data.")
    both = ends(run)
    if both is not None and both[1] < MEMORISED * last["loss"]:
        seen = f"It knows its training rows much better ({both[1]:.3f}) than held-out ones ({last['loss']:.3f})."
        yield Finding("note", seen, "More data, fewer epochs or an adapter of lower rank close that gap.")


# Gradients -----------------------------------------------------------------------------------------------------------


def spikes(steps: Sequence[Line]) -> list[int]:
    """Steps whose gradient norm is over SPIKE times the median of the steps before."""
    norms = [float(step["grad_norm"]) for step in steps if "grad_norm" in step]
    found = []
    for index in range(SPIKE_FIRST, len(norms)):
        if norms[index] > SPIKE * median(norms[max(0, index - SPIKE_STEPS) : index]):
            found.append(int(steps[index]["step"]))
    return found


def _gradients(run: RunRecord) -> Iterator[Finding]:
    found = spikes(run.steps)
    if found:
        shown = ", ".join(f"{step:,}" for step in found[:5]) + (" ..." if len(found) > 5 else "")
        seen = f"The gradient jumped to {SPIKE:.0f} times its usual norm at {_count(len(found), 'step')}: {shown}."
        yield Finding("look", seen, "Look at what these steps read; a lower optimizer.learning_rate makes jumps rarer.")
    limit = run.config.get("optimizer", {}).get("max_grad_norm")
    norms = [step["grad_norm"] for step in run.steps[len(run.steps) // 10 :] if "grad_norm" in step]
    if limit and norms:
        clipped = sum(norm > limit for norm in norms) / len(norms)
        if clipped > OFTEN_CLIPPED:
            seen = f"In {_share(clipped)} of the steps the gradient was scaled to optimizer.max_grad_norm ({limit:g})."
            yield Finding("note", seen, "So the step size hardly depends on the gradient; that is often harmless.")


# Data ----------------------------------------------------------------------------------------------------------------


def _data(run: RunRecord) -> Iterator[Finding]:
    num_examples = run.data.get("num_examples")
    num = len(run.rejections)
    if num:
        of = f" of {num_examples:,} ({_share(num / num_examples)})" if num_examples else ""
        level: Level = "look" if num_examples and num > MANY_REJECTED * num_examples else "note"
        seen = f"{num:,}{of} rows were rejected and not trained."
        yield Finding(level, seen, "The reasons stand under “What was trained”.")
    elif num_examples:
        yield Finding(
            "good", f"All {num_examples:,} rows of the data could be trained exactly as inference will see them."
        )
    fill = run.data.get("fill")
    if fill is not None and fill < LOW_FILL:
        seen = f"Only {_share(fill)} of the rows' room holds tokens."
        yield Finding("note", seen, "A larger data.max_length packs conversations more tightly.")
    shortened: dict[str, Any] = run.data.get("shortened", {})
    cut, split = shortened.get("num_truncated", 0), shortened.get("num_split", 0)
    if cut or split:
        yield Finding("note", f"{cut:,} rows lost their oldest context and {split:,} were split, being too long.")


def _tax(run: RunRecord) -> Iterator[Finding]:
    """What `preceptor compare` found outside what was trained."""
    for task in run.compare.get("tasks", ()):
        if task["role"] == "trained" and change(task) > 0:
            yield Finding("good", f"Against the base model it {sentence(task)}.")
    lost = [task for task in run.compare.get("tasks", ()) if task["role"] != "trained" and change(task) < 0]
    if lost:
        said = "; ".join(sentence(task) for task in lost)
        yield Finding("look", f"An alignment tax: {said}.", "Replay, KL to the base, an adapter or averaging lower it.")
    elif run.compare:
        yield Finding("good", "No alignment tax that can be told from zero was found by `preceptor compare`.")


def _share(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"
