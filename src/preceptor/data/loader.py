"""The batches of a run: which packed sequences each step trains on, as a pure function of the step.

There is no iterator whose position could be lost: a resumed run asks for the next step and gets what the first run
would have got.
"""

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from preceptor.data.dataset import Dataset
from preceptor.data.forest import PackedSequence, Segment, Tree, pack_trees
from preceptor.data.packing import EpochPlans
from preceptor.data.prefix_sharing import chains_of
from preceptor.data.stream import Window, Windows
from preceptor.errors import StreamError, counted

FEW_STEPS = 50  # of an optimizer; fewer hardly change how a model answers
_MORE = 1.2  # times the steps of an epoch: what shorter sequences must promise, whose number is an estimate


def few_steps(
    num_steps: int, steps_per_epoch: int, num_tokens: int, longest: int, by_epochs: bool = True
) -> str | None:
    """What to say of a run of few optimizer steps, and what makes more of them; None where there are enough.

    steps_per_epoch: as the run is. num_tokens: of an epoch. longest: tokens of its longest example. by_epochs: whether
    `train.duration` is in epochs, of which smaller batches make more steps.
    """
    if num_steps >= FEW_STEPS:
        return None
    shortest = max(64, -(-longest // 64) * 64)
    per_epoch = math.ceil(num_tokens / shortest)
    seen = f"only {counted(num_steps, 'optimizer step')}, too few to learn much (under {FEW_STEPS}): "
    if not by_epochs:
        return f"{seen}raise `train.duration`, which is in steps: an epoch has {steps_per_epoch:,}"
    # Of so few examples no packing makes many steps, or not many more.
    if per_epoch < max(FEW_STEPS / 5, steps_per_epoch * _MORE):
        return f"{seen}add examples, or raise `train.duration`"
    return (
        f"{seen}`train.batch_size: 1` with `data.max_length: {shortest}` gives about {per_epoch:,} in each epoch; or "
        "raise `train.duration`, or add examples"
    )


@dataclass(frozen=True)
class Amounts:
    """Of a stream so far: examples, how many were rejected for which code, tokens."""

    num_examples: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    num_tokens: int = 0
    num_trained: int = 0

    def plus(self, window: Window, dataset: Dataset | None) -> "Amounts":
        """dataset: the window's."""
        codes = Counter(rejection.code for table in window.tables for rejection in table.rejections)
        return Amounts(
            self.num_examples + window.num_examples,
            dict(Counter(self.rejected) + codes),
            self.num_tokens + (0 if dataset is None else int(dataset.lengths.sum(dtype=np.int64))),
            self.num_trained + (0 if dataset is None else int(dataset.num_trained.sum(dtype=np.int64))),
        )


@dataclass(frozen=True)
class Position:
    """Where a run is in a stream: the window, the step that begins it, and what was read before it.

    sha256: of the examples up to the end of the window; "" before it is read.
    """

    window: int
    first_step: int
    sha256: str
    before: Amounts

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Position":
        return cls(**{**found, "before": Amounts(**found["before"])})


@dataclass(frozen=True)
class WindowFacts:
    """A window that a run begins to train. so_far: with it. dataset: None where nothing in it can be trained."""

    window: Window
    dataset: Dataset | None
    first_step: int
    num_steps: int
    so_far: Amounts


class Loader:
    """The batches of a run. Every tree occurs once an epoch; epochs differ in packing and order, not in steps.

    A batch holds at most `batch_size` sequences of one epoch, which are spread evenly over its steps. Where
    conversations must not share a sequence (`apart`), each planned sequence becomes one sequence per chain: the same
    steps over the same tokens, in smaller pieces.
    """

    position: Position | None = None  # which the step alone determines

    def __init__(self, dataset: Dataset, max_length: int, batch_size: int, seed: int, first_epoch: int = 0) -> None:
        """first_epoch: the number of the epoch that begins with step 0."""
        assert len(dataset.lengths)
        self._dataset = dataset
        self._max_length = max_length
        self._first_epoch = first_epoch
        self._plans = EpochPlans(dataset.lengths, max_length, seed)
        self.batch_size = batch_size
        self.alone = False
        self.sequences_per_epoch = self._plans.num_sequences
        self.steps_per_epoch = math.ceil(self.sequences_per_epoch / batch_size)

    def apart(self) -> "Loader":
        """The same steps for a model whose layers cannot keep conversations apart (model/checks.py)."""
        loader = copy.copy(self)
        loader.alone = True
        return loader

    def trees(self, epoch: int, num_sequences: int) -> list[list[Tree]]:
        """Those of each of the first sequences of an epoch, in training order."""
        planned = self._plans.sequences(epoch, 0, min(num_sequences, self.sequences_per_epoch))
        return [self._dataset.trees(indices) for indices in planned]

    def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> list[PackedSequence]:
        """The sequences of step 0, 1, 2, ...; with several processes those of one of them."""
        return [packed for trees in self._trees_of(step, rank, num_ranks) for packed in pack(trees, self.alone)]

    def sources(self, step: int, rank: int = 0, num_ranks: int = 1) -> list[tuple[str, ...]]:
        """The examples, `file:line`, of each sequence of `batch`."""
        trees = self._trees_of(step, rank, num_ranks)
        if self.alone:
            return [(tree.source,) for own in trees for tree in own for _ in chains_of(tree)]
        return [tuple(tree.source for tree in own) for own in trees]

    def progress(self, step: int) -> dict[str, Any]:
        """How far a run is after so many steps, for its log."""
        return {"epoch": round(step / self.steps_per_epoch, 4)}

    def _trees_of(self, step: int, rank: int, num_ranks: int) -> Iterator[list[Tree]]:
        epoch, within = divmod(step, self.steps_per_epoch)
        epoch += self._first_epoch
        start, end = (at * self.sequences_per_epoch // self.steps_per_epoch for at in (within, within + 1))
        batch = self._plans.sequences(epoch, start, end)
        if num_ranks > 1:
            sizes = [int(sum(self._dataset.lengths[index] for index in planned)) for planned in batch]
            batch = [batch[at] for at in assign_to_ranks(sizes, num_ranks)[rank]]
        return (self._dataset.trees(planned) for planned in batch)

    def largest_sequences(self) -> list[PackedSequence]:
        """Of the first epoch: the sequence with most tokens, and that with most trained tokens if it is another.

        Of an epoch of more than one block (packing.py): the one with most tokens of the first block, and one made of
        the trees with the largest share of trained tokens, of which no sequence has more.
        """
        trees = map(self._dataset.trees, self._largest_plans)
        packed = [sequence for own in trees for sequence in pack(own, self.alone)]
        most_tokens = max(packed, key=lambda sequence: (sequence.num_tokens, sequence.num_trained))
        most_targets = max(packed, key=lambda sequence: (sequence.num_trained, sequence.num_tokens))
        return [most_tokens] if most_tokens is most_targets else [most_tokens, most_targets]

    @cached_property
    def _largest_plans(self) -> list[list[int]]:
        plan = self._plans.sequences(0, 0, self._plans.sequences_per_block)
        if self._plans.sequences_per_block < self.sequences_per_epoch:
            plan.append(self._most_trained())
        lengths, num_trained = self._dataset.lengths, self._dataset.num_trained
        sizes = [(int(lengths[planned].sum()), int(num_trained[planned].sum())) for planned in plan]
        longest = max(range(len(plan)), key=lambda at: sizes[at])
        most_trained = max(range(len(plan)), key=lambda at: sizes[at][::-1])
        return [plan[at] for at in {longest, most_trained}]

    def _most_trained(self) -> list[int]:
        """Trees that fill a sequence, those with the largest share of trained tokens first."""
        shares = (self._dataset.num_trained / np.maximum(self._dataset.lengths, 1)).astype(np.float32)
        num = min(len(shares), self._max_length)
        first = np.argpartition(-shares, num - 1)[:num]
        planned, free = [], self._max_length
        for index in first[np.argsort(-shares[first], kind="stable")].tolist():
            if self._dataset.lengths[index] <= free:
                planned.append(index)
                free -= int(self._dataset.lengths[index])
        return planned

    @property
    def fill(self) -> float:
        """Share of the sequences' capacity that tokens take."""
        return int(self._dataset.lengths.sum(dtype=np.int64)) / (self.sequences_per_epoch * self._max_length)


class StreamLoader:
    """The batches of a stream (stream.py): of one window after the other, each as `Loader` makes those of an epoch.

    How many steps a window takes is known when it is rendered, so a step is found from the *position*: the number of
    the window, its first step, and what was read before it. A run that goes on begins there.
    """

    steps_per_epoch = 0  # there are no epochs
    alone = False

    def __init__(
        self,
        windows: Windows,
        first: Dataset,
        opened: Callable[[Window], Dataset | None],
        longest: int,
        max_length: int,
        batch_size: int,
        seed: int,
    ) -> None:
        """first: of the first window. opened: a later window's trees, None without any. longest: of an example.

        on_window, which may be set: called with each window that is begun, or why it cannot be.
        """
        self._windows, self._opened = windows, opened
        self._settings = max_length, batch_size, seed
        self._first_dataset, self._first = first, Loader(first, *self._settings)
        self._longest, self.batch_size, self.fill = longest, batch_size, self._first.fill
        self._loader: Loader | None = None
        self._at, self._num_steps, self._has_begun, self._amounts = Position(0, 0, "", Amounts()), 0, False, Amounts()
        self.on_window: Callable[[WindowFacts | StreamError], None] = lambda _: None

    def apart(self) -> "StreamLoader":
        """As `Loader.apart`; for a loader of which no batch was asked for."""
        loader = copy.copy(self)
        loader.alone, loader._first = True, self._first.apart()
        return loader

    @property
    def position(self) -> Position:
        """Of the window of the batch that was asked for last."""
        return self._at

    def seek(self, position: Position) -> None:
        """Go on from there. The next batch raises StreamError where the stream is another one up to there."""
        self._at, self._has_begun = position, False

    def trees(self, epoch: int, num_sequences: int) -> list[list[Tree]]:
        """As `Loader.trees`, of the first window."""
        return self._first.trees(epoch, num_sequences)

    def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> list[PackedSequence]:
        """As `Loader.batch`; no step before the position. Raises StreamError."""
        loader = self._loader_of(step)
        return loader.batch(step - self._at.first_step, rank, num_ranks)

    def sources(self, step: int, rank: int = 0, num_ranks: int = 1) -> list[tuple[str, ...]]:
        loader = self._loader_of(step)
        return loader.sources(step - self._at.first_step, rank, num_ranks)

    def progress(self, step: int) -> dict[str, Any]:
        return {"window": self._at.window}

    def _loader_of(self, step: int) -> Loader:
        assert step >= self._at.first_step, "windows that were trained are gone"
        if not self._has_begun:
            self._begin(self._at)
        while self._loader is None or step >= self._at.first_step + self._num_steps:
            self._begin(Position(self._at.window + 1, self._at.first_step + self._num_steps, "", self._amounts))
        return self._loader

    def _begin(self, position: Position) -> None:
        try:
            window = self._windows.get(position.window)
            if position.sha256 not in ("", window.sha256):
                raise StreamError(
                    f"window {position.window}: up to its end the sources give other examples than when the run "
                    "trained it; a stream must give the same from its beginning at every start"
                )
        except StreamError as error:
            self.on_window(error)
            raise
        dataset = self._opened(window) if window.number else self._first_dataset
        self._at, self._loader, self._num_steps = replace(position, sha256=window.sha256), None, 0
        if dataset is not None:
            self._loader = Loader(dataset, *self._settings, first_epoch=window.number)
            self._loader.alone = self.alone
            self._num_steps = self._loader.steps_per_epoch
        self._has_begun, self._amounts = True, position.before.plus(window, dataset)
        self.on_window(WindowFacts(window, dataset, position.first_step, self._num_steps, self._amounts))

    def largest_sequences(self) -> list[PackedSequence]:
        """As large as any that may come, as only the first window is known: full, with the share of trained tokens of
        the first window's largest; and full, with all tokens trained that can be.
        """
        known = self._first.largest_sequences()[0]
        ids = itertools.cycle(known.ids_T.tolist())
        share = known.num_trained / known.num_tokens
        return [self._full(ids, lambda length: length - max(1, round(length * share))), self._full(ids, lambda _: 1)]

    def _full(self, ids: Iterator[int], num_context: Callable[[int], int]) -> PackedSequence:
        trees, free = [], self._settings[0]
        while free > 1:
            length = min(free, self._longest)
            context = min(length - 1, max(1, num_context(length)))
            parts = [tuple(itertools.islice(ids, num)) for num in (context, length - context)]
            trees.append(Tree("the largest", (Segment("context", parts[0], None), Segment("target", parts[1], 0))))
            free -= length
        return max(pack(trees, self.alone), key=lambda sequence: sequence.num_tokens)


def assign_to_ranks(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Which of the sequences of these sizes each process takes, so that all have about the same number of tokens.

    The longest first, each to the process that has fewest tokens, and of those the fewest sequences (Graham 1969). A
    process has its own in their order.
    """
    assigned: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        rank = min(range(num_ranks), key=lambda rank: (tokens[rank], len(assigned[rank]), rank))
        assigned[rank].append(index)
        tokens[rank] += sizes[index]
    return [sorted(own) for own in assigned]


def pack(trees: Sequence[Tree], alone: bool) -> list[PackedSequence]:
    """One sequence of all the trees; alone: a sequence for each of their chains."""
    if alone:
        return [pack_trees([chain], alone=True) for tree in trees for chain in chains_of(tree)]
    return [pack_trees(trees)]
