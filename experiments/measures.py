"""The measures of the study, skill and tax, with intervals; and expectations with outcomes that follow from them.

Skill is what SFT teaches: to answer questions as shown, and to stop. Tax is what it may cost, measured on plain text to
be continued, about held-out stories or facts. That is the form of pretraining, and no conversation has it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from preceptor.evaluate.intervals import DIFFERENCE_OF_SHARES, SHARE
from scholar.facts import load_facts
from scholar.library import SEED, library, write_pages
from seeds import Figure, Values, difference, figure
from trial import Yardstick

HELDOUT, COMPLETIONS, ARITHMETIC = "heldout", "completions", "arithmetic"
ENDINGS, TEXT, PAGES = "endings", "library_heldout", "pages"
NUM_PAGES = 200


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure of one task: sum of `above` over sum of `below` (absent: the number of items).

    unit 100: shares, told in per cent, their differences in points. better: 1 or -1, whether more is.
    """

    name: str
    label: str
    task: str
    above: str
    below: str = ""
    unit: float = 100.0
    better: int = 1

    @property
    def digits(self) -> int:
        return 1 if self.unit > 1 else 4

    @property
    def unit_name(self) -> str:
        return "points" if self.unit > 1 else "bits per byte"

    def values(self, models: Sequence[Mapping[str, Any]], items: Collection[int] | None = None) -> Values:
        """Of models measured alike, a seed each. items: the places of those that count; None: all."""

        def taken(name: str) -> list[list[float]]:
            lists = [model[self.task][name] for model in models]
            return [[own[at] for at in (range(len(own)) if items is None else items)] for own in lists]

        return Values.of(taken(self.above), taken(self.below) if self.below else None)

    def of(self, models: Sequence[Mapping[str, Any]], items: Collection[int] | None = None) -> Figure:
        return figure(self.values(models, items), SHARE if self.unit > 1 else None)

    def between(
        self,
        before: Sequence[Mapping[str, Any]],
        after: Sequence[Mapping[str, Any]],
        items: Collection[int] | None = None,
    ) -> Figure:
        """`after` less `before`."""
        bounds = DIFFERENCE_OF_SHARES if self.unit > 1 else None
        return difference(self.values(before, items), self.values(after, items), bounds)

    def verdict(self, change: Figure) -> int:
        """1 for the better, -1 for the worse, 0 where the interval holds zero."""
        return self.better * change.sign


EXACT = Measure("exact", "exact answers to held-out questions", HELDOUT, "right")
STOPS = Measure("stops", "answers that stop by themselves", HELDOUT, "stop_token")
BITS = Measure("bits", "held-out stories, bits per byte", TEXT, "bits", "num_bytes", unit=1.0, better=-1)
PAGE_BITS = Measure("pages", "new library pages, bits per byte", PAGES, "bits", "num_bytes", unit=1.0, better=-1)
CLOZE = Measure("cloze", "statements of facts completed", COMPLETIONS, "right")
SUMS = Measure("sums", "sums completed", ARITHMETIC, "right")
ENDED = Measure("endings", "story endings chosen correctly", ENDINGS, "right")

SKILLS = (EXACT, STOPS)
TAXES = (PAGE_BITS, BITS, CLOZE, SUMS, ENDED)
TAX = PAGE_BITS  # by which claims and plots tell it: text of every kind that the base was pretrained on


def write_new_pages(file: Path) -> Path:
    """Pages as the library has them, about the same facts, drawn by another seed; none of them stands in it."""
    if not file.is_file():
        facts = load_facts()
        known = set(library(facts))
        new = [page for page in library(facts, seed=SEED + 1)[: 2 * NUM_PAGES] if page not in known]
        write_pages(new[:NUM_PAGES], file)
    return file


def yardsticks(num_questions: int, num_others: int | None, pages: Path) -> tuple[Yardstick, ...]:
    """The tasks with so many items each; None: all that there are. pages: of `write_new_pages`."""
    most = 10**6 if num_others is None else num_others
    return (
        Yardstick(HELDOUT, num_questions, ("right", "stop_token"), max_new_tokens=96),
        Yardstick(PAGES, min(most, NUM_PAGES), ("bits", "num_bytes"), file=str(pages)),
        Yardstick(TEXT, min(most, 150), ("bits", "num_bytes")),
        Yardstick(COMPLETIONS, min(most, 200), ("right",), max_new_tokens=16),
        Yardstick(ARITHMETIC, min(most, 140), ("right",), max_new_tokens=8),
        Yardstick(ENDINGS, min(most, 150), ("right",)),
    )


# In words ------------------------------------------------------------------------------------------------------------


def shown(measure: Measure, own: Figure) -> str:
    """`97.9 % (96.4 to 98.9)`; of bits per byte `0.412 (0.400 to 0.425)`."""
    unit, digits = measure.unit, measure.digits
    after = " %" if unit > 1 else ""
    return f"{own.value * unit:.{digits}f}{after} ({own.low * unit:.{digits}f} to {own.high * unit:.{digits}f})"


def changed(measure: Measure, own: Figure) -> str:
    """`-3.1 points (-4.0 to -2.2)`."""
    unit, digits = measure.unit, measure.digits
    value, low, high = (_signed(edge * unit, digits) for edge in (own.value, own.low, own.high))
    return f"{value} {measure.unit_name} ({low} to {high})"


def of_seeds(measure: Measure, own: Figure) -> str:
    """`97.3 to 98.4`: from the lowest training seed to the highest."""
    low, high = (edge * measure.unit for edge in (min(own.by_seed), max(own.by_seed)))
    return f"{low:.{measure.digits}f} to {high:.{measure.digits}f}"


def _signed(value: float, digits: int) -> str:
    """With its sign, a true minus; what rounds to zero has none."""
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def all_figures(measures: Sequence[Measure], models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For the JSON: each measure of models that were trained alike, a seed each."""
    return {measure.name: asdict(measure.of(models)) for measure in measures}


def all_changes(
    measures: Sequence[Measure], before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """For the JSON: by how much each measure of `after` is more than that of `before`."""
    return {measure.name: asdict(measure.between(before, after)) for measure in measures}


# Expectations -------------------------------------------------------------------------------------------------------

Outcome = Literal["shown", "refuted", "open"]


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
