"""The examples of an epoch, drawn from its sources and from replay, and the weight of each trained token.

    step loss = sum_n  weight_n * loss_n  /  sum_n share_n           over the trained tokens of the step's sequences

With `loss.reduction: token` every trained token has the share 1 and the divisor is their number. With `conversation` it
has the share 1 / (trained tokens of its conversation), so a conversation's shares add up to 1, the divisor is the
number of conversations, and a long answer counts as much as a short one. weight_n is the share times the token's own
weight.

Shares belong to the conversation, so they are given to its tree before trees are put together (equal prompts) or taken
apart (one chain a sequence): then weights and divisor are right however the tokens are spread over sequences.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import numpy as np

from preceptor.config import Source
from preceptor.data.forest import Tree
from preceptor.errors import ConfigError

_MOST_EXAMPLES = 10**8  # of a source in an epoch; their numbers take 400 MB
_REPLAY = 1  # so that what is replayed is drawn apart from all else

Reduction = Literal["token", "conversation"]


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


def draw_replay(replay_N: np.ndarray, num_tuned: int, share: float, seed: int) -> np.ndarray:
    """Which examples to replay, so that they have `share` of all trained tokens, within one example's length.

    replay_N: trained tokens of each example. num_tuned: trained tokens beside them. share: over 0, under 1. A seeded
    choice; no example is drawn again before all were.
    """
    wanted = share / (1.0 - share) * num_tuned
    usable = np.flatnonzero(replay_N)
    rng = np.random.default_rng([seed, _REPLAY])
    drawn = [np.empty(0, np.int64)]
    num_trained = 0
    while len(usable) and num_trained < wanted:
        order = rng.permutation(usable)
        ends = np.cumsum(replay_N[order], dtype=np.int64)
        num = int(np.searchsorted(ends, wanted - num_trained)) + 1
        drawn.append(order[:num])
        num_trained += int(ends[min(num, len(ends)) - 1])
    return np.concatenate(drawn)


def mix(per_source: Iterable[tuple[int, Source]], seed: int) -> np.ndarray:
    """The examples of an epoch, numbered source by source: each source's `weight` times, or `count` of them.

    per_source: the number of a source's examples. Whole copies first, then a part of one that `seed` chooses, in the
    order of the file. Raises ConfigError for more than an epoch can hold.
    """
    rng = np.random.default_rng(seed)
    mixed = [np.empty(0, np.int32)]
    start = 0
    drawn = [(num, source, *_copies(source, num)) for num, source in per_source]
    for place, (num_examples, source, copies, num_chosen) in enumerate(drawn):
        num = copies * num_examples + num_chosen
        if num > _MOST_EXAMPLES:
            given = f"weight {source.weight:g}" if source.count is None else f"count {source.count:,}"
            raise ConfigError(
                f"{source.path}: {given} makes an epoch of {num:,} examples, more than {_MOST_EXAMPLES:,}; lower it"
            )
        whole = np.arange(start, start + num_examples, dtype=np.int32)
        mixed += [whole] * copies
        if any(chosen for *_, chosen in drawn[place:]):  # what is drawn later hangs on all draws before
            mixed.append(whole[np.sort(rng.permutation(num_examples)[:num_chosen])])
        start += num_examples
    return np.concatenate(mixed)


def _copies(source: Source, num_items: int) -> tuple[int, int]:
    """How many whole copies of a source's items an epoch holds, and how many chosen items on top."""
    if source.count is not None:
        return divmod(source.count, num_items) if num_items else (0, 0)
    copies, part = divmod(source.weight or 1.0, 1)
    return int(copies), round(part * num_items)
