"""Refusals counted by reason, with the first place of each, and which of them a run file allows."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from preceptor.data.conversation import Refusal


@dataclass(slots=True)
class Reason:
    """How many rows were refused with one code; `first` is the first of them, whose sentence says what to do."""

    first: Refusal
    count: int
    allowed: bool


class Tally:
    """Counts refusals. allowed: the codes for which rows may be left out (`data.refusals`)."""

    def __init__(self, allowed: Collection[str] = (), refusals: Iterable[Refusal] = ()) -> None:
        self._allowed = frozenset(allowed)
        self._reasons: dict[str, Reason] = {}
        for refusal in refusals:
            self.add(refusal)

    def add(self, refusal: Refusal) -> None:
        reason = self._reasons.setdefault(refusal.code, Reason(refusal, 0, refusal.code in self._allowed))
        reason.count += 1

    @property
    def reasons(self) -> list[Reason]:
        """The most frequent first; of equally frequent ones that which came first."""
        return sorted(self._reasons.values(), key=lambda reason: -reason.count)

    @property
    def num_refused(self) -> int:
        return sum(reason.count for reason in self._reasons.values())

    @property
    def num_not_allowed(self) -> int:
        return sum(reason.count for reason in self._reasons.values() if not reason.allowed)

    @property
    def never_seen(self) -> list[str]:
        """Allowed codes that no refusal has: perhaps misspelt."""
        return sorted(self._allowed - self._reasons.keys())

    def __str__(self) -> str:
        """One line per reason: how often, where first, and what it says there."""
        return "\n".join(
            f"  {reason.count:>6} x {reason.first.code}{' (allowed)' * reason.allowed}: "
            f"first at {reason.first.source}: {reason.first.message}"
            for reason in self.reasons
        )
