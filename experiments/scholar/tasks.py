"""Tasks that the base model can do and SFT may harm: `scholar:NAME` of `preceptor eval` and `compare`.

All are seeded, and plain text to be continued, as the library has it and SFT never does, about facts that no SFT
conversation mentions:

- `completions`: a statement of the library up to its value, which must come next; every family but the sums;
- `arithmetic`: the same of sums and differences, read as numbers;
- `choices`: the true value among three others of its family, by likelihood;
- `endings`: the sentence that goes on a held-out story, among sentences that go on others, by likelihood.

`heldout` (questions.py) asks for facts as SFT taught to answer; `library_heldout` (library.py) is text for perplexity.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from scholar.facts import Fact, load_facts
from scholar.library import heldout_stories
from scholar.questions import split_facts
from scholar.wording import say, wordings

SEED = 23
SUMS = ("addition", "subtraction")
NUM_COMPLETIONS, NUM_CHOICES, NUM_WRONG = 400, 400, 3


def completions(facts: Sequence[Fact]) -> Iterator[dict[str, Any]]:
    """As many of each family as there are, at most an even share."""
    rng = random.Random(f"completions {SEED}")
    for fact in even(facts, NUM_COMPLETIONS, rng):
        prompt, _ = cut(fact, rng)
        accepted = [rf"\A\s*{re.escape(fact.value)}(?!\w)"]
        yield {"prompt": prompt, "accepted": accepted, "match": "regex", "until": ["\n"], "family": fact.family}


def arithmetic(facts: Sequence[Fact]) -> Iterator[dict[str, Any]]:
    """Every sum and difference once; the answer ends with its sentence, so that its last number is its first."""
    rng = random.Random(f"arithmetic {SEED}")
    for fact in facts:
        prompt, _ = cut(fact, rng)
        row = {"prompt": prompt, "accepted": [fact.value], "match": "numeric", "until": [".", "\n", " is left"]}
        yield {**row, "family": fact.family}


def choices(facts: Sequence[Fact], known: Sequence[Fact]) -> Iterator[dict[str, Any]]:
    """The wrong values are those of other `known` facts of the family; families of too few values are left out."""
    rng = random.Random(f"choices {SEED}")
    values = {family: sorted({f.value for f in known if f.family == family}) for family in wordings()}
    for fact in even([f for f in facts if len(values[f.family]) > NUM_WRONG], NUM_CHOICES, rng):
        prompt, rest = cut(fact, rng)
        wrong = rng.sample([value for value in values[fact.family] if value != fact.value], NUM_WRONG)
        options = rng.sample([fact.value, *wrong], NUM_WRONG + 1)
        yield {
            "prompt": prompt,
            "choices": [f" {value}{rest}" for value in options],
            "answer": options.index(fact.value),
            "family": fact.family,
        }


def endings(stories: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A story up to its last paragraph, whose first sentence must be told from those of other stories."""
    rng = random.Random(f"endings {SEED}")
    parts = [story.rpartition("\n")[::2] for story in stories]
    firsts = [re.split(r"(?<=[.!?\"]) (?=[A-Z\"])", last)[0] for _, last in parts]
    for index, (before, _) in enumerate(parts):
        others = sorted(set(firsts) - {firsts[index]})
        options = rng.sample([firsts[index], *rng.sample(others, NUM_WRONG)], NUM_WRONG + 1)
        yield {"prompt": f"{before}\n", "choices": options, "answer": options.index(firsts[index])}


def cut(fact: Fact, rng: random.Random) -> tuple[str, str]:
    """A statement of the library, which SFT never makes, before its value, without the space, and after it."""
    statements = [
        pattern for pattern in wordings()[fact.family].statements if 0 <= pattern.find("$s") < _value(pattern)
    ]
    pattern = rng.choice(statements)
    before, after = pattern[: _value(pattern)], pattern[_value(pattern) + 2 :]
    return say(before, fact).rstrip(), say(after, fact)


def _value(pattern: str) -> int:
    return pattern.find("$v")


def even(facts: Sequence[Fact], num: int, rng: random.Random) -> list[Fact]:
    """About `num` facts in a seeded order: of each family the same number, or all that it has."""
    by_family: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_family[fact.family].append(fact)
    left, chosen = num, []
    for place, family in enumerate(sorted(by_family, key=lambda name: len(by_family[name]))):
        share = left // (len(by_family) - place)
        drawn = rng.sample(by_family[family], min(share, len(by_family[family])))
        chosen += drawn
        left -= len(drawn)
    return rng.sample(chosen, len(chosen))


def tasks() -> dict[str, list[dict[str, Any]]]:
    """File name -> its rows."""
    known = load_facts()
    facts = split_facts(known)[1]
    other, sums = ([f for f in facts if (f.family in SUMS) == wanted] for wanted in (False, True))
    return {
        "completions.jsonl": list(completions(other)),
        "arithmetic.jsonl": list(arithmetic(sums)),
        "choices.jsonl": list(choices(facts, known)),
        "endings.jsonl": list(endings(heldout_stories())),
    }
