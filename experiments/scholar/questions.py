"""Questions and ideal answers over the facts: `data/conversations.jsonl` (SFT) and `data/heldout.jsonl`.

Both are seeded. The facts are split by group, so that no fact of a held-out question occurs in SFT in any form: neither
asked, nor mentioned, nor as the other fact of the same place, sum or character. The `wording` of a held-out example is
"new" where the wording of its last question (or, of a persona, its system prompt) never occurs in SFT, else "seen".

`answers` of a held-out row are all that is accepted: the sentences that SFT teaches for that family, with the true
value (in the persona's manner; with the second sentence where more was asked for), and nothing looser.
"""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scholar.facts import Fact
from scholar.wording import fill, frames, named, say, wordings

SEED = 11
HELDOUT_SHARE = 0.5  # of the groups of facts

WordingKind = Literal["seen", "new"]
# How many conversations of each kind SFT has. `longer` ones ask for two sentences and count as single.
SFT_COUNTS = {"single": 200, "longer": 140, "multi": 400, "persona": 260}
# Exchanges of a `multi` conversation, drawn evenly. SFT's are longer, to show more in 1,000 conversations.
SFT_TURNS, HELDOUT_TURNS = (3, 4, 5, 6, 7, 8), (2, 2, 2, 3, 3, 4)
HELDOUT_COUNTS: dict[tuple[str, WordingKind], int] = {
    ("single", "seen"): 500, ("single", "new"): 600, ("longer", "seen"): 80, ("longer", "new"): 80,
    ("multi", "seen"): 200, ("multi", "new"): 140, ("persona", "seen"): 200, ("persona", "new"): 200,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question and every accepted answer to it; the first is the one that SFT shows."""

    fact: Fact
    question: str
    answers: tuple[str, ...]


def split_facts(facts: Sequence[Fact], seed: int = SEED) -> tuple[list[Fact], list[Fact]]:
    """(SFT facts, held-out facts); no group is in both."""
    groups = sorted({fact.group for fact in facts})
    heldout = set(random.Random(seed).sample(groups, round(len(groups) * HELDOUT_SHARE)))
    return [fact for fact in facts if fact.group not in heldout], [fact for fact in facts if fact.group in heldout]


def _frames(kind: str, wording: WordingKind) -> Sequence[str]:
    """Frames of one kind; SFT and the seen questions draw on those of the library and some more."""
    table = frames()
    if wording == "new":
        new: list[str] = table["questions_new"][kind]
        return new
    seen: list[str] = table["questions"][kind] + table["questions_more"][kind]
    return seen


# One exchange -----------------------------------------------------------------------------------------------------


def ask(fact: Fact, wording: WordingKind, rng: random.Random) -> Exchange:
    """A question that stands alone. A new wording has a new frame, a new question, or both."""
    table = wordings()[fact.family]
    new_frame, new_core = (
        rng.choice(((True, False), (False, True), (True, True))) if wording == "new" else (False, False)
    )
    framed: WordingKind = "new" if new_frame else "seen"
    if rng.random() < 0.5:
        core = say(rng.choice(table.questions_new if new_core else table.questions), fact)
        question = fill(rng.choice(_frames("direct", framed)), q=core, s=named(fact))
    else:
        core = say(rng.choice(table.clauses_new if new_core else table.clauses), fact)
        question = fill(rng.choice(_frames("embedded", framed)), c=core)
    return Exchange(fact, question, _answers(fact, rng))


def ask_longer(fact: Fact, wording: WordingKind, rng: random.Random) -> Exchange:
    """A question that asks for a second sentence; the fact has a detail."""
    table = wordings()[fact.family]
    frame = rng.choice(_frames("longer", wording))
    values = {"q": say(rng.choice(table.questions), fact), "c": say(rng.choice(table.clauses), fact)}
    detail = say(table.detail, fact)
    return Exchange(fact, fill(frame, **values), tuple(f"{answer} {detail}" for answer in _answers(fact, rng)))


def follow_up(fact: Fact, previous: Fact, wording: WordingKind, rng: random.Random) -> Exchange:
    """ "And Oslo?" after a question of the same family; "And the country?" after another fact of the same subject."""
    if fact.group == previous.group:
        question = fill(rng.choice(_frames("cross", wording)), n=wordings()[fact.family].noun)
    else:
        question = fill(rng.choice(_frames("follow", wording)), s=named(fact))
    return Exchange(fact, question, _answers(fact, rng))


def _answers(fact: Fact, rng: random.Random) -> tuple[str, ...]:
    forms = [say(pattern, fact) for pattern in wordings()[fact.family].taught]
    return tuple(rng.sample(forms, len(forms)))


# Conversations ----------------------------------------------------------------------------------------------------


class Draw:
    """Facts in a seeded order that favours small families (by the square root of their size), each family's facts in
    turn, so that none is drawn a second time before all others were."""

    def __init__(self, facts: Sequence[Fact], rng: random.Random):
        self.rng = rng
        self.by_family: dict[str, list[Fact]] = defaultdict(list)
        for fact in facts:
            self.by_family[fact.family].append(fact)
        self.queues: dict[str, list[Fact]] = {family: [] for family in self.by_family}
        self.weights = {family: len(facts) ** 0.5 for family, facts in self.by_family.items()}

    def any(self, families: Sequence[str] = ()) -> Fact:
        names = list(families) or sorted(self.by_family)
        return self.of(self.rng.choices(names, [self.weights[name] for name in names])[0])

    def of(self, family: str) -> Fact:
        if not self.queues[family]:
            facts = self.by_family[family]
            self.queues[family] = self.rng.sample(facts, len(facts))
        return self.queues[family].pop()

    def with_detail(self) -> Fact:
        families = [family for family in sorted(self.by_family) if wordings()[family].detail]
        while not (fact := self.any(families)).detail:
            pass
        return fact


def exchanges(
    draw: Draw, wording: WordingKind, kind: str, turns_of_multi: Sequence[int], rng: random.Random
) -> list[Exchange]:
    """One exchange, or several of which the last has the given wording."""
    if kind == "longer":
        return [ask_longer(draw.with_detail(), wording, rng)]
    if kind != "multi":
        return [ask(draw.any(), wording, rng)]
    num_turns = rng.choice(turns_of_multi)
    turns = [ask(draw.any(), "seen", rng)]
    while len(turns) < num_turns:
        last = len(turns) == num_turns - 1
        turns.append(_next_turn(turns[-1].fact, draw, wording if last else "seen", rng))
    return turns


def _next_turn(previous: Fact, draw: Draw, wording: WordingKind, rng: random.Random) -> Exchange:
    others = [f for facts in draw.by_family.values() for f in facts if f.group == previous.group and f != previous]
    chance = rng.random()
    if others and previous.family in ("region", "country") and chance < 0.4:
        return follow_up(others[0], previous, wording, rng)
    if chance < 0.75:
        while (fact := draw.of(previous.family)).group == previous.group:
            pass
        return follow_up(fact, previous, wording, rng)
    return ask(draw.any(), wording, rng)


def converse(
    draw: Draw, kind: str, wording: WordingKind, turns_of_multi: Sequence[int], rng: random.Random
) -> tuple[list[dict[str, str]], Exchange]:
    """A conversation's messages, ideal answers included, and its last exchange (in the persona's manner)."""
    messages: list[dict[str, str]] = []
    manner = "$a"
    if kind == "persona":
        persona = frames()["personas"][rng.choice(sorted(frames()["personas"]))]
        manner = persona["answer"]
        new_system = wording == "new" and rng.random() < 0.6
        messages.append({"role": "system", "content": rng.choice(persona["systems_new" if new_system else "systems"])})
        wording = "seen" if new_system else wording
        turns = exchanges(draw, wording, "multi" if rng.random() < 0.2 else "single", turns_of_multi, rng)
    else:
        turns = exchanges(draw, wording, kind, turns_of_multi, rng)
        if rng.random() < 0.15:
            messages.append({"role": "system", "content": rng.choice(frames()["neutral_systems"])})
    for turn in turns:
        answers = tuple(dict.fromkeys(fill(manner, a=answer, v=turn.fact.value) for answer in turn.answers))
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": answers[0]})
    return messages, Exchange(turns[-1].fact, turns[-1].question, answers)


def sft_rows(facts: Sequence[Fact], seed: int = SEED) -> list[dict[str, Any]]:
    """Rows of `conversations.jsonl`, over the SFT facts only."""
    rng = random.Random(f"SFT {seed}")
    draw = Draw(split_facts(facts, seed)[0], rng)
    rows = [
        {"messages": converse(draw, kind, "seen", SFT_TURNS, rng)[0]}
        for kind, count in SFT_COUNTS.items()
        for _ in range(count)
    ]
    return rng.sample(rows, len(rows))


def heldout_rows(facts: Sequence[Fact], seed: int = SEED) -> list[dict[str, Any]]:
    """Rows of `heldout.jsonl`, over the held-out facts only."""
    rng = random.Random(f"held out {seed}")
    draw = Draw(split_facts(facts, seed)[1], rng)
    rows: dict[str, dict[str, Any]] = {}  # by what is asked: no two rows ask the same
    for (kind, wording), count in HELDOUT_COUNTS.items():
        wanted = len(rows) + count
        while len(rows) < wanted:
            messages, last = converse(draw, kind, wording, HELDOUT_TURNS, rng)
            row = {"messages": messages, "answers": list(last.answers), "family": last.fact.family}
            asked = json.dumps([m["content"] for m in messages if m["role"] != "assistant"])
            rows.setdefault(asked, row | {"wording": wording, "kind": "single" if kind == "longer" else kind})
    return rng.sample(list(rows.values()), len(rows))
