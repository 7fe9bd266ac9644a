"""The form in which a template takes what the chat-completions format allows to be written in two ways.

Arguments of a tool call are an object or a string that holds one; text is a string or a list with one text part; a
turn that only calls tools has no content or an empty one. A template that fails on the form which the file gives, or
writes it wrongly (a string of JSON quoted once more, a list as Python prints it), is given the other, which says the
same. What a template takes is found once, by rendering small conversations.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preceptor.chat.template import Template
from preceptor.data.rejections import Rejected
from preceptor.errors import TemplateError

_ARGUMENTS = {"probe_key": "probe value"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_name",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "A key."}}},
    },
}


@dataclass(frozen=True, slots=True)
class Forms:
    """Which forms a template takes as they are given; where it takes neither, nothing is changed."""

    object_arguments: bool
    string_arguments: bool
    absent_content: bool
    empty_content: bool
    text_parts: bool

    def fit(self, given: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """The message in a form that the template takes; the same object if nothing has to change. Raises Rejected."""
        content = given.get("content")
        if isinstance(content, list) and not self.text_parts and len(content) == 1:
            given = {**given, "content": content[0]["text"]}
        calls = given.get("tool_calls")
        if not calls:
            return given
        if content is None and not self.absent_content and self.empty_content:
            given = {**given, "content": ""}
        if self.object_arguments != self.string_arguments:
            given = {**given, "tool_calls": [_call_as(call, self.object_arguments, where) for call in calls]}
        return given


def find_forms(template: Template) -> Forms:
    """Learn from small renders what the template takes."""

    def call(arguments: Any, **content: Any) -> str:
        calls = [{"id": "abcdefghi", "type": "function", "function": {"name": "probe_name", "arguments": arguments}}]
        turn = {"role": "assistant", **content, "tool_calls": calls}
        return _rendered(template, [{"role": "user", "content": "probe"}, turn], [_TOOL])

    as_string = json.dumps(_ARGUMENTS)
    shows_object = [call(_ARGUMENTS), call(_ARGUMENTS, content="")]
    shows_string = [call(as_string), call(as_string, content="")]
    parts = [{"type": "text", "text": "probe text"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]
    with_parts = _rendered(template, turns, None)
    return Forms(
        object_arguments=any("probe_key" in text and "probe value" in text for text in shows_object),
        string_arguments=any(as_string in text and f"{{{as_string}}}" not in text for text in shows_string),
        absent_content=any("probe_name" in text and "None" not in text for text in (shows_object[0], shows_string[0])),
        empty_content=any("probe_name" in text for text in (shows_object[1], shows_string[1])),
        text_parts=with_parts.count("probe text") >= 2 and "'type'" not in with_parts,
    )


def _rendered(template: Template, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> str:
    try:
        return template.render(messages, tools)
    except TemplateError as error:
        if error.condemns:
            raise
        return ""


def _call_as(call: Mapping[str, Any], as_object: bool, where: str) -> Mapping[str, Any]:
    """The call with its arguments as an object, or as a string of JSON."""
    inner = call.get("function")
    function = inner if isinstance(inner, Mapping) else call
    arguments = function.get("arguments")
    if isinstance(arguments, str) == (not as_object) or arguments is None:
        return call
    changed = {**function, "arguments": _as_object(arguments, where) if as_object else _as_string(arguments)}
    return {**call, "function": changed} if function is not call else changed


def _as_object(arguments: str, where: str) -> Any:
    try:
        value = json.loads(arguments)
    except json.JSONDecodeError as error:
        raise Rejected("arguments_not_object", f"{where}.tool_calls: {arguments!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise Rejected("arguments_not_object", f"{where}.tool_calls: {arguments!r} is not a JSON object")
    return value


def _as_string(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)
