"""The folder of a run.

OUT/config.yaml      the resolved run file
OUT/rejections.jsonl examples that were not trained: source, code, message
OUT/environment.json, data.json, examples.jsonl
                     what the run is made of (train/record.py)
OUT/metrics.jsonl    one line a step
OUT/eval.jsonl       one line an evaluation
OUT/samples.jsonl    one line a sampled answer to a held-out prompt
OUT/checkpoints/     with checkpoint.every: what `--resume` needs
OUT/model/           a complete Hugging Face folder (with an adapter: merged; the adapter in model/adapter)
OUT/summary.json     what came out
OUT/report.html      all of it for the eye, written last (report/page.py)
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from preceptor import config
from preceptor.data.examples import Rejection
from preceptor.errors import CheckpointError
from preceptor.train.metrics import append_line


def check_out(out: str, replace: bool) -> Path:
    """The run's folder, which must not exist, or be a run's folder that may be replaced. Raises CheckpointError."""
    folder = Path(out)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return folder
    if not replace:
        raise CheckpointError(f"{out}: exists already; choose another `out`, or replace that run with --replace")
    if not (folder.is_dir() and (folder / "config.yaml").is_file()):
        raise CheckpointError(f"{out}: is not the folder of a run, so --replace leaves it alone; choose another `out`")
    return folder


def open_folder(folder: Path, run: config.Run, rejections: Sequence[Rejection], replace: bool) -> None:
    """Begin a run on disk. Raises CheckpointError if the folder cannot be written."""
    check_out(str(folder), replace)
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(config.dump(run), encoding="utf-8")
        for name in ("rejections.jsonl", "metrics.jsonl", "eval.jsonl", "samples.jsonl"):
            (folder / name).touch()
    except OSError as error:
        raise CheckpointError(f"{folder}: the run's folder cannot be written: {error}") from None
    for rejection in rejections:
        append_line(folder / "rejections.jsonl", asdict(rejection))


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = folder / ".summary.partial"
    partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / "summary.json")
