"""A first run file: values that suit the data, the model and the device, each with its reason.

`read_lengths` renders a sample of the data as training does, `suggest` chooses, `Suggestion.text` is the file. Few
examples get short sequences, small batches and as many epochs as make enough optimizer steps; weights are trained in
full where that fits the device, else by LoRA.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from preceptor import config
from preceptor.chat.format import ChatFormat, load_chat_format
from preceptor.chat.template import BUILTIN
from preceptor.config.yaml_text import one_line_yaml
from preceptor.data.examples import Conversation, Rejection, RejectionCounts
from preceptor.data.loader import FEW_STEPS
from preceptor.data.packing import count_sequences
from preceptor.data.reading import read_trees
from preceptor.data.sources import OpenSource, open_sources
from preceptor.data.truncation import Fitter
from preceptor.errors import DataError, ModelError
from preceptor.plan.devices import DeviceSpec
from preceptor.plan.model import PlannedModel
from preceptor.plan.plan import make_case
from preceptor.plan.sample import Sample

if TYPE_CHECKING:
    from preceptor.plan.dry_run import DryRun

Method = Literal["auto", "full", "lora"]

_MOST_RENDERED = 1000  # examples of each source
_MOST_PACKED = 10_000  # to see how densely they pack; 50 ms
_MAX_LENGTHS = (4096, 2048, 1024, 512, 256, 128, 64)
_BATCH_SIZES = (4, 2, 1)
_EPOCHS, _MOST_EPOCHS = 3, 10
_ENOUGH_STEPS = 3 * FEW_STEPS
_MARGIN = 1.25  # for examples that were not rendered and may be longer
_LONGEST = 2**24
_HELD_OUT, _ENOUGH_TO_HOLD_OUT = 0.05, 200  # share, and the fewest examples of which it is held out
_CHECKPOINT_STEPS = 100
# Peak learning rates by parameters: (fewer than, full, LoRA)
_RATES = ((1e8, 3e-4, 2e-3), (1e9, 5e-5, 5e-4), (math.inf, 2e-5, 2e-4))
_CHECKPOINTED = {"memory": {"activation_checkpointing": "all"}}
_HALF = {"model": {"dtype": "bfloat16"}}
_WAYS: dict[Method, tuple[dict[str, Any], ...]] = {
    "full": ({}, _CHECKPOINTED),
    "lora": ({"adapter": {}}, {"adapter": {}, **_HALF}, {"adapter": {}, **_HALF, **_CHECKPOINTED}),
}


@dataclass(frozen=True)
class DataLengths:
    """What the rendered examples have, without those that are rejected. stands_for: how many of all the data each of
    them stands for: in its own source, where the files tell. num_added: tokens that the chat template needs and the
    model's tokenizer has not.
    """

    lengths: list[int]
    stands_for: list[float]
    whole: bool
    chat_template: str | None  # None: the data has no conversations
    num_positions: int | None
    rejections: RejectionCounts
    num_read: int = 0
    share_trained: float = 1.0
    num_added: int = 0
    template_is_given: bool = False
    has_conversations: bool = True

    def sequences(self, max_length: int) -> int:
        """Sequences of an epoch; exact where the sample is whole and nothing of it is held out.

        Else by how densely the rendered examples pack, each as often as its share of the data says.
        """
        lengths_N, stands_for_N = np.array(self.lengths), np.array(self.stands_for)
        num_packed = max(len(lengths_N), min(_MOST_PACKED, self.num_examples))
        ends_N = np.rint(np.cumsum(stands_for_N) * (num_packed / self.num_examples)).astype(int)
        drawn_N = np.repeat(lengths_N, np.diff(ends_N, prepend=0))
        share = self.share_trained * float(stands_for_N @ lengths_N) / int(drawn_N.sum())
        return math.ceil(round(count_sequences(drawn_N, max_length, seed=0) * share, 6))

    @property
    def num_examples(self) -> float:
        """Of all the data, without those that are rejected."""
        return math.fsum(self.stands_for)

    @property
    def shortest(self) -> int:
        """The smallest `data.max_length` for the longest example, in steps of 64."""
        needed = max(self.lengths) * (1 if self.whole else _MARGIN)
        rounded = max(64, math.ceil(needed / 64) * 64)
        return rounded if self.num_positions is None else min(rounded, self.num_positions)


def read_lengths(run: config.Run) -> DataLengths:
    """Render the first examples of each source. Raises DataError where none can be trained, and as `prepare`."""
    sources = [OpenSource(source) for source in run.data.train]
    chat = _chat_format(run, sources)
    renderer = chat.renderer(run.data)
    fitter = Fitter(renderer, _LONGEST, "reject", chat.num_positions)
    lengths: list[int] = []
    stands_for: list[float] = []
    counts = RejectionCounts(())
    num_read, whole, has_conversations = 0, True, False
    for source in sources:
        num = 0
        entries = read_trees(source, fitter)
        for _, found in islice(entries, _MOST_RENDERED):
            num += 1
            if isinstance(found, Rejection):
                counts.add(found)
            else:
                lengths += [tree.num_tokens for _, tree in found]
                chat.require_rows(tree for _, tree in found)
                has_conversations |= any(isinstance(example, Conversation) for example, _ in found)
        num_read += num
        is_whole = next(entries, None) is None
        whole &= is_whole
        rows = [table.num_rows() for table in source.tables]
        num_examples = num if is_whole or None in rows else sum(filter(None, rows))
        stands_for += [num_examples / max(num, 1)] * (len(lengths) - len(stands_for))
    if not lengths:
        raise DataError(f"no example can be trained:\n{counts}")
    template = None if chat.template is None else run.data.chat_template or chat.template.name
    return DataLengths(
        lengths, stands_for, whole, template, chat.num_positions, counts, num_read,
        num_added=len(chat.added), template_is_given=run.data.chat_template is not None,
        has_conversations=has_conversations,
    )  # fmt: skip


def _chat_format(run: config.Run, sources: Sequence[OpenSource]) -> ChatFormat:
    """As training has it; for a model without a template, the built-in one whose tokens it has, if there is one."""
    chat = load_chat_format(run.model, run.data, sources)
    if run.data.chat_template is None and chat.template is not None and chat.added:
        own = set(chat.tokenizer.get_vocab()) - set(chat.added)
        for name, built in BUILTIN.items():
            if own >= set(built.tokens):
                return load_chat_format(run.model, run.data.model_copy(update={"chat_template": name}), sources)
    return chat


def hold_out(run: config.Run, data: DataLengths) -> tuple[config.Run, DataLengths]:
    """With `data.eval_size` where no held-out data is named and there are enough examples to spare some."""
    if run.data.eval or data.num_examples < _ENOUGH_TO_HOLD_OUT:
        return run, data
    settings = run.data.model_copy(update={"eval_size": _HELD_OUT})
    sides = open_sources(settings)
    if not all(any(True for source in side for _ in source.examples()) for side in sides):
        return run, data  # of a few questions none may be held out, or all
    return run.model_copy(update={"data": settings}), replace(data, share_trained=1 - _HELD_OUT)


@dataclass(frozen=True)
class Suggestion:
    """A run and the reasons for its values. fits: None where that cannot be said, and `why_unknown` says why."""

    run: config.Run
    data: DataLengths
    num_steps: int
    num_parameters: int | None
    device: DeviceSpec
    fits: bool | None
    why_unknown: str = ""

    def text(self, schema: str, command: str) -> str:
        """The run file, with comments. schema: where its JSON schema is; command: what starts it."""
        return "\n".join(_lines(self, schema, command)) + "\n"


def suggest(
    run: config.Run,
    data: DataLengths,
    model: PlannedModel,
    sample: Sample | str,
    device: DeviceSpec,
    dry_run: "DryRun | str",
    method: Method = "auto",
) -> Suggestion:
    """Values over those of `run`, which names model, data and out. dry_run: or why there is none."""
    max_length, batch_size, epochs = choose_sizes(data)
    tree = run.model_dump(mode="json")
    tree["data"] |= {"max_length": max_length, "chat_template": data.chat_template}
    tree["train"] |= {"batch_size": batch_size, "duration": f"{epochs} epochs"}
    tree["optimizer"]["learning_rate"] = None
    num_steps = epochs * math.ceil(data.sequences(max_length) / batch_size)
    if num_steps > 2 * _CHECKPOINT_STEPS:
        tree["checkpoint"]["every"] = f"{_CHECKPOINT_STEPS} steps"
    chosen, fits, why = _choose_way(tree, sample, device, dry_run, method)
    num = model.num_stored if isinstance(dry_run, str) else dry_run.parameters().num_base
    _, full, lora = next(row for row in _RATES if (math.inf if num is None else num) <= row[0])
    optimizer = chosen.optimizer.model_copy(update={"learning_rate": full if chosen.adapter is None else lora})
    return Suggestion(chosen.model_copy(update={"optimizer": optimizer}), data, num_steps, num, device, fits, why)


def choose_sizes(data: DataLengths) -> tuple[int, int, int]:
    """`data.max_length`, `train.batch_size` and epochs: the largest step of which an epoch count makes enough.

    Where even the smallest step makes few, more epochs, up to `_MOST_EPOCHS`.
    """
    lengths = sorted({data.shortest, *(length for length in _MAX_LENGTHS if length > data.shortest)}, reverse=True)
    if data.num_positions is not None:
        lengths = [length for length in lengths if length <= data.num_positions]
    sizes = sorted(product(lengths, _BATCH_SIZES), key=lambda size: (-size[0] * size[1], size[0]))
    for max_length, batch_size in sizes:
        if _EPOCHS * math.ceil(data.sequences(max_length) / batch_size) >= _ENOUGH_STEPS:
            return max_length, batch_size, _EPOCHS
    per_epoch = data.sequences(lengths[-1])
    epochs = min(_MOST_EPOCHS, max(_EPOCHS, math.ceil(_ENOUGH_STEPS / per_epoch)))
    return lengths[-1], 1, epochs


def _choose_way(
    tree: dict[str, Any], sample: Sample | str, device: DeviceSpec, dry_run: "DryRun | str", method: Method
) -> tuple[config.Run, bool | None, str]:
    """The first way of training that fits; the last where none does."""
    ways: Sequence[dict[str, Any]] = _WAYS[method] if method != "auto" else (*_WAYS["full"], *_WAYS["lora"])
    runs = []
    for way in ways:
        changed = {name: {**(tree[name] or {}), **values} for name, values in way.items()}
        runs.append(config.build({**tree, **changed}, "init"))
    if isinstance(dry_run, str):
        return (runs[0] if method == "full" else runs[-1]), None, dry_run
    for run in runs:
        try:
            peak = make_case(run, dry_run, sample, device).memory.peak_bytes
        except ModelError as error:
            return run, None, str(error)
        if peak <= device.usable_bytes:
            return run, True, ""
    return runs[-1], False, ""


# The file -------------------------------------------------------------------------------------------------------------

_COMMENT_AT = 32  # the column


def _line(text: str, comment: str) -> str:
    return f"{text:<{_COMMENT_AT}} # {comment}"


def _lines(found: Suggestion, schema: str, command: str) -> Iterator[str]:
    run, data = found.run, found.data
    yield f"# yaml-language-server: $schema={schema}"
    yield f"# Made by `preceptor init`; `preceptor schema` has all keys. This starts it:\n#   {command}"
    yield "model:"
    yield f"  path: {one_line_yaml(run.model.path)}"
    if run.model.dtype == "bfloat16":
        yield _line("  dtype: bfloat16", "of the frozen weights; the adapter's are float32")
    yield "data:"
    yield "  train:"
    yield from _sources(run.data.train)
    if run.data.eval:
        yield _line("  eval:", "held-out examples: their loss, and sampled answers")
        yield from _sources(run.data.eval)
    elif run.data.eval_size is not None:
        what = "held-out share: its loss, sampled answers; or name files: `eval: [{path: heldout.jsonl}]`"
        yield _line(f"  eval_size: {run.data.eval_size:g}", what)
    else:
        yield _line("  # eval:", "held-out examples, if you have some: their loss, and sampled answers")
        yield "  #   - path: heldout.jsonl"
        yield _line("  # eval_size: 0.1", "or hold a share of these examples out")
    if data.chat_template is not None:
        yield _line(f"  chat_template: {one_line_yaml(data.chat_template)}", _of_template(data))
    of = "the" if data.whole else "the first"
    longest = f"the longest of {of} {len(data.lengths):,} examples has {max(data.lengths):,}"
    yield _line(f"  max_length: {run.data.max_length}", f"tokens per packed sequence; {longest}")
    if data.rejections.not_allowed:
        yield _line(f"  # allow_rejected: [{', '.join(data.rejections.not_allowed)}]", rejected_line(data))
    yield "train:"
    yield _line(f"  duration: {run.train.duration}", _steps(found))
    yield _line(f"  batch_size: {run.train.batch_size}", "packed sequences per optimizer step")
    yield "optimizer:"
    yield _line(f"  learning_rate: {_number(run.optimizer.learning_rate)}", _size(found))
    if run.checkpoint.every is not None:
        yield "checkpoint:"
        yield _line(f"  every: {run.checkpoint.every}", "a run that is killed goes on from the newest one")
    if run.memory.activation_checkpointing != "none":
        yield "memory:"
        yield _line("  activation_checkpointing: all", "less memory, about a third more time")
    if run.adapter is None:
        yield f"# no section `adapter`: all weights are trained; {_fit(found)}"
    else:
        yield _line("adapter:", f"LoRA; without this section all weights are trained; {_fit(found)}")
        yield "  kind: lora"
        yield f"  rank: {run.adapter.rank}"
    yield f"out: {one_line_yaml(run.out)}"


def _of_template(data: DataLengths) -> str:
    if not data.has_conversations:
        return "no example uses it: none is a conversation; `columns` can make conversations of questions and answers"
    if data.chat_template == "tokenizer":
        return "the model's own"
    whose = "as given" if data.template_is_given else "the model has none"
    if not data.num_added:
        return whose if data.template_is_given else f"{whose}, but its vocabulary has the tokens of this one"
    num = {1: "a token", 2: "two tokens"}.get(data.num_added, f"{data.num_added} tokens")
    return f"{whose}; adds {num}, which {'is' if data.num_added == 1 else 'are'} trained"


def rejected_line(data: DataLengths) -> str:
    """How many of the examples that were read cannot be trained, and which is the first."""
    first = data.rejections.reasons[0].first.source
    of = f"{data.rejections.num_rejected:,} of {data.num_read:,} examples"
    return f"{of} cannot be trained, first {first}"


def _number(value: float | None) -> str:
    """2.0e-4: with a point, so that every reader of YAML takes it for a number."""
    return re.sub(r"e-0*", "e-", f"{value:.1e}")


def _sources(sources: Sequence[config.Source]) -> Iterator[str]:
    for source in sources:
        yield f"    - path: {one_line_yaml(source.path)}"
        if source.split is not None:
            yield f"      split: {one_line_yaml(source.split)}"


def _steps(found: Suggestion) -> str:
    about = "" if found.data.whole and found.run.data.eval_size is None else "about "
    few = f"; under {FEW_STEPS} teach little: add examples" if found.num_steps < FEW_STEPS else ""
    return f"{about}{found.num_steps:,} optimizer steps{few}"


def _size(found: Suggestion) -> str:
    size = f"{found.num_parameters:,} parameters" if found.num_parameters else "a model of unknown size"
    return f"usual for {'full fine-tuning' if found.run.adapter is None else 'LoRA'} of {size}"


def _fit(found: Suggestion) -> str:
    device = found.device.name
    if found.fits is None:
        return "whether it fits is not known"
    return f"it fits {device}" if found.fits else f"it does not fit {device}"
