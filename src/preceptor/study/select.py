"""`preceptor select`: which conversations to keep, after LIMA (Zhou et al. 2023, arXiv:2305.11206): less is more.

    pool ── survey ──> signals, embeddings ── choose ──> kept rows, in their own form, and a reason for every row
            (twice through the files, one forward pass a row)

The parts are in selection/. A million conversations: two passes through the files, and a third that writes; the model
reads each prompt once and each answer twice; memory and the cost of the choice are stated in selection/survey.py and
selection/diversity.py.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from preceptor.errors import ConfigError
from preceptor.model.load import load_model, load_tokenizer, resolve_model_path
from preceptor.study.selection.choice import NO_DIVERSITY, Settings, choose
from preceptor.study.selection.explain import explain, summarise
from preceptor.study.selection.measure import BaseReader
from preceptor.study.selection.pool import Pool
from preceptor.study.selection.quality import MODEL_SIGNALS
from preceptor.study.selection.survey import survey

MAX_ROW_TOKENS = 4096


def needs_model(settings: Settings) -> bool:
    return settings.diversity != NO_DIVERSITY or any(settings.weights[name] > 0 for name in MODEL_SIGNALS)


def load_reader(model: str, max_row_tokens: int = MAX_ROW_TOKENS) -> BaseReader:
    """The base model ready to read: bfloat16 on a GPU where there is one, else float32. Raises ModelError."""
    import torch

    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    path = resolve_model_path(model)
    return BaseReader(load_model(path, dtype=dtype, device=device), load_tokenizer(path), max_row_tokens)


def select(
    pool: Pool,
    reader: BaseReader | None,
    settings: Settings,
    out: Path,
    explain_file: Path | None = None,
    on_row: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Survey the pool, choose, write the kept rows to `out` and a line a row to `explain_file`; return the figures.

    Raises ConfigError if a file cannot be written or a model is needed, DataError if the pool cannot be read or holds
    nothing to choose from.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        found = survey(pool, reader, Path(folder), on_row)
        surveyed = time.perf_counter()
        choice = choose(found, settings)
        chosen = time.perf_counter()
        pool.write(frozenset(found.number_N[choice.kept].tolist()), out)
        if explain_file is not None:
            _write_lines(explain(found, choice), explain_file)
        summary = summarise(found, choice)
    return summary | {"seconds": {"survey": surveyed - started, "choice": chosen - surveyed}}


def _write_lines(lines: Iterable[dict[str, Any]], file: Path) -> None:
    try:
        with file.open("w", encoding="utf-8") as text:
            for line in lines:
                text.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"--explain {file}: cannot be written: {error.strerror}") from None
