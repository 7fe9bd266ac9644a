"""An explanation of a choice: the reason and the scores of each example, and a summary of all."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from preceptor.select.choice import Choice
from preceptor.select.survey import Survey

KEPT, EXACT, NEAR, LOW, COVERED = "kept", "exact_repeat", "near_repeat", "low_quality", "covered"


def explain(found: Survey, choice: Choice) -> Iterator[dict[str, Any]]:
    """One object per example, in the order of the pool: source, kept, code, reason, and its scores if it has any.

    code: KEPT, EXACT, NEAR, LOW, COVERED, or that of a rejection.
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
            yield {
                "source": source,
                "kept": False,
                "code": EXACT,
                "reason": f"repeats {like} exactly",
                "like": like,
            }
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
        return {"code": LOW, "reason": f"quality {quality_N[place]:.2f}: enough examples as good or better are kept"}
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
            f"the loss of the answer with the prompt is {model.difficulty_N[place]:.2f} times that without"
        )
        words["loss"] = f"after its first token the answer has a loss of {model.loss_rest_N[place]:.2f} nats per token"
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
        scores |= {
            "loss": round(float(model.loss_N[place]), 4),
            "loss_alone": round(float(model.loss_alone_N[place]), 4),
            "loss_rest": round(float(model.loss_rest_N[place]), 4),
            "difficulty": round(float(model.difficulty_N[place]), 4),
            "prompt_tokens": int(model.prompt_tokens_N[place]),
            "answer_tokens": int(model.answer_tokens_N[place]),
        }
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
        "first_rejected": [
            {"source": rejection.source, "code": rejection.code, "message": rejection.message}
            for rejection in list(found.rejected.values())[:5]
        ],
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
    counts[LOW if choice.coverage is None else COVERED] += num_candidates - num_kept
    return {code: count for code, count in counts.most_common() if count}


def _lengths(found: Survey, places: np.ndarray) -> dict[str, Any]:
    characters = [found.signals[place].num_characters for place in places.tolist()]
    lengths = {"answer_characters": _statistics(characters)}
    if found.model is not None:
        lengths["prompt_tokens"] = _statistics(found.model.prompt_tokens_N[places])
        lengths["answer_tokens"] = _statistics(found.model.answer_tokens_N[places])
    return lengths


def _statistics(lengths: Sequence[int] | np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(lengths, (5, 50, 95)).tolist()
    return {"percentile_5": low, "median": median, "mean": float(np.mean(lengths)), "percentile_95": high}
