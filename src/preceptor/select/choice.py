"""Which examples of a surveyed pool are kept, and why each of the others is not.

rejected         cannot be trained, or is too long for the model; with the code of the rejection
exact_repeat     repeats an earlier example exactly
near_repeat      nearly repeats another example; the best of such examples is kept, the first of equals
low_quality      not among the candidates, which are the best `quality_share` of the distinct examples, or as many as
                 are to be kept if that is more, and all that are as good as the last of them
covered          a candidate, and similar to an example that is kept
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from preceptor.errors import ConfigError
from preceptor.select.diversity import GreedyChoice, Points, coverage, facility_location, k_centre, nearest_chosen
from preceptor.select.quality import WEIGHTS, Quality, judge
from preceptor.select.survey import Survey

QUALITY_SHARE = 0.5
METHODS: Mapping[str, Callable[[Points, np.ndarray, int, int], GreedyChoice]] = {
    "facility-location": facility_location,
    "k-centre": k_centre,
}
NO_DIVERSITY = "none"  # quality alone


@dataclass(frozen=True)
class Settings:
    """How to choose."""

    keep: int  # number of examples
    seed: int = 0
    weights: Mapping[str, float] = field(default_factory=lambda: dict(WEIGHTS))  # of the signals (quality.py)
    quality_share: float = QUALITY_SHARE  # share of the distinct examples that are candidates
    diversity: str = "facility-location"  # one of METHODS, or `none`

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.keep < 1:
            raise ConfigError(f"--keep {self.keep}: keep at least 1 example")
        if not 0 < self.quality_share <= 1:
            raise ConfigError(f"--quality-share {self.quality_share:g}: a share above 0, at most 1")
        if self.diversity not in (*METHODS, NO_DIVERSITY):
            known = ", ".join((*METHODS, NO_DIVERSITY))
            raise ConfigError(f"--diversity {self.diversity}: must be one of {known}")


@dataclass(frozen=True, eq=False)
class Choice:
    """The choice among the N examples that a survey measured; places are indices into `survey.number_N`."""

    settings: Settings
    quality: Quality
    distinct: np.ndarray  # places of the examples that repeat no other
    candidates: np.ndarray  # those of them that are good enough
    kept: np.ndarray  # those of them that are chosen, in the order of the choice
    gain_K: np.ndarray  # what each of these added
    repeated_N: np.ndarray  # the place of the better example that an example nearly repeats, else -1
    like_N: np.ndarray  # the kept example that a candidate is most similar to, else -1
    similarity_N: np.ndarray  # and the similarity, else 0
    coverage: float | None  # of the candidates by the kept examples
    random_coverage: float | None  # by as many random candidates

    @property
    def is_short(self) -> bool:
        """Whether fewer examples than `keep` could be kept."""
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
    repeated_N = _repeated(found.representative_N, quality.quality_N)
    distinct = np.flatnonzero(repeated_N < 0)
    candidates = _best(
        distinct, quality.quality_N, max(settings.keep, math.ceil(settings.quality_share * len(distinct)))
    )
    keep = min(settings.keep, len(candidates))
    like_N, similarity_N = np.full(num, -1), np.zeros(num, np.float32)
    covered = random_covered = None
    if model is None or settings.diversity == NO_DIVERSITY:
        order = _by_quality(quality.quality_N[candidates], keep, settings.seed)
    else:
        points = Points(model.embedding_NE, candidates)
        order = METHODS[settings.diversity](points, quality.quality_N[candidates], keep, settings.seed)
        nearest, similarity_N[candidates] = nearest_chosen(points, order.index_K)
        like_N[candidates] = candidates[order.index_K[nearest]]
        seed = settings.seed
        at_random = np.random.default_rng(seed).permutation(len(candidates))[:keep]
        covered, random_covered = coverage(points, order.index_K, seed), coverage(points, at_random, seed)
    return Choice(
        settings=settings,
        quality=quality,
        distinct=distinct,
        candidates=candidates,
        kept=candidates[order.index_K],
        gain_K=order.gain_K,
        repeated_N=repeated_N,
        like_N=like_N,
        similarity_N=similarity_N,
        coverage=covered,
        random_coverage=random_covered,
    )


def _repeated(representative_N: np.ndarray, quality_N: np.ndarray) -> np.ndarray:
    """For each example that nearly repeats a better one, or an equal earlier one, the place of that one; else -1."""
    order = np.lexsort(
        (np.arange(len(representative_N)), -quality_N, representative_N)
    )  # by group, the best first, then the first
    starts = np.flatnonzero(np.r_[True, representative_N[order[1:]] != representative_N[order[:-1]]])
    best = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
    repeated_N = np.empty(len(representative_N), np.int64)
    repeated_N[order] = np.where(best == order, -1, best)
    return repeated_N


def _best(places: np.ndarray, quality_N: np.ndarray, num: int) -> np.ndarray:
    """The best `num` of the examples, and all that are as good as the last of them."""
    if num >= len(places):
        return places
    least = np.partition(quality_N[places], len(places) - num)[len(places) - num]
    best: np.ndarray = places[quality_N[places] >= least]
    return best


def _by_quality(quality_C: np.ndarray, keep: int, seed: int) -> GreedyChoice:
    drawn = np.random.default_rng(seed).permutation(len(quality_C))
    index_K = drawn[np.argsort(-quality_C[drawn], kind="stable")][:keep]
    return GreedyChoice(index_K, quality_C[index_K])
