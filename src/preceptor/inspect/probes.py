"""Small conversations of every kind, for testing templates; each text in them occurs only once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preceptor.data.examples import Conversation, Rejection, read_messages

SYSTEM = "Speak as a zookeeper would."
QUESTIONS = ("What is a quokka?", "What is an okapi?")
ANSWERS = ("A quokka is a marsupial.", "An okapi is a giraffid.")
REASONING = ("Recall Australia.", "Recall the Congo.")
RESULT = "four metres"

TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "measure_animal",
        "description": "Measures one animal.",
        "parameters": {
            "type": "object",
            "properties": {"species": {"type": "string", "description": "Which species."}},
            "required": ["species"],
        },
    },
}


@dataclass(frozen=True, slots=True)
class Probe:
    """A conversation of one kind."""

    kind: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None

    def record(self) -> Conversation:
        messages = read_messages([dict(message) for message in self.messages], self.kind)
        assert not isinstance(messages, Rejection)
        return Conversation(self.kind, messages, self.tools)


def says(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def calls(content: str | None, *species: str, **fields: Any) -> dict[str, Any]:
    """An assistant message that calls the tool once for each species."""
    ids = ("abcdefghi", "bcdefghij")
    made = [
        {"id": id_, "type": "function", "function": {"name": "measure_animal", "arguments": {"species": name}}}
        for id_, name in zip(ids, species, strict=False)
    ]
    return {"role": "assistant", "content": content, **fields, "tool_calls": made}


def result(content: str, id_: str = "abcdefghi") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "name": "measure_animal", "content": content}


def several(*turns: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """A conversation of the questions and these turns."""
    pairs = zip(QUESTIONS, turns, strict=True)
    return tuple(message for question, turn in pairs for message in (says("user", question), turn))


def texts_of(message: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The texts of a message as (name, text); reasoning inside content counts as reasoning."""
    content, own = message.get("content") or "", message.get("reasoning_content") or ""
    inline, closed, answer = content.removeprefix("<think>\n").partition("\n</think>\n\n")
    texts = [("reasoning", own or (inline if closed else "")), ("text", answer if closed else content)]
    texts += [("tool call", call["function"]["arguments"]["species"]) for call in message.get("tool_calls") or ()]
    return [(name, text) for name, text in texts if text]


def shows_tools(text: str) -> bool:
    """Whether a render contains the tool with the description of its parameter."""
    return "measure_animal" in text and "Which species." in text


def _all(tools: Sequence[Mapping[str, Any]]) -> tuple[Probe, ...]:
    asked, offered = says("user", QUESTIONS[0]), tuple(tools)
    plain = several(says("assistant", ANSWERS[0]), says("assistant", ANSWERS[1]))
    reasoned = several(*(says("assistant", a, reasoning_content=r) for a, r in zip(ANSWERS, REASONING, strict=True)))
    inline = several(
        *(says("assistant", f"<think>\n{r}\n</think>\n\n{a}") for a, r in zip(ANSWERS, REASONING, strict=True))
    )
    answered = (says("assistant", ANSWERS[0]), says("user", QUESTIONS[1]), says("assistant", ANSWERS[1]))
    thinks, concludes = {"reasoning_content": REASONING[0]}, {"reasoning_content": "Recall the ruler."}
    looped = (
        asked,
        calls("", "quokka", **thinks),
        result(RESULT),
        says("assistant", ANSWERS[0], **concludes),
        says("user", QUESTIONS[1]),
        says("assistant", ANSWERS[1], reasoning_content=REASONING[1]),
    )
    both = (result(RESULT), result("two feet", "bcdefghij"))
    return (
        Probe("one turn", plain[:2]),
        Probe("several turns", plain),
        Probe("system prompt", (says("system", SYSTEM), *plain)),
        Probe("developer prompt", (says("developer", SYSTEM), *plain)),
        Probe("two user messages in a row", (says("user", "Good morning, keeper."), *plain)),
        Probe("reasoning_content", reasoned),
        Probe("inline <think>", inline),
        Probe("tools offered, none called", plain, offered),
        Probe("tool call", (asked, calls("", "quokka"), result(RESULT), *answered), offered),
        Probe("tool call without content", (asked, calls(None, "quokka"), result(RESULT), *answered), offered),
        Probe("text beside a tool call", (asked, calls("I shall look.", "quokka"), result(RESULT), *answered), offered),
        Probe("two tool calls in a turn", (asked, calls("", "quokka", "okapi"), *both, *answered), offered),
        Probe("reasoning with tool calls", looped, offered),
        Probe("system prompt with tools", (says("system", SYSTEM), *plain), offered),
    )


PROBES = _all([TOOL])
