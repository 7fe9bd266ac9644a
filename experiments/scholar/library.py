"""The library: the plain text that the scholar is pretrained on, as JSON lines `{"text": ...}`, one per "web page".

About 25 MB, written in seconds, and always the same, because it is seeded. Every fact occurs equally often on each kind
of page:

- *almanac* and *notes*: direct statements, of one family or of all;
- *profiles*: the same fact stated two or three times in a row, each time in other words, so that the model learns to
  carry a subject from one sentence into the next, as an answer does with the subject of its question;
- *letters*: indirect questions with an answer that points back ("Readers ask which region Nassau belongs to. It is
  America."). Knowledge that is only stated cannot be drawn out by a question later: without these pages a trial
  drew out 38 % of what the model knew, with them 97 % (compare Allen-Zhu and Li, "Physics of Language Models",
  part 3.1). No question is ever answered directly, so the base model still answers none;
- *dictations*: a subject is named and, further on, named again: no facts, but practice in carrying any name from one
  line to the next, also where a name much like it stands between;
- *quizzes*: bare questions and nothing else, so that the base model, asked a question, asks more;
- *stories*: ordinary connected text, of which other seeds make the held-out portion.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from scholar.facts import Fact
from scholar.prose import names, story
from scholar.wording import fill, frames, named, say, statements_of, wordings

SEED = 7
# How often each fact occurs on each kind of page, and how many stories there are; about 7 M tokens together.
ALMANAC_PASSES, NOTES_PASSES, PROFILES_PASSES, LETTERS_PASSES, QUIZ_PASSES, NUM_STORIES = 5, 6, 12, 36, 10, 5000
# Further profiles and letters on which alphabetical neighbours (SyntaxError, SyntaxWarning) stand side by side.
NEIGHBOUR_PROFILES_PASSES, NEIGHBOUR_LETTERS_PASSES, DICTATION_PASSES = 2, 6, 30
# Subjects that are numbers share their digits with all others and are told apart late, so they occur more often.
NUMBER_FAMILIES = {"addition", "ascii", "day_of_year", "hex", "http", "roman", "subtraction"}
NUMBER_PROFILES_PASSES, NUMBER_LETTERS_PASSES = 5, 16
NUM_HELDOUT_STORIES = 150

OTHER_NOUN = {"region": "country", "country": "region"}  # what the detail of a place is

Page = Callable[[Sequence[Fact], random.Random], str]


def almanac(facts: Sequence[Fact], rng: random.Random) -> str:
    return "\n".join([_head(facts, rng), *(_statement(fact, rng) for fact in facts)])


def notes(facts: Sequence[Fact], rng: random.Random) -> str:
    text = " ".join(_statement(fact, rng) for fact in facts)
    return f"{_head(facts, rng)}\n{text}" if rng.random() < 0.5 else text


def _head(facts: Sequence[Fact], rng: random.Random) -> str:
    """A heading, or the page's subjects in order: names to be found again further down, as in a question's answer."""
    library = frames()["library"]
    heading: str = rng.choice(library["headings"])
    listed = f"{rng.choice(library['contents'])}: {', '.join(named(fact) for fact in facts)}"
    return rng.choice((heading, listed))


def profiles(facts: Sequence[Fact], rng: random.Random) -> str:
    """Each fact two or three times in a row, in different words, on one line or on several."""
    between = rng.choice((" ", "\n"))
    stated = [between.join(rng.sample(statements_of(fact), rng.choice((2, 3)))) for fact in facts]
    return rng.choice((" ", "\n")).join(stated)


def _statement(fact: Fact, rng: random.Random) -> str:
    return rng.choice(statements_of(fact)) + _detail(fact, rng)


def _detail(fact: Fact, rng: random.Random, share: float = 0.25) -> str:
    """The family's second sentence, with a space before it, at a `share` of the calls."""
    detail = wordings()[fact.family].detail
    return f" {say(detail, fact)}" if detail and fact.detail and rng.random() < share else ""


def letters(facts: Sequence[Fact], rng: random.Random) -> str:
    """Indirect questions and their answers; neighbours of one family sometimes as a further question of the same.

    At times a page tells first who answers, and each answer is in that persona's manner.
    """
    library = frames()["library"]
    role = rng.choice(sorted(frames()["personas"])) if rng.random() < 0.2 else None
    between = rng.choice(library["replies"])
    lines = [rng.choice(library["headings"])] if rng.random() < 0.3 else []
    if role:
        lines = [fill(rng.choice(library["roles"]), r=role)]
    previous = None
    for fact in facts:
        if previous == fact.family and rng.random() < 0.4:
            lines.append(_asked(rng.choice(library["further"]), fact, role, between, rng))
        else:
            longer = bool(fact.detail) and rng.random() < 0.25
            (kind,) = ("indirect",) if role else rng.choices(("indirect", "reported", "told"), (75, 10, 15))
            lines.append(_asked(rng.choice(library["longer" if longer else kind]), fact, role, between, rng, longer))
        previous = fact.family
    return "\n".join(lines)


def _asked(frame: str, fact: Fact, role: str | None, between: str, rng: random.Random, longer: bool = False) -> str:
    """An indirect question and its answer in one frame; at times an aside stands between the two."""
    wording, library = wordings()[fact.family], frames()["library"]
    answer = say(rng.choice(wording.answers), fact) + _detail(fact, rng, share=1.0 if longer else 0.05)
    if role:
        point = fill(frames()["personas"][role]["answer"], v=fact.value, a=answer)
    else:
        point = answer if longer else fill(rng.choice(library["points"]), v=fact.value, n=wording.noun, a=answer)
        if rng.random() < 0.1:
            point = f"{rng.choice(library['asides'])} {point}"
    first, second = rng.sample(names(), 2)
    clause = say(rng.choice((*wording.clauses, *wording.clauses_new)), fact)
    values = {"c": clause, "s": named(fact), "v": fact.value, "a": answer, "A": first, "B": second}
    asked = fill(frame.replace(" $p", f"{between}$p"), p=point, **values)
    if fact.family in OTHER_NOUN and fact.detail and rng.random() < 0.15:
        asked += " " + fill(rng.choice(library["other"]), o=OTHER_NOUN[fact.family], d=fact.detail)
    return asked


def dictations(facts: Sequence[Fact], rng: random.Random) -> str:
    """Each subject is named and named again, beside another of the page."""
    library = frames()["library"]
    between = rng.choice(library["replies"])
    lines = []
    for fact, other in zip(facts, [*facts[1:], facts[0]], strict=True):
        frame = rng.choice(library["dictations"]).replace(" $p", between)
        first, second = rng.sample(names(), 2)
        lines.append(fill(frame, s=named(fact), t=named(other), A=first, B=second))
    return "\n".join(lines)


def quiz(facts: Sequence[Fact], rng: random.Random) -> str:
    """Bare questions; sometimes under a heading, sometimes all on one line."""
    library = frames()["library"]
    lines = [rng.choice(library["quiz_headings"])] if rng.random() < 0.2 else []
    if not lines and rng.random() < 0.2:
        lines = [fill(rng.choice(library["quiz_roles"]), r=rng.choice(sorted(frames()["personas"])))]
    previous = None
    for fact in facts:
        lines.append(bare_question(fact, rng, follows=previous == fact.family))
        previous = fact.family
    return (" " if rng.random() < 0.1 else "\n").join(lines)


def bare_question(fact: Fact, rng: random.Random, follows: bool = False) -> str:
    wording = wordings()[fact.family]
    asked = frames()["questions_new" if rng.random() < 0.3 else "questions"]
    if follows and rng.random() < 0.3:
        return fill(rng.choice(_asking(asked["follow"], rng)), s=named(fact))
    if rng.random() < 0.7:
        question = say(rng.choice((*wording.questions, *wording.questions_new)), fact)
        return fill(rng.choice(_asking(asked["direct"], rng)), q=question)
    clause = say(rng.choice((*wording.clauses, *wording.clauses_new)), fact)
    return fill(rng.choice(_asking(asked["embedded"], rng)), c=clause)


def _asking(patterns: Sequence[str], rng: random.Random) -> Sequence[str]:
    """Mostly those that end in a question mark, since a quiz asks more often than it requests."""
    marked = [pattern for pattern in patterns if pattern.endswith(("?", "$q"))]
    return marked if rng.random() < 0.6 else patterns


Order = Callable[[Fact], tuple[str, ...]]


def mixed(fact: Fact) -> tuple[str, ...]:
    return ()


def by_family(fact: Fact) -> tuple[str, ...]:
    return (fact.family,)


def by_name(fact: Fact) -> tuple[str, ...]:
    return (fact.family, fact.subject)


def _pages(make: Page, facts: Sequence[Fact], passes: int, order: Order, rng: random.Random) -> Iterator[str]:
    """Pages of 2 to 7 facts that go through all facts `passes` times, shuffled and then sorted by `order`."""
    for _ in range(passes):
        ordered = sorted(rng.sample(facts, len(facts)), key=order)
        start = 0
        while start < len(ordered):
            size = rng.randint(2, 7)
            yield make(ordered[start : start + size], rng)
            start += size


def library(facts: Sequence[Fact], seed: int = SEED) -> list[str]:
    """All pages in a seeded order."""
    rng = random.Random(seed)
    pages = [story(rng) for _ in range(NUM_STORIES)]
    numbers = [fact for fact in facts if fact.family in NUMBER_FAMILIES]
    plan: list[tuple[Page, Sequence[Fact], int, Order]] = [
        (almanac, facts, ALMANAC_PASSES, by_family),
        (notes, facts, NOTES_PASSES, mixed),
        (profiles, facts, PROFILES_PASSES, mixed),
        (profiles, numbers, NUMBER_PROFILES_PASSES, mixed),
        (letters, facts, LETTERS_PASSES // 2, by_family),
        (letters, facts, LETTERS_PASSES // 2, mixed),
        (letters, numbers, NUMBER_LETTERS_PASSES, mixed),
        (profiles, facts, NEIGHBOUR_PROFILES_PASSES, by_name),
        (letters, facts, NEIGHBOUR_LETTERS_PASSES, by_name),
        (dictations, facts, DICTATION_PASSES // 2, by_name),
        (dictations, facts, DICTATION_PASSES // 2, mixed),
        (quiz, facts, QUIZ_PASSES // 2, by_family),
        (quiz, facts, QUIZ_PASSES // 2, mixed),
    ]
    for make, about, passes, order in plan:
        pages += _pages(make, about, passes, order, rng)
    rng.shuffle(pages)
    return pages


def heldout_stories(seed: int = SEED) -> list[str]:
    """Stories that the library does not hold, for bits per byte."""
    known = set(library((), seed))
    rng = random.Random(f"held out {seed}")
    return [page for page in (story(rng) for _ in range(NUM_HELDOUT_STORIES)) if page not in known]


def write_pages(pages: Iterable[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": page}, ensure_ascii=False) + "\n" for page in pages), encoding="utf-8")
