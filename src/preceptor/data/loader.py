"""Rows in a seeded order: which records each step trains on, as a pure function of the step.

There is no iterator whose position could be lost: a resumed run asks for the next step, and gets what the first run
would have got.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

from preceptor.data.forest import Row, Tree, build_row, plan_rows


class Loader:
    """The rows of a whole run. Every tree occurs once an epoch; epochs differ in packing and order.

    The last step of an epoch holds the rows that are left, so that no step mixes two epochs.
    """

    def __init__(self, trees: Sequence[Tree], max_row_tokens: int, rows_per_step: int, seed: int) -> None:
        assert trees
        self._trees = trees
        self._lengths = [tree.num_tokens for tree in trees]
        self._max_row_tokens = max_row_tokens
        self._rows_per_step = rows_per_step
        self._seed = seed
        # Only ties between equal lengths differ from epoch to epoch, so every epoch has the same number of rows.
        self.rows_per_epoch = len(self.plan(0))
        self.steps_per_epoch = math.ceil(self.rows_per_epoch / rows_per_step)

    @lru_cache(maxsize=2)  # noqa: B019 (a loader lives as long as its run)
    def plan(self, epoch: int) -> list[list[int]]:
        """Tree indices of each row of an epoch, in training order."""
        return plan_rows(self._lengths, self._max_row_tokens, seed=self._seed * 1_000_003 + epoch)

    def rows(self, step: int) -> list[Row]:
        """The rows of step 0, 1, 2, ..."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self._rows_per_step
        plan = self.plan(epoch)[start : start + self._rows_per_step]
        return [build_row([self._trees[index] for index in row]) for row in plan]

    @property
    def fill(self) -> float:
        """Share of the rows' room that tokens take."""
        return sum(self._lengths) / (self.rows_per_epoch * self._max_row_tokens)
