"""Tasks put to a model: what it answers, chooses or predicts for each item, and the figures over all of them.

- *generation*: greedy answers; `accuracy` is the share of right ones (score.py), and stop reasons are counted: the
  model's stop token, the length limit, or a text of the item's `until`.
- *multiple choice*: no answer is generated; for each choice the log-likelihood of its tokens after what is given.
  `acc` is the share of items whose right choice is the likeliest, `acc_norm` that of items where it is the likeliest
  per UTF-8 byte, so that long choices are not at a loss (Brown et al. 2020, section 2.4; lm-eval's acc_norm divides by
  characters). Choices after plain text are tokenised with it, and all choices of an item are scored from the first
  token in which they may differ; after a chat template, whose tokens a server fixes, they are tokenised alone.
- *perplexity*: `bits_per_byte` is the loss of all tokens of a text in bits over the UTF-8 bytes that they spell;
  `perplexity` is exp(loss per token), which depends on the tokenizer. Where there is no bos token nothing comes before
  a text's first token: it is not predicted, and its bytes are not counted. Longer texts than the model's context (or
  4,096 tokens) are read in windows that overlap by half, each token predicted once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from preceptor.chat.growing_tree import shared_length
from preceptor.chat.token_text import spans
from preceptor.data.forest import Segment, Tree
from preceptor.evaluate.generate import Answer, generate
from preceptor.evaluate.likelihood import segment_losses
from preceptor.evaluate.model import EvaluatedModel, Ids
from preceptor.evaluate.score import is_right
from preceptor.evaluate.tasks import Given, Item, Task

# The figures of each kind of task: name -> (numerator, denominator) in an item's values; "" is 1 for each item.
METRICS: dict[str, dict[str, tuple[str, str]]] = {
    "generation": {"accuracy": ("right", "")},
    "multiple choice": {"acc": ("right", ""), "acc_norm": ("right_norm", "")},
    "perplexity": {"bits_per_byte": ("bits", "num_bytes")},
}
STOP_REASONS = ("stop_token", "until", "length")


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one item: `values` are numbers to sum up, `record` what a reader wants to see."""

    item: Item
    values: dict[str, float]
    record: dict[str, Any] = field(default_factory=dict)


def examine(subject: EvaluatedModel, task: Task, max_new_tokens: int, batch_size: int) -> list[Result]:
    """One result an item, in their order, under the caller's autocast. Raises DataError for an item that cannot be."""
    if task.kind == "generation":
        return _generate(subject, task.items, max_new_tokens, batch_size)
    return _choose(subject, task.items) if task.kind == "multiple choice" else _read(subject, task.items)


# Generation ----------------------------------------------------------------------------------------------------------


def _generate(subject: EvaluatedModel, items: Sequence[Item], max_new_tokens: int, batch_size: int) -> list[Result]:
    contexts = [subject.context(_given(item), item.source, max_new_tokens) for item in items]
    answers = generate(
        subject.model,
        subject.tokenizer,
        contexts,
        subject.stop_token_ids,
        max_new_tokens,
        batch_size=batch_size,
        until=[item.until for item in items] if any(item.until for item in items) else (),
    )
    return [_scored(item, answer) for item, answer in zip(items, answers, strict=True)]


def _scored(item: Item, answer: Answer) -> Result:
    cuts = [place for text in item.until if (place := answer.text.find(text)) >= 0]
    text = answer.text[: min(cuts)] if cuts else answer.text
    stop = "until" if cuts else "stop_token" if answer.stopped else "length"
    right = is_right(text, item.match, item.accepted)
    values = {"right": float(right), "num_tokens": float(len(answer.ids))}
    record = {"answer": text, "stop": stop, "right": right, "accepted": list(item.accepted)}
    return Result(item, values | {reason: float(stop == reason) for reason in STOP_REASONS}, record)


# Multiple choice -----------------------------------------------------------------------------------------------------


def _choose(subject: EvaluatedModel, items: Sequence[Item]) -> list[Result]:
    trees = [choice_tree(subject, item) for item in items]
    losses = segment_losses(subject.model, trees, subject.row_tokens, subject.alone)
    results = []
    for item, tree_losses in zip(items, losses, strict=True):
        log_likelihoods = [-own.nats for own in tree_losses[1:]]
        sizes = [len(choice.encode()) for choice in item.choices]
        per_byte = [value / size for value, size in zip(log_likelihoods, sizes, strict=True)]
        chosen, chosen_norm = (max(range(len(each)), key=each.__getitem__) for each in (log_likelihoods, per_byte))
        values = {
            "right": float(chosen == item.answer),
            "right_norm": float(chosen_norm == item.answer),
            "chance": 1 / len(item.choices),
        }
        record = {"choices": list(item.choices), "right_choice": item.answer, "log_likelihoods": log_likelihoods}
        results.append(Result(item, values, record | {"chosen": chosen, "chosen_norm": chosen_norm}))
    return results


def choice_tree(subject: EvaluatedModel, item: Item) -> Tree:
    """The context and, as branches, the tokens of each choice. Raises DataError where there is no context."""
    given = _given(item)
    context = subject.context(given, item.source)
    endings: list[Ids] = [subject.ids(choice) for choice in item.choices]
    if subject.is_plain(given):
        text, bos = subject.text(given), subject.bos
        wholes = [(*bos, *subject.ids(text + choice)) for choice in item.choices]
        shared = min(shared_length(context, whole) for whole in wholes)
        if shared:  # else the choices part at the very first token, and something must come before it
            context, endings = context[:shared], [whole[shared:] for whole in wholes]
    branches = [Segment("target", ending, 0) for ending in endings]
    return Tree(item.source, (Segment("context", context, None), *branches))


# Perplexity ----------------------------------------------------------------------------------------------------------


def _read(subject: EvaluatedModel, items: Sequence[Item]) -> list[Result]:
    trees, owners = [], []
    for number, item in enumerate(items):
        windows = text_windows(item.source, subject.bos, subject.ids(item.text), subject.row_tokens)
        trees += windows
        owners += [number] * len(windows)
    losses = segment_losses(subject.model, trees, subject.row_tokens, subject.alone)
    nats, num_tokens = [0.0] * len(items), [0] * len(items)
    for number, tree_losses in zip(owners, losses, strict=True):
        nats[number] += sum(own.nats for own in tree_losses)
        num_tokens[number] += sum(len(own) for own in tree_losses)
    results = []
    for item, loss, num in zip(items, nats, num_tokens, strict=True):
        values = {"bits": loss / math.log(2), "num_bytes": float(predicted_bytes(subject, item.text))}
        results.append(Result(item, values | {"nats": loss, "num_tokens": float(num)}, {"num_predicted": num}))
    return results


def text_windows(source: str, bos: Ids, ids: Ids, window: int) -> list[Tree]:
    """Trees of at most `window` tokens that together predict each token once.

    One tree where all fits; else each further window begins half a window earlier than what it predicts.
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


def predicted_bytes(subject: EvaluatedModel, text: str) -> int:
    """UTF-8 bytes of a text, less the characters of a first token that nothing comes before."""
    if subject.bos:
        return len(text.encode())
    measured = spans(subject.ids(text), text, subject.tokenizer)
    return len(text[measured[0][1] if measured else 0 :].encode())


def _given(item: Item) -> Given:
    assert item.given is not None, "only a text has nothing given"
    return item.given
