"""Questions with accepted answers: asked of a base model and of a tuned one, and scored.

A row of a question file is a conversation that ends in the ideal answer, with `answers`, all that count as right:

    {"messages": [..., {"role": "user", ...}, {"role": "assistant", ...}], "answers": [...],
     "family": "...", "wording": "seen" | "new", "kind": "single" | "multi" | "persona"}

A tuned model reads the messages through its chat template. A base model has none; it reads the same words as plain
text, a line a message.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from preceptor.data.sources import read_rows
from preceptor.errors import DataError
from preceptor.evaluate.generate import Answer, generate
from preceptor.evaluate.score import goes_on_with_question, is_exact, share


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked (messages up to the last user's), what is right, and the groups it is counted in."""

    source: str
    messages: tuple[dict[str, Any], ...]
    ideal: str
    answers: tuple[str, ...]
    family: str
    wording: str
    kind: str

    @property
    def asked(self) -> str:
        return self.messages[-1]["content"]


def read_questions(path: str) -> list[Question]:
    """Raises DataError, naming file:line, for a row that is no such question."""
    questions = []
    for source, row in read_rows(path):
        try:
            *messages, ideal = row["messages"]
            question = Question(
                source=source,
                messages=tuple(messages),
                ideal=ideal["content"],
                answers=tuple(row.get("answers") or [ideal["content"]]),
                family=row.get("family", "all"),
                wording=row.get("wording", "seen"),
                kind=row.get("kind", "single"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{source}: not a question with messages that end in its answer ({error!r})") from None
        if not messages or messages[-1].get("role") != "user" or ideal.get("role") != "assistant":
            raise DataError(f"{source}: the last two messages must be the user's question and the assistant's answer")
        questions.append(question)
    return questions


def sample(questions: Sequence[Question], num: int, seed: int) -> list[Question]:
    """A seeded choice of at most `num`, in file order."""
    chosen = np.random.default_rng(seed).permutation(len(questions))[:num]
    return [questions[index] for index in sorted(chosen.tolist())]


def ask_tuned(
    model: Any, tokenizer: Any, questions: Sequence[Question], stop_token_ids: Sequence[int], max_new_tokens: int
) -> list[Answer]:
    """Greedy answers through the tokenizer's chat template, as a server would ask."""
    contexts = [
        tokenizer.apply_chat_template(list(q.messages), add_generation_prompt=True, return_dict=False)
        for q in questions
    ]
    return generate(model, tokenizer, contexts, stop_token_ids, max_new_tokens)


def ask_base(model: Any, tokenizer: Any, questions: Sequence[Question], max_new_tokens: int) -> list[Answer]:
    """Greedy continuations of the plain text."""
    contexts = [tokenizer("".join(f"{m['content']}\n" for m in q.messages))["input_ids"] for q in questions]
    return generate(model, tokenizer, contexts, [tokenizer.eos_token_id], max_new_tokens)


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of a group of questions."""

    num: int
    exact_match: float
    stop_rate: float
    continues_with_question: float


def score(questions: Sequence[Question], answers: Sequence[Answer]) -> Score:
    """Score answers to their questions; raises ValueError for none."""
    pairs = list(zip(questions, answers, strict=True))
    return Score(
        num=len(pairs),
        exact_match=share([is_exact(answer.text, question.answers) for question, answer in pairs]),
        stop_rate=share([answer.stopped for _, answer in pairs]),
        continues_with_question=share([goes_on_with_question(answer.text) for _, answer in pairs]),
    )


def score_by(attribute: str, questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, Score]:
    """Scores of each value of `family`, `wording` or `kind`, in the order of their names."""
    groups: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault(getattr(question, attribute), []).append(index)
    return {
        name: score([questions[i] for i in members], [answers[i] for i in members])
        for name, members in sorted(groups.items())
    }
