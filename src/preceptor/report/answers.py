"""What to think of a run's answers: whether they stop, are right, are empty, all alike, or the same as the base's."""

from collections.abc import Iterator, Sequence
from typing import Literal

from preceptor.evaluate.intervals import SHARE, interval
from preceptor.report.reading import RunRecord

ENOUGH = 3  # answers of which something can be said together
RUNS_ON = 0.1  # share of answers that do not stop, from which on it is suspicious


def verdict_on_speech(run: RunRecord) -> Iterator[tuple[Literal["wrong", "look", "note", "good"], str, str]]:
    """(level, what was seen, advice) about the last answers to each prompt."""
    step = max((thread.last["step"] for thread in run.threads), default=0)
    threads = [thread for thread in run.threads if thread.last["step"] == step]
    if not threads or step == 0:
        return
    last = [thread.last for thread in threads]
    answers = [str(sample["answer"]) for sample in last]
    if all("stopped" in sample for sample in last):
        stopped = [bool(sample["stopped"]) for sample in last]
        if stopped.count(False) > RUNS_ON * len(last):
            advice = (
                "Either the stop token was not learned, or eval.max_new_tokens cuts long answers off: look at them."
            )
            yield "look", f"Answers do not stop by themselves: {_of(stopped)} did.", advice
        else:
            yield "good", f"Answers stop by themselves: {_of(stopped)}.", ""
    if all("exact" in sample for sample in last):
        right = _of([bool(sample["exact"]) for sample in last])
        before = run.summary.get("base_exact_match")
        base = "" if before is None else f"; the base model: {before:.1%}"
        yield "note", f"Held-out questions answered exactly: {right}{base}.", ""
    yield from _oddities(answers, [thread.base for thread in threads])


def _oddities(
    answers: Sequence[str], base: Sequence[str | None]
) -> Iterator[tuple[Literal["wrong", "look", "note", "good"], str, str]]:
    empty = sum(not answer.strip() for answer in answers)
    if empty:
        advice = "The stop token comes first: look for empty or cut answers in the data."
        yield "look", f"{empty} of {len(answers)} answers are empty.", advice
    if len(answers) >= ENOUGH and len(set(answers)) == 1 and not empty:
        yield "look", f"All {len(answers)} prompts got the same answer.", "The model no longer reads what it is asked."
    known = [(answer, said) for answer, said in zip(answers, base, strict=True) if said is not None]
    same = sum(answer == said for answer, said in known)
    if known and same == len(known):
        yield (
            "look",
            f"All {same} answers are the base model's, letter for letter.",
            "Training changed next to nothing.",
        )


def _of(right: Sequence[bool]) -> str:
    """`38 of 40 (95%; 95% interval 83% to 99%)`, the interval as everywhere (evaluate/intervals.py)."""
    found = interval([float(own) for own in right], bounds=SHARE)
    spread = "" if found.low is None or found.high is None else f"; 95% interval {found.low:.0%} to {found.high:.0%}"
    return f"{sum(right):,} of {len(right):,} ({found.value:.0%}{spread})"
