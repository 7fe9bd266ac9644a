"""What a template leaves out of the context: messages of others and tools that the file has and the model never sees.

A server that is asked with the same messages builds the same context, so such examples are trained. But the answer may
be to what is left out, so it is counted and said.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from preceptor.chat.message_forms import Forms
from preceptor.chat.origins import Leaf, json_body
from preceptor.chat.reasoning import block_of
from preceptor.chat.turns import Turn
from preceptor.data.rejections import Rejected

_NAMES = {
    "system": "system prompt",
    "developer": "developer prompt",
    "user": "user message",
    "assistant": "earlier answer",
    "tool": "tool result",
}
_SHORT = 16  # characters; shorter texts may stand in a prompt by chance


def left_out(
    turns: Sequence[Turn],
    messages: Sequence[Mapping[str, Any]],
    starts: Sequence[int],
    tools: Sequence[Any] | None,
    forms: Forms,
) -> tuple[str, ...]:
    """The kinds of messages whose text is not in the prompts of the turns, and `tools`.

    starts: the number of each message's first leaf, and of all leaves.
    """
    found: dict[str, None] = {}
    shown = forms.shown
    if tools and not (
        forms.tools and all(str(tool.get("function", tool).get("name")) in turns[0].prompt for tool in tools)
    ):
        found["tools"] = None
    earlier, done, at = "", 0, 0
    for turn in turns:
        if not turn.prompt.startswith(earlier):
            done, at = 0, 0
        for k in range(done, turn.message):
            role = messages[k]["role"]
            for index in range(starts[k], starts[k + 1]):
                leaf = turn.leaves[index]
                text = _text(leaf, role, turn.tags) if leaf.path[0] == "content" else ""
                if not text:
                    continue
                place = turn.prompt.find(text, at)
                if place >= 0 and (role in shown or len(text) >= _SHORT):
                    at = place + len(text)
                elif not _shows(turn, index, text, role in shown):
                    found[_NAMES[role]] = None
        earlier, done = turn.prompt, turn.message
    return tuple(found)


def _text(leaf: Leaf, role: str, tags: Mapping[str, str]) -> str:
    """What a prompt must hold of a content: it without the reasoning that history need not have."""
    if leaf.path[-1] == "thinking":
        return ""
    block = block_of(leaf.text, tags) if role == "assistant" else None
    return (block.answer if block is not None and block.closed else leaf.text).strip()


def _shows(turn: Turn, index: int, text: str, role_is_shown: bool) -> bool:
    """Whether the prompt holds the text somewhere, as it is, in JSON, or with other white space."""
    if len(text) >= _SHORT:
        prompt = turn.prompt
        if any(form in prompt for form in (text, json_body(text, True), json_body(text, False))):
            return True
        if "".join(text.split()) in "".join(prompt.split()):
            return True
        if not role_is_shown:
            return False
    try:
        return bool(turn.prompt_marked().spelled(index).strip())
    except Rejected:
        return True  # not known
