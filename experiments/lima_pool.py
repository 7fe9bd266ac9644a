"""The pool of the LIMA curve: good, useless and redundant conversations, as in real data.

    python experiments/lima_pool.py --out runs/lima_curve/pool.jsonl

Seeded. The key `planted` of an example says what it is; neither selection nor training reads it:

    good          the 1,000 conversations that ship with the package, over facts that no held-out question asks
    exact, near   copies of good rows: letter for letter, or with another greeting round the first question
    narrow        single questions of one family alone, asked and answered well
    wrong         the answer names another fact's value; nothing else shows that it is wrong
    garbled       the letters within the answer's words are shuffled
    boilerplate   the answer refuses, or says nothing in many words
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preceptor.scholar import data_file
from scholar.facts import Fact, load_facts
from scholar.questions import Draw, ask, split_facts

SEED = 5
NARROW_FAMILY = "country_code"
COUNTS = {"exact": 500, "near": 300, "narrow": 1000, "wrong": 400, "garbled": 400, "boilerplate": 400}
GREETINGS = ("Hello!", "Hi there.", "Good day.", "Excuse me.", "One more thing.", "Quick question.")
BOILERPLATE = (
    "As an AI language model, I do not have access to that information.",
    "I'm sorry, but I can't help with that.",
    "I am not able to answer this question. Let me know if you have any other questions!",
    "That is a great question! There are many sides to it, and it is important to note that opinions differ.",
    "I cannot provide an answer to that. I hope this helps!",
    "It depends. Feel free to ask me anything else.",
)

Row = dict[str, Any]


def make_pool(seed: int = SEED) -> list[Row]:
    """All rows, in an order drawn from `seed`."""
    rng = random.Random(f"lima pool {seed}")
    lines = data_file("conversations.jsonl").read_text(encoding="utf-8").splitlines()
    good = [json.loads(line)["messages"] for line in lines]
    rows = [_row(messages, "good") for messages in good]
    rows += [_row(rng.choice(good), "exact") for _ in range(COUNTS["exact"])]
    longer = [messages for messages in good if sum(len(m["content"].split()) for m in messages) >= 60]
    rows += [_row(_greeted(rng.choice(longer), rng), "near") for _ in range(COUNTS["near"])]
    rows += narrow_rows(COUNTS["narrow"], seed)
    facts = split_facts(load_facts())[0]
    draw = Draw(facts, rng)
    for kind in ("wrong", "garbled", "boilerplate"):
        rows += [_row(_spoilt(kind, facts, draw, rng), kind) for _ in range(COUNTS[kind])]
    return rng.sample(rows, len(rows))


def narrow_rows(num: int, seed: int = SEED) -> list[Row]:
    """Good single questions of one family, over its facts that SFT may use, in every wording that SFT has."""
    rng = random.Random(f"narrow {seed}")
    draw = Draw(split_facts(load_facts())[0], rng)
    rows: dict[str, Row] = {}  # no question twice with the same answer
    while len(rows) < num:
        exchange = ask(draw.of(NARROW_FAMILY), "seen", rng)
        messages = _exchange(exchange.question, exchange.answers[0])
        rows.setdefault(json.dumps(messages), _row(messages, "narrow"))
    return list(rows.values())


def _row(messages: Sequence[dict[str, str]], planted: str) -> Row:
    return {"messages": list(messages), "planted": planted}


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _greeted(messages: Sequence[dict[str, str]], rng: random.Random) -> list[dict[str, str]]:
    first = next(index for index, message in enumerate(messages) if message["role"] == "user")
    greeted = {"role": "user", "content": f"{rng.choice(GREETINGS)} {messages[first]['content']}"}
    return [*messages[:first], greeted, *messages[first + 1 :]]


def _spoilt(kind: str, facts: Sequence[Fact], draw: Draw, rng: random.Random) -> list[dict[str, str]]:
    """A single question with a useless answer."""
    exchange = ask(draw.any(), "seen", rng)
    fact, answer = exchange.fact, exchange.answers[0]
    if kind == "wrong":
        others = [f.value for f in facts if f.family == fact.family and f.value != fact.value]
        answer = answer.replace(fact.value, rng.choice(others))
    elif kind == "garbled":
        answer = " ".join("".join(rng.sample(word, len(word))) for word in answer.split())
    else:
        answer = rng.choice(BOILERPLATE)
    return _exchange(exchange.question, answer)


def write_pool(rows: Sequence[Row], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lima_curve/pool.jsonl"))
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    made = make_pool(arguments.seed)
    write_pool(made, arguments.out)
    print(f"{len(made):,} rows -> {arguments.out}")
