"""What the prompts of a conversation leave out.

A server that is asked with the same messages builds the same context, so such examples are trained. But the answer
may be to what is left out, so it is counted and said.
"""

from collections.abc import Mapping, Sequence

from preceptor.chat import reasoning
from preceptor.chat.message_forms import Forms
from preceptor.chat.origins import Leaf, MessageList, Tools, json_body
from preceptor.chat.turns import Turn
from preceptor.data.examples import Rejected

_KINDS = {
    "system": "system prompt",
    "developer": "developer prompt",
    "user": "user message",
    "assistant": "earlier answer",
    "tool": "tool result",
}
_SHORT = 16  # characters; shorter texts may stand in a prompt by chance


def left_out(
    turns: Sequence[Turn], messages: MessageList, starts: Sequence[int], tools: Tools, forms: Forms
) -> tuple[str, ...]:
    """The kinds of messages whose text is not in the prompts of the turns, `tool call` and `tools`.

    starts: the number of each message's first leaf, and of all leaves. Of tool calls it is a lower bound: the name may
    stand before the next message's text by chance.
    """
    found: dict[str, None] = {}
    shown = forms.texts | forms.one_part  # roles whose messages the template shows at all
    if tools and not (
        forms.tools and all(str(tool.get("function", tool).get("name")) in turns[0].prompt for tool in tools)
    ):
        found["tools"] = None
    earlier, done, at = "", 0, 0
    for turn in turns:
        prompt, own = turn.prompt, turn.own.start
        if not prompt.startswith(earlier):
            done, at = 0, 0
        for index in range(done, own):
            leaf = turn.leaves[index]
            role, field = messages[leaf.message]["role"], leaf.path[0]
            if field == "content" and (text := _needed_text(leaf, role, turn.tags)):
                place = prompt.find(text, at)
                if place >= 0 and (role in shown or len(text) >= _SHORT):
                    at = place + len(text)
                elif not _prompt_shows(turn, index, text, role in shown):
                    found[_KINDS[role]] = None
            elif field == "tool_calls" and leaf.path[2:] in (("name",), ("function", "name")):
                until = _next_text(turn, messages, starts, leaf.message, at)
                if prompt.find(leaf.text, at, until) < 0 and not _prompt_shows(turn, index, leaf.text, role in shown):
                    found["tool call"] = None
        earlier, done = prompt, own
    return tuple(found)


def _next_text(turn: Turn, messages: MessageList, starts: Sequence[int], k: int, from_here: int) -> int:
    """Where the text of the message after message k begins in the prompt; the prompt's end where that is not known."""
    if k + 1 < turn.message:
        for leaf in turn.leaves[starts[k + 1] : starts[k + 2]]:
            text = _needed_text(leaf, messages[k + 1]["role"], turn.tags) if leaf.path[0] == "content" else ""
            if text and (place := turn.prompt.find(text, from_here)) >= 0:
                return place
    return len(turn.prompt)


def _needed_text(leaf: Leaf, role: str, tags: Mapping[str, str]) -> str:
    """What a prompt must hold of a content: it without the reasoning that history need not have."""
    if leaf.path[-1] == "thinking":
        return ""
    block = reasoning.block_of(leaf.text, tags) if role == "assistant" else None
    return (block.answer if block is not None and block.closed else leaf.text).strip()


def _prompt_shows(turn: Turn, index: int, text: str, role_is_shown: bool) -> bool:
    """Whether the prompt holds the text somewhere, as it is, in JSON, or with other white space."""
    if len(text) >= _SHORT:
        if any(form in turn.prompt for form in (json_body(text, True), json_body(text, False))):
            return True
        if "".join(text.split()) in "".join(turn.prompt.split()):
            return True
        if not role_is_shown:
            return False
    try:
        return bool(turn.prompt_marked().spelled(index).strip())
    except Rejected:
        return True  # not known
