"""Which tokens a template ends a turn with, found by rendering small conversations.

A server must stop at them, so they belong to the eos ids of the generation config: the end of an answer
(`<|im_end|>`, or `<|user|>` where only the next message ends a turn) and the end of a turn that calls a tool, where
that is another (`<|call|>`, `<|observation|>`).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from preceptor.chat.message_forms import find_forms
from preceptor.chat.template import Template
from preceptor.chat.tokenise import any_of
from preceptor.chat.turns import shared_start
from preceptor.errors import TemplateError

_ANSWER = "a5f1c0de"  # occurs in no template
_USER = {"role": "user", "content": "b5f1c0de"}
_NEXT = "c5f1c0de"
_TOOL = {"type": "function", "function": {"name": "probe", "description": "A probe.", "parameters": {}}}


def find_stop_tokens(template: Template, tokenizer: Any) -> tuple[str, ...]:
    """The special tokens that end a turn in this template, a plain answer's first; () if plain text ends it."""
    if template.stop is not None:
        return (template.stop,)
    special = any_of(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    forms = find_forms(template)
    *answered, follower = forms.fit(
        [_USER, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
    )
    found = [_closing(template, answered, follower, None, special)]
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "probe", "arguments": {"key": _ANSWER}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    *called, result = forms.fit(
        [_USER, calling, {"role": "tool", "content": _NEXT, "tool_call_id": "abcdefghi", "name": "probe"}]
    )
    found.append(_closing(template, called, result, [_TOOL], special))
    return tuple(dict.fromkeys(token for token in found if token))


def _closing(
    template: Template,
    messages: Sequence[Mapping[str, Any]],
    follower: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None,
    special: re.Pattern[str],
) -> str | None:
    """The token that ends the last message.

    The eos, if it stands there; else of those that follow the message's text whatever comes after, an answer's first
    and a tool call's last (calls have closing tokens of their own); else the first that the next message brings.
    """
    tail = _tail(template, messages, tools)
    if tail is None:
        return None
    eos: str | None = template.variables.get("eos_token")
    if eos is not None and special.findall(tail)[:1] == [eos]:
        return eos
    after = _tail(template, [*messages, follower], tools)
    if after is not None:
        after = after.partition(_NEXT)[0]
        tail = shared_start(tail, after)
    tokens = _ending(special.findall(tail), eos)
    if eos in tokens:
        return eos
    if tokens:
        return tokens[0] if tools is None else tokens[-1]
    return next(iter(_ending(special.findall(after or ""), eos)), None)


def _ending(tokens: Sequence[str], eos: str | None) -> list[str]:
    """Without those that close a tag inside the turn (`</tool_call>`)."""
    return [token for token in tokens if token == eos or not token.startswith(("</", "[/"))]


def _tail(
    template: Template, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> str | None:
    """What the render has after the probe's answer; None if it does not show it."""
    try:
        _, found, after = template.render(messages, tools).rpartition(_ANSWER)
    except TemplateError as error:
        if error.condemns:
            raise
        return None
    return after if found else None
