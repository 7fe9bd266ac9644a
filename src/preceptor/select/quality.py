"""One quality between 0 and 1 from all signals, with the reasons.

Each signal s lowers the quality by a fault f_s between 0 and 1, times its weight w_s, the most that it can take away:

    quality = prod over s of (1 - w_s * f_s)

    refusal       1 if an answer refuses or speaks of being a language model, 0.5 for filler phrases
    formatting    0.5 for one flaw, 1 for two
    repetition    repeated four-word sequences from 20 % (0) to 60 % (1), or compression from 4 to 8 times
    length        log of the answers' mean length, from 2 (0) to 4 (1) robust deviations from the pool's median
    difficulty    IFD from 0.95 (0) to 1 (1): the prompt does not help to predict the answer; limited by 1 (0) to 3 (1)
                  robust deviations above the pool's median, because a base model that never saw answers expects
                  another question after a question, and then no prompt helps
    loss          mean loss of the answers after their first tokens, from 1 (0) to 3 (1) robust deviations above the
                  pool's median. Answers that are unlikely under the base are broken, wrong, or state facts that it does
                  not know; training on those teaches it to invent (Gekhman et al. 2024, arXiv:2405.05904)

A robust deviation is 1.4826 times the median distance from the median, the standard deviation of a normal pool.
Examples more than 4 of them away are set aside and median and deviation are computed again, until none is: both
describe the bulk of the pool, whatever else it holds. A deviation is at least _LEAST, so that a pool of equals has no
outliers. An example without a fault has quality 1: among good examples, diversity chooses.
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
            raise ConfigError(f"--weight {text}: there is no signal {name!r}; the signals are {', '.join(WEIGHTS)}")
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = -1.0
        if not 0 <= weights[name] <= 1:
            raise ConfigError(f"--weight {text}: a weight is a number from 0 (off) to 1, as in {name}=0.5")
    return weights


@dataclass(frozen=True, eq=False, slots=True)
class Quality:
    """The qualities and faults of N examples, all between 0 and 1, float64."""

    quality_N: np.ndarray
    fault_N: Mapping[str, np.ndarray]
    weights: Mapping[str, float]

    def reasons(self, index: int) -> list[str]:
        """The signals that lower the example's quality, the worst first."""
        cost = {name: self.weights[name] * float(fault_N[index]) for name, fault_N in self.fault_N.items()}
        return sorted((name for name in cost if cost[name] > 0), key=lambda name: -cost[name])


def judge(
    signals: Sequence[TextSignals],
    difficulty_N: np.ndarray | None,
    loss_rest_N: np.ndarray | None,
    weights: Mapping[str, float],
) -> Quality:
    """The quality of N examples, at least 1. difficulty_N, loss_rest_N: None without a model."""
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
    """0 up to the first bound, 1 from the second, linear between them."""
    ramp_N: np.ndarray = np.clip((value_N - bounds[0]) / (bounds[1] - bounds[0]), 0.0, 1.0)
    return ramp_N


def _deviations(value_N: np.ndarray, name: str) -> np.ndarray:
    """The signed distance from the median in robust deviations."""
    bulk = value_N
    while True:
        centre = float(np.median(bulk))
        deviation = max(1.4826 * float(np.median(np.abs(bulk - centre))), _LEAST[name])
        within = bulk[np.abs(bulk - centre) <= _SET_ASIDE * deviation]
        if len(within) == len(bulk):
            result_N: np.ndarray = (value_N - centre) / deviation
            return result_N
        bulk = within
