"""The form in which a template takes what the chat-completions format allows to be written in several ways.

Arguments of a tool call are an object or a string that holds one; a text is a string or a list of text parts; a tool's
result may be an object; a turn that only calls tools has no content or an empty one; ids of calls are any strings. A
template that fails on the form which the file gives, or leaves it out, or writes it wrongly (a string of JSON quoted
once more, a list as Python prints it), is given another form that says the same, as servers do. What a template takes
is found once, by rendering small conversations.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, count
from typing import Any, Literal

from preceptor.chat.origins import MessageList, Tools
from preceptor.chat.template import Template
from preceptor.data.examples import Rejected

_ARGUMENTS = {"probe_key": "probe value"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"probe": {"type": "string", "description": "A probe."}}},
    },
}
_FIRST, _SECOND, _ID = "probe one", "probe two", "abcdefghi"
_PRINTED = re.compile(r"""['"]text['"]: ?['"]probe one""")  # a list of parts as Python or JSON spells it
_WITHIN = re.escape(json.dumps(_ARGUMENTS)).join(("['{]", "['}]"))  # a string of JSON that Python printed, or a set
_NINE = re.compile(r"[A-Za-z0-9]{9}")

_KINDS = {str: "a string inside a string", list: "a list", bool: "true or false", int: "a number", float: "a number"}

IdForm = Literal["any", "nine", "named"]


@dataclass(frozen=True, slots=True)
class Forms:
    """Which forms a template takes as they are given; where it takes none of two, nothing is changed.

    texts, parts, one_part: the roles whose messages are shown if their content is a string, a list of text parts, or a
    list of one. thinking_parts: reasoning may be a part of an assistant's content, of type `thinking`. needs_ids: calls
    and results without ids are rejected; needs_names: results without the function's name are. ids: `nine` letters and
    digits; `named`: the id is written in place of the function's name, as `functions.NAME:NUMBER`. tools: whether they
    are shown. settings: arguments, each with a value, with which the template renders reasoning that it leaves out
    otherwise, or ends its prompts otherwise.
    """

    texts: set[str]
    parts: set[str]
    one_part: set[str]
    object_arguments: bool
    string_arguments: bool
    absent_content: bool
    empty_content: bool
    thinking_parts: bool
    needs_ids: bool
    needs_names: bool
    ids: IdForm
    tools: bool = False
    settings: tuple[tuple[str, Any], ...] = ()

    def fit(self, messages: MessageList) -> list[Mapping[str, Any]]:
        """The messages in forms that the template takes; those in which nothing has to change are the same objects.

        Raises Rejected where a call's arguments are no JSON object.
        """
        fitted: list[Mapping[str, Any]] = []
        ids = _CallIds(self)
        for k, given in enumerate(messages):
            if type(given.get("content")) is not str or given["role"] not in self.texts:
                given = self._with_content(given)
            if given.get("tool_calls") == []:  # servers leave it out; to some templates the key alone is a call
                given = {key: value for key, value in given.items() if key != "tool_calls"}
            if given.get("tool_calls"):
                calls = [
                    self._call(call, f"messages[{k}].tool_calls[{i}]") for i, call in enumerate(given["tool_calls"])
                ]
                given = {**given, "tool_calls": ids.of_calls(calls)}
            elif given["role"] == "tool":
                given = ids.of_result(given)
            fitted.append(given)
        return fitted

    def _with_content(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        content, role = given.get("content"), given["role"]
        if content is None:
            if not given.get("tool_calls") or self.absent_content or not self.empty_content:
                return given
            content = ""
        if not isinstance(content, str | list):
            content = json.dumps(content, ensure_ascii=False)  # a tool's result; servers take texts only
        if isinstance(content, str):
            if role not in self.texts and role in self.one_part:
                content = [_part(content)]
        elif role not in self.parts and role in self.texts | self.one_part:
            # As servers join them: with line ends; but an assistant wrote one text, in one piece.
            content = ("" if role == "assistant" else "\n").join(part["text"] for part in content)
            content = content if role in self.texts else [_part(content)]
        return given if content is given.get("content") else {**given, "content": content}

    def _call(self, call: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """The call with its arguments as an object where the template takes one, else as a string of JSON."""
        inner = call.get("function")
        of_function = ("name", "arguments")
        function = inner if isinstance(inner, Mapping) else {k: v for k, v in call.items() if k in of_function}
        given = function.get("arguments")
        arguments: Any = arguments_object(given, where)
        if self.string_arguments and not self.object_arguments:
            arguments = given if isinstance(given, str) and given.strip() else json.dumps(arguments, ensure_ascii=False)
        if function is inner and arguments is given:
            return call
        rest = call if function is inner else {k: v for k, v in call.items() if k in ("id", "type")}
        return {"type": "function", **rest, "function": {**function, "arguments": arguments}}


@dataclass(eq=False, slots=True)
class _CallIds:
    """The ids of one conversation's calls, in the form that the template takes, and of the results that answer them."""

    _forms: Forms
    _calls: dict[str | None, tuple[str | None, Any]] = field(default_factory=dict)  # given id -> its new one, and name
    _open: list[str | None] = field(default_factory=list)  # given ids of the last turn's calls without a result
    _num_calls: int = 0

    def of_calls(self, calls: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        self._open, made = [], []
        for call in calls:
            given, name = call.get("id"), call["function"].get("name")
            id_ = self._fitted(given, str(name))
            self._num_calls += 1
            key = f" {self._num_calls}" if given is None else given
            self._open.append(key)
            self._calls[key] = id_, name
            made.append(call if id_ == given else {"id": id_, **{k: v for k, v in call.items() if k != "id"}})
        return made

    def _fitted(self, given: Any, name: str) -> Any:
        """A call's id in the form that the template takes; no two given ids become one."""
        form, number = self._forms.ids, self._num_calls
        if form == "named" and name not in str(given):
            return f"functions.{name}:{number}"
        if form != "nine" and (given is not None or not self._forms.needs_ids):
            return given
        fits = given is None or _NINE.fullmatch(str(given))
        ours = given if fits else re.sub(r"[^A-Za-z0-9]", "", f"{number:09}{given}")[-9:]
        taken = {None, *(id_ for key, (id_, _) in self._calls.items() if key != given)}
        free = (f"call{n:05}" for n in count(number))
        return next(id_ for id_ in chain((ours,), free) if id_ not in taken)

    def of_result(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        key = given.get("tool_call_id")
        if key is None and self._open:
            key = self._open[0]
        if key in self._open:
            self._open.remove(key)
        id_, name = self._calls.get(key, (given.get("tool_call_id"), None))
        if id_ is not None and given.get("tool_call_id") != id_ and (self._forms.needs_ids or self._forms.ids != "any"):
            given = {**given, "tool_call_id": id_}
        if self._forms.needs_names and name is not None and given.get("name") is None:
            given = {**given, "name": name}
        return given


def arguments_object(given: Any, where: str) -> dict[str, Any]:
    """A call's arguments as an object: {} where there are none. Raises Rejected where they are no JSON object.

    One rule for all templates: most write a string of arguments as it is, and no server could parse that.
    """
    if given is None or (isinstance(given, str) and not given.strip()):
        return {}
    value = given
    if isinstance(given, str):
        try:
            value = json.loads(given, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            shown = given if len(given) <= 60 else given[:60] + "…"
            found = f"{where}.function.arguments: {shown!r} is no JSON ({error})"
            raise Rejected("arguments_not_object", found) from error
    if not isinstance(value, dict):
        kind = _KINDS.get(type(value), "null inside a string")
        raise Rejected("arguments_not_object", f"{where}.function.arguments: it is {kind}")
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


# What a template takes -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def find_forms(template: Template) -> Forms:
    """Learn from small renders what the template takes."""
    texts, parts, one_part = (set[str]() for _ in range(3))

    def try_role(role: str, before: Sequence[Any], after: Sequence[Any] = (), tools: Any = None) -> None:
        fields = {"tool_call_id": _ID, "name": "probe_name"} if role == "tool" else {}
        both = [_part(_FIRST), _part(_SECOND)]
        for roles, content in ((texts, _FIRST), (one_part, both[:1]), (parts, both)):
            message = {"role": role, "content": content, **fields}
            text = _rendered(template, [*before, message, *after], tools)
            if _FIRST in text and (roles is not parts or _SECOND in text) and not _PRINTED.search(text):
                roles.add(role)

    try_role("user", [])
    asked = {"role": "user", "content": [_part("probe")] if "user" in one_part - texts else "probe"}
    try_role("system", [], [asked])
    try_role("developer", [], [asked])
    try_role("assistant", [asked])
    in_parts = "assistant" in one_part - texts
    calls = _find_call_forms(template, asked, [_part("")] if in_parts else "")
    thought = [{"type": "thinking", "thinking": _FIRST}, _part(_SECOND)]
    text = _rendered(template, [asked, {"role": "assistant", "content": thought}], None)
    thinks = _FIRST in text and _SECOND in text and "'thinking'" not in text and '"thinking"' not in text
    settings = _find_settings(template, asked)
    tools = "probe_tool" in _rendered(template, [asked], [_TOOL], add_generation_prompt=True)
    found = Forms(texts, parts, one_part, thinking_parts=thinks, tools=tools, settings=settings, **calls)
    turn = {"role": "assistant", "content": None, "tool_calls": [_call(_ARGUMENTS, _ID)]}
    try_role("tool", found.fit([asked, turn]), tools=[_TOOL])
    return found


def _find_settings(template: Template, asked: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    apart = {"role": "assistant", "content": "probe", "reasoning_content": _FIRST}
    within = {"role": "assistant", "content": f"<think>\n{_FIRST}\n</think>\n\nprobe"}

    def seen(**arguments: Any) -> tuple[Any, ...]:
        prompt = _rendered(template, [asked], None, add_generation_prompt=True, **arguments)
        turns = (_rendered(template, [asked, turn], None, **arguments) for turn in (apart, within))
        return prompt.rpartition("probe")[2], *[_FIRST in text for text in turns]

    usual = seen()
    return tuple((name, value) for name, value in template.settings if seen(**{name: value}) != usual)


def _find_call_forms(template: Template, asked: Mapping[str, Any], empty: Any) -> dict[str, Any]:
    """Of `Forms`, what concerns tool calls; empty: content without text."""

    def shown(arguments: Any, id_: str | None = _ID, result: Sequence[Any] = (), **content: Any) -> str:
        turn = {"role": "assistant", **content, "tool_calls": [_call(arguments, id_)]}
        return _rendered(template, [asked, turn, *result], [_TOOL])

    as_string = json.dumps(_ARGUMENTS)
    of_object = [shown(_ARGUMENTS), shown(_ARGUMENTS, content=empty)]
    of_string = [shown(as_string), shown(as_string, content=empty)]
    takes_object = any("probe_key" in text and "probe value" in text for text in of_object)
    takes_string = any(as_string in text and not re.search(_WITHIN, text) for text in of_string)
    if takes_string and any(str(_ARGUMENTS) in text for text in of_object):
        takes_object = False  # it prints an object as Python does
    either = [one if "probe value" in one else other for one, other in zip(of_object, of_string, strict=True)]
    absent = "probe value" in either[0] and "None" not in either[0]
    arguments, content = _ARGUMENTS if takes_object else as_string, {} if absent else {"content": empty}

    def answered(id_: str | None, name: str | None = "probe_name") -> bool:
        names = {key: value for key, value in (("tool_call_id", id_), ("name", name)) if value}
        result = {"role": "tool", "content": empty or "probe", **names}
        return "probe value" in shown(arguments, id_, [result], **content)

    takes = answered(_ID)
    named = "probe_name" not in shown(arguments, **content)
    return {
        "object_arguments": takes_object,
        "string_arguments": takes_string,
        "absent_content": absent,
        "empty_content": "probe value" in either[1],
        "needs_ids": takes and not answered(None),
        "needs_names": takes and not answered(_ID, None),
        "ids": "named" if takes and named else "nine" if takes and not answered("call_1") else "any",
    }


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _call(arguments: Any, id_: str | None) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "probe_name", "arguments": arguments}}
    return call if id_ is None else {"id": id_, **call}


def _rendered(template: Template, messages: MessageList, tools: Tools, **arguments: Any) -> str:
    return template.render_or_none(messages, tools, **arguments) or ""
