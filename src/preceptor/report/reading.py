"""The folder of a run -> plain values. Nothing else is read, and nothing is written.

Only `config.yaml` must be there: a run that is going on, was killed, or was made before a file existed is read as far
as it goes. A last line without its line end is being written just now, and is left out.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from preceptor.errors import CheckpointError
from preceptor.files import read_json, read_json_lines

Line = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind. Empty lists and dicts stand for files that are not there.

    steps: metrics.jsonl. looks: eval.jsonl. The others are named as their files; train/run_folder.py
    says what is in them.
    """

    folder: Path
    name: str
    config: Line
    config_text: str
    steps: list[Line]
    looks: list[Line]
    samples: list[Line]
    rejections: list[Line]
    examples: list[Line]
    summary: Line
    environment: Line
    data: Line
    compare: Line

    @property
    def is_finished(self) -> bool:
        return bool(self.summary)

    @property
    def num_steps(self) -> int:
        """Steps taken so far."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @cached_property
    def threads(self) -> list["Thread"]:
        """The samples by prompt, in the order of the first look."""
        found: dict[tuple[str, str], list[Line]] = {}
        for sample in self.samples:
            found.setdefault((str(sample.get("source", "")), str(sample.get("prompt", ""))), []).append(sample)
        return [Thread(source, prompt, samples) for (source, prompt), samples in found.items()]


@dataclass(frozen=True)
class Thread:
    """One prompt and its answers, a sample a look."""

    source: str
    prompt: str
    samples: list[Line]

    @property
    def last(self) -> Line:
        return self.samples[-1]

    @property
    def base(self) -> str | None:
        """What the base model said: `base` beside the answer, else the answer before the first step."""
        if "base" in self.last:
            return str(self.last["base"])
        first = self.samples[0]
        return str(first["answer"]) if first["step"] == 0 and len(self.samples) > 1 else None

    @property
    def between(self) -> list[Line]:
        """The samples after the base's and before the last."""
        return [sample for sample in self.samples[:-1] if sample["step"] > 0]


def read_run(folder: Path) -> RunRecord:
    """Raises CheckpointError if the folder is not that of a run, or a file in it is broken."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{folder}: is not the folder of a run (no config.yaml); name the `out` of a run file")
    text = file.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CheckpointError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: is no run file, but {type(config).__name__}")
    return RunRecord(
        folder=folder,
        name=folder.resolve().name,
        config=config,
        config_text=text,
        steps=read_json_lines(folder / "metrics.jsonl"),
        looks=read_json_lines(folder / "eval.jsonl"),
        samples=read_json_lines(folder / "samples.jsonl"),
        rejections=read_json_lines(folder / "rejections.jsonl"),
        examples=read_json_lines(folder / "examples.jsonl"),
        summary=read_json(folder / "summary.json"),
        environment=read_json(folder / "environment.json"),
        data=read_json(folder / "data.json"),
        compare=read_json(folder / "compare.json"),
    )


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested config as dotted keys: {"train.seed": 0, "data.train[0].path": ...}; what is empty is a value."""
    if isinstance(tree, dict) and tree:
        parts = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and tree:
        parts = [(f"{prefix}[{index}]", value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    return {key: value for name, part in parts for key, value in flat(part, name).items()}
