"""All that the golden tests know of the package: its rendering, its command line, keys and files of a run."""

import contextlib
import hashlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from preceptor import cli
from preceptor.chat.render import Renderer
from preceptor.chat.stop_tokens import find_stop_tokens
from preceptor.chat.template import load_template, probe_message_rules
from preceptor.data.examples import Conversation, Rejection, read_messages
from preceptor.data.forest import Tree

# Trees ---------------------------------------------------------------------------------------------------------------


def render_rows(tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What becomes of the rows in turn, by one renderer, whose caches are empty at first, on the day of recording."""
    with (
        mock.patch("preceptor.chat.environment.datetime", DayOfRecording),
        mock.patch("transformers.utils.chat_template_utils.datetime", DayOfRecording),
    ):
        return _render_rows(tokenizer, rows)


class DayOfRecording(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "DayOfRecording":
        return cls(2026, 11, 28, tzinfo=tz)


def _render_rows(tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    template = load_template("tokenizer", tokenizer)
    closings = (*find_stop_tokens(template, tokenizer).tokens, tokenizer.eos_token)
    stops = [tokenizer.convert_tokens_to_ids(token) for token in closings if token is not None]
    renderer = Renderer(tokenizer, template, stop_token_ids=stops)
    outcomes = []
    for number, row in enumerate(rows):
        messages = read_messages(row["messages"], f"row:{number}")
        if isinstance(messages, Rejection):
            outcomes.append(messages)
        else:
            outcomes.append(renderer.render(Conversation(f"row:{number}", messages, row.get("tools"))))
    return [outcome_of(outcome) for outcome in outcomes]


def aliases_reasoning(tokenizer: Any) -> bool:
    """Whether the installed transformers shows a message's reasoning to templates under every name of the field."""
    return probe_message_rules(tokenizer).aliases_reasoning


def outcome_of(outcome: Tree | Rejection) -> str:
    """A hash over kind, ids, parent and weight of all segments, their number and that of trained tokens; or a code."""
    if isinstance(outcome, Rejection):
        return outcome.code
    segments = [[s.kind, list(s.ids), s.parent, float(s.weight)] for s in outcome.segments]
    sha256 = hashlib.sha256(json.dumps(segments).encode()).hexdigest()
    return f"{sha256[:12]} segments {len(segments)} trained {outcome.num_trained}"


# Runs ----------------------------------------------------------------------------------------------------------------

# Every key that matters is written out, so that another default changes nothing.
BASE: dict[str, Any] = {
    "model": {"path": "MODEL", "dtype": "float32"},
    "data": {
        "train": [{"path": "train.jsonl"}],
        "eval": [{"path": "eval.jsonl"}],
        "chat_template": "chatml",
        "train_on": "assistant",
        "max_length": 256,
        "overflow": "reject",
    },
    "train": {"duration": "20 steps", "batch_size": 2, "precision": "float32", "seed": 0, "device": "cpu"},
    "optimizer": {
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "warmup": "5 %",
        "min_lr_ratio": 0.1,
        "weight_decay": 0.1,
        "betas": [0.9, 0.95],
        "max_grad_norm": 1.0,
    },
    "loss": {"type": "nll", "reduction": "token"},
    "memory": {"activation_checkpointing": "none", "context_gradient": "full"},
    "eval": {"every": "10 steps", "num_samples": 0},
    "out": "run",
}
_LORA = {"adapter.kind": "lora", "adapter.rank": 4, "adapter.alpha": 8.0, "adapter.dropout": 0.0}
_LONG = {"data.train": [{"path": "long.jsonl"}], "data.max_length": 96}
_SHORT = {"train.duration": "8 steps", "eval.every": "4 steps"}

# name of the case: (model, keys of the run file that differ from BASE)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("qwen3", {}),
    "context_gradient recompute": ("qwen3", {"memory.context_gradient": "recompute"}),
    "context_gradient detach": ("qwen3", {"memory.context_gradient": "detach"}),
    "activation_checkpointing all": ("qwen3", {"memory.activation_checkpointing": "all"}),
    "activation_checkpointing 1 and context_gradient recompute": (
        "qwen3",
        {"memory.activation_checkpointing": 1, "memory.context_gradient": "recompute", **_SHORT},
    ),
    "lora": ("qwen3", _LORA),
    "lora with dropout": ("qwen3", {**_LORA, "adapter.dropout": 0.1, **_SHORT}),
    "lora on some modules": ("llama", {**_LORA, "adapter.target_modules": ["q_proj", "v_proj"], **_SHORT}),
    "lora bfloat16 weights": ("qwen3", {**_LORA, "model.dtype": "bfloat16", "train.precision": "bfloat16", **_SHORT}),
    "kl_coef": ("qwen3", {"loss.kl_coef": 0.2}),
    "kl_coef with lora": ("qwen3", {**_LORA, "loss.kl_coef": 0.2, **_SHORT}),
    "dft": ("qwen3", {"loss.type": "dft"}),
    "label_smoothing and z_loss": ("qwen3", {"loss.label_smoothing": 0.1, "loss.z_loss": 1e-3}),
    "reduction conversation": ("qwen3", {"loss.reduction": "conversation"}),
    "share_prefixes": ("qwen3", {"data.share_prefixes": True, "data.train": [{"path": "prompts.jsonl"}]}),
    "overflow split": ("qwen3", {"data.overflow": "split", **_LONG}),
    "overflow truncate_context": ("qwen3", {"data.overflow": "truncate_context", **_LONG}),
    "overflow reject": ("qwen3", {"data.max_rejected": 1.0, **_LONG, **_SHORT}),
    "replay": ("qwen3", {"replay.data": [{"path": "text.jsonl"}], "replay.share": 0.3}),
    "mixture": (
        "qwen3",
        {"data.train": [{"path": "train.jsonl", "weight": 0.5}, {"path": "text.jsonl", "count": 7}], "train.seed": 3},
    ),
    "bfloat16": ("qwen3", {"train.precision": "bfloat16"}),
    "bfloat16 context_gradient recompute": (
        "qwen3",
        {"train.precision": "bfloat16", "memory.context_gradient": "recompute", **_SHORT},
    ),
    "llama3 template on tied embeddings": ("qwen3", {"data.chat_template": "llama3"}),
    "llama3 template with lora": ("qwen3", {"data.chat_template": "llama3", **_LORA, **_SHORT}),
    "reasoning template": (
        "qwen3",
        {"data.train": [{"path": "branches.jsonl"}], "data.chat_template": "branches.jinja"},
    ),
    "reasoning template, context_gradient recompute": (
        "qwen3",
        {
            "data.train": [{"path": "branches.jsonl"}],
            "data.chat_template": "branches.jinja",
            "memory.context_gradient": "recompute",
            **_SHORT,
        },
    ),
    "train_on all": ("qwen3", {"data.train_on": "all"}),
    "train_on last": ("qwen3", {"data.train_on": "last"}),
    "linear lr_scheduler": (
        "qwen3",
        {"optimizer.lr_scheduler": "linear", "optimizer.warmup": "4 steps", "optimizer.max_grad_norm": 0.5},
    ),
    "untied head": ("llama", {}),
    "mistral": ("mistral", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "gpt_oss": ("gpt_oss", {}),
    "gpt2": ("gpt2", {}),
    "mamba2": ("mamba2", _SHORT),
    "lfm2": ("lfm2", _SHORT),
}


def run_file(case: str, model: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(json.dumps(BASE))
    tree["model"]["path"] = str(model)
    for key, value in CASES[case][1].items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return tree


def is_coarse(case: str) -> bool:
    """Whether numbers are rounded to bfloat16 on the way."""
    return CASES[case][1].get("train.precision") == "bfloat16"


def trajectory(case: str, model: Path, folder: Path) -> dict[str, Any]:
    """Train as the command does, in `folder`, which holds the data files; what the run wrote of its steps."""
    (folder / "run.yaml").write_text(yaml.safe_dump(run_file(case, model)), encoding="utf-8")
    command("train", folder / "run.yaml", f"out={folder / 'run'}")
    steps = _lines(folder / "run" / "metrics.jsonl")
    held_out = _lines(folder / "run" / "eval.jsonl")
    summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    return {
        "num_examples": summary["examples_per_epoch"],
        "num_rejected": summary["num_rejected"],
        "num_tokens": [step["num_tokens"] for step in steps],
        "num_trained": [step["num_trained"] for step in steps],
        "learning_rate": [step["learning_rate"] for step in steps],
        "loss": [step["loss"] for step in steps],
        "grad_norm": [step["grad_norm"] for step in steps],
        "held_out_loss": [line["loss"] for line in held_out],
    }


def command(*arguments: Any) -> None:
    """`preceptor ...` in this process; what it prints comes up only where it fails."""
    printed = io.StringIO()
    with (
        mock.patch("preceptor.train.finish.write_report"),  # it draws for half the time of such a short run
        mock.patch.object(sys, "argv", ["preceptor", *map(str, arguments)]),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            if stop.code:
                raise AssertionError(f"preceptor {arguments}: exit code {stop.code}\n{printed.getvalue()}") from None


# Demo ----------------------------------------------------------------------------------------------------------------


def demo(folder: Path) -> dict[str, Any]:
    command("demo", "--out", folder / "demo")
    steps = _lines(folder / "demo" / "metrics.jsonl")
    held_out = _lines(folder / "demo" / "eval.jsonl")
    summary = json.loads((folder / "demo" / "summary.json").read_text(encoding="utf-8"))
    keys = ("base_exact_match", "intern_exact_match", "stop_rate", "base_continues_with_question")
    return {
        **{key: summary[key] for key in (*keys, "num_questions", "examples_per_epoch", "num_steps", "tokens")},
        "loss": [step["loss"] for step in steps[:10] + steps[-10:]],
        "held_out_loss": [line["loss"] for line in held_out],
        "answers": [line["answer"] for line in _lines(folder / "demo" / "samples.jsonl") if "base" in line][:20],
    }


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
