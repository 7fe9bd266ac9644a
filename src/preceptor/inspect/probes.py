"""Small conversations of every kind, for testing templates, and what the proof makes of each.

Each text in them occurs only once. Of a probe the result is a chain, a tree (and what was rewritten), or a rejection.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from preceptor.chat.template import Template
from preceptor.chat.turns import shared_start
from preceptor.data.examples import Conversation, Rejection, read_messages
from preceptor.data.forest import Tree, turns_of

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


def _all() -> tuple[Probe, ...]:
    asked, offered = says("user", QUESTIONS[0]), (TOOL,)
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


PROBES = _all()
_SHOWN = 70  # characters of an excerpt


def outcome(probe: Probe, tree: Tree | Rejection, template: Template) -> dict[str, Any]:
    """The result of one kind of conversation. template: with the renderer's arguments among its variables."""
    found: dict[str, Any] = {
        "kind": probe.kind,
        "proved": isinstance(tree, Tree),
        "shape": "",  # or `chain`, `tree`
        "rewrite": None,
        "left_out": (),  # messages of others, or the tools, that the template does not show to the model
        "code": "",  # why it is rejected
        "message": "",
    }
    if isinstance(tree, Rejection):
        return found | {"left_out": _left_out(probe, template), "code": tree.code, "message": tree.message}
    found["left_out"] = tree.left_out
    if all(segment.parent == (index - 1 if index else None) for index, segment in enumerate(tree.segments)):
        return found | {"shape": "chain"}
    return found | {"shape": "tree", "rewrite": _rewrite(probe, tree)}


def _left_out(probe: Probe, template: Template) -> tuple[str, ...]:
    """The messages of others, and the tools, that the last turn's prompt does not contain."""
    text = template.render_or_none(probe.messages[:-1], probe.tools, add_generation_prompt=True)
    if text is None:
        return ()
    names = {"system": "system prompt", "developer": "developer prompt", "user": "user message", "tool": "tool result"}
    others = [message for message in probe.messages if message["role"] in names]
    missing = [names[message["role"]] for message in others if message["content"] not in text]
    if probe.tools and not shows_tools(text):
        missing.append("tools")
    return tuple(dict.fromkeys(missing))


def _rewrite(probe: Probe, tree: Tree) -> dict[str, Any] | None:
    """How the template rewrites an earlier turn once there is a later one: the first turn as generated, compared with
    the context of the first later turn that does not continue it."""
    for turn, later in pairwise(turns_of(tree)):
        generated, context = turn.context_text + turn.target_text, later.context_text
        if context.startswith(generated):
            continue
        shared = len(shared_start(generated, context))
        question = next(message["content"] for message in probe.messages if message["role"] == "user")
        texts = texts_of(probe.messages[turn.message])
        return {
            "dropped": tuple(dict.fromkeys(name for name, text in texts if text in generated and text not in context)),
            "moves": generated.find(question) + len(question) > shared,  # the text before the answer changes too
            "generated": _excerpt(generated[shared:]),  # from the first difference on
            "becomes": _excerpt(context[shared:]),
        }
    return None


def _excerpt(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
