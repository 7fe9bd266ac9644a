"""Rows of a prompt and its answer, each a text, and the messages that they become."""

from collections.abc import Sequence
from typing import Any

from preceptor.data.reading.values import Row, Unreadable, parsed, short, text_in

PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("prompt", "response"),
)
# What may belong to a question that is asked of a pair's first key; training without it would teach to guess.
PARTS_OF_A_QUESTION = ("input", "history", "context", "passage", "document", "documents", "choices", "options")


def pair_of(keys: Sequence[str]) -> tuple[str, str] | None:
    """The two keys of a prompt and its answer, if there are any. Raises Unreadable if two pairs fit."""
    fitting = [pair for pair in PAIRS if pair[0] in keys and pair[1] in keys]
    if len(fitting) > 1:
        names = ", or ".join(" and ".join(pair) for pair in fitting)
        raise Unreadable("ambiguous_format", f"the row can be read as {names}; say which with `columns`")
    return fitting[0] if fitting else None


def check_whole(row: Row, pair: tuple[str, str]) -> None:
    """Raises Unreadable for a key that the question may need and that this pair does not read."""
    for key in PARTS_OF_A_QUESTION:
        if row.get(key) and not (pair[0] == "instruction" and key in ("input", "history")):
            raise Unreadable(
                "unread_column",
                f"the row has {key!r}, which {' and '.join(pair)} leave out; make it part of the question, or set "
                f"`columns: {{{pair[0]}: {pair[0]}, {pair[1]}: {pair[1]}}}` to read these alone",
            )


def pair_messages(row: Row, pair: tuple[str, str]) -> list[dict[str, Any]]:
    """A prompt and its answer as messages.

    Alpaca's `input`, where it is not blank, follows the instruction after a blank line; `history` is a list of earlier
    [instruction, answer] pairs, trained like the last. Raises Unreadable for what is no text.
    """
    if pair[0] == "prompt" and isinstance(row["prompt"], list):
        return [*row["prompt"], {"role": "assistant", "content": text_in(row, "response")}]
    exchanges, question = [], text_in(row, pair[0])
    if pair[0] == "instruction":
        exchanges = _history(row.get("history"))
        if text_in(row, "input").strip():
            question = f"{question}\n\n{row['input']}" if question.strip() else row["input"]
    answer = text_in(row, pair[1])
    for key, text, code in ((pair[0], question, "empty_prompt"), (pair[1], answer, "empty_answer")):
        if not text.strip():
            raise Unreadable(code, f"{key} is empty")
    return [
        {"role": role, "content": content}
        for exchange in [*exchanges, (question, answer)]
        for role, content in zip(("user", "assistant"), exchange, strict=True)
    ]


def _history(value: Any) -> list[tuple[str, str]]:
    value = parsed(value) or []
    if isinstance(value, list) and all(
        isinstance(pair, list) and [type(t) for t in pair] == [str, str] for pair in value
    ):
        return [(asked, said) for asked, said in value]
    raise Unreadable("bad_history", f"history is {short(value)}; it must be a list of [instruction, answer] pairs")
