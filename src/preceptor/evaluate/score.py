"""Rules that decide whether a generated answer is right.

    exact      the answer equals an accepted text; whitespace around it is ignored
    contains   the answer contains an accepted text
    regex      an accepted pattern is found in the answer (Python's `re.search`)
    numeric    the last number of the answer equals an accepted one as a decimal: 1,000.0 is 1000, "5 - 3 = 2" is 2

Of an answer with reasoning, only what follows the last `</think>` counts.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Literal

OFTEN_EQUAL = 0.5  # share of the prompts that get one answer

Match = Literal["exact", "contains", "regex", "numeric"]

# A sign counts where no digit or bracket stands before it: in "10-5" it is a minus between two numbers.
_SIGN = r"(?:(?<![\d)\]])[-−])?"
_NUMBER = re.compile(rf"{_SIGN}(?:(?<!\d)(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)")


def is_right(text: str, match: Match, accepted: Sequence[str]) -> bool:
    """Whether an answer is right."""
    return MATCHES[match](text.rpartition("</think>")[2], accepted)


def is_exact(text: str, accepted: Sequence[str]) -> bool:
    """Whether an answer equals an accepted one; whitespace around it is ignored."""
    return text.strip() in {answer.strip() for answer in accepted}


def _contains(text: str, accepted: Sequence[str]) -> bool:
    return any(answer in text for answer in accepted)


def _found(text: str, accepted: Sequence[str]) -> bool:
    return any(re.search(pattern, text) for pattern in accepted)


def _equal(text: str, accepted: Sequence[str]) -> bool:
    found = last_number(text)
    return found is not None and any(found == last_number(answer) for answer in accepted)


MATCHES: Mapping[Match, Callable[[str, Sequence[str]], bool]] = {
    "exact": is_exact,
    "contains": _contains,
    "regex": _found,
    "numeric": _equal,
}


def last_number(text: str) -> Decimal | None:
    """The last number in digits of a text; None if there is none."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


def is_number(text: str) -> bool:
    """Whether a text is one number and nothing else."""
    return _NUMBER.fullmatch(text.strip()) is not None


def repeated_answer(answers: Iterable[tuple[str, Sequence[str]]]) -> tuple[str, int] | None:
    """The answer that most prompts get although they ask for different ones, and how many do; None if there is none.

    answers: of each prompt, with the accepted texts.
    """
    given = [(text.strip(), tuple(accepted)) for text, accepted in answers]
    counts = Counter(text for text, _ in given if text)
    if not counts:
        return None
    answer, count = counts.most_common(1)[0]
    wanted = {accepted for text, accepted in given if text == answer}
    return (answer, count) if count > max(1, OFTEN_EQUAL * len(given)) and len(wanted) > 1 else None


def repeated_line(answer: str, count: int, num_prompts: int) -> str:
    """`repeated_answer` in a sentence."""
    which = f"All {count}" if count == num_prompts else f"{count} of {num_prompts}"
    shown = answer if len(answer) <= 60 else answer[:57] + "..."
    return f"{which} prompts got the same answer: “{shown}”."
