"""A measured shift -> its figures: shares, by position, the most shifted tokens, and answers to look at.

    {"num_prompts", "num_tokens", "num_added": generated tokens that the base lacks, which no other figure counts,
     "shares": {"unshifted", "marginal", "shifted"}, "mean_prob", "mean_kl": each {"value", "low", "high", "num"},
     "by_position": [{"position", "num", "unshifted", "marginal", "shifted", "mean_prob", "mean_kl"}],
     "most_shifted": [{"token", "num", "num_shifted", "num_marginal", "mean_prob"}],
     "answers": [{"source", "texts", "ranks", "probs", "kls"}]}

Intervals resample whole answers, since the tokens of one answer are not independent.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from preceptor.study.bootstrap import interval
from preceptor.study.shift import MARGINAL, SHIFTED, Said, Shift
from preceptor.study.tokens import decode

NUM_POSITIONS, NUM_TOKENS, NUM_ANSWERS = 256, 50, 50


def shift_figures(shift: Shift, said: Sequence[Said], tokenizer: Any, seed: int = 0) -> dict[str, Any] | None:
    """None where no token has a rank. tokenizer: the tuned model's."""
    known_N = shift.rank_N > 0
    if not known_N.any():
        return None
    classes = _classes(shift.rank_N)
    num_P = _by_answer(known_N, shift, len(said))
    return {
        "num_prompts": len(said),
        "num_tokens": int(known_N.sum()),
        "num_added": int((~known_N).sum()),
        "shares": {
            name: asdict(interval(_by_answer(own_N, shift, len(said)), num_P, seed=seed))
            for name, own_N in classes.items()
        },
        "mean_prob": asdict(interval(_by_answer(shift.prob_N, shift, len(said)), num_P, seed=seed)),
        "mean_kl": asdict(interval(_by_answer(shift.kl_N, shift, len(said)), num_P, seed=seed)),
        "by_position": _by_position(shift, classes, known_N),
        "most_shifted": _most_shifted(shift, classes, tokenizer),
        "answers": _answers(shift, said, tokenizer),
    }


def _classes(rank_N: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "unshifted": rank_N == 1,
        "marginal": (rank_N >= MARGINAL) & (rank_N < SHIFTED),
        "shifted": rank_N >= SHIFTED,
    }


def _by_answer(value_N: np.ndarray, shift: Shift, num_answers: int) -> list[float]:
    return np.bincount(shift.answer_N, weights=value_N, minlength=num_answers).tolist()


def _by_position(shift: Shift, classes: dict[str, np.ndarray], known_N: np.ndarray) -> list[dict[str, Any]]:
    found = []
    for position in range(1, min(int(shift.position_N.max()), NUM_POSITIONS) + 1):
        here_N = known_N & (shift.position_N == position)
        num = int(here_N.sum())
        if num:
            shares = {name: float((own_N & here_N).sum() / num) for name, own_N in classes.items()}
            means = {"mean_prob": float(shift.prob_N[here_N].mean()), "mean_kl": float(shift.kl_N[here_N].mean())}
            found.append({"position": position, "num": num, **shares, **means})
    return found


def _most_shifted(shift: Shift, classes: dict[str, np.ndarray], tokenizer: Any) -> list[dict[str, Any]]:
    """The tokens most often shifted."""
    ids, counts = np.unique(shift.token_N[classes["shifted"]], return_counts=True)
    order = sorted(zip(counts.tolist(), ids.tolist(), strict=True), key=lambda each: (-each[0], each[1]))
    found = []
    for num_shifted, id_ in order[:NUM_TOKENS]:
        own_N = shift.token_N == id_
        found.append(
            {
                "token": decode([id_], tokenizer),
                "num": int(own_N.sum()),
                "num_shifted": num_shifted,
                "num_marginal": int((own_N & classes["marginal"]).sum()),
                "mean_prob": float(shift.prob_N[own_N].mean()),
            }
        )
    return found


def _answers(shift: Shift, said: Sequence[Said], tokenizer: Any) -> list[dict[str, Any]]:
    found = []
    for number, each in enumerate(said[:NUM_ANSWERS]):
        own_N = shift.answer_N == number
        found.append(
            {
                "source": each.source,
                "texts": [decode([id_], tokenizer) for id_ in each.answer],
                "ranks": shift.rank_N[own_N].tolist(),
                "probs": [round(value, 6) for value in shift.prob_N[own_N].tolist()],
                "kls": [round(value, 6) for value in shift.kl_N[own_N].tolist()],
            }
        )
    return found
