"""The trees of a run: how they are read from its sources, how many tokens they have, and their fingerprint."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from preceptor.data.examples import Example, Rejection
from preceptor.data.forest import Tree, path_lengths, turn_lengths
from preceptor.data.sources import Entry, OpenSource
from preceptor.data.truncation import ExampleTree, Fitter
from preceptor.data.workers import ExampleRenderer, render_all


class Dataset:
    """Trees by their index. Consumers use `lengths` and `trees` only, so that the trees need not be in memory."""

    def __init__(self, trees: Sequence[Tree]) -> None:
        self._trees = trees
        self.lengths = np.array([tree.num_tokens for tree in trees], np.int64)  # tokens of each tree

    def trees(self, indices: Iterable[int]) -> list[Tree]:
        return [self._trees[index] for index in indices]

    def __iter__(self) -> Iterator[Tree]:
        """All trees, one at a time."""
        for index in range(len(self.lengths)):
            yield from self.trees([index])

    @cached_property
    def token_ids(self) -> set[int]:
        """Every token that occurs."""
        return {token for tree in self for segment in tree.segments for token in segment.ids}

    @cached_property
    def sha256(self) -> str:
        """Changes with any token that is computed, and with which tokens are trained."""
        digest = hashlib.sha256()
        for tree in self:
            for segment in tree.segments:
                digest.update(repr((segment.kind, segment.parent, segment.weight, len(segment.ids))).encode())
                digest.update(np.array(segment.ids, dtype=np.int64).tobytes())
        return digest.hexdigest()


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
    def of(cls, trees: Sequence[Tree], shared: Sequence[Tree], whole: bool) -> "TokenCounts":
        """shared: the same trees with shared prefixes. whole: prompts are trained too, a sample is a conversation."""
        return cls(
            computed=sum(tree.num_tokens for tree in shared),
            trained=sum(tree.num_trained for tree in trees),
            ungrouped=sum(tree.num_tokens for tree in trees),
            one_sample_a_turn=sum(num_sample_tokens(tree, whole) for tree in trees),
        )


def num_sample_tokens(tree: Tree, whole: bool) -> int:
    """Tokens of the tree as one sample for each turn; whole: as one sample for each of its conversations."""
    return sum(path_lengths(tree) if whole else map(sum, turn_lengths(tree)))


def read_trees(
    source: OpenSource, renderer: ExampleRenderer, fitter: Fitter, num_processes: int = 1
) -> Iterator[tuple[Entry, list[ExampleTree] | Rejection]]:
    """Each entry of a source with the examples that are trained for it, each with its tree, or with its rejection.

    With more than one process, large sources are rendered in several (workers.py says what the caller must heed).
    Raises DataError if a file cannot be read.
    """
    entries: deque[Entry] = deque()  # those that are being rendered

    def examples() -> Iterator[Example | Rejection]:
        for entry in source.entries():
            entries.append(entry)
            yield fitter.before_rendering(entry.example)

    for example, tree in render_all(renderer, examples(), num_processes):
        yield entries.popleft(), fitter.fit(example, tree)
