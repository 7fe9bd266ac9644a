"""`preceptor select`: which conversations to keep, after LIMA (Zhou et al. 2023, arXiv:2305.11206): less is more.

    pool ── survey ──> signals, embeddings ── choose ──> kept rows, in their own form, and a reason for every row
            (twice through the files, one forward pass a row)

The parts are in selection/. A million conversations: two passes through the files, and a third that writes; the model
reads each prompt once and each answer twice; memory and the cost of the choice are stated in selection/survey.py and
selection/diversity.py.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preceptor.chat.format import load_tokenizer
from preceptor.files import write_json_lines
from preceptor.model.load import load_model
from preceptor.select.choice import NO_DIVERSITY, Settings, choose
from preceptor.select.explain import explain, summarise
from preceptor.select.measure import BaseReader
from preceptor.select.pool import Pool
from preceptor.select.quality import MODEL_SIGNALS
from preceptor.select.survey import survey

MAX_LENGTH = 4096


def needs_model(settings: Settings) -> bool:
    return settings.diversity != NO_DIVERSITY or any(settings.weights[name] > 0 for name in MODEL_SIGNALS)


def load_reader(model: str, max_length: int = MAX_LENGTH) -> BaseReader:
    """The base model ready to read: bfloat16 on a GPU where there is one, else float32. Raises ModelError."""
    import torch

    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    return BaseReader(load_model(model, dtype=dtype, device=device), load_tokenizer(model), max_length)


def select(
    pool: Pool,
    reader: BaseReader | None,
    settings: Settings,
    out: Path,
    explain_file: Path | None = None,
    on_row: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Survey the pool, choose, write the kept rows to `out` and a line a row to `explain_file`; return the figures.

    Raises CheckpointError if a file cannot be written, ConfigError if a model is needed, DataError if the pool cannot
    be read or holds nothing to choose from.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        found = survey(pool, reader, Path(folder), on_row)
        surveyed = time.perf_counter()
        choice = choose(found, settings)
        chosen = time.perf_counter()
        pool.write(frozenset(found.number_N[choice.kept].tolist()), out)
        if explain_file is not None:
            write_json_lines(explain_file, explain(found, choice))
        summary = summarise(found, choice)
    return summary | {"seconds": {"survey": surveyed - started, "choice": chosen - surveyed}}


_MEANINGS = {
    "kept": "kept",
    "covered": "good enough, and like a row that is kept",
    "low_quality": "worse than the rows that the choice was made from",
    "exact_repeat": "says exactly what an earlier row says",
    "near_repeat": "nearly says what another row says",
}


def to_text(summary: dict[str, Any]) -> str:
    """What `select` returns, as lines."""
    parts = [_codes(summary), _rejected(summary), _lengths(summary), _verdict(summary)]
    return "\n\n".join(part for part in parts if part)


def _codes(summary: dict[str, Any]) -> str:
    lines = [f"{summary['num_examples']:,} rows"]
    for code, count in sorted(summary["codes"].items(), key=lambda item: (item[0] != "kept", -item[1])):
        share = count / summary["num_examples"]
        lines.append(f"  {count:>9,}  {share:>6.1%}  {code:<14} {_MEANINGS.get(code, 'rejected')}")
    return "\n".join(lines)


def _rejected(summary: dict[str, Any]) -> str:
    lines = [f"  {first['source']}: {first['code']}: {first['message']}" for first in summary["first_rejected"]]
    return "\n".join(["The first rejected rows", *lines]) if lines else ""


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
    lines = [f"mean quality: {quality['before']:.3f} of all distinct rows, {quality['after']:.3f} of those kept"]
    if summary["coverage"] is not None:
        lines.append(
            f"coverage of the rows chosen from: {summary['coverage']:.3f}; "
            f"by as many drawn at random among them: {summary['random_coverage']:.3f}"
        )
    if summary["all_kept"]:
        lines.append(
            f"--keep {summary['asked_to_keep']:,} is more than there is: all {summary['num_kept']:,} rows that can be "
            "trained and repeat no other are kept, whatever their quality"
        )
    else:
        lines.append(f"kept {summary['num_kept']:,} of {summary['num_examples']:,} rows")
    return "\n".join(lines)
