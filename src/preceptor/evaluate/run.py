"""A task run on a model: what the model answers, chooses or predicts for each item.

- *generation*: greedy answers. `accuracy` is the share of right ones (tasks.py). Stop reasons are counted: the model's
  stop token, the length limit, or a text of the item's `until`.
- *multiple choice*: nothing is generated; each choice is scored by the log-likelihood of its tokens after the prompt.
  `acc` is the share of items whose right choice is the likeliest, `acc_norm` the share where it is the likeliest per
  UTF-8 byte, so that long choices have no disadvantage (Brown et al. 2020, section 2.4; lm-eval's acc_norm divides by
  characters). Choices after plain text are tokenised together with it, and all choices of an item are scored from the
  first token in which they may differ. After a chat template, whose tokens a server fixes, they are tokenised alone.
- *perplexity*: `bits_per_byte` is the loss of all tokens of a text in bits, divided by the UTF-8 bytes that they spell.
  `perplexity` is exp(loss per token), which depends on the tokenizer. Without a bos token the first token of a text is
  not predicted, and its bytes are not counted. Texts longer than the model's context (or 4,096 tokens) are split into
  windows that overlap by half; each token is predicted once.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import transformers

from preceptor.chat.origins import shared_length
from preceptor.chat.tokenise import spans
from preceptor.config.code import OwnFunction
from preceptor.data.forest import Segment, Tree
from preceptor.errors import DataError, ModelError, short
from preceptor.evaluate.generate import NOT_FINITE, GeneratedAnswer
from preceptor.evaluate.intervals import LEVEL, NUM_RESAMPLES
from preceptor.evaluate.likelihood import segment_losses
from preceptor.evaluate.model import EvaluatedModel, TokenIds
from preceptor.evaluate.tasks import Task, TaskItem, TaskPrompt, is_right
from preceptor.world import package_version

# The metrics of each kind of task: name -> (numerator, denominator) in an item's values; "" is 1 for each item.
METRICS: dict[str, dict[str, tuple[str, str]]] = {
    "generation": {"accuracy": ("right", "")},
    "multiple choice": {"acc": ("right", ""), "acc_norm": ("right_norm", "")},
    "perplexity": {"bits_per_byte": ("bits", "num_bytes")},
}
OWN = "own"  # the value of the user's function
STOP_REASONS = ("stop_token", "until", "length")


def metrics_of(task: Task) -> dict[str, tuple[str, str]]:
    """Those of its kind, and that of the user's function."""
    return METRICS[task.kind] | ({} if task.own is None else {task.own.name: (OWN, "")})


@dataclass(frozen=True, slots=True)
class ItemResult:
    """The result of one item."""

    item: TaskItem
    values: dict[str, float]  # numbers that metrics and counts are sums of
    record: dict[str, Any] = field(default_factory=dict)  # what the model did, for a reader


def run_task(evaluated: EvaluatedModel, task: Task, max_new_tokens: int, batch_size: int) -> list[ItemResult]:
    """One result per item, in order, under the caller's autocast. Raises DataError for an item that does not fit,
    ModelError where logits are not finite; the figures of a text are then not finite either. max_new_tokens: where the
    task has no limit of its own.
    """
    if task.kind == "generation":
        return _generate(evaluated, task, task.max_new_tokens or max_new_tokens, batch_size)
    return _choose(evaluated, task.items) if task.kind == "multiple choice" else _predict(evaluated, task.items)


def evaluation_settings(evaluated: EvaluatedModel, seed: int, max_new_tokens: int) -> dict[str, Any]:
    """What results depend on besides model and data."""
    return {
        "seed": seed,
        "num_resamples": NUM_RESAMPLES,
        "level": LEVEL,
        "max_new_tokens": max_new_tokens,
        "dtype": str(evaluated.model.dtype).removeprefix("torch."),
        "device": evaluated.model.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "preceptor": package_version("preceptor"),
    }


def _generate(evaluated: EvaluatedModel, task: Task, max_new_tokens: int, batch_size: int) -> list[ItemResult]:
    contexts = [evaluated.context(_prompt_of(item), item.source, max_new_tokens) for item in task.items]
    until = [item.until for item in task.items] if any(item.until for item in task.items) else ()
    answers = evaluated.generate(contexts, max_new_tokens, batch_size=batch_size, until=until, shared_out=True)
    return [_scored(item, answer, task.own) for item, answer in zip(task.items, answers, strict=True)]


def _scored(item: TaskItem, answer: GeneratedAnswer, own: OwnFunction | None) -> ItemResult:
    cuts = [place for text in item.until if (place := answer.text.find(text)) >= 0]
    text = answer.text[: min(cuts)] if cuts else answer.text
    stop = "until" if cuts else "stop_token" if answer.stopped else "length"
    right = is_right(text, item.match, item.accepted)
    values = {"right": float(right), "num_tokens": float(len(answer.ids))}
    values |= {reason: float(stop == reason) for reason in STOP_REASONS}
    values |= {} if own is None else {OWN: _own_value(item, text, own)}
    return ItemResult(item, values, {"answer": text, "stop": stop, "right": right, "accepted": list(item.accepted)})


def _own_value(item: TaskItem, answer: str, own: OwnFunction) -> float:
    """The number that the user's function gives. Raises DataError for anything else."""
    prompt = _prompt_of(item)
    asked = {"messages": deepcopy(prompt.messages)} if prompt.text is None else {"prompt": prompt.text}
    example = {"source": item.source, **asked, "accepted": list(item.accepted), "match": item.match, **item.groups}
    try:
        value = float(own.function(answer, example))
    except Exception as error:
        raise DataError(f"{item.source}: {own.name} raised {type(error).__name__}: {short(str(error))}") from error
    if not math.isfinite(value):
        raise DataError(f"{item.source}: {own.name} gave {value}; it must be a finite number")
    return value


def _choose(evaluated: EvaluatedModel, items: Sequence[TaskItem]) -> list[ItemResult]:
    trees = [choice_tree(evaluated, item) for item in items]
    losses = segment_losses(evaluated.model, trees, evaluated.window_tokens, evaluated.alone, evaluated.world)
    results = []
    for item, tree_losses in zip(items, losses, strict=True):
        log_likelihoods = [-own.nats for own in tree_losses[1:]]
        if not all(map(math.isfinite, log_likelihoods)):  # of which none is the largest
            raise ModelError(f"{item.source}: {NOT_FINITE}")
        sizes = [max(1, len(choice.encode())) for choice in item.choices]  # of an empty one only its delimiter is read
        per_byte = [value / size for value, size in zip(log_likelihoods, sizes, strict=True)]
        chosen, chosen_norm = (max(range(len(each)), key=each.__getitem__) for each in (log_likelihoods, per_byte))
        values = {
            "right": float(chosen == item.answer),
            "right_norm": float(chosen_norm == item.answer),
            "chance": 1 / len(item.choices),
        }
        record = {"choices": shown_choices(item), "right_choice": item.answer, "log_likelihoods": log_likelihoods}
        results.append(ItemResult(item, values, record | {"chosen": chosen, "chosen_norm": chosen_norm}))
    return results


def shown_choices(item: TaskItem) -> list[str]:
    """What the model reads."""
    return [item.delimiter + choice for choice in item.choices]


def choice_tree(evaluated: EvaluatedModel, item: TaskItem) -> Tree:
    """The context and, as branches, the tokens of each choice. Raises DataError if there is no context."""
    prompt = _prompt_of(item)
    context = evaluated.context(prompt, item.source)
    endings: list[TokenIds] = [evaluated.chat.ids(choice) for choice in shown_choices(item)]
    if evaluated.is_plain(prompt):
        text, bos = evaluated.prompt_text(prompt), evaluated.chat.bos
        wholes = [(*bos, *evaluated.chat.ids(text + choice)) for choice in shown_choices(item)]
        shared = min(shared_length(context, whole) for whole in wholes)
        if shared:  # else the choices differ in the very first token, and something must come before it
            context, endings = context[:shared], [whole[shared:] for whole in wholes]
    branches = [Segment("target", ending, 0) for ending in endings]
    return Tree(item.source, (Segment("context", context, None), *branches))


def _predict(evaluated: EvaluatedModel, items: Sequence[TaskItem]) -> list[ItemResult]:
    chat, window = evaluated.chat, evaluated.window_tokens
    texts = [text_windows(item.source, chat.bos, chat.ids(item.text), window) for item in items]
    trees = [tree for windows in texts for tree in windows]
    losses = iter(segment_losses(evaluated.model, trees, window, evaluated.alone, evaluated.world))
    results = []
    for item, windows in zip(items, texts, strict=True):
        found = list(islice(losses, len(windows)))
        nats = sum(sum(own.nats for own in tree_losses) for tree_losses in found)
        num = sum(len(own) for tree_losses in found for own in tree_losses)
        values = {"bits": nats / math.log(2), "num_bytes": float(predicted_bytes(evaluated, item.text))}
        results.append(ItemResult(item, values | {"nats": nats, "num_tokens": float(num)}, {"num_predicted": num}))
    return results


def text_windows(source: str, bos: TokenIds, ids: TokenIds, window: int) -> list[Tree]:
    """Trees of at most `window` tokens that together predict each token once.

    One tree if all fits; else each further window begins with half a window of context.
    """
    if len(bos) + len(ids) <= window:
        context = (Segment("context", bos, None),) if bos else ()
        return [Tree(source, (*context, Segment("target", ids, 0 if bos else None)))]
    first = window - len(bos)
    trees = text_windows(source, bos, ids[:first], window)
    half = window // 2
    for start in range(first, len(ids), window - half):
        context_ids, target_ids = ids[start - half : start], ids[start : start + window - half]
        trees.append(Tree(source, (Segment("context", context_ids, None), Segment("target", target_ids, 0))))
    return trees


def predicted_bytes(evaluated: EvaluatedModel, text: str) -> int:
    """The UTF-8 bytes of a text, without those of a first token that is not predicted."""
    if evaluated.chat.bos:
        return len(text.encode())
    measured = spans(evaluated.chat.ids(text), text, evaluated.chat.tokenizer)
    return len(text[measured[0][1] if measured else 0 :].encode())


def _prompt_of(item: TaskItem) -> TaskPrompt:
    assert item.prompt is not None, "only texts have no prompt"
    return item.prompt
