"""The batches of a run: which packed sequences each step trains on, as a pure function of the step.

There is no iterator whose position could be lost: a resumed run asks for the next step and gets what the first run
would have got.
"""

import copy
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from preceptor.data.dataset import Dataset
from preceptor.data.forest import PackedSequence, Tree, pack_trees
from preceptor.data.packing import EpochPlans
from preceptor.data.prefix_sharing import chains_of

FEW_STEPS = 50  # of an optimizer; fewer hardly change how a model answers


def few_steps(num_steps: int, num_tokens: int, longest: int) -> str | None:
    """What to say of a run of few optimizer steps, and what makes more of them; None where there are enough.

    num_tokens: of an epoch. longest: tokens of its longest example.
    """
    if num_steps >= FEW_STEPS:
        return None
    shortest = max(64, -(-longest // 64) * 64)
    per_epoch = math.ceil(num_tokens / shortest)
    seen = f"only {num_steps:,} optimizer step{'s' * (num_steps != 1)}, too few to learn much (under {FEW_STEPS}): "
    if per_epoch < FEW_STEPS / 5:  # of so few examples no packing makes many steps
        return f"{seen}add examples, or raise `train.duration`"
    return (
        f"{seen}`train.batch_size: 1` with `data.max_length: {shortest}` gives about {per_epoch:,} in each epoch; or "
        "raise `train.duration`, or add examples"
    )


class Loader:
    """The batches of a run. Every tree occurs once an epoch; epochs differ in packing and order, not in steps.

    A batch holds at most `batch_size` sequences of one epoch, which are spread evenly over its steps. Where
    conversations must not share a sequence (`apart`), each planned sequence becomes one sequence per chain: the same
    steps over the same tokens, in smaller pieces.
    """

    def __init__(self, dataset: Dataset, max_length: int, batch_size: int, seed: int) -> None:
        assert len(dataset.lengths)
        self._dataset = dataset
        self._max_length = max_length
        self._plans = EpochPlans(dataset.lengths, max_length, seed)
        self.batch_size = batch_size
        self.alone = False
        self.sequences_per_epoch = self._plans.num_sequences
        self.steps_per_epoch = math.ceil(self.sequences_per_epoch / batch_size)

    def apart(self) -> "Loader":
        """The same steps for a model whose layers cannot keep conversations apart (model/checks/sequential.py)."""
        loader = copy.copy(self)
        loader.alone = True
        return loader

    def plan(self, epoch: int, start: int = 0, end: int | None = None) -> list[list[int]]:
        """Tree indices of each sequence of an epoch, or of its sequences `start` to `end`, in training order."""
        end = self.sequences_per_epoch if end is None else min(end, self.sequences_per_epoch)
        return self._plans.sequences(epoch, start, end)

    def trees(self, planned: Sequence[int]) -> list[Tree]:
        return self._dataset.trees(planned)

    def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> list[PackedSequence]:
        """The sequences of step 0, 1, 2, ...; with several processes those of one of them."""
        of_rank = self._planned(step, rank, num_ranks)
        return [packed for planned in of_rank for packed in pack(self.trees(planned), self.alone)]

    def sources(self, step: int, rank: int = 0, num_ranks: int = 1) -> list[tuple[str, ...]]:
        """The examples, `file:line`, of each sequence of `batch`."""
        trees = [self.trees(planned) for planned in self._planned(step, rank, num_ranks)]
        if self.alone:
            return [(tree.source,) for own in trees for tree in own for _ in chains_of(tree)]
        return [tuple(tree.source for tree in own) for own in trees]

    def _planned(self, step: int, rank: int, num_ranks: int) -> list[list[int]]:
        epoch, within = divmod(step, self.steps_per_epoch)
        start, end = (at * self.sequences_per_epoch // self.steps_per_epoch for at in (within, within + 1))
        batch = self.plan(epoch, start, end)
        dealt = deal([int(sum(self._dataset.lengths[index] for index in planned)) for planned in batch], num_ranks)
        return [batch[at] for at in dealt[rank]]

    def largest_sequences(self) -> list[PackedSequence]:
        """Of the first epoch: the sequence with most tokens, and that with most trained tokens if it is another.

        Of an epoch of more than one block (packing.py): the one with most tokens of the first block, and one made of
        the trees with the largest share of trained tokens, of which no sequence has more.
        """
        packed = [sequence for planned in self._largest_plans for sequence in pack(self.trees(planned), self.alone)]
        most_tokens = max(packed, key=lambda sequence: (sequence.num_tokens, sequence.num_trained))
        most_targets = max(packed, key=lambda sequence: (sequence.num_trained, sequence.num_tokens))
        return [most_tokens] if most_tokens is most_targets else [most_tokens, most_targets]

    @cached_property
    def _largest_plans(self) -> list[list[int]]:
        plan = self.plan(0, 0, self._plans.sequences_per_block)
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


def deal(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Which of the sequences of these sizes each process takes, so that all have about the same number of tokens.

    The longest first, each to the process that has fewest tokens, and of those the fewest sequences (Graham 1969). A
    process has its own in their order.
    """
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        rank = min(range(num_ranks), key=lambda rank: (tokens[rank], len(dealt[rank]), rank))
        dealt[rank].append(index)
        tokens[rank] += sizes[index]
    return [sorted(own) for own in dealt]


def pack(trees: Sequence[Tree], alone: bool) -> list[PackedSequence]:
    """One sequence of all the trees; alone: a sequence for each of their chains."""
    if alone:
        return [pack_trees([chain], alone=True) for tree in trees for chain in chains_of(tree)]
    return [pack_trees(trees)]
