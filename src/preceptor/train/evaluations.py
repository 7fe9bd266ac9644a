"""Evaluations during training: held-out loss, tasks, and answers to the same prompts each time."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from preceptor.data.cache import key_of
from preceptor.data.examples import Conversation
from preceptor.data.forest import Tree, path_ids
from preceptor.errors import CheckpointError, explaining_out_of_memory
from preceptor.evaluate.figures import summary
from preceptor.evaluate.generate import Sampling
from preceptor.evaluate.held_out import LabelledTree, label_targets, measure
from preceptor.evaluate.model import EvaluatedModel
from preceptor.evaluate.run import run_task
from preceptor.evaluate.tasks import Task
from preceptor.files import append_line, read_json, read_json_lines, write_json
from preceptor.model.numerics import autocast
from preceptor.train.checkpoint import State, require_finite
from preceptor.train.improvement import improvement
from preceptor.train.prepare import Prepared
from preceptor.train.provenance import base_identity, tasks_sha256
from preceptor.world import ONE, World, package_version


@dataclass(frozen=True)
class SamplePrompt:
    """A held-out prompt whose answers are recorded."""

    source: str
    context: tuple[int, ...]  # tokens
    last_message: str
    reference: str  # the answer in the data


@dataclass
class Evaluations:
    """Writes `samples.jsonl` (one line per evaluation and prompt), then `eval.jsonl` (one line per evaluation).

    A line of eval.jsonl has `step`; with held-out examples, `loss`, its 95 % interval over the examples in
    `loss_interval`, `bits_per_byte`, `token_accuracy`, `num_trained`, and the same in `by_source`, `by_kind`, `by_turn`
    (held_out.py); with tasks, `tasks` (evaluate/figures.py). A sample has the greedy `answer` and a `sampled` one,
    drawn by the same seed at each evaluation. With `records_improvement` a line also has the losses `by_example`, and
    whether it is an `improvement` (improvement.py). lines: those of eval.jsonl, also of earlier sessions: an evaluation
    that is there is not made again. base: what is known of the base model, which is the model before the first step.
    """

    folder: Path
    held_out: Sequence[LabelledTree]
    tasks: Sequence[Task]
    prompts: Sequence[SamplePrompt]
    evaluated: Callable[[Any], EvaluatedModel]
    max_length: int
    max_new_tokens: int
    sampling: Sampling
    precision: str
    enabled: bool
    say: Callable[[str], None]
    world: World = ONE
    records_improvement: bool = False
    lines: list[dict[str, Any]] = field(default_factory=list)
    base: "BaseFigures | None" = None

    def evaluate(self, state: State, asked: bool = False) -> None:
        """Evaluate and sample; nothing that influences training changes. Raises ModelError as `require_finite`.

        asked: also where `eval.every` says never.
        """
        if not (self.enabled or asked) or (self.lines and self.lines[-1]["step"] == state.step):
            return
        require_finite(state)
        evaluated = self.evaluated(state.model)
        measured: dict[str, Any] = {}
        with autocast(state.model.device, self.precision):
            if self.held_out:
                measured |= self._measure(state.model, evaluated.alone)
            if self.tasks:
                measured["tasks"] = [self._measured(evaluated, task, state.step) for task in self.tasks]
            self._sample(evaluated, state.step)
        if measured:
            line = {"step": state.step, **measured}
            if self.records_improvement:
                line["improvement"] = improvement(self.lines, line, self.sampling.seed)
            if self.world.is_first:
                append_line(self.folder / "eval.jsonl", line)
            self.lines.append(line)
            self.say(f"after {state.step} steps: {_shown(measured)}")

    def _measure(self, model: Any, alone: bool) -> dict[str, Any]:
        with explaining_out_of_memory(
            "the evaluation of the held-out examples does not fit in memory: lower data.max_length, or leave the "
            "longest examples out of data.eval"
        ):
            return measure(
                model, self.held_out, self.max_length, alone, by_example=self.records_improvement, world=self.world
            )

    def _measured(self, evaluated: EvaluatedModel, task: Task, step: int) -> dict[str, Any]:
        """The figures of a task; of the base model those of an earlier run, where there are some."""
        base = self.base if step == 0 else None
        if base is None or (task.own is not None and task.own.sha256 is None):
            return self._run_task(evaluated, task)
        found = self.world.first(lambda: base.read(task))
        if found is not None:
            self.say(
                f"{task.name}: the base model's figures are kept from an earlier run (data.cache: off measures again)"
            )
            return {**found, "task": task.name}
        found = self._run_task(evaluated, task)
        if self.world.is_first:
            base.write(task, found)
        return found

    def _run_task(self, evaluated: EvaluatedModel, task: Task) -> dict[str, Any]:
        results = run_task(evaluated, task, self.max_new_tokens, batch_size=64)
        return summary(task, results, self.sampling.seed)

    def _sample(self, evaluated: EvaluatedModel, step: int) -> None:
        contexts = [prompt.context for prompt in self.prompts]
        greedy, sampled = (
            evaluated.generate(contexts, self.max_new_tokens, sampling=sampling) for sampling in (None, self.sampling)
        )
        if not self.world.is_first:
            return
        for prompt, answer, drawn in zip(self.prompts, greedy, sampled, strict=True):
            append_line(
                self.folder / "samples.jsonl",
                {
                    "step": step,
                    "source": prompt.source,
                    "prompt": prompt.last_message,
                    "answer": answer.text,
                    "stopped": answer.stopped,
                    "sampled": drawn.text,
                    "sampled_stopped": drawn.stopped,
                    "temperature": self.sampling.temperature,
                    "reference": prompt.reference,
                },
            )


@dataclass(frozen=True)
class BaseFigures:
    """The figures of the base model on tasks, kept in a folder. key: all that they depend on, besides the task."""

    folder: Path
    key: str

    def read(self, task: Task) -> dict[str, Any] | None:
        try:
            return read_json(self._file(task)) or None
        except CheckpointError:
            return None

    def write(self, task: Task, found: dict[str, Any]) -> None:
        with suppress(CheckpointError, OSError):  # a cache that cannot be written costs time alone
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._file(task), found)

    def _file(self, task: Task) -> Path:
        return self.folder / f"{key_of(self.key, tasks_sha256([task]))}.json"


def _base_figures(prepared: Prepared, world: World) -> BaseFigures | None:
    """None where nothing is cached, or the model before the first step is no base model that can be named."""
    run, chat = prepared.run, prepared.chat
    identity = base_identity(run.model)
    if prepared.cache is None or run.model.init == "random" or run.model.from_run is not None or identity is None:
        return None
    on_gpu = run.train.device != "cpu" and torch.cuda.is_available()
    key = key_of(
        identity,
        chat.template and chat.template.text,
        repr(chat.template_kwargs),
        [sorted(chat.added), run.train.seed, run.model.dtype, run.train.precision, run.engine, run.eval.max_new_tokens],
        [run.model.quantization, run.model.double_quantization],
        [run.adapter is not None, on_gpu, world.size, torch.get_num_threads()],
        [torch.__version__, transformers.__version__, package_version("preceptor")],
    )
    return BaseFigures(prepared.cache.folder / "evaluations", key)


def build_evaluations(
    prepared: Prepared, folder: Path, say: Callable[[str], None], alone: bool, world: World = ONE
) -> Evaluations:
    """The evaluations of a run in its folder. alone: the model processes one conversation at a time."""
    run, chat = prepared.run, prepared.chat
    assert run.train.precision is not None, "a run that starts has a precision"
    enabled = run.eval.every is not None
    conversations = [(example, tree) for example, tree in prepared.held_out if isinstance(example, Conversation)]
    return Evaluations(
        folder=folder,
        held_out=label_targets(prepared.held_out, chat.tokenizer),
        tasks=prepared.tasks,
        prompts=[first_prompt(example, tree) for example, tree in conversations[: run.eval.num_samples]],
        evaluated=lambda model: EvaluatedModel(str(run.out), model, chat, alone, world),
        max_length=run.data.max_length,
        max_new_tokens=run.eval.max_new_tokens,
        sampling=Sampling(run.eval.temperature, run.train.seed),
        precision=run.train.precision,
        enabled=enabled,
        say=say,
        world=world,
        records_improvement=run.train.patience is not None,
        base=_base_figures(prepared, world) if prepared.tasks else None,
        lines=world.gather(read_json_lines(folder / "eval.jsonl") if world.is_first else [])[0],
    )


def _shown(measured: dict[str, Any]) -> str:
    """An evaluation in one line."""
    parts = []
    if "loss" in measured:
        per_byte = f", {measured['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in measured else ""
        spread = "({:.4f} to {:.4f})".format(*measured["loss_interval"]) if "loss_interval" in measured else ""
        loss = f"{measured['loss']:.4f} {spread}".rstrip()
        parts.append(f"held-out loss {loss}{per_byte}, token accuracy {measured['token_accuracy']:.1%}")
    for task in measured.get("tasks", ()):
        name, figure = next(iter(task["figures"].items()))
        parts.append(f"{task['task']} {name} {figure['value']:.3f}")
    return "; ".join(parts)


def first_prompt(conversation: Conversation, tree: Tree) -> SamplePrompt:
    """The prompt of the conversation's first trained turn."""
    target = next(segment for segment in tree.segments if segment.message is not None)
    turn = target.message
    assert turn is not None
    return SamplePrompt(
        source=conversation.source,
        context=path_ids(tree, target.parent),
        last_message=conversation.messages[turn - 1].content if turn else "",
        reference=conversation.messages[turn].content,
    )
