"""Evaluations during training: held-out loss, tasks, and answers to the same prompts each time."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from preceptor.data.cache import key_of
from preceptor.data.examples import Conversation
from preceptor.data.forest import Tree, path_ids
from preceptor.errors import CheckpointError, counted, explaining_out_of_memory
from preceptor.evaluate.figures import summary
from preceptor.evaluate.generate import Sampling
from preceptor.evaluate.held_out import label_targets, measure
from preceptor.evaluate.model import EvaluatedModel
from preceptor.evaluate.run import run_task
from preceptor.evaluate.tasks import Task
from preceptor.files import append_line, read_json, read_json_lines, write_json
from preceptor.model.numerics import autocast
from preceptor.report.run_record import in_figures
from preceptor.train.checkpoint import State, require_finite
from preceptor.train.improvement import improvement
from preceptor.train.prepare import Prepared
from preceptor.train.provenance import base_identity, held_out_sha256, tasks_sha256
from preceptor.world import ONE, World, package_version

_NO_ROOM = (
    "the evaluation of the held-out examples does not fit in memory: lower data.max_length, or leave the longest "
    "examples out of data.eval"
)


@dataclass(frozen=True)
class SamplePrompt:
    """A held-out prompt whose answers are recorded."""

    source: str
    context: tuple[int, ...]  # tokens
    last_message: str
    reference: str  # the answer in the data


class Evaluations:
    """Writes `samples.jsonl` (one line per evaluation and prompt), then `eval.jsonl` (one line per evaluation).

    A line of eval.jsonl has `step`; with held-out examples, `loss`, its 95 % interval over the examples in
    `loss_interval`, `bits_per_byte`, `token_accuracy`, `num_trained`, and the same in `by_source`, `by_kind`, `by_turn`
    (held_out.py); with tasks, `tasks` (evaluate/figures.py); and `measured_on`, hashes of both. A sample has the greedy
    `answer` and a `sampled` one, drawn by the same seed at each evaluation. With `train.patience` a line also has the
    losses `by_example`, and whether it is an `improvement` (improvement.py). lines: those of eval.jsonl, also of
    earlier sessions: an evaluation that is there is not made again. unwritten: (file, line) of what was measured and
    could not be written.
    """

    def __init__(
        self, prepared: Prepared, folder: Path, say: Callable[[str], None], alone: bool, world: World = ONE
    ) -> None:
        """alone: the model processes one conversation at a time."""
        self._run, self._chat, self._folder, self._say, self._world = prepared.run, prepared.chat, folder, say, world
        held_out, num_samples = prepared.held_out, prepared.run.eval.num_samples
        conversations = [(example, tree) for example, tree in held_out if isinstance(example, Conversation)]
        self.prompts = [first_prompt(example, tree) for example, tree in conversations[:num_samples]]
        tags = prepared.chat.template.reasoning_tags if prepared.chat.template else {}
        self.held_out, self._tasks = label_targets(held_out, prepared.chat.tokenizer, tags), prepared.tasks
        self._measured_on = {task.name: tasks_sha256([task]) for task in self._tasks}
        self._measured_on |= {"held_out": held_out_sha256(prepared)} if self.held_out else {}
        self._base = _base_figures(prepared, world) if prepared.tasks else None
        self._alone, self._sampling = alone, Sampling(prepared.run.eval.temperature, prepared.run.train.seed)
        own = read_json_lines(folder / "eval.jsonl") if world.is_first else []
        self.lines: list[dict[str, Any]] = world.gather(own)[0]
        self.unwritten: list[tuple[str, dict[str, Any]]] = []

    def evaluated(self, model: Any) -> EvaluatedModel:
        return EvaluatedModel(str(self._run.out), model, self._chat, self._alone, self._world)

    def evaluate(self, state: State, asked: bool = False) -> None:
        """Evaluate and sample; nothing that influences training changes. Raises ModelError as `require_finite`.

        asked: also where `eval.every` says never.
        """
        self.write()  # of an evaluation before
        if (self._run.eval.every is None and not asked) or (self.lines and self.lines[-1]["step"] == state.step):
            return
        require_finite(state)
        precision, patience = self._run.train.precision, self._run.train.patience
        assert precision is not None, "a run that starts has a precision"
        evaluated = self.evaluated(state.model)
        measured: dict[str, Any] = {}
        with autocast(state.model.device, precision):
            if self.held_out:
                max_length, by_example = self._run.data.max_length, patience is not None
                with explaining_out_of_memory(_NO_ROOM):
                    measured |= measure(
                        state.model, self.held_out, max_length, evaluated.alone, by_example, self._world
                    )
            if self._tasks:
                measured["tasks"] = [self._measured(evaluated, task, state.step) for task in self._tasks]
            self.unwritten = [("samples.jsonl", line) for line in self._samples(evaluated, state.step)]
        if measured:
            line = {"step": state.step, **measured, "measured_on": self._measured_on}
            if patience is not None:
                line["improvement"] = improvement(self.lines, line, self._sampling.seed)
            self.unwritten.append(("eval.jsonl", line))
        self.write()

    def write(self) -> None:
        """Write what is unwritten, and say the figures. Raises CheckpointError; the rest may then be tried again."""
        while self.unwritten:
            name, line = self.unwritten[0]
            self._world.first(partial(append_line, self._folder / name, line))
            del self.unwritten[0]
            if name == "eval.jsonl":
                self.lines.append(line)
                self._say(f"after {counted(line['step'], 'step')}: {_shown(line)}")

    def _measured(self, evaluated: EvaluatedModel, task: Task, step: int) -> dict[str, Any]:
        """The figures of a task; of the base model those of an earlier run, where there are some."""
        kept = None
        if step == 0 and self._base is not None and (task.own is None or task.own.sha256 is not None):
            folder, key = self._base
            kept = folder / f"{key_of(key, tasks_sha256([task]))}.json"
            if found := self._world.first(partial(_kept_figures, kept)):
                self._say(
                    f"{task.name}: the base model's figures are kept from an earlier run (data.cache: off measures "
                    "again)"
                )
                return {**found, "task": task.name}
        results = run_task(evaluated, task, self._run.eval.max_new_tokens, batch_size=64)
        found = summary(task, results, self._sampling.seed)
        if kept is not None and self._world.is_first:
            with suppress(CheckpointError, OSError):  # a cache that cannot be written costs time alone
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_json(kept, found)
        return found

    def _samples(self, evaluated: EvaluatedModel, step: int) -> list[dict[str, Any]]:
        contexts = [prompt.context for prompt in self.prompts]
        greedy, sampled = (
            evaluated.generate(contexts, self._run.eval.max_new_tokens, sampling=sampling)
            for sampling in (None, self._sampling)
        )
        return [
            {
                "step": step,
                "source": prompt.source,
                "prompt": prompt.last_message,
                "answer": answer.text,
                "stopped": answer.stopped,
                "sampled": drawn.text,
                "sampled_stopped": drawn.stopped,
                "temperature": self._sampling.temperature,
                "reference": prompt.reference,
            }
            for prompt, answer, drawn in zip(self.prompts, greedy, sampled, strict=True)
        ]


def _kept_figures(file: Path) -> dict[str, Any]:
    with suppress(CheckpointError):  # of a broken file
        return read_json(file)
    return {}


def _base_figures(prepared: Prepared, world: World) -> tuple[Path, str] | None:
    """Where the figures of the base model on tasks are kept, and the name of all that they depend on beside the task.

    None where nothing is cached, or the model before the first step is no base model that can be named.
    """
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
    return prepared.cache.folder / "evaluations", key


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
        parts.append(f"{task['task']} {name} {in_figures(figure['value'], '.3f')}")
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
