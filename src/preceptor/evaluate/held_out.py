"""Loss, bits per byte and token accuracy on the targets of held-out examples: of all, and by source, kind and turn.

    source  the file
    kinds   tools (tools are offered, or a tool was called before), reasoning (the turn has some), system (there is a
            system prompt), plain (none of these); `completion` and `text` for other examples. A turn may have several
    turn    its 1-based index among the assistant messages of the conversation; none where data.overflow left messages
            out before it

`bits_per_byte` is the loss of all target tokens in bits, stop tokens included, over the UTF-8 bytes of the targets'
text without special tokens: it does not depend on the tokenizer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from preceptor.chat.reasoning import has_reasoning
from preceptor.chat.tokenise import decode, special_ids
from preceptor.data.examples import Completion, Conversation, Example
from preceptor.data.forest import Tree, path_ids
from preceptor.evaluate.intervals import interval
from preceptor.evaluate.likelihood import SegmentLosses, segment_losses
from preceptor.world import ONE, World

_LONGEST_CHARACTER = 8  # tokens; UTF-8 needs no more than four


@dataclass(frozen=True, slots=True)
class TargetLabels:
    """The groups of a target segment, and the bytes of its text."""

    source: str
    kinds: tuple[str, ...]
    turn: int | None  # from 1; None: unknown
    num_bytes: int


@dataclass(frozen=True, slots=True)
class LabelledTree:
    """A held-out example with the labels of its segments, None for contexts."""

    tree: Tree
    labels: tuple[TargetLabels | None, ...]
    example: str  # its source, which its copies have too, and the pieces of one that was split


def label_targets(
    examples: Sequence[tuple[Example, Tree]], tokenizer: Any, tags: Mapping[str, str]
) -> list[LabelledTree]:
    """Label the targets of held-out examples with their turns. tags: of reasoning, that the template knows."""
    specials = {id_: str(tokenizer.convert_ids_to_tokens(id_)) for id_ in special_ids(tokenizer)}
    found: list[LabelledTree] = []
    last: Example | None = None
    said: tuple[int, ...] = ()  # the last tokens of the tree before, which is of the example `last`
    for example, tree in examples:
        labels: list[TargetLabels | None] = []
        earlier = said[:-1] if example is last else ()  # a piece of a text begins with the last token of the one before
        for segment in tree.segments:
            if segment.kind == "context":
                labels.append(None)
                continue
            not_predicted = [specials[id_] for id_ in segment.ids if id_ in specials]
            if segment.parent is None and segment.ids[0] not in specials:  # nothing comes before the first token
                not_predicted.append(decode(segment.ids[:1], tokenizer))
            num_bytes = len(segment.text.encode())
            if not segment.text:  # of a piece (truncation.py)
                before = (*earlier, *path_ids(tree, segment.parent))[-_LONGEST_CHARACTER:]
                num_bytes = _whole(before + segment.ids, tokenizer) - _whole(before, tokenizer)
            num_bytes -= len("".join(not_predicted).encode())
            file = example.source.rpartition(":")[0] or example.source
            turn = None
            if isinstance(example, Conversation) and segment.message is not None and not example.is_shortened:
                turn = sum(message.role == "assistant" for message in example.messages[: segment.message + 1])
            labels.append(TargetLabels(file, _kinds(example, segment.message, tags), turn, max(0, num_bytes)))
        found.append(LabelledTree(tree, tuple(labels), example.source))
        last, said = example, (*earlier, *path_ids(tree, len(tree.segments) - 1))[-_LONGEST_CHARACTER - 1 :]
    return found


def _whole(ids: Sequence[int], tokenizer: Any) -> int:
    """The bytes of the characters that these tokens spell to their end; the next token counts one that it completes."""
    return len(decode(ids, tokenizer).rstrip("\ufffd").encode())


def _kinds(example: Example, index: int | None, tags: Mapping[str, str]) -> tuple[str, ...]:
    """index: of the message that the target is."""
    if not isinstance(example, Conversation):
        return ("completion" if isinstance(example, Completion) else "text",)
    before = example.messages if index is None else example.messages[: index + 1]
    kinds = []
    if example.tools or any(message.tool_calls or message.role == "tool" for message in before):
        kinds.append("tools")
    if index is not None and has_reasoning(example.messages[index].given, tags):
        kinds.append("reasoning")
    if any(message.role in ("system", "developer") for message in before):
        kinds.append("system")
    return tuple(kinds) or ("plain",)


_Measured = tuple[TargetLabels, SegmentLosses]


def measure(
    model: Any,
    held_out: Sequence[LabelledTree],
    max_length: int,
    alone: bool = False,
    by_example: bool = False,
    world: World = ONE,
) -> dict[str, Any]:
    """The figures of all targets, and `by_source`, `by_kind`, `by_turn`; with `by_example` each example's `loss` (the
    sum, to six digits, its copies and pieces included) and `num_tokens`. `loss_interval`: the loss's 95 % interval over
    the choice of examples, where there are several (intervals.py).

    Under the caller's autocast. world: the examples are shared out over its processes; each has the figures. Raises
    ValueError if there is no held-out target.
    """
    losses = segment_losses(model, [each.tree for each in held_out], max_length, alone, world)
    pairs = [
        (labels, own)
        for each, tree_losses in zip(held_out, losses, strict=True)
        for labels, own in zip(each.labels, tree_losses, strict=True)
        if labels is not None and len(own)
    ]
    if not pairs:
        raise ValueError("no held-out target to measure on")
    groups: dict[str, dict[str, list[_Measured]]] = {"by_source": {}, "by_kind": {}, "by_turn": {}}
    for labels, own in pairs:
        turns = () if labels.turn is None else (str(labels.turn),)
        for group, names in zip(groups.values(), ((labels.source,), labels.kinds, turns), strict=True):
            for name in names:
                group.setdefault(name, []).append((labels, own))
    sums: dict[str, list[float]] = {}
    for each, tree_losses in zip(held_out, losses, strict=True):
        own_sums = sums.setdefault(each.example, [0.0, 0])
        own_sums[0] += sum(own.nats for own in tree_losses)
        own_sums[1] += sum(len(own) for own in tree_losses)
    of_examples: dict[str, list[float]] = {
        "loss": [float(f"{nats:.6g}") for nats, _ in sums.values()],
        "num_tokens": [num for _, num in sums.values()],
    }
    is_finite = math.isfinite(sum(of_examples["loss"]))
    spread = interval(of_examples["loss"], of_examples["num_tokens"]).within(0.0) if is_finite else None
    return {
        **_figures(pairs),
        **({} if spread is None or spread.low is None else {"loss_interval": [spread.low, spread.high]}),
        **({"by_example": of_examples} if by_example else {}),
        **{
            group: {name: _figures(members) for name, members in sorted(found.items(), key=_in_order)}
            for group, found in groups.items()
        },
    }


def _in_order(item: tuple[str, Any]) -> tuple[int, str]:
    return (int(item[0]), "") if item[0].isdigit() else (0, item[0])


def _figures(pairs: Sequence[_Measured]) -> dict[str, float]:
    loss_N = np.concatenate([own.loss_N for _, own in pairs])
    num_bytes = sum(labels.num_bytes for labels, _ in pairs)
    found: dict[str, float] = {
        "loss": float(loss_N.mean()),
        "token_accuracy": float(np.concatenate([own.correct_N for _, own in pairs]).mean()),
        "num_trained": len(loss_N),
    }
    if num_bytes:
        found["bits_per_byte"] = float(loss_N.sum() / math.log(2) / num_bytes)
    return found
