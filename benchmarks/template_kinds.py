"""Conversations of every kind that data files hold, for proofs under many templates. Nothing of the package is used."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Messages = list[dict[str, Any]]

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the city."},
                    "days": {"type": "integer", "description": "How many days ahead."},
                    "units": {"type": "array", "items": {"type": "string"}, "description": "Units."},
                },
                "required": ["city"],
            },
        },
    }
]
# No answer can be trained: what is right is a rejection, wherever the template knows the tags.
UNFINISHED = ("unclosed reasoning", "reasoning without answer")
_FIRST = {"role": "user", "content": "Who goes there? "}
_SECOND = {"role": "user", "content": "2 < 3?"}
_ANSWERS = ({"role": "assistant", "content": "It is I.\n"}, {"role": "assistant", "content": "Yes & no."})
_ARGUMENTS = {"city": 'Zürich "Altstadt"', "days": 3}
_RESULT = '{"degrees": 12}'


def _thought(number: int) -> str:
    return f"Thought {number}:\nlet me see"


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _says(content: Any, role: str = "assistant", **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def _call(arguments: Any, id_: str | None = "call00001") -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return {"id": id_, **call} if id_ else call


def _result(content: Any, id_: str | None = "call00001", name: str | None = "get_weather") -> dict[str, Any]:
    fields = {"tool_call_id": id_, "name": name}
    return {"role": "tool", "content": content, **{key: value for key, value in fields.items() if value}}


def _two(*turns: Mapping[str, Any]) -> Messages:
    return [message for pair in zip((_FIRST, _SECOND), map(dict, turns), strict=True) for message in pair]


def _inline(number: int, answer: str, before: str = "<think>\n") -> dict[str, Any]:
    return _says(f"{before}{_thought(number)}\n</think>\n\n{answer}")


def _plain_kinds() -> dict[str, Messages]:
    parted = [_says([_part("Who goes "), _part("there?")], "user"), _says([_part("It is I.")])]
    return {
        "plain": _two(*_ANSWERS),
        "system": [_says("You are <terse>.", "system"), *_two(*_ANSWERS)],
        "text parts": [*parted, _says([_part("2 < 3?")], "user"), _says("Yes & no.")],
        "system in parts": [_says([_part("You are "), _part("<terse>.")], "system"), *_two(*_ANSWERS)],
        "answer in parts": _two(_says([_part("It is "), _part("I.")]), _ANSWERS[1]),
        "reasoning_content": _two(
            *(_says(a["content"], reasoning_content=_thought(n)) for n, a in enumerate(_ANSWERS))
        ),
        "inline think": _two(_inline(0, "It is I."), _inline(1, "Yes & no.")),
        "one tag": _two(_inline(0, "It is I.", ""), _inline(1, "Yes & no.", "")),
        "empty reasoning": _two(*(_says(f"<think>\n\n</think>\n\n{a['content'].strip()}") for a in _ANSWERS)),
        "unclosed reasoning": [_FIRST, _says("<think>\nTwo and two make")],
        "reasoning without answer": [_FIRST, _says("<think>\nTwo and two.\n</think>\n\n")],
    }


def _calling(
    content: Any = "", calls: Sequence[Any] = (), results: Sequence[Any] = (), answer: Any = None, **fields: Any
) -> Messages:
    turn = _says(content, tool_calls=list(calls or [_call(_ARGUMENTS)]), **fields)
    last = answer or _says("It is 12 degrees.")
    return [_FIRST, turn, *(results or [_result(_RESULT)]), last, _SECOND, dict(_ANSWERS[1])]


def _tool_kinds() -> dict[str, Messages]:
    reasoned = _calling(reasoning_content=_thought(0), answer=_says("It is 12 degrees.", reasoning_content=_thought(1)))
    reasoned[-1] = _says("Yes & no.", reasoning_content=_thought(2))
    inline = _calling(f"<think>\n{_thought(0)}\n</think>\n\n", answer=_inline(1, "It is 12 degrees."))
    inline[-1] = _inline(2, "Yes & no.")
    many = {"city": "Ulm", "units": ["C", "it's"], "odd": {"deep": True, "none": None, "x": 1.5}}
    two = [_call(_ARGUMENTS), _call({"city": "Ulm", "days": 1}, "call00002")]
    long_id, named_id = "call_9Ab-12cd_EF345", "functions.get_weather:0"
    return {
        "tools": _calling(),
        "tools + reasoning": reasoned,
        "tools + inline think": inline,
        "text beside a call": _calling("I shall look."),
        "parallel calls": _calling(calls=two, results=[_result(_RESULT), _result('{"degrees": 9}', "call00002")]),
        "string arguments": _calling(calls=[_call(json.dumps(_ARGUMENTS, ensure_ascii=False))]),
        "nested arguments": _calling(calls=[_call(many)]),
        "no arguments": _calling(calls=[_call("")]),
        "long ids": _calling(calls=[_call(_ARGUMENTS, long_id)], results=[_result(_RESULT, long_id, None)]),
        "no ids": _calling(calls=[_call(_ARGUMENTS, None)], results=[_result(_RESULT, None, None)]),
        "ids with names": _calling(calls=[_call(_ARGUMENTS, named_id)], results=[_result(_RESULT, named_id, None)]),
        "result in parts": _calling(results=[_result([_part("twelve"), _part("degrees")])]),
        "result as text": _calling(results=[_result("twelve degrees")]),
        "result as object": _calling(results=[_result({"degrees": 12})]),
        "ends with a call": _calling()[:2],
    }


CONVERSATIONS: Mapping[str, tuple[Messages, list[dict[str, Any]] | None]] = {
    **{kind: (messages, None) for kind, messages in _plain_kinds().items()},
    **{kind: (messages, TOOLS) for kind, messages in _tool_kinds().items()},
}
