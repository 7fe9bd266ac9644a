"""Data selection, the command `preceptor select`, after LIMA (Zhou et al. 2023, arXiv:2305.11206): less is more.

    pool ── survey ──> signals, embeddings ── choose ──> kept examples, and a reason for each example
            (two passes through the files, one forward pass per example)

For a million examples: two passes through the files, and a third one that writes; the model processes each prompt once
and each answer twice. survey.py and diversity.py state the memory and the cost of the choice.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from preceptor.chat.format import load_tokenizer
from preceptor.errors import counted
from preceptor.files import write_json_lines
from preceptor.model.load import load_model
from preceptor.select.choice import NO_DIVERSITY, Settings, choose, explain, summarise
from preceptor.select.measure import BaseScorer
from preceptor.select.pool import Pool
from preceptor.select.quality import MODEL_SIGNALS
from preceptor.select.survey import survey


def needs_model(settings: Settings) -> bool:
    return settings.diversity != NO_DIVERSITY or any(settings.weights[name] > 0 for name in MODEL_SIGNALS)


def load_scorer(model: str, max_length: int) -> BaseScorer:
    """Load the base model: bfloat16 on a GPU if there is one, else float32. Raises ModelError."""
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    return BaseScorer(load_model(model, dtype=dtype, device=device), load_tokenizer(model), max_length)


def select(
    pool: Pool,
    scorer: BaseScorer | None,
    settings: Settings,
    out: Path,
    explain_file: Path | None = None,
    on_example: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Survey the pool, choose, write the kept examples to `out` and an explanation of each example to `explain_file`.

    Raises CheckpointError if a file cannot be written, ConfigError if a model is needed, DataError if the pool cannot
    be read or holds nothing to choose from.
    """
    started = time.perf_counter()
    found = survey(pool, scorer, out.parent, on_example)
    surveyed = time.perf_counter()
    choice = choose(found, settings)
    chosen = time.perf_counter()
    pool.write(frozenset(found.number_N[choice.kept].tolist()), out)
    if explain_file is not None:
        write_json_lines(explain_file, explain(found, choice))
    return summarise(found, choice) | {"seconds": {"survey": surveyed - started, "choice": chosen - surveyed}}


_MEANINGS = {
    "kept": "kept",
    "covered": "a candidate, similar to an example that is kept",
    "low_quality": "of lower quality than the candidates",
    "enough_kept": "a candidate; enough that are as good or better are kept",
    "exact_repeat": "repeats an earlier example exactly",
    "near_repeat": "nearly repeats another example",
}


def to_text(summary: dict[str, Any]) -> str:
    """The result of `select` as lines of text."""
    rejected = [f"  {first['source']}: {first['code']}: {first['message']}" for first in summary["first_rejected"]]
    rejected = rejected and ["The first rejected examples", *rejected]
    parts = [_codes(summary), "\n".join(rejected), _lengths(summary), _verdict(summary)]
    return "\n\n".join(part for part in parts if part)


def _codes(summary: dict[str, Any]) -> str:
    lines = [f"{counted(summary['num_examples'], 'example')}"]
    for code, count in sorted(summary["codes"].items(), key=lambda item: (item[0] != "kept", -item[1])):
        share = count / summary["num_examples"]
        lines.append(f"  {count:>9,}  {share:>6.1%}  {code:<14} {_MEANINGS.get(code, 'rejected')}")
    return "\n".join(lines)


def _lengths(summary: dict[str, Any]) -> str:
    lines = [f"{'Lengths':<20}{'5 %':>9}{'median':>9}{'mean':>9}{'95 %':>9}"]
    for name in summary["lengths"]["before"]:
        for when, label in (("before", "all distinct"), ("after", "kept")):
            values = summary["lengths"][when][name]
            cells = "".join(f"{values[key]:>9,.0f}" for key in ("percentile_5", "median", "mean", "percentile_95"))
            title = f"{name.replace('_', ' ')}" if when == "before" else ""
            lines.append(f"  {title:<18}{cells}  {label}")
    return "\n".join(lines)


def _verdict(summary: dict[str, Any]) -> str:
    quality = summary["quality"]
    lines = [f"mean quality: {quality['before']:.3f} of all distinct examples, {quality['after']:.3f} of those kept"]
    if summary["coverage"] is not None:
        lines.append(
            f"coverage of the candidates: {summary['coverage']:.3f}; "
            f"by as many random ones: {summary['random_coverage']:.3f}"
        )
    if summary["all_kept"]:
        lines.append(
            f"--keep {summary['asked_to_keep']:,} is more than there are: all {summary['num_kept']:,} distinct "
            "examples are kept, whatever their quality"
        )
    else:
        lines.append(f"kept {summary['num_kept']:,} of {counted(summary['num_examples'], 'example')}")
    return "\n".join(lines)
