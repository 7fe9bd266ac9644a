"""Rows in a seeded order: which records each step trains on, as a pure function of the step.

There is no iterator whose position could be lost: a resumed run asks for the next step, and gets what the first run
would have got.
"""

import copy
import math
from collections.abc import Sequence
from functools import lru_cache

from preceptor.data.dataset import Dataset
from preceptor.data.forest import PackedSequence, Tree, pack_trees
from preceptor.data.packing import count_rows, plan_epoch
from preceptor.data.prefix_sharing import chains_of


class Loader:
    """The rows of a whole run. Every tree occurs once an epoch; epochs differ in packing and order, not in steps.

    A step holds rows of one epoch, `batch_size` at most; an epoch's rows are spread evenly over its steps. Where
    conversations must not meet in a row (`apart`), each planned row becomes a row for each of its chains: the same
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
        self.rows_per_epoch = count_rows(self._lengths, max_length, seed)
        self.steps_per_epoch = math.ceil(self.rows_per_epoch / batch_size)

    def apart(self) -> "Loader":
        """The same steps for a model whose layers cannot keep conversations apart (model/checks/sequential.py)."""
        loader = copy.copy(self)
        loader.alone = True
        return loader

    @lru_cache(maxsize=2)  # noqa: B019 (a loader lives as long as its run)
    def plan(self, epoch: int) -> list[list[int]]:
        """Tree indices of each row of an epoch, in training order."""
        seed = self._seed * 1_000_003 + epoch
        return plan_epoch(self._lengths, self._max_length, self.rows_per_epoch, seed)

    def trees(self, planned_row: Sequence[int]) -> list[Tree]:
        return self._dataset.trees(planned_row)

    def rows(self, step: int) -> list[PackedSequence]:
        """The rows of step 0, 1, 2, ..."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start, end = (at * self.rows_per_epoch // self.steps_per_epoch for at in (within, within + 1))
        return [row for planned in self.plan(epoch)[start:end] for row in lay_out(self.trees(planned), self.alone)]

    def largest_rows(self) -> list[PackedSequence]:
        """Of the first epoch: the row of most tokens, and the row of most trained tokens if that is another."""
        plan = self.plan(0)
        num_tokens = [sum(self._lengths[index] for index in planned) for planned in plan]
        num_trained = [sum(tree.num_trained for tree in self.trees(planned)) for planned in plan]
        longest = max(range(len(plan)), key=lambda row: (num_tokens[row], num_trained[row]))
        most_trained = max(range(len(plan)), key=lambda row: (num_trained[row], num_tokens[row]))
        rows = [row for at in {longest, most_trained} for row in lay_out(self.trees(plan[at]), self.alone)]
        most_tokens = max(rows, key=lambda row: (row.num_tokens, row.num_trained))
        most_targets = max(rows, key=lambda row: (row.num_trained, row.num_tokens))
        return [most_tokens] if most_tokens is most_targets else [most_tokens, most_targets]

    @property
    def fill(self) -> float:
        """Share of the rows' room that tokens take."""
        return sum(self._lengths) / (self.rows_per_epoch * self._max_length)


def lay_out(trees: Sequence[Tree], alone: bool) -> list[PackedSequence]:
    """One row of all the trees; alone: a row for each of their chains."""
    if alone:
        return [pack_trees([chain], alone=True) for tree in trees for chain in chains_of(tree)]
    return [pack_trees(trees)]
