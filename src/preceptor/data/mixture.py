"""The examples of an epoch, drawn from its sources and from replay, and the weight of each trained token.

    step loss = sum_n  weight_n * loss_n  /  sum_n share_n           over the trained tokens of the step's sequences

With `loss.reduction: token` every trained token has the share 1 and the divisor is their number. With `conversation` it
has the share 1 / (trained tokens of its conversation), so a conversation's shares add up to 1, the divisor is the
number of conversations, and a long answer counts as much as a short one. weight_n is the share times the token's own
weight.

Shares belong to the conversation, so they are given to its tree before trees are put together (equal prompts) or taken
apart (one chain a sequence): then weights and divisor are right however the tokens are spread over sequences.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import numpy as np

from preceptor.config import Source
from preceptor.data.forest import Tree
from preceptor.errors import ConfigError

_MOST_EXAMPLES = 10**8  # of a source in an epoch; a list of so many takes 800 MB

Reduction = Literal["token", "conversation"]
T = TypeVar("T")


def share_of(tree: Tree, reduction: Reduction) -> float:
    """What each trained token of the tree, which is one conversation, adds to the divisor; 0 where it has none."""
    if reduction == "token":
        return 1.0
    return 1.0 / tree.num_trained if tree.num_trained else 0.0


def weigh(tree: Tree, reduction: Reduction) -> Tree:
    """The tree with its segments' weights times their share."""
    share = share_of(tree, reduction)
    if share == 1.0:
        return tree
    return replace(tree, segments=tuple(replace(s, weight=s.weight * share, share=share) for s in tree.segments))


def draw_replay(replay: Sequence[Tree], tuning: Sequence[Tree], share: float, seed: int) -> list[Tree]:
    """A seeded choice of `replay` with `share` of all trained tokens, beside `tuning`; within one example's length.

    No example is drawn again before all were. share: over 0, under 1.
    """
    wanted = share / (1.0 - share) * sum(tree.num_trained for tree in tuning)
    usable = [tree for tree in replay if tree.num_trained]
    rng = random.Random(f"replay {seed}")
    drawn: list[Tree] = []
    num_trained = 0
    while usable and num_trained < wanted:
        for tree in rng.sample(usable, len(usable)):
            if num_trained >= wanted:
                break
            drawn.append(tree)
            num_trained += tree.num_trained
    return drawn


def mix(per_source: Iterable[tuple[Sequence[T], Source]], seed: int) -> list[T]:
    """Items of several sources in one list: each source `weight` times, or `count` of its items.

    Whole copies first, then a part of one that `seed` chooses, in the order of the file. Raises ConfigError for more
    items than a list can hold.
    """
    rng = np.random.default_rng(seed)
    mixed: list[T] = []
    for items, source in per_source:
        copies, num_chosen = _copies(source, len(items))
        num = copies * len(items) + num_chosen
        if num > _MOST_EXAMPLES:
            given = f"weight {source.weight:g}" if source.count is None else f"count {source.count:,}"
            raise ConfigError(
                f"{source.path}: {given} makes an epoch of {num:,} examples, more than {_MOST_EXAMPLES:,}; lower it"
            )
        for _ in range(copies):
            mixed.extend(items)
        chosen = rng.permutation(len(items))[:num_chosen]
        mixed.extend(items[index] for index in sorted(chosen.tolist()))
    return mixed


def _copies(source: Source, num_items: int) -> tuple[int, int]:
    """How many whole copies of a source's items an epoch holds, and how many chosen items on top."""
    if source.count is not None:
        return divmod(source.count, num_items) if num_items else (0, 0)
    copies, part = divmod(source.weight or 1.0, 1)
    return int(copies), round(part * num_items)
