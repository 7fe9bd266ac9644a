"""What is asked of a generated text: whether it is right to the letter, and whether it goes on with a question."""

from collections.abc import Sequence


def is_exact(text: str, accepted: Sequence[str]) -> bool:
    """Whether a generated answer is one of the accepted ones, letter for letter; only space around it is ignored."""
    return text.strip() in {answer.strip() for answer in accepted}


def goes_on_with_question(text: str) -> bool:
    """Whether a continuation's first line that is not blank is a question: what a base model does to a question."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return first.endswith("?")


def share(hits: Sequence[bool]) -> float:
    """Share of true values; raises ValueError for none at all, since 0/0 is no result."""
    if not hits:
        raise ValueError("a share of nothing")
    return sum(hits) / len(hits)
