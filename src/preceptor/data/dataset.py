"""The trees of a run: their lengths in memory, the trees where they are kept; statistics and fingerprint."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from preceptor.data.forest import Tree, has_branches
from preceptor.data.mixture import Reduction, weigh
from preceptor.data.prefix_sharing import Group, beginning_of, group_prefixes, joined
from preceptor.data.records import DIGEST_BYTES, digest, encode
from preceptor.data.table_trees import TableTrees


@dataclass(frozen=True)
class TreeStore:
    """Trees of several tables, numbered one table after the other. chosen_N: those of an epoch, in order.

    Memory holds 8 bytes for each tree of the tables, and 4 for each of the epoch.
    """

    tables: tuple[TableTrees, ...]
    chosen_N: np.ndarray
    reduction: Reduction = "token"

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.tables)])

    @cached_property
    def _takes_all(self) -> bool:
        """Whether an epoch is every tree once, in order."""
        num = int(self._starts[-1])
        return len(self.chosen_N) == num and bool((self.chosen_N == np.arange(num, dtype=np.int32)).all())

    def __len__(self) -> int:
        return len(self.chosen_N)

    def tree(self, index: int) -> Tree:
        number = int(self.chosen_N[index])
        table = int(np.searchsorted(self._starts, number, side="right")) - 1
        return weigh(self.tables[table].tree(number - int(self._starts[table])), self.reduction)

    def array(self, name: str) -> np.ndarray:
        """One of the tables' arrays, over the trees of the epoch."""
        return self._of_epoch([table.load(name) for table in self.tables])

    @property
    def lengths(self) -> np.ndarray:
        return self._of_epoch([table.length_N for table in self.tables])

    @property
    def num_trained(self) -> np.ndarray:
        return self._of_epoch([table.trained_N for table in self.tables])

    def _of_epoch(self, per_table: Sequence[np.ndarray]) -> np.ndarray:
        found = per_table[0] if len(per_table) == 1 else np.concatenate(per_table)
        return found if self._takes_all else found[self.chosen_N]

    @property
    def token_ids(self) -> set[int]:
        """Every token of the tables' trees, chosen or not."""
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


class MemoryTrees:
    """A list of trees, with what `TreeStore` knows of its own."""

    reduction: Reduction = "token"

    def __init__(self, trees: Sequence[Tree]) -> None:
        self._trees = trees
        self.lengths = np.array([tree.num_tokens for tree in trees], np.int64)
        self.num_trained = np.array([tree.num_trained for tree in trees], np.int64)

    def tree(self, index: int) -> Tree:
        return self._trees[index]

    def array(self, name: str) -> np.ndarray:
        if name == "branches":
            return np.array([has_branches(tree) for tree in self._trees], np.uint8)
        assert name == "digests", name
        digests = b"".join(digest(encode(tree)) for tree in self._trees)
        return np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)

    @property
    def token_ids(self) -> set[int]:
        return {token for tree in self._trees for segment in tree.segments for token in segment.ids}

    @property
    def target_lengths(self) -> np.ndarray:
        return np.array([len(s.ids) for tree in self._trees for s in tree.segments if s.kind == "target"])


class Dataset:
    """Trees by their index. Consumers use what is here only, so that the trees need not be in memory.

    groups: trees of which some are put together when they are read (prefix_sharing.py); absent: each by itself.
    """

    def __init__(self, trees: Sequence[Tree] | TreeStore, groups: Sequence[int | Group] | None = None) -> None:
        self._store = trees if isinstance(trees, TreeStore) else MemoryTrees(trees)
        self._groups = groups
        length_N, trained_N = self._store.lengths, self._store.num_trained
        self.num_ungrouped_tokens = int(length_N.sum(dtype=np.int64))
        if groups is not None:
            length_N, trained_N = _of_groups(groups, length_N, trained_N)
        self.lengths, self.num_trained = length_N, trained_N  # tokens and trained tokens of each tree

    def trees(self, indices: Iterable[int]) -> list[Tree]:
        """Raises DataError where a tree cannot be read any more."""
        if self._groups is None:
            return [self._store.tree(index) for index in indices]
        return [joined(self._groups[index], self._store.tree) for index in indices]

    def __iter__(self) -> Iterator[Tree]:
        """All trees, one at a time."""
        for index in range(len(self.lengths)):
            yield from self.trees([index])

    @cached_property
    def token_ids(self) -> set[int]:
        """Every token that occurs; of a source of which an epoch takes a part, those of the whole."""
        return self._store.token_ids

    @property
    def target_lengths(self) -> np.ndarray:
        """Tokens of each target, in no order."""
        return self._store.target_lengths

    @property
    def first_branching(self) -> int | None:
        """The first tree that branches; None where none does."""
        branches_N = self._store.array("branches")
        if self._groups is None:
            found = np.flatnonzero(branches_N)
            return int(found[0]) if len(found) else None
        return next((k for k, each in enumerate(self._groups) if isinstance(each, Group) or branches_N[each]), None)

    @cached_property
    def sha256(self) -> str:
        """Changes with any token that is computed, and with which tokens are trained."""
        found = hashlib.sha256(self._store.reduction.encode())
        found.update(np.ascontiguousarray(self._store.array("digests")).data)
        for each in self._groups or ():
            found.update(repr(each).encode())
        return found.hexdigest()


def with_shared_prefixes(store: TreeStore, max_length: int, seed: int) -> Dataset:
    """The trees of a store, with what they begin with shared. Reads all trees; holds their first contexts meanwhile."""
    beginnings = (beginning_of(store.tree(index), index) for index in range(len(store)))
    return Dataset(store, group_prefixes(beginnings, store.chosen_N.tolist(), max_length, seed))


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
    def of(cls, dataset: Dataset, store: TreeStore) -> "TokenCounts":
        """store: the dataset's own."""
        return cls(
            computed=int(dataset.lengths.sum(dtype=np.int64)),
            trained=int(dataset.num_trained.sum(dtype=np.int64)),
            ungrouped=dataset.num_ungrouped_tokens,
            one_sample_a_turn=int(store.array("samples").sum(dtype=np.int64)),
        )
