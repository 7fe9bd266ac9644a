"""The trees of a run: which ones an epoch holds, the weight of their tokens, lengths, statistics, fingerprint.

    step loss = sum_n  weight_n * loss_n  /  sum_n share_n           over the trained tokens of the step's sequences

With `loss.reduction: token` every trained token has the share 1 and the divisor is their number. With `conversation` it
has the share 1 / (trained tokens of its conversation), so a conversation's shares add up to 1, the divisor is the
number of conversations, and a long answer counts as much as a short one. weight_n is the share times the token's own
weight.

Shares belong to the conversation, so they are given to its tree before trees are put together (equal prompts) or taken
apart (one chain a sequence): then weights and divisor are right however the tokens are spread over sequences.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from preceptor.config import Source
from preceptor.data.forest import Tree, has_branches
from preceptor.data.prefix_sharing import Group, beginning_of, group_prefixes, tree_of_group
from preceptor.data.records import DIGEST_BYTES, digest, encode_tree
from preceptor.data.table_trees import TableTrees
from preceptor.errors import ConfigError

_MOST_EXAMPLES = 10**8  # of a source in an epoch; their numbers take 400 MB
_REPLAY = 1  # so that what is replayed is drawn apart from all else

Reduction = Literal["token", "conversation"]

# Which examples, and their weight -------------------------------------------------------------------------------------


def weigh(tree: Tree, reduction: Reduction) -> Tree:
    """The tree, which is one conversation, with its segments' weights times their share; share 0 if none is trained."""
    if reduction == "token":
        return tree
    share = 1.0 / tree.num_trained if tree.num_trained else 0.0
    return replace(tree, segments=tuple(s._replace(weight=s.weight * share, share=share) for s in tree.segments))


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


def mix(numbers: Iterable[int], sources: Sequence[Source], seed: int) -> np.ndarray:
    """The examples of an epoch, numbered source by source: each source's `weight` times, or `count` of them.

    numbers: of each source's examples. Whole copies first, then a part of one that `seed` chooses, in the
    order of the file. Raises ConfigError for more than an epoch can hold.
    """
    rng = np.random.default_rng(seed)
    mixed = [np.empty(0, np.int32)]
    start = 0
    drawn = [(num, source, *_copies(source, num)) for num, source in zip(numbers, sources, strict=True)]
    for place, (num_examples, source, copies, num_chosen) in enumerate(drawn):
        num = copies * num_examples + num_chosen
        if num > _MOST_EXAMPLES:
            given = f"weight {source.weight:g}" if source.count is None else f"count {source.count:,}"
            raise ConfigError(
                f"{source.path}: {given} makes an epoch of {num:,} examples, more than {_MOST_EXAMPLES:,}; lower it"
            )
        whole = np.arange(start, start + num_examples, dtype=np.int32)
        mixed += [whole] * copies
        if any(chosen for *_, chosen in drawn[place:]):  # what is drawn later depends on all draws before
            mixed.append(whole[np.sort(rng.permutation(num_examples)[:num_chosen])])
        start += num_examples
    return np.concatenate(mixed)


def _copies(source: Source, num_items: int) -> tuple[int, int]:
    """How many whole copies of a source's items an epoch holds, and how many chosen items on top."""
    if source.count is not None:
        return divmod(source.count, num_items) if num_items else (0, 0)
    copies, part = divmod(source.weight or 1.0, 1)
    return int(copies), round(part * num_items)


# Trees by number ------------------------------------------------------------------------------------------------------


class TreeList(list[Tree]):
    """Trees in memory, in place of those of a table."""

    def tree(self, number: int) -> Tree:
        return self[number]

    def load(self, name: str) -> np.ndarray:
        if name == "digests":
            digests = b"".join(digest(encode_tree(tree)) for tree in self)
            return np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)
        of_tree = {"lengths": lambda t: t.num_tokens, "trained": lambda t: t.num_trained, "branches": has_branches}
        return np.array([of_tree[name](tree) for tree in self], np.int64)


class Dataset:
    """The trees of an epoch by their index, so that they need not be in memory.

    They are those of several tables, numbered one table after the other. chosen_N: those of the epoch, in order.
    groups: some of these are put together when they are read (prefix_sharing.py); absent: each by itself. Memory holds
    8 bytes for each tree of the tables, and 4 for each of the epoch.
    """

    def __init__(
        self,
        tables: Sequence[TableTrees | TreeList],
        chosen_N: np.ndarray,
        reduction: Reduction = "token",
        groups: Sequence[int | Group] | None = None,
    ) -> None:
        self.tables, self.chosen_N, self._reduction, self._groups = tables, chosen_N, reduction, groups
        self._starts = np.cumsum([0, *map(len, tables)])
        num = int(self._starts[-1])
        self._takes_all = len(chosen_N) == num and bool((chosen_N == np.arange(num, dtype=np.int32)).all())

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> "Dataset":
        """Trees in memory, each once."""
        return cls([TreeList(trees)], np.arange(len(trees), dtype=np.int32))

    def with_shared_prefixes(self, max_length: int, seed: int) -> "Dataset":
        """The same with what trees begin with shared. Reads all trees; holds their first contexts meanwhile."""
        beginnings = (beginning_of(self.tree(index), index) for index in range(len(self.chosen_N)))
        groups = group_prefixes(beginnings, self.chosen_N.tolist(), max_length, seed)
        return Dataset(self.tables, self.chosen_N, self._reduction, groups)

    def tree(self, index: int) -> Tree:
        """One that is not put together with others. Raises DataError where it cannot be read any more."""
        number = int(self.chosen_N[index])
        table = int(np.searchsorted(self._starts, number, side="right")) - 1
        return weigh(self.tables[table].tree(number - int(self._starts[table])), self._reduction)

    def trees(self, indices: Iterable[int]) -> list[Tree]:
        """Raises DataError as `tree`."""
        if self._groups is None:
            return [self.tree(index) for index in indices]
        return [tree_of_group(self._groups[index], self.tree) for index in indices]

    def __iter__(self) -> Iterator[Tree]:
        """All trees, one at a time."""
        for index in range(len(self.lengths)):
            yield from self.trees([index])

    def array(self, name: str) -> np.ndarray:
        """One of the tables' arrays, over the trees of the epoch before any are put together."""
        per_table = [table.load(name) for table in self.tables]
        found = per_table[0] if len(per_table) == 1 else np.concatenate(per_table)
        return found if self._takes_all else found[self.chosen_N]

    @cached_property
    def _sizes(self) -> tuple[np.ndarray, np.ndarray]:
        length_N, trained_N = self.array("lengths"), self.array("trained")
        return (length_N, trained_N) if self._groups is None else _of_groups(self._groups, length_N, trained_N)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each tree."""
        return self._sizes[0]

    @property
    def num_trained(self) -> np.ndarray:
        """Trained tokens of each tree."""
        return self._sizes[1]

    @cached_property
    def token_ids(self) -> set[int]:
        """Every token that occurs; of a source of which an epoch takes a part, those of the whole."""
        return set(np.unique(np.concatenate([table.load("token_ids") for table in self.tables])).tolist())

    @property
    def target_lengths(self) -> np.ndarray:
        """Tokens of each target, of all trees as often as they occur in the epoch, in no order."""
        if self._takes_all:
            return np.concatenate([table.load("targets") for table in self.tables])
        times_N = np.bincount(self.chosen_N, minlength=int(self._starts[-1]))
        parts = []
        for table, start in zip(self.tables, self._starts, strict=False):
            times = np.repeat(times_N[start : start + len(table)], table.load("num_targets"))
            parts.append(np.repeat(table.load("targets"), times))
        return np.concatenate(parts)

    @property
    def first_branching(self) -> int | None:
        """The first tree that branches; None where none does."""
        branches_N = self.array("branches")
        if self._groups is not None:
            branches_N = np.array([isinstance(each, Group) or branches_N[each] for each in self._groups])
        found = np.flatnonzero(branches_N)
        return int(found[0]) if len(found) else None

    @cached_property
    def sha256(self) -> str:
        """Changes with any token that is computed, and with which tokens are trained."""
        found = hashlib.sha256(self._reduction.encode())
        found.update(np.ascontiguousarray(self.array("digests")).data)
        for each in self._groups or ():
            found.update(repr(each).encode())
        return found.hexdigest()


def _of_groups(
    groups: Sequence[int | Group], length_N: np.ndarray, trained_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and trained tokens of each group."""

    def tokens(group: int | Group) -> tuple[int, int]:
        if isinstance(group, int):
            return int(length_N[group]), int(trained_N[group])
        found = [tokens(member) for member in group.members]
        return sum(num for num, _ in found) - (len(found) - 1) * group.num_shared, sum(num for _, num in found)

    both = np.array([tokens(group) for group in groups], np.int64).reshape(-1, 2)
    return both[:, 0].copy(), both[:, 1].copy()


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of an epoch: computed, trained, and what would be computed for the same trained tokens otherwise."""

    computed: int
    trained: int
    ungrouped: int  # computed without `data.share_prefixes`
    one_sample_a_turn: int  # each turn with its whole context, as most trainers do

    def __str__(self) -> str:
        """How many tokens the trees save, in a line; "" where they save none."""
        if self.computed >= max(self.ungrouped, self.one_sample_a_turn):
            return ""
        saved = 1 - self.computed / self.one_sample_a_turn
        grouped = f"; without grouped prompts {self.ungrouped:,}" if self.ungrouped > self.computed else ""
        return f"one sample a turn would take {self.one_sample_a_turn:,} tokens, {saved:.0%} are saved{grouped}"

    @classmethod
    def of(cls, dataset: Dataset) -> "TokenCounts":
        counted = (dataset.lengths, dataset.num_trained, dataset.array("lengths"), dataset.array("samples"))
        return cls(*(int(each_N.sum(dtype=np.int64)) for each_N in counted))
