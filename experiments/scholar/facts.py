"""Facts of the Python standard library and the time-zone database, frozen into `facts.jsonl`.

All other modules read the frozen file, because errno messages, MIME types, HTTP phrases and time zones differ by
platform and by Python version.

A fact is one subject with one value, so that each question has one answer; what has two (a city name in two regions,
an exception with two bases, a name that two modules export) is left out. `group` names what must stay together when
facts are split: both facts of one city, a sum and the difference that undoes it, a letter and its HTML entity.
"""

import json
from dataclasses import dataclass
from pathlib import Path

FACTS_FILE = Path(__file__).parent / "facts.jsonl"


@dataclass(frozen=True, slots=True)
class Fact:
    """`value` answers the question of `family` about `subject`; `detail` (may be "") completes the family's second
    sentence about the subject; facts of one `group` are never split."""

    family: str
    subject: str
    value: str
    group: str
    detail: str = ""


def load_facts() -> list[Fact]:
    """The frozen facts, in the file's order."""
    return [Fact(**json.loads(line)) for line in FACTS_FILE.read_text(encoding="utf-8").splitlines()]
