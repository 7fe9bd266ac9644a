"""Signals -> one quality between 0 and 1, with the reasons.

Each signal s takes away a share of the quality: a fault f_s between 0 and 1, times the weight w_s that the user gives
it, the most that the signal can take away:

    quality = prod over s of (1 - w_s * f_s)

    refusal       1 where an answer refuses or talks of being a language model, 0.5 for filler phrases
    formatting    0.5 for one flaw, 1 for two
    repetition    repeated four-word sequences from 20 % (none) to 60 % (all), or compression from 4 to 8 times
    length        log of the answers' mean length, more than 2 robust deviations from the pool's median (all at 4)
    difficulty    IFD from 0.95 (none) to 1 (all): the prompt does not help to foresee the answer; and at the same time
                  from 1 to 3 robust deviations above the pool's median, for a base that was never taught to answer
                  expects another question after a question, and then no prompt helps
    loss          mean loss of the answers after their first tokens, above the pool's median, in robust deviations: from
                  1 (none) to 3 (all). Answers that the base finds unlikely are broken, wrong, or say what it does not
                  know; to train on that teaches to invent (Gekhman et al. 2024, arXiv:2405.05904)

A robust deviation is 1.4826 times the median distance from the median, the standard deviation of a normal pool. Rows
more than 4 of them away are set aside and median and deviation taken anew, until none is: they are those of the bulk
of the pool, whatever else it holds. A deviation is not taken for less than _LEAST, so that a pool of equals has no
outliers. A row without a fault has quality 1: among good rows, diversity chooses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from preceptor.errors import ConfigError
from preceptor.select.signals import TextSignals

WEIGHTS: Mapping[str, float] = {
    "refusal": 0.9,
    "formatting": 0.5,
    "repetition": 0.7,
    "length": 0.4,
    "difficulty": 0.7,
    "loss": 0.8,
}
MODEL_SIGNALS = ("difficulty", "loss")

_LEAST = {"length": 0.35, "difficulty": 0.05, "loss": 0.1}  # length: a factor of 1.4; loss: nats
_REPEATED, _COMPRESSION, _DIFFICULTY = (0.2, 0.6), (4.0, 8.0), (0.95, 1.0)
_FAR, _HIGH = (2.0, 4.0), (1.0, 3.0)  # deviations
_SET_ASIDE = 4.0


def read_weights(given: Sequence[str]) -> dict[str, float]:
    """`SIGNAL=WEIGHT` over the defaults; 0 switches a signal off. Raises ConfigError."""
    weights = dict(WEIGHTS)
    for text in given:
        name, _, value = text.partition("=")
        if name not in WEIGHTS:
            raise ConfigError(f"--weight {text}: no signal is named {name!r}; there are {', '.join(WEIGHTS)}")
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = -1.0
        if not 0 <= weights[name] <= 1:
            raise ConfigError(f"--weight {text}: a weight is a number from 0 (off) to 1, as in {name}=0.5")
    return weights


@dataclass(frozen=True, eq=False, slots=True)
class Quality:
    """Of N rows: quality_N, and the fault of each signal, all between 0 and 1, float64."""

    quality_N: np.ndarray
    fault_N: Mapping[str, np.ndarray]
    weights: Mapping[str, float]

    def reasons(self, row: int) -> list[str]:
        """The signals that lower the row's quality, the worst first."""
        cost = {name: self.weights[name] * float(fault_N[row]) for name, fault_N in self.fault_N.items()}
        return sorted((name for name in cost if cost[name] > 0), key=lambda name: -cost[name])


def judge(
    signals: Sequence[TextSignals],
    difficulty_N: np.ndarray | None,
    loss_rest_N: np.ndarray | None,
    weights: Mapping[str, float],
) -> Quality:
    """The quality of N rows, at least 1. difficulty_N, loss_rest_N: None where no model read them; weights: of all."""
    fault_N = {
        "refusal": np.array([s.refusal for s in signals]),
        "formatting": np.array([s.formatting for s in signals]),
        "repetition": np.maximum(
            _ramp(np.array([s.repeated for s in signals]), _REPEATED),
            _ramp(np.array([s.compression for s in signals]), _COMPRESSION),
        ),
        "length": _ramp(np.abs(_deviations(np.log([max(1, s.num_characters) for s in signals]), "length")), _FAR),
    }
    if difficulty_N is not None:
        high_N = _ramp(_deviations(difficulty_N, "difficulty"), _HIGH)
        fault_N["difficulty"] = np.minimum(_ramp(difficulty_N, _DIFFICULTY), high_N)
    if loss_rest_N is not None:
        fault_N["loss"] = _ramp(_deviations(loss_rest_N, "loss"), _HIGH)
    fault_N = {name: fault for name, fault in fault_N.items() if weights[name] > 0}
    quality_N = np.ones(len(signals))
    for name, fault in fault_N.items():
        quality_N *= 1 - weights[name] * fault
    return Quality(quality_N, fault_N, weights)


def _ramp(value_N: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    """0 up to the first bound, 1 from the second, straight between."""
    ramp_N: np.ndarray = np.clip((value_N - bounds[0]) / (bounds[1] - bounds[0]), 0.0, 1.0)
    return ramp_N


def _deviations(value_N: np.ndarray, name: str) -> np.ndarray:
    """Distance from the median in robust deviations, with its sign."""
    bulk = value_N
    while True:
        centre = float(np.median(bulk))
        deviation = max(1.4826 * float(np.median(np.abs(bulk - centre))), _LEAST[name])
        within = bulk[np.abs(bulk - centre) <= _SET_ASIDE * deviation]
        if len(within) == len(bulk):
            result_N: np.ndarray = (value_N - centre) / deviation
            return result_N
        bulk = within
