"""Base against tuned model: the alignment tax on tasks and texts, and the token-distribution shift of answers.

One model is in memory at a time, the tuned one first. `compare` returns, and `write` leaves as `compare.json`:

    {"base", "tuned": the models as named,
     "settings": {"seed", "num_resamples", "level", "max_new_tokens", "dtype", "device", "base_reads", "tuned_reads",
                  "torch", "transformers", "preceptor"},
     "verdict": [sentence],
     "tasks": [{"task", "kind", "num_items", "role": "tax" | "trained" | "text",
                "figures": {NAME: {"base", "tuned", "difference": {"value", "low", "high", "num"}, "num_changed"}},
                "counts": {"base", "tuned": figures.counts},
                "groups": {KEY: {VALUE: as figures}}, "sentence"}],
     "shift": shift_figures.py, or {"skipped": why}, or null where there was no prompt,
     "samples": [{"source", "prompt", "base", "tuned", "base_stopped", "tuned_stopped", "reference"}]}

`items.jsonl` beside it has a line an item and model: figures.records and "model": "base" | "tuned".

Samples: the base continues the same rendered context that it reads for the shift.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from preceptor.compare.shift import (
    Said,
    States,
    base_tree,
    measure_shift,
    shared_ids,
    shift_figures,
    speller,
    states,
    tuned_tree,
)
from preceptor.compare.verdict import sentence, verdict
from preceptor.errors import ModelError
from preceptor.evaluate.figures import comparison, records
from preceptor.evaluate.generate import Answer, generate
from preceptor.evaluate.intervals import LEVEL, NUM_RESAMPLES
from preceptor.evaluate.model import EvaluatedModel
from preceptor.evaluate.run import Result, examine
from preceptor.evaluate.tasks import Given, Task
from preceptor.files import write_json, write_json_lines, writing

NUM_SAMPLES = 20

Prompt = tuple[str, Given, str]  # source, what is given, reference answer
Load = Callable[[], EvaluatedModel]


@dataclass(frozen=True, slots=True)
class Questions:
    """What both models are put to. tasks: each with its role (`tax`, `trained`, `text`). prompts: for the shift."""

    tasks: Sequence[tuple[Task, str]]
    prompts: Sequence[Prompt] = ()
    max_new_tokens: int = 256
    batch_size: int = 64
    seed: int = 0


@dataclass(frozen=True, eq=False)
class _Answers:
    """The tuned model's answers to the prompts, and what must be kept of it to hold the base against them."""

    said: list[Said]
    answers: list[Answer]
    states: States
    tokenizer: Any


def compare(
    load_base: Load, load_tuned: Load, questions: Questions, say: Callable[[str], None] = lambda text: None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The comparison, and the records of all items. `say` is told what is being done.

    Raises DataError for an item that a model cannot read, ModelError and TemplateError as loading does.
    """
    tuned = load_tuned()
    tuned_results = _examine_all(tuned, questions, say)
    answers = _answer(tuned, questions) if questions.prompts else None
    tuned_name, tuned_reads = tuned.name, tuned.reads
    del tuned
    _free()
    base = load_base()
    base_results = _examine_all(base, questions, say)
    shift, samples = _shift(base, answers, questions, say) if answers is not None else (None, [])
    rows = [
        {**comparison(task, ours, theirs, questions.seed), "role": role}
        for (task, role), ours, theirs in zip(questions.tasks, base_results, tuned_results, strict=True)
    ]
    found = {
        "base": base.name,
        "tuned": tuned_name,
        "settings": _settings(base, questions) | {"base_reads": base.reads, "tuned_reads": tuned_reads},
        "verdict": verdict(rows, shift),
        "tasks": [{**row, "sentence": sentence(row)} for row in rows],
        "shift": shift,
        "samples": samples,
    }
    items = [
        {"model": model, **record}
        for model, results in (("base", base_results), ("tuned", tuned_results))
        for (task, _), own in zip(questions.tasks, results, strict=True)
        for record in records(task, own)
    ]
    return found, items


def write(folder: Path, found: dict[str, Any], items: Sequence[dict[str, Any]]) -> None:
    """`compare.json` and `items.jsonl`. Raises CheckpointError where the folder cannot be written."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json_lines(folder / "items.jsonl", items)
    write_json(folder / "compare.json", found)


def settings_of(subject: EvaluatedModel, seed: int) -> dict[str, Any]:
    """What a figure depends on besides model and data."""
    return {
        "seed": seed,
        "num_resamples": NUM_RESAMPLES,
        "level": LEVEL,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "device": subject.model.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "preceptor": _version(),
    }


def _version() -> str | None:
    try:
        return version("preceptor")
    except PackageNotFoundError:  # run from its source, not installed
        return None


def _settings(base: EvaluatedModel, questions: Questions) -> dict[str, Any]:
    return settings_of(base, questions.seed) | {"max_new_tokens": questions.max_new_tokens}


def _examine_all(subject: EvaluatedModel, questions: Questions, say: Callable[[str], None]) -> list[list[Result]]:
    results = []
    for task, _ in questions.tasks:
        say(f"{subject.name}: {task.name}")
        results.append(examine(subject, task, questions.max_new_tokens, questions.batch_size))
    return results


def _answer(tuned: EvaluatedModel, questions: Questions) -> _Answers:
    contexts = [tuned.context(given, source, questions.max_new_tokens) for source, given, _ in questions.prompts]
    answers = _generate(tuned, contexts, questions)
    said = [
        Said(source, context, answer.ids + (() if answer.stop_id is None else (answer.stop_id,)))
        for (source, _, _), context, answer in zip(questions.prompts, contexts, answers, strict=True)
    ]
    return _Answers(said, answers, states(tuned, [tuned_tree(each) for each in said]), tuned.tokenizer)


def _shift(
    base: EvaluatedModel, tuned: _Answers, questions: Questions, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of the shift, and samples of both models side by side."""
    say(f"{base.name}: the tuned model's answers")
    try:
        shared = shared_ids(base.tokenizer.get_vocab(), tuned.tokenizer.get_vocab())
    except ModelError as error:
        return {"skipped": str(error)}, []
    trees = [base_tree(each, shared, speller(tuned.tokenizer, base.tokenizer)) for each in tuned.said]
    shift = measure_shift(tuned.said, states(base, trees), tuned.states, shared)
    figures = shift_figures(shift, tuned.said, tuned.tokenizer, questions.seed)
    continued = _generate(base, [tree.segments[0].ids for tree in trees[:NUM_SAMPLES]], questions)
    samples = [
        {
            "source": source,
            "prompt": given.asked,
            "base": before.text,
            "tuned": after.text,
            "base_stopped": before.stopped,
            "tuned_stopped": after.stopped,
            "reference": reference,
        }
        for (source, given, reference), before, after in zip(questions.prompts, continued, tuned.answers, strict=False)
    ]
    return figures or {"skipped": "the answers have no token that the base has"}, samples


def _generate(subject: EvaluatedModel, contexts: Sequence[Sequence[int]], questions: Questions) -> list[Answer]:
    return generate(
        subject.model,
        subject.tokenizer,
        contexts,
        subject.stop_token_ids,
        questions.max_new_tokens,
        batch_size=questions.batch_size,
    )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
