"""ShareGPT messages (`from`, `value`) -> messages of the chat-completions format.

    from                                    becomes
    human, user                             user
    gpt, assistant, chatgpt, model          assistant
    system                                  system
    tool, observation                       tool
    function_call                           assistant with tool_calls: `value` is JSON, {"name": ..., "arguments": ...}
                                            or a list of such, as LLaMA-Factory writes it

All other keys of a message (train, weight, reasoning_content, ...) stay as they are.
"""

from typing import Any

from preceptor.data.formats.values import Unreadable, parsed
from preceptor.errors import short

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def from_sharegpt(messages: list[Any], where: str) -> list[dict[str, Any]]:
    """Raises Unreadable for a message that cannot be read so."""
    return [_message(message, f"{where}[{k}]") for k, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or "value" not in message or "from" not in message:
        raise Unreadable("bad_message", f"{where} has no from and value, which the other messages have")
    said_by, value = message["from"], message["value"]
    rest = {key: inner for key, inner in message.items() if key not in ("from", "value")}
    if said_by == "function_call":
        # Content is empty, not absent: templates that add to it fail on an absent one.
        read = {"role": "assistant", "content": "", "tool_calls": _calls(value, where)}
    elif isinstance(said_by, str) and said_by in ROLES:
        read = {"role": ROLES[said_by], "content": value}
    else:
        known = ", ".join([*ROLES, "function_call"])
        raise Unreadable("unknown_role", f"{where} is from {short(said_by)}; known are {known}")
    if twice := next((key for key in read if rest.get(key) not in (None, "", [], read[key])), None):
        raise Unreadable("ambiguous_format", f"{where} has from/value and also a different `{twice}`; remove `{twice}`")
    return type(message)({**read, **{key: inner for key, inner in rest.items() if key not in read}})


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    calls = parsed(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) and "arguments" in c for c in calls):
        raise Unreadable("bad_tool_call", f"{where} is a function_call; its value must be JSON with name and arguments")
    return [{"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]
