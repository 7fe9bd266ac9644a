"""What a run left in its folder, as plain values. Nothing else is read, and nothing is written.

Only `config.yaml` must exist: the folder of a run that is still going on, or was killed, is read as far as it goes.
A last line without a line end is still being written, and is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

from preceptor.errors import CheckpointError
from preceptor.files import read_json, read_json_lines, read_run_file

JsonObject = dict[str, Any]
EvalLine = TypeVar("EvalLine", bound=Mapping[str, Any])

NATS = "nats per trained token"  # of a held-out loss

LINES = ("metrics", "eval", "samples", "rejections", "examples")  # .jsonl
OBJECTS = ("summary", "environment", "data", "compare")  # .json


@dataclass(frozen=True)
class RunRecord:
    """The files of a run folder, which train/run_folder.py describes; missing ones are empty."""

    folder: Path
    name: str
    config: JsonObject
    config_text: str
    steps: list[JsonObject]  # metrics.jsonl, without those whose update was left out
    evaluations: list[JsonObject]  # eval.jsonl
    samples: list[JsonObject]
    rejections: list[JsonObject]
    examples: list[JsonObject]
    summary: JsonObject
    environment: JsonObject
    data: JsonObject
    compare: JsonObject
    skipped: list[JsonObject] = field(default_factory=list)  # of metrics.jsonl: steps whose update was left out

    @property
    def is_finished(self) -> bool:
        return bool(self.summary)

    @property
    def num_steps(self) -> int:
        """Steps taken so far."""
        return max((int(own[-1]["step"]) for own in (self.steps, self.skipped) if own), default=0)

    @property
    def memory_before_bytes(self) -> int:
        """What the process held before the model was loaded (on a CPU), as far as that is known."""
        return int(self.summary.get("memory_before_bytes") or self.data.get("memory_before_bytes") or 0)

    @property
    def ended_early(self) -> bool:
        """Whether a finished run took fewer steps than were planned: by `train.patience`, or by its program."""
        return not self.summary.keys().isdisjoint(("stopped_early", "ended_by_program"))

    def until(self, step: int) -> Self:
        """The record as it was after a step. What was measured after the run is of its last one, and left out."""
        names = ("steps", "skipped", "evaluations", "samples")
        own = {name: [line for line in getattr(self, name) if int(line["step"]) <= step] for name in names}
        return replace(self, **own, summary={}, compare={})  # type: ignore[arg-type]

    @property
    def counts(self) -> "DataCounts | None":
        """Examples of the data; None where they were not counted."""
        if self.data.get("num_examples") is None:
            return None
        held_out = self.data.get("held_out", {})
        measured, lost = held_out.get("num_examples", 0), held_out.get("num_rejected", 0)
        return DataCounts(self.data["num_examples"] - measured, len(self.rejections) - lost, measured, lost)

    @property
    def all_held_out(self) -> list[JsonObject]:
        """The evaluations that measured a held-out loss. It is null where it was not finite."""
        return [evaluation for evaluation in self.evaluations if "loss" in evaluation]

    @property
    def held_out(self) -> list[JsonObject]:
        """Those of `all_held_out` with the held-out examples of the last one: other losses are not compared."""
        return measured_on_the_same(self.all_held_out, "held_out")

    def all_of_task(self, name: str) -> list[JsonObject]:
        """The evaluations that measured a task."""
        return [line for line in self.evaluations if any(own["task"] == name for own in line.get("tasks", ()))]

    def of_task(self, name: str) -> list[JsonObject]:
        """Those of `all_of_task` with the items of the last one."""
        return measured_on_the_same(self.all_of_task(name), name)

    def of_model(self, lines: Sequence[JsonObject]) -> list[JsonObject]:
        """Those up to the step of the saved model, which `checkpoint.best` may choose before the last; else all."""
        return up_to(lines, self.summary.get("model_step"))

    @property
    def held_out_of_model(self) -> list[JsonObject]:
        """Those up to the saved model's, with its held-out examples: its own is the last."""
        return measured_on_the_same(self.of_model(self.all_held_out), "held_out")

    @property
    def loss_ends(self) -> tuple[float, float] | None:
        """Training loss over the first and the last tenth of the steps; None for fewer than two steps."""
        tenth = max(1, len(self.steps) // 10)
        return (_mean_loss(self.steps[:tenth]), _mean_loss(self.steps[-tenth:])) if len(self.steps) > 1 else None

    @property
    def is_cross_entropy(self) -> bool:
        """Whether the training loss falls where the model learns: that of `dft` or of the user's own need not."""
        loss = self.config.get("loss") or {}
        return loss.get("code") is None and loss.get("type", "nll") == "nll"

    @property
    def loss_unit(self) -> str:
        """What the training loss is measured in."""
        loss = self.config.get("loss") or {}
        if loss.get("code") is not None:
            unit = "units of loss.code"
        else:
            unit = "nats" if self.is_cross_entropy else "nats times probability"
        mean = ", mean of conversations" if loss.get("reduction", "token") == "conversation" else " per trained token"
        added = " and ".join(key for key in ("label_smoothing", "z_loss", "kl_coef") if loss.get(key))
        return f"{unit}{mean}{', with ' * bool(added)}{added}"

    @cached_property
    def prompts(self) -> list["PromptSamples"]:
        """The samples by prompt, in the order of the first evaluation."""
        found: dict[tuple[str, str], list[JsonObject]] = {}
        for sample in self.samples:
            found.setdefault((str(sample.get("source", "")), str(sample.get("prompt", ""))), []).append(sample)
        return [
            PromptSamples(source, prompt, samples, last=(self.of_model(samples) or samples)[-1])
            for (source, prompt), samples in found.items()
        ]


@dataclass(frozen=True)
class DataCounts:
    """Examples that are there to train on and those that are held out, and how many of each are rejected."""

    train: int
    train_rejected: int
    held_out: int
    held_out_rejected: int

    def __str__(self) -> str:
        return f"{self.train:,}" + (f" to train on, {self.held_out:,} held out" if self.held_out else "")


@dataclass(frozen=True)
class PromptSamples:
    """One prompt and its answers, one sample per evaluation."""

    source: str
    prompt: str
    samples: list[JsonObject]
    last: JsonObject  # the saved model's; of a run that goes on, the last

    @property
    def base(self) -> str | None:
        """The base model's answer: `base` beside the tuned model's, else the answer before the first step."""
        if "base" in self.last:
            return str(self.last["base"])
        first = self.samples[0]
        return str(first["answer"]) if first["step"] == 0 and len(self.samples) > 1 else None

    @property
    def between(self) -> list[JsonObject]:
        """The samples after the base's, without `last`."""
        return [sample for sample in self.samples if sample["step"] > 0 and sample is not self.last]


def read_run(folder: Path) -> RunRecord:
    """Raises CheckpointError if the folder is not that of a run, or a file in it is broken."""
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder}: is not the folder of a run (no config.yaml); name the `out` of a run file")
    config, text = read_run_file(folder)
    lines = {name: read_json_lines(folder / f"{name}.jsonl") for name in LINES}
    return record_of_files(folder, config, text, lines, {name: read_json(folder / f"{name}.json") for name in OBJECTS})


def record_of_files(
    folder: Path,
    config: JsonObject,
    config_text: str,
    lines: Mapping[str, list[JsonObject]],
    objects: Mapping[str, JsonObject],
) -> RunRecord:
    """lines: of the files of LINES; objects: those of OBJECTS."""
    return RunRecord(
        folder=folder,
        name=folder.resolve().name,
        config=config,
        config_text=config_text,
        steps=[step for step in lines["metrics"] if "skipped" not in step],
        skipped=[step for step in lines["metrics"] if "skipped" in step],
        evaluations=lines["eval"],
        samples=lines["samples"],
        rejections=lines["rejections"],
        examples=lines["examples"],
        summary=objects["summary"],
        environment=objects["environment"],
        data=objects["data"],
        compare=objects["compare"],
    )


def finite(evaluations: Sequence[JsonObject]) -> list[JsonObject]:
    """Those of `held_out` whose loss is finite."""
    return [evaluation for evaluation in evaluations if evaluation["loss"] is not None]


def in_figures(value: float | None, form: str = ".4f") -> str:
    """A figure of a JSON file in words: null stands for one that is not finite."""
    return "not finite" if value is None else format(value, form)


def measured_on_the_same(lines: Sequence[EvalLine], what: str | None) -> list[EvalLine]:
    """The evaluations with the held-out examples (`held_out`), or the items of a task, of the last one.

    By the hashes of `measured_on`, which lines of older versions do not have.
    """
    known = [line.get("measured_on", {}).get(what) for line in lines]
    return [line for line, own in zip(lines, known, strict=True) if own in (None, known[-1])]


def up_to(lines: Sequence[JsonObject], step: int | None) -> list[JsonObject]:
    """The lines up to a step; None: all."""
    return [line for line in lines if step is None or line["step"] <= step]


def tokens_per_second(step: JsonObject) -> float | None:
    return step["num_tokens"] / step["seconds"] if step.get("seconds") and "num_tokens" in step else None


def _mean_loss(steps: Sequence[JsonObject]) -> float:
    """As the steps have it, in their `loss_unit`, over some of them."""
    num = sum(step.get("num_trained", 1) for step in steps)
    return sum(step["loss"] * step.get("num_trained", 1) for step in steps) / max(1, num)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested config as dotted keys: {"train.seed": 0, "data.train[0].path": ...}; empty lists and dicts stay."""
    if isinstance(tree, dict) and tree:
        parts = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and tree:
        parts = [(f"{prefix}[{index}]", value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    return {key: value for name, part in parts for key, value in flat(part, name).items()}
