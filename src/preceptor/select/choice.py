"""Which rows of a surveyed pool are kept, and why each of the others is not.

rejected         the reader's or the model's reason, with its code
exact_repeat     says exactly what an earlier row says
near_repeat      nearly says what another row says; of such rows the best is kept, of equals the first
low_quality      not among the best rows, from which the choice is made: the best `quality_share` of the rows that
                 are left, or as many as are to be kept if that is more, and whatever is as good as the last of them
covered          among the best, and like a row that is kept
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from preceptor.errors import ConfigError
from preceptor.select.diversity import Order, Points, coverage, facility_location, k_centre, nearest_chosen
from preceptor.select.quality import WEIGHTS, Quality, judge
from preceptor.select.survey import Survey

QUALITY_SHARE = 0.5
METHODS: Mapping[str, Callable[[Points, np.ndarray, int, int], Order]] = {
    "facility-location": facility_location,
    "k-centre": k_centre,
}
NO_DIVERSITY = "none"  # the best rows, whatever they are like


@dataclass(frozen=True)
class Settings:
    """How to choose. weights: of the signals (quality.py). diversity: one of METHODS, or `none`."""

    keep: int
    seed: int = 0
    weights: Mapping[str, float] = field(default_factory=lambda: dict(WEIGHTS))
    quality_share: float = QUALITY_SHARE
    diversity: str = "facility-location"

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.keep < 1:
            raise ConfigError(f"--keep {self.keep}: keep at least 1 row")
        if not 0 < self.quality_share <= 1:
            raise ConfigError(f"--quality-share {self.quality_share:g}: a share above 0, at most 1")
        if self.diversity not in (*METHODS, NO_DIVERSITY):
            known = ", ".join((*METHODS, NO_DIVERSITY))
            raise ConfigError(f"--diversity {self.diversity}: must be one of {known}")


@dataclass(frozen=True, eq=False)
class Choice:
    """What became of the N rows that a survey measured; places are those in `survey.number_N`.

    left: not repeated. candidates: of these, good enough. kept: chosen among them, the first chosen first; gain_K:
    what each added; both in the order of the choice. twin_N: for a row that nearly repeats another, the one that
    stands for it, else -1. like_N, similarity_N: for each candidate the kept row that it is most like; -1 and 0 for
    others. coverage, random_coverage: of the candidates, by the kept rows and by as many drawn at random among them.
    """

    settings: Settings
    quality: Quality
    left: np.ndarray
    candidates: np.ndarray
    kept: np.ndarray
    gain_K: np.ndarray
    twin_N: np.ndarray
    like_N: np.ndarray
    similarity_N: np.ndarray
    coverage: float | None
    random_coverage: float | None

    @property
    def is_short(self) -> bool:
        """Whether there were fewer rows than were to be kept."""
        return len(self.kept) < self.settings.keep


def choose(found: Survey, settings: Settings) -> Choice:
    """A pure function of the survey and the settings, the same each time.

    Raises ConfigError if the settings need a model and the survey was made without.
    """
    model = found.model
    if model is None and settings.diversity != NO_DIVERSITY:
        raise ConfigError(f"--diversity {settings.diversity}: needs --model; without one, choose `none`")
    num = len(found.number_N)
    quality = judge(
        found.signals,
        None if model is None else model.difficulty_N,
        None if model is None else model.loss_rest_N,
        settings.weights,
    )
    twin_N = _twins(found.head_N, quality.quality_N)
    left = np.flatnonzero(twin_N < 0)
    candidates = _best(left, quality.quality_N, max(settings.keep, math.ceil(settings.quality_share * len(left))))
    keep = min(settings.keep, len(candidates))
    like_N, similarity_N = np.full(num, -1), np.zeros(num, np.float32)
    covered = random_covered = None
    if model is None or settings.diversity == NO_DIVERSITY:
        order = _by_quality(quality.quality_N[candidates], keep, settings.seed)
    else:
        points = Points(model.embedding_NE, candidates)
        order = METHODS[settings.diversity](points, quality.quality_N[candidates], keep, settings.seed)
        nearest, similarity_N[candidates] = nearest_chosen(points, order.row_K)
        like_N[candidates] = candidates[order.row_K[nearest]]
        seed = settings.seed
        at_random = np.random.default_rng(seed).permutation(len(candidates))[:keep]
        covered, random_covered = coverage(points, order.row_K, seed), coverage(points, at_random, seed)
    return Choice(
        settings=settings,
        quality=quality,
        left=left,
        candidates=candidates,
        kept=candidates[order.row_K],
        gain_K=order.gain_K,
        twin_N=twin_N,
        like_N=like_N,
        similarity_N=similarity_N,
        coverage=covered,
        random_coverage=random_covered,
    )


def _twins(head_N: np.ndarray, quality_N: np.ndarray) -> np.ndarray:
    """For each row that nearly repeats a better one, or an earlier one as good, that row; else -1."""
    order = np.lexsort((np.arange(len(head_N)), -quality_N, head_N))  # by group, the best first, then the first
    starts = np.flatnonzero(np.r_[True, head_N[order[1:]] != head_N[order[:-1]]])
    best = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
    twin_N = np.empty(len(head_N), np.int64)
    twin_N[order] = np.where(best == order, -1, best)
    return twin_N


def _best(left: np.ndarray, quality_N: np.ndarray, num: int) -> np.ndarray:
    """At least `num` of the rows, all if there are no more: the best, and all that are as good as the last of them."""
    if num >= len(left):
        return left
    least = np.partition(quality_N[left], len(left) - num)[len(left) - num]
    best: np.ndarray = left[quality_N[left] >= least]
    return best


def _by_quality(quality_C: np.ndarray, keep: int, seed: int) -> Order:
    drawn = np.random.default_rng(seed).permutation(len(quality_C))
    row_K = drawn[np.argsort(-quality_C[drawn], kind="stable")][:keep]
    return Order(row_K, quality_C[row_K])
