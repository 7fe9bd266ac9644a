"""Stories: ordinary connected text, on which a tuned model can show what it forgot.

A seeded grammar over the themes of `prose.yaml`. A story takes the steps of one theme in order; whoever and whatever
it names first (two people, a place, a thing, the weather) it keeps to the last sentence, so that there is something
to predict over its whole length.
"""

import random
from functools import cache
from typing import Any

from scholar.wording import fill, read_table


@cache
def _tables() -> dict[str, Any]:
    return read_table("prose.yaml")


def names() -> list[str]:
    """Names of people."""
    people: list[str] = _tables()["names"]
    return people


def story(rng: random.Random) -> str:
    """One story of two or three paragraphs, about 150 words."""
    tables = _tables()
    theme = tables["themes"][rng.choice(sorted(tables["themes"]))]
    first, second = rng.sample(tables["names"], 2)
    calling, other_calling = rng.sample(tables["callings"], 2)
    cast = {"A": first, "B": second, "a": calling, "b": other_calling}
    cast |= {"weather": rng.choice(tables["weather"]), "mood": rng.choice(tables["moods"])}
    cast |= {"thing": rng.choice(theme["things"]), "place": rng.choice(theme["places"])}
    cast["time"] = rng.choice(tables["times"])
    # A step is left out now and then, never the first: it names everything that the others refer to.
    steps = [step for index, step in enumerate(theme["steps"]) if index == 0 or rng.random() < 0.9]
    sentences = [fill(rng.choice(step), **cast) for step in steps]
    sentences = [sentence[0].upper() + sentence[1:] for sentence in sentences]
    num_paragraphs = rng.choice((2, 3))
    size = -(-len(sentences) // num_paragraphs)
    return "\n".join(" ".join(sentences[start : start + size]) for start in range(0, len(sentences), size))
