"""Which tokens a template ends a turn with, found by rendering small conversations.

A server must stop at them, so they belong to the eos ids of the generation config: the end of an answer
(`<|im_end|>`, or `<|user|>` where only the next message ends a turn) and the end of a turn that calls a tool, where
that is another (`<|call|>`, `<|observation|>`).
"""

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from preceptor.chat.message_forms import find_forms
from preceptor.chat.origins import MessageList, Tools
from preceptor.chat.template import Template
from preceptor.chat.tokenise import any_of
from preceptor.chat.turns import shared_start

_ANSWER = "a5f1c0de"  # occurs in no template
_USER = {"role": "user", "content": "b5f1c0de"}
_NEXT = "c5f1c0de"
_TOOL = {"type": "function", "function": {"name": "probe", "description": "A probe.", "parameters": {}}}
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "probe", "arguments": {"key": _ANSWER}}}
# A question, its answer, and the next question; a question, a tool call, and its result.
_ANSWERING = [_USER, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
_CALLING = [
    _USER,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": _NEXT, "tool_call_id": "abcdefghi", "name": "probe"},
]


class StopTokens(NamedTuple):
    """The special tokens that end a turn, a plain answer's first; () if plain text ends it. doubts: sentences about
    those that were not confirmed, and are left out."""

    tokens: tuple[str, ...]
    doubts: tuple[str, ...] = ()


def find_stop_tokens(template: Template, tokenizer: Any, known: Collection[str] = ()) -> StopTokens:
    """How this template ends a turn, asked in two conversations each.

    known: the stop tokens of the model's own generation config. A token counts if both conversations show it, or one
    does and it is known.
    """
    if template.stop is not None:
        return StopTokens((template.stop,))
    special = any_of(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    forms = find_forms(template)
    earlier = [_USER, {"role": "assistant", "content": "d5f1c0de"}]

    def asked(turns: Sequence[Any], tools: Tools, answer: str | None, what: str) -> Any:
        both = [forms.fit([*before, *turns]) for before in ([], earlier)]
        return _confirmed([_closing(template, messages, tools, special, answer) for messages in both], known, what)

    answer, doubts = asked(_ANSWERING, None, None, "an answer")
    call, doubts_of_call = asked(_CALLING, [_TOOL], answer, "a tool call")
    if call is not None and answer is None:
        answer = template.variables.get("eos_token")  # what ends a tool call is not what ends a text
    return StopTokens(tuple(dict.fromkeys(token for token in (answer, call) if token)), (*doubts, *doubts_of_call))


def _confirmed(
    found: Sequence[tuple[bool, str | None]], known: Collection[str], what: str
) -> tuple[str | None, list[str]]:
    """The token that ends a turn, and why another is not believed. found: of each conversation, whether the template
    renders it, and the token."""
    tokens = list(dict.fromkeys(token for renders, token in found if renders))
    if len(tokens) == 1 and (tokens[0] in (None, *known) or all(renders for renders, _ in found)):
        return tokens[0], []
    believed = next((token for token in tokens if token in known), None)
    if not tokens or believed is not None:
        return believed, []
    shown = " and ".join(str(token) for token in tokens)
    return None, [f"the chat template ends {what} with {shown}, by what conversation; none of them counts as its end"]


def _closing(
    template: Template, messages: MessageList, tools: Tools, special: re.Pattern[str], answer: str | None
) -> tuple[bool, str | None]:
    """Whether the template renders the messages but the last, and the token that ends the last of these.

    The eos, if it stands there; else, of the tokens that follow the message's text whatever comes after: an answer's
    first that closes no part of it; a tool call's last, since calls have closing tokens of their own, or that of an
    answer; else the first that the next message brings.
    """
    before, tail = _around(template, messages[:-1], tools)
    if tail is None:
        return False, None
    eos: str | None = template.variables.get("eos_token")
    if eos is not None and special.findall(tail)[:1] == [eos]:
        return True, eos
    after = _around(template, messages, tools)[1]
    if after is not None:
        after = after.partition(_NEXT)[0]
        tail = shared_start(tail, after)
    tokens = _ending(special.findall(tail), eos)
    for token in (eos, answer):
        if token in tokens:
            return True, token
    if not tokens:
        return True, next(iter(_ending(special.findall(after or ""), eos)), None)
    if tools is not None:
        return True, tokens[-1]
    opening = tokens[0].replace("END", "START").replace("end", "start")
    closes_part = len(tokens) > 1 and before.rstrip().endswith(opening)
    return True, tokens[closes_part]


def _ending(tokens: Sequence[str], eos: str | None) -> list[str]:
    """Without those that close a tag inside the turn (`</tool_call>`)."""
    return [token for token in tokens if token == eos or not token.startswith(("</", "[/"))]


def _around(template: Template, messages: MessageList, tools: Tools) -> tuple[str, str | None]:
    """What the render has before and after the probe's answer; no text after it if it does not show it."""
    before, found, after = (template.render_or_none(messages, tools) or "").rpartition(_ANSWER)
    return before, after if found else None
