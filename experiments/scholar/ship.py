"""Shipping: a finished pretraining run's model, copied into the package.

MODEL_DIR/                        config, generation config, tokenizer, weights in bfloat16
MODEL_DIR/history/run.yaml        the resolved run file
MODEL_DIR/history/metrics.jsonl   the run's steps, thinned evenly to at most `MAX_HISTORY_BYTES`, the last one kept
MODEL_DIR/history/summary.json    what came out
"""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preceptor.errors import ModelError
from preceptor.scholar import MODEL_DIR

MAX_WEIGHTS_BYTES = 12_000_000
MAX_HISTORY_BYTES = 200_000


def ship(run: Path, destination: Path = MODEL_DIR) -> None:
    """Copy a run's model as bfloat16, with its history.

    Raises ModelError if the run has no finished base model, or one that is too large to ship.
    """
    if not (run / "summary.json").is_file() or not (run / "model" / "config.json").is_file():
        raise ModelError(f"{run}: not the folder of a finished run; it needs summary.json and model/config.json")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    if tokenizer.chat_template is not None:
        raise ModelError(f"{run}/model: has a chat template, and the scholar is a base model; pretrain on text rows")
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.bfloat16)
    num_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    if num_bytes > MAX_WEIGHTS_BYTES:
        raise ModelError(f"{run}/model: {num_bytes:,} bytes in bfloat16; the package carries {MAX_WEIGHTS_BYTES:,}")
    history = destination / "history"
    history.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    (destination / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner alone
    shutil.copyfile(run / "config.yaml", history / "run.yaml")
    shutil.copyfile(run / "summary.json", history / "summary.json")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (history / "metrics.jsonl").write_text("".join(thin(lines, MAX_HISTORY_BYTES)), encoding="utf-8")


def thin(lines: list[str], max_bytes: int) -> list[str]:
    """Every n-th line, counted back from the last, with the smallest n that fits into `max_bytes`."""
    stride = 1
    while sum(len(line.encode()) for line in lines[::-1][::stride]) > max_bytes:
        stride += 1
    return lines[::-1][::stride][::-1]
