"""Whether a generated answer is right: exact, contains, regex, numeric.

    exact      the answer is an accepted text, letter for letter; only space around it is ignored
    contains   an accepted text occurs in the answer, letter for letter
    regex      an accepted pattern is found in the answer (Python's `re`, `search`)
    numeric    the answer's last number equals an accepted one as a decimal: 1,000.0 is 1000, "5 - 3 = 2" is 2

Of an answer with reasoning, what follows the last `</think>` counts.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Literal

Match = Literal["exact", "contains", "regex", "numeric"]

# A sign counts where no digit or bracket stands before it: in "10-5" it is a minus between two numbers.
_SIGN = r"(?:(?<![\d)\]])[-−])?"
_NUMBER = re.compile(rf"{_SIGN}(?:(?<!\d)(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)")


def is_right(text: str, match: Match, accepted: Sequence[str]) -> bool:
    """Whether `text` is an answer that `accepted` allows."""
    return MATCHES[match](text.rpartition("</think>")[2], accepted)


def is_exact(text: str, accepted: Sequence[str]) -> bool:
    """Whether a generated answer is one of the accepted ones, letter for letter; only space around it is ignored."""
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
    """The last number that a text names in digits, None if there is none."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


def is_number(text: str) -> bool:
    """Whether a text is one number and nothing else."""
    return _NUMBER.fullmatch(text.strip()) is not None


def goes_on_with_question(text: str) -> bool:
    """Whether a continuation's first line that is not blank is a question: what a base model does to a question."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return first.endswith("?")


def share(hits: Sequence[bool]) -> float:
    """Share of true values; raises ValueError for none at all, since 0/0 is no result."""
    if not hits:
        raise ValueError("a share of nothing")
    return sum(hits) / len(hits)
