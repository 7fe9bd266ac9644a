"""Figures over several training seeds: means over seeds and items, with intervals for both.

The value of a figure is sum_si a_si / sum_si b_si over seeds s and items i. Its interval is a bootstrap that draws
seeds and items at once, each with replacement (10,000 times; the middle 95 %), so that it holds what another training
seed and other questions would have changed. Of three seeds all three draws are the same one in one draw of nine, so
the interval is hardly narrower than from the lowest seed to the highest. The same items are drawn for both sides of a
difference, but seeds apart: no two trainings are a pair.

Shares are widened to the exact binomial interval of the items (intervals.py says why), differences of shares to that of
the items that changed, each with its mean over the seeds: gains and losses have each their own mean size.

Legend: S seeds, I items, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from preceptor.evaluate.intervals import (
    DIFFERENCE_OF_SHARES,
    LEVEL,
    NUM_RESAMPLES,
    SHARE,
    Bounds,
    exact_difference,
    exact_share,
)

Array = NDArray[np.float64]
INTERVALS = "bootstrap over seeds and items; shares, and differences of shares, widened to the exact binomial ones"
"""Stands in a result; those of before 2026-12 have no such key: their differences are not widened."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over seeds and items with its 95 % interval. by_seed: of each training; empty for differences."""

    value: float
    low: float
    high: float
    num_items: int
    num_seeds: int
    by_seed: tuple[float, ...] = ()

    @property
    def sign(self) -> int:
        """-1 or 1 where the whole interval lies on one side of zero; 0: not distinguishable from zero."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True, eq=False)
class Values:
    """One figure's items under each seed: above_SI / below_SI; a share's or mean's denominators are ones."""

    above_SI: Array
    below_SI: Array

    @classmethod
    def of(cls, above: Sequence[Sequence[float]], below: Sequence[Sequence[float]] | None = None) -> "Values":
        """Raises ValueError where there is no item, or seeds have not the same items."""
        above_SI = np.asarray(above, dtype=np.float64)
        below_SI = np.ones_like(above_SI) if below is None else np.asarray(below, dtype=np.float64)
        if above_SI.ndim != 2 or above_SI.shape != below_SI.shape or not below_SI.sum() > 0:
            raise ValueError("a figure needs the same items, one at least, under each seed, and denominators over zero")
        return cls(above_SI, below_SI)

    @property
    def by_seed(self) -> Array:
        found: Array = self.above_SI.sum(axis=1) / self.below_SI.sum(axis=1)
        return found

    @property
    def value(self) -> float:
        return float(self.above_SI.sum() / self.below_SI.sum())

    def resampled(self, items_RI: Array, rng: np.random.Generator) -> Array:
        """The figure of each draw: items_RI is how often each item was drawn; seeds are drawn here."""
        num_seeds = len(self.above_SI)
        seeds_RS = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=len(items_RI))
        above_R, below_R = ((items_RI @ side_SI.T * seeds_RS).sum(axis=1) for side_SI in (self.above_SI, self.below_SI))
        found: Array = above_R / below_R
        return found


def figure(values: Values, bounds: Bounds | None = None, seed: int = 0) -> Figure:
    """The figure itself. bounds SHARE: items are 0 or 1."""
    num_seeds, num_items = values.above_SI.shape
    low, high = _edges(values.resampled(_items(num_items, seed), np.random.default_rng([seed, 1])))
    if bounds == SHARE:
        exact = exact_share(values.above_SI.mean(axis=0))
        low, high = min(low, exact[0]), max(high, exact[1])
    return Figure(values.value, low, high, num_items, num_seeds, tuple(values.by_seed.tolist()))


def difference(before: Values, after: Values, bounds: Bounds | None = None, seed: int = 0) -> Figure:
    """`after` less `before`, on the same items; each may have its own number of seeds (a base model has one)."""
    if before.above_SI.shape[1] != after.above_SI.shape[1]:
        raise ValueError(f"{before.above_SI.shape[1]} items and {after.above_SI.shape[1]} are not the same ones")
    rng = np.random.default_rng([seed, 1])
    num_items = after.above_SI.shape[1]
    items_RI = _items(num_items, seed)
    low, high = _edges(after.resampled(items_RI, rng) - before.resampled(items_RI, rng))
    if bounds == DIFFERENCE_OF_SHARES:
        exact = exact_difference(after.above_SI.mean(axis=0) - before.above_SI.mean(axis=0))
        low, high = min(low, exact[0]), max(high, exact[1])
    num_seeds = max(len(before.above_SI), len(after.above_SI))
    return Figure(after.value - before.value, low, high, num_items, num_seeds)


@lru_cache(maxsize=8)
def _items(num: int, seed: int) -> Array:
    """How often each item is drawn, the same for every figure over as many: drawing costs more than all sums."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num, np.full(num, 1 / num), size=NUM_RESAMPLES).astype(np.float64)


def _edges(found_R: Array) -> Bounds:
    low, high = np.quantile(found_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
