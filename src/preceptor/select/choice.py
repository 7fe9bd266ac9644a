"""Which examples of a surveyed pool are kept, and why each of the others is not; the choice explained.

rejected         cannot be trained, or is too long for the model; with the code of the rejection
exact_repeat     repeats an earlier example exactly
near_repeat      nearly repeats another example; the best of such examples is kept, of equals the one with most answers
low_quality      not among the candidates, which are the best `quality_share` of the distinct examples, or as many as
                 are to be kept if that is more, and all that are as good as the last of them
covered          a candidate, and similar to an example that is kept
enough_kept      a candidate, where quality alone chooses: enough that are as good or better are kept
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

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
    quality = judge(found.signals, None if model is None else model.score_N, settings.weights)
    repeated_N = _repeated(
        found.representative_N, quality.quality_N, np.array([own.num_answers for own in found.signals])
    )
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


def _repeated(representative_N: np.ndarray, quality_N: np.ndarray, num_answers_N: np.ndarray) -> np.ndarray:
    """For each example that nearly repeats a better one, an equal one that trains more answers, or an equal earlier
    one, the place of that one; else -1.
    """
    keys = (np.arange(len(representative_N)), -num_answers_N, -quality_N, representative_N)  # the last sorts first
    order = np.lexsort(keys)
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


KEPT, EXACT, NEAR, LOW, COVERED = "kept", "exact_repeat", "near_repeat", "low_quality", "covered"
ENOUGH = "enough_kept"


def explain(found: Survey, choice: Choice) -> Iterator[dict[str, Any]]:
    """One object per example, in the order of the pool: source, kept, code, reason, and its scores if it has any.

    code: KEPT, EXACT, NEAR, LOW, COVERED, ENOUGH, or that of a rejection.
    """
    place_of = {number: place for place, number in enumerate(found.number_N.tolist())}
    rank_of = {place: rank for rank, place in enumerate(choice.kept.tolist())}
    candidates = frozenset(choice.candidates.tolist())
    for number, source in enumerate(found.sources):
        if number in found.rejected:
            rejection = found.rejected[number]
            yield {"source": source, "kept": False, "code": rejection.code, "reason": rejection.message}
        elif number in found.exact:
            like = found.sources[found.exact[number]]
            yield {"source": source, "kept": False, "code": EXACT, "reason": f"repeats {like} exactly", "like": like}
        else:
            place = place_of[number]
            rank = rank_of.get(place)
            verdict = _kept(choice, rank) if rank is not None else _dropped(found, choice, place, place in candidates)
            yield {"source": source, "kept": rank is not None} | verdict | _scores(found, choice, place)


def _kept(choice: Choice, rank: int) -> dict[str, Any]:
    num, gain = len(choice.kept), float(choice.gain_K[rank])
    if choice.is_short:
        reason = "all distinct examples are kept"
    elif choice.coverage is None:
        reason = f"number {rank + 1} of {num}, by quality"
    else:
        reason = f"number {rank + 1} of {num} chosen: it added most to the coverage ({gain:.3g})"
    return {"code": KEPT, "reason": reason, "rank": rank + 1, "gain": gain}


def _dropped(found: Survey, choice: Choice, place: int, is_candidate: bool) -> dict[str, Any]:
    def source(other: int) -> str:
        return found.sources[int(found.number_N[other])]

    quality_N, repeated = choice.quality.quality_N, int(choice.repeated_N[place])
    if repeated >= 0:
        better = ", which is better" if quality_N[repeated] > quality_N[place] else ""
        return {"code": NEAR, "reason": f"nearly repeats {source(repeated)}{better}", "like": source(repeated)}
    if not is_candidate:
        least = float(quality_N[choice.candidates].min())
        return {
            "code": LOW,
            "reason": f"quality {quality_N[place]:.2f} below {least:.2f}: {_faults(found, choice, place)}",
        }
    if choice.coverage is None:
        return {"code": ENOUGH, "reason": f"quality {quality_N[place]:.2f}: enough examples as good or better are kept"}
    like, similarity = source(int(choice.like_N[place])), float(choice.similarity_N[place])
    return {
        "code": COVERED,
        "reason": f"most like {like}, which is kept (similarity {similarity:.2f})",
        "like": like,
        "similarity": round(similarity, 4),
    }


def _faults(found: Survey, choice: Choice, place: int) -> str:
    """The reasons for an example's low quality."""
    signals, model = found.signals[place], found.model
    words = {
        "refusal": ", ".join(signals.found[:1]),
        "formatting": ", ".join(signals.found[signals.refusal > 0 :]),
        "repetition": f"{signals.repeated:.0%} repeated, compressed {signals.compression:.1f} times",
        "length": f"answers of {signals.num_characters} characters",
    }
    if model is not None:
        words["difficulty"] = (
            f"the loss of the answer with the prompt is {model.score_N['difficulty'][place]:.2f} times that without"
        )
        rest = model.score_N["loss_rest"][place]
        words["loss"] = f"after its first token the answer has a loss of {rest:.2f} nats per token"
    return "; ".join(f"{name} ({words[name]})" for name in choice.quality.reasons(place))


def _scores(found: Survey, choice: Choice, place: int) -> dict[str, Any]:
    signals, model = found.signals[place], found.model
    scores: dict[str, Any] = {
        "quality": round(float(choice.quality.quality_N[place]), 4),
        "faults": {name: round(float(fault_N[place]), 4) for name, fault_N in choice.quality.fault_N.items()},
        "answer_characters": signals.num_characters,
        "repeated": round(signals.repeated, 4),
        "compression": round(signals.compression, 2),
        "found": list(signals.found),
    }
    if model is not None:
        scores |= {name: round(model.score_N[name][place].item(), 4) for name in model.score_N.dtype.names or ()}
    return scores


def summarise(found: Survey, choice: Choice) -> dict[str, Any]:
    """All counts in one object. Lengths: the mean answer of an example in characters, prompt and answers in tokens."""
    settings = choice.settings
    everything = np.arange(len(found.number_N))
    return {
        "num_examples": len(found.sources),
        "asked_to_keep": settings.keep,
        "num_kept": len(choice.kept),
        "all_kept": choice.is_short,
        "codes": _codes(found, choice),
        "first_rejected": [asdict(rejection) for rejection in list(found.rejected.values())[:5]],
        "lengths": {"before": _lengths(found, everything), "after": _lengths(found, choice.kept)},
        "quality": {
            "before": float(choice.quality.quality_N.mean()),
            "after": float(choice.quality.quality_N[choice.kept].mean()),
        },
        "coverage": choice.coverage,
        "random_coverage": choice.random_coverage,
        "seed": settings.seed,
        "weights": dict(settings.weights),
        "quality_share": settings.quality_share,
        "diversity": settings.diversity,
    }


def _codes(found: Survey, choice: Choice) -> dict[str, int]:
    """The number of examples of each code of `explain`, the most frequent first."""
    num_kept, num_candidates = len(choice.kept), len(choice.candidates)
    counts = Counter(rejection.code for rejection in found.rejected.values())
    counts[KEPT], counts[EXACT], counts[NEAR] = num_kept, len(found.exact), int((choice.repeated_N >= 0).sum())
    counts[LOW] = len(choice.distinct) - num_candidates
    counts[ENOUGH if choice.coverage is None else COVERED] += num_candidates - num_kept
    return {code: count for code, count in counts.most_common() if count}


def _lengths(found: Survey, places: np.ndarray) -> dict[str, Any]:
    characters = [found.signals[place].num_characters for place in places.tolist()]
    lengths = {"answer_characters": _statistics(characters)}
    if found.model is not None:
        for name in ("prompt_tokens", "answer_tokens"):
            lengths[name] = _statistics(found.model.score_N[name][places])
    return lengths


def _statistics(lengths: Sequence[int] | np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(lengths, (5, 50, 95)).tolist()
    return {"percentile_5": low, "median": median, "mean": float(np.mean(lengths)), "percentile_95": high}
