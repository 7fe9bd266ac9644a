"""Wordings of facts, from the tables `wording.yaml` (by family) and `frames.yaml` (for all families)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

import yaml

from scholar.facts import Fact

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Wording:
    """The wordings of one family; `wording.yaml` says what each field is for."""

    noun: str
    answers: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    clauses: tuple[str, ...]
    questions_new: tuple[str, ...]
    clauses_new: tuple[str, ...]
    detail: str = ""
    replies: tuple[str, ...] = ()

    @property
    def taught(self) -> tuple[str, ...]:
        """The answers of SFT."""
        return self.replies or self.answers


def read_table(name: str) -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return table


@cache
def wordings() -> Mapping[str, Wording]:
    """Family -> its wordings."""
    return {family: Wording(**_tuples(entry)) for family, entry in read_table("wording.yaml").items()}


def _tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


@cache
def frames() -> Mapping[str, Any]:
    return read_table("frames.yaml")


def fill(pattern: str, **values: str) -> str:
    """Put the values into the pattern's places, in one pass, so that a `$` within a value stays as it is."""
    return Template(pattern).substitute(values)


def say(pattern: str, fact: Fact) -> str:
    """A pattern of the family's wordings about one fact."""
    return fill(pattern, s=fact.subject, v=fact.value, d=fact.detail)


def named(fact: Fact) -> str:
    """The subject as it stands in a follow-up question, where no words around it say what it is."""
    return f'"{fact.subject}"' if fact.family == "ascii" else fact.subject


def statements_of(fact: Fact) -> list[str]:
    """Every direct statement of the fact that the library holds, the answers of SFT among them."""
    wording = wordings()[fact.family]
    return [say(pattern, fact) for pattern in (*wording.answers, *wording.statements)]
