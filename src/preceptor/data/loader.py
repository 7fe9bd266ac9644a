"""The batches of a run: which packed sequences each step trains on, as a pure function of the step.

There is no iterator whose position could be lost: a resumed run asks for the next step and gets what the first run
would have got.
"""

import copy
import math
from collections.abc import Sequence
from functools import lru_cache

from preceptor.data.dataset import Dataset
from preceptor.data.forest import PackedSequence, Tree, pack_trees
from preceptor.data.packing import count_sequences, plan_epoch
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
        self._lengths: list[int] = dataset.lengths.tolist()
        self._max_length = max_length
        self._seed = seed
        self.batch_size = batch_size
        self.alone = False
        self.sequences_per_epoch = count_sequences(self._lengths, max_length, seed)
        self.steps_per_epoch = math.ceil(self.sequences_per_epoch / batch_size)

    def apart(self) -> "Loader":
        """The same steps for a model whose layers cannot keep conversations apart (model/checks/sequential.py)."""
        loader = copy.copy(self)
        loader.alone = True
        return loader

    @lru_cache(maxsize=2)  # noqa: B019 (a loader lives as long as its run)
    def plan(self, epoch: int) -> list[list[int]]:
        """Tree indices of each sequence of an epoch, in training order."""
        seed = self._seed * 1_000_003 + epoch
        return plan_epoch(self._lengths, self._max_length, self.sequences_per_epoch, seed)

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
        batch = self.plan(epoch)[start:end]
        dealt = deal([sum(self._lengths[index] for index in planned) for planned in batch], num_ranks)
        return [batch[at] for at in dealt[rank]]

    def largest_sequences(self) -> list[PackedSequence]:
        """Of the first epoch: the sequence with most tokens, and that with most trained tokens if it is another."""
        plan = self.plan(0)
        num_tokens = [sum(self._lengths[index] for index in planned) for planned in plan]
        num_trained = [sum(tree.num_trained for tree in self.trees(planned)) for planned in plan]
        longest = max(range(len(plan)), key=lambda at: (num_tokens[at], num_trained[at]))
        most_trained = max(range(len(plan)), key=lambda at: (num_trained[at], num_tokens[at]))
        packed = [sequence for at in {longest, most_trained} for sequence in pack(self.trees(plan[at]), self.alone)]
        most_tokens = max(packed, key=lambda sequence: (sequence.num_tokens, sequence.num_trained))
        most_targets = max(packed, key=lambda sequence: (sequence.num_trained, sequence.num_tokens))
        return [most_tokens] if most_tokens is most_targets else [most_tokens, most_targets]

    @property
    def fill(self) -> float:
        """Share of the sequences' capacity that tokens take."""
        return sum(self._lengths) / (self.sequences_per_epoch * self._max_length)


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
