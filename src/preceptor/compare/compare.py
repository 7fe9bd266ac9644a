"""Comparison of base and tuned model: the alignment tax on tasks and texts, and the token-distribution shift.

One model is in memory at a time, the tuned one first. `compare` returns, and `write` leaves as `compare.json`:

    {"base", "tuned": the models as named,
     "settings": {"seed", "num_resamples", "level", "max_new_tokens", "dtype", "device", "torch", "transformers",
                  "preceptor", "base_prompt_format", "tuned_prompt_format"},
     "verdict": [sentence],
     "tasks": [{"task", "kind", "num_items", "role": "tax" | "trained" | "text",
                "figures": {NAME: {"base", "tuned", "difference": {"value", "low", "high", "num"}, "num_changed"}},
                "counts": {"base", "tuned": figures.counts},
                "groups": {KEY: {VALUE: as figures}}, "sentence"}],
     "shift": shift.shift_figures, or {"skipped": why}, or null without prompts,
     "samples": [{"source", "prompt", "base", "tuned", "base_stopped", "tuned_stopped", "reference"}]}

`items.jsonl` beside it has a line per item and model: figures.records and "model": "base" | "tuned".

Samples: the base continues the same rendered context that it is given for the shift.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from preceptor.chat.format import ChatFormat
from preceptor.compare.shift import (
    AnswerTokens,
    TargetStates,
    base_tree,
    measure_shift,
    shared_ids,
    shift_figures,
    speller,
    target_states,
    tuned_tree,
)
from preceptor.compare.verdict import sentence, short_names, verdict
from preceptor.errors import ModelError
from preceptor.evaluate.figures import comparison, records
from preceptor.evaluate.generate import GeneratedAnswer
from preceptor.evaluate.model import EvaluatedModel
from preceptor.evaluate.run import ItemResult, evaluation_settings, run_task
from preceptor.evaluate.tasks import ReferencePrompt, Task
from preceptor.files import write_json, write_json_lines, writing
from preceptor.model.loss.linear_cross_entropy import output_head

NUM_SAMPLES = 20


@dataclass(frozen=True, slots=True)
class EvaluationSuite:
    """The tasks and prompts on which models are compared, and the settings for all of them."""

    tasks: Sequence[tuple[Task, str]]  # each with its role: `tax`, `trained` or `text`
    prompts: Sequence[ReferencePrompt] = ()  # for the shift
    max_new_tokens: int = 256
    batch_size: int = 64
    seed: int = 0

    def run(self, evaluated: EvaluatedModel, say: Callable[[str], None]) -> list[list[ItemResult]]:
        """The results of each task. say: shows what is being done."""
        results = []
        for task, _ in self.tasks:
            say(f"{evaluated.name}: {task.name}")
            results.append(run_task(evaluated, task, self.max_new_tokens, self.batch_size))
        return results


@dataclass(frozen=True, eq=False)
class _TunedAnswers:
    """The tuned model's answers to the prompts, and what is kept of the model to compare the base with them."""

    answers: list[GeneratedAnswer]
    tokens: list[AnswerTokens]
    states: TargetStates
    chat: ChatFormat


def compare(
    load_base: Callable[[], EvaluatedModel],
    load_tuned: Callable[[], EvaluatedModel],
    suite: EvaluationSuite,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The comparison, and the records of all items. say: shows what is being done.

    Raises DataError for an item that a model cannot read, ModelError and TemplateError as loading does.
    """
    tuned = load_tuned()
    tuned_results = suite.run(tuned, say)
    answers = _answer(tuned, suite) if suite.prompts else None
    tuned_name, tuned_prompt_format = tuned.name, tuned.prompt_format
    del tuned
    gc.collect()
    torch.cuda.empty_cache()
    base = load_base()
    base_results = suite.run(base, say)
    shift, samples = _shift(base, answers, suite, say) if answers is not None else (None, [])
    settings = evaluation_settings(base, suite.seed, suite.max_new_tokens)
    entries = [
        {**comparison(task, ours, theirs, suite.seed), "role": role}
        for (task, role), ours, theirs in zip(suite.tasks, base_results, tuned_results, strict=True)
    ]
    names = short_names(task.name for task, _ in suite.tasks)
    found = {
        "base": base.name,
        "tuned": tuned_name,
        "settings": settings | {"base_prompt_format": base.prompt_format, "tuned_prompt_format": tuned_prompt_format},
        "verdict": verdict(entries, shift),
        "tasks": [{**entry, "sentence": sentence(entry, names[entry["task"]])} for entry in entries],
        "shift": shift,
        "samples": samples,
    }
    items = [
        {"model": model, **record}
        for model, results in (("base", base_results), ("tuned", tuned_results))
        for (task, _), own in zip(suite.tasks, results, strict=True)
        for record in records(task, own)
    ]
    return found, items


def write(folder: Path, found: dict[str, Any], items: Sequence[dict[str, Any]]) -> None:
    """`compare.json` and `items.jsonl`. Raises CheckpointError where the folder cannot be written."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json_lines(folder / "items.jsonl", items)
    write_json(folder / "compare.json", found)


def _answer(tuned: EvaluatedModel, suite: EvaluationSuite) -> _TunedAnswers:
    contexts = [tuned.context(prompt, source, suite.max_new_tokens) for source, prompt, _ in suite.prompts]
    answers = tuned.generate(contexts, suite.max_new_tokens, batch_size=suite.batch_size)
    tokens = [
        AnswerTokens(source, context, answer.ids + (() if answer.stop_id is None else (answer.stop_id,)))
        for (source, _, _), context, answer in zip(suite.prompts, contexts, answers, strict=True)
    ]
    return _TunedAnswers(answers, tokens, target_states(tuned, list(map(tuned_tree, tokens))), tuned.chat)


def _shift(
    base: EvaluatedModel, tuned: _TunedAnswers, suite: EvaluationSuite, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of the shift, and samples of both models side by side."""
    say(f"{base.name}: the tuned model's answers")
    rows, tuned_rows = (head.weight_VD.shape[0] for head in (output_head(base.model), tuned.states.head))
    try:
        shared = shared_ids(base.chat.tokenizer.get_vocab(), tuned.chat.tokenizer.get_vocab(), min(rows, tuned_rows))
    except ModelError as error:
        return {"skipped": str(error)}, []
    spell = speller(tuned.chat.tokenizer, base.chat.tokenizer, rows)
    trees = [base_tree(each, shared, spell) for each in tuned.tokens]
    shift = measure_shift(tuned.tokens, target_states(base, trees), tuned.states, shared)
    figures = shift_figures(shift, tuned.tokens, tuned.chat.tokenizer, suite.seed)
    contexts = [tree.segments[0].ids for tree in trees[:NUM_SAMPLES]]
    continued = base.generate(contexts, suite.max_new_tokens, batch_size=suite.batch_size)
    samples = [
        {
            "source": source,
            "prompt": prompt.last_message,
            "base": before.text,
            "tuned": after.text,
            "base_stopped": before.stopped,
            "tuned_stopped": after.stopped,
            "reference": reference,
        }
        for (source, prompt, reference), before, after in zip(suite.prompts, continued, tuned.answers, strict=False)
    ]
    return figures or {"skipped": "the answers have no token that the base has"}, samples
