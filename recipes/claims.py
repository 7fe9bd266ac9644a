"""What was expected of an experiment and what came of it, decided by the figures alone."""

from dataclasses import dataclass
from typing import Literal

from measures import Measure, changed
from seeds import Figure

Outcome = Literal["shown", "refuted", "open"]
SAYS: dict[Outcome, str] = {"shown": "shown", "refuted": "refuted", "open": "cannot be told"}


@dataclass(frozen=True, slots=True)
class Claim:
    expected: str
    outcome: Outcome
    found: str


def by_sign(expected: str, measure: Measure, change: Figure, wanted: int, found: str = "") -> Claim:
    """Shown where the whole interval is on the wanted side (1: better, -1: worse), refuted where on the other."""
    sign = measure.verdict(change)
    outcome: Outcome = "open" if sign == 0 else "shown" if sign == wanted else "refuted"
    return Claim(expected, outcome, f"{found}{changed(measure, change)}")


def by_margin(expected: str, measure: Measure, change: Figure, margin: float, found: str = "") -> Claim:
    """Shown where it is sure to be no worse by more than `margin`; refuted where it is sure to be.

    That a difference cannot be told from zero is no proof that there is none, so a margin is named.
    """
    worst, best = sorted((measure.better * change.low, measure.better * change.high))
    outcome: Outcome = "shown" if worst >= -margin else "refuted" if best < -margin else "open"
    return Claim(expected, outcome, f"{found}{changed(measure, change)}")


def by_level(expected: str, own: Figure, level: float, found: str) -> Claim:
    """Shown where the whole interval lies over `level`, refuted where under it."""
    outcome: Outcome = "shown" if own.low > level else "refuted" if own.high < level else "open"
    return Claim(expected, outcome, found)
