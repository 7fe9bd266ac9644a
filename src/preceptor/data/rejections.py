"""Every reason for which an example is not trained: its code, what to do about it, and counts by reason."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from preceptor.config import nearest
from preceptor.data.examples import Rejection
from preceptor.errors import ConfigError, short

READING: dict[str, str] = {
    "unreadable": "a value that cannot be read: a key given twice, NaN, a huge number, broken text",
    "broken_character": "half of a character",
    "unknown_format": "its keys make no format",
    "ambiguous_format": "its keys make several formats",
    "ambiguous_null": "a null that may be padding (Parquet, Arrow)",
    "unread_column": "a key without which the example would say something else, such as images",
    "unread_field": "the same in a message, such as an image or `train_detail`",
    "no_messages": "no list of messages",
    "bad_message": "a message that cannot be read",
    "unknown_role": "a role that is none",
    "not_an_answer": "a message is to be trained that is not the assistant's",
    "no_assistant_message": "no message is the assistant's",
    "empty_answer": "an answer without text and tool calls",
    "empty_prompt": "a question without text",
    "empty_text": "no text",
    "not_text": "a value that should be a text",
    "nothing_to_train": "`train: false` or weight 0 on every answer",
    "bad_system": "a system prompt that is no text",
    "two_system_prompts": "`system` and another system message",
    "bad_tools": "tools that are no list of JSON schemas",
    "bad_tool_call": "a ShareGPT function call without name and arguments",
    "bad_template_kwargs": "template arguments that are no object",
    "bad_prompt_completion": "a prompt and a completion of different kinds",
    "bad_history": "Alpaca's history that is no list of pairs",
    "needs_template": "plain strings beside tools, a system prompt or template arguments",
    "left_out": "the function of the source's `code` gave None; allow it where that is meant",
    "too_long": "more than `data.max_length` tokens",
}
"""Codes of what is found while an example is read or cut, and what they mean."""

ADVICE: dict[str, str] = {
    # the example itself
    "no_turn": "give it an assistant message that is to be trained (train: true, weight above 0)",
    "special_token_in_text": "remove the token from the text, or set special_tokens_in_text to plain (the text is read "
    "as ordinary characters) or allow (it acts as the token)",
    "unknown_token": "the vocabulary has no token for some of the text: use a tokenizer that covers it, or change it",
    "text_too_large": "a tokenizer would take more than a gigabyte of memory for it: split the text",
    "nothing_to_predict": "an example needs at least two tokens, one to read and one to predict",
    "reasoning_unclosed": "the reasoning does not end, so there is no answer to learn: complete the turn, or set "
    "train: false on it",
    # the template and the messages
    "no_template": "the data began with plain text and the model has no chat template, so none was set: set "
    "data.chat_template",
    "no_prompt": "no server asks a model to speak before anyone has said anything: put a user message first, or set "
    "train: false on this message",
    "template_rejects": "change the messages as the template asks, or choose another template",
    "reserved_argument": "these are arguments of the server's own and reach no template: remove them",
    "arguments_not_object": "write a tool call's arguments as an object, or as a string that holds a JSON object",
    "render_differs": "the template does something that cannot be followed exactly: choose another, and report it",
    # what the template makes of the turn
    "turn_missing": "the template leaves this message out; choose another template, or set train: false on it",
    "content_dropped": "the template leaves the text out (often beside a tool call): move it to a message of its own, "
    "remove it, or choose another template",
    "content_changed": "the template alters the text, so the model would learn something else than what was given: "
    "write it as the template would, or choose another template",
    "reasoning_dropped": "the template does not render reasoning: write it into content, remove it, or choose a "
    "template that renders it (chatml does)",
    "reasoning_twice": "the template puts a reasoning block of its own before that of the content, and leaves "
    "reasoning_content out: remove the block, or choose another template",
    "tool_call_dropped": "the template leaves tool calls, or a part of them, out; choose a template that renders them "
    "(chatml does)",
    # where the turn starts
    "prompt_opens_reasoning": "the prompt that a server builds opens a reasoning block and this turn has none: give it "
    "reasoning_content, set chat_template_kwargs so that the prompt does not open one, or choose another template",
    "prompt_closes_reasoning": "the prompt closes the reasoning block and this turn has reasoning: turn thinking on in "
    "chat_template_kwargs, or remove the reasoning from the turn",
    "prompt_conflicts": "what a server puts before the answer does not stand where the template renders this turn. Fix "
    "the template, or choose another",
    # where the turn ends
    "no_stop_token": "nothing ends this turn: give the tokenizer an eos token, or the model a generation config",
    "stop_inside_turn": "a server would stop in the middle of this turn: remove the stop token from the text, or from "
    "the stop tokens (generation config)",
}
"""Codes of what is found while an example is rendered, and what to do."""

CODES = frozenset(READING | ADVICE)


def check_codes(allowed: Iterable[str]) -> None:
    """Raises ConfigError for a code of `data.allow_rejected` that no rejection can have."""
    for code in allowed:
        if code not in CODES:
            raise ConfigError(
                f"data.allow_rejected: no example is rejected as {short(code)}; {nearest(code, sorted(CODES))}"
            )


class Rejected(Exception):
    """Raised while an example is rendered, with a code of ADVICE and what was found; becomes a Rejection."""

    def __init__(self, code: str, found: str, helps: str = "") -> None:
        """helps: what is known to help here, said instead of what helps in general."""
        assert code in (CODES if helps else ADVICE), code
        super().__init__(f"{found}: {helps or ADVICE[code]}")
        self.code, self.found = code, found

    def helped_by(self, helps: str) -> "Rejected":
        return Rejected(self.code, self.found, helps)


@dataclass(slots=True)
class Reason:
    """How many examples were rejected with one code; `first` is the first of them, whose sentence says what to do."""

    first: Rejection
    count: int
    allowed: bool


class RejectionCounts:
    """Counts rejections. allowed: the codes for which examples may be left out (`data.allow_rejected`)."""

    def __init__(self, allowed: Collection[str] = (), rejections: Iterable[Rejection] = ()) -> None:
        self._allowed = frozenset(allowed)
        self._reasons: dict[str, Reason] = {}
        for rejection in rejections:
            self.add(rejection)

    def add(self, rejection: Rejection) -> None:
        reason = self._reasons.setdefault(rejection.code, Reason(rejection, 0, rejection.code in self._allowed))
        reason.count += 1

    @property
    def reasons(self) -> list[Reason]:
        """The most frequent first; of equally frequent ones that which came first."""
        return sorted(self._reasons.values(), key=lambda reason: -reason.count)

    @property
    def num_rejected(self) -> int:
        return sum(reason.count for reason in self._reasons.values())

    @property
    def num_not_allowed(self) -> int:
        return sum(reason.count for reason in self._reasons.values() if not reason.allowed)

    @property
    def not_allowed(self) -> list[str]:
        """Codes of rejections that are not allowed."""
        return [reason.first.code for reason in self.reasons if not reason.allowed]

    @property
    def never_seen(self) -> list[str]:
        """Allowed codes that no rejection has."""
        return sorted(self._allowed - self._reasons.keys())

    def __str__(self) -> str:
        """One line per reason: how often, where first, and what it says there."""
        return "\n".join(
            f"  {reason.count:>6} x {reason.first.code}{' (allowed)' * reason.allowed}: "
            f"first at {reason.first.source}: {reason.first.message}"
            for reason in self.reasons
        )
