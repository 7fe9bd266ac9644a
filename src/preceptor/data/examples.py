"""Examples: conversations with their messages, completions, documents; and the validation of messages.

An *example* is one record of the data: a `Conversation` (messages, rendered by a chat template), a `Completion` (a
prompt and what must follow it, as plain strings) or a `Document` (plain text, every token trained). Every example knows
its `source`, "file:line". What cannot be trained is a `Rejection` with a reason code and a sentence.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from preceptor.errors import short

ROLES = ("system", "developer", "user", "assistant", "tool")

# Keys of a message that say whether it is trained: ours, and those of Axolotl, ms-swift and verl.
TRAIN_KEYS = ("train", "trainable", "loss", "loss_mask")

MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")
_TEXT_ONLY = "only text is trained here"
_UNREAD_KEYS: Mapping[str, str] = {
    **dict.fromkeys(MEDIA_KEYS, _TEXT_ONLY),
    "train_detail": "a message is trained whole or, with `train: false`, not at all",
    "function_call": "write the call as `tool_calls`",
    "refusal": "write what the model is to say as `content`",
}
"""Keys of a message without which it would say something else -> what to do."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """An example that is not trained: its place, a reason code to count by, and a sentence that says what to do."""

    source: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation, in the chat-completions format.

    `given` is the message exactly as the file holds it; the template sees this and nothing else, so that no field is
    renamed, padded with nulls or lost. The attributes read from it are what the rest of the program needs to know.
    """

    given: Mapping[str, Any]
    train: bool = True
    weight: float = 1.0

    @property
    def role(self) -> str:
        return str(self.given["role"])

    @property
    def content(self) -> str:
        """The message's text; "" where there is none, parts joined, a tool's result that is an object as JSON."""
        content = self.given.get("content")
        if content is None:
            return ""
        if isinstance(content, str):
            return content
        if isinstance(content, Mapping):
            return json.dumps(content, ensure_ascii=False)
        return "".join(part["text"] for part in content)

    @property
    def reasoning_content(self) -> str:
        return self.given.get("reasoning_content") or ""

    @property
    def tool_calls(self) -> Sequence[Mapping[str, Any]]:
        return self.given.get("tool_calls") or ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, with the tools that were offered (JSON schemas, exactly as given) and template arguments."""

    source: str
    messages: tuple[Message, ...]
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and the text that must follow it, as plain strings that no template touches; eos ends the text."""

    source: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text, every token of it trained; eos ends it."""

    source: str
    text: str


Example = Conversation | Completion | Document


def num_characters(example: Example) -> int:
    """Of the texts of an example, without tools."""
    if isinstance(example, Conversation):
        return sum(len(message.content) + len(message.reasoning_content) for message in example.messages)
    return len(example.text) if isinstance(example, Document) else len(example.prompt) + len(example.completion)


def read_message(raw: object, where: str) -> Message | str:
    """One message of a file -> Message, or "code: sentence" saying why not."""
    if not isinstance(raw, dict):
        return f"bad_message: {where} is {type(raw).__name__}, not an object with role and content"
    role = raw.get("role")
    if role not in ROLES:
        return f"unknown_role: {where} has role {short(role)}; known roles are {', '.join(ROLES)}"
    problem = _problem(raw, where)
    if problem:
        return problem
    train, weight = _trained(raw, where), 1.0 if raw.get("weight") is None else raw["weight"]
    if isinstance(train, str):
        return train
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        return f"bad_message: {where}.weight is {short(weight)}; it must be a number of at least 0"
    given = {key: value for key, value in raw.items() if key not in (*TRAIN_KEYS, "weight")}
    if role == "assistant":
        message = Message(given, train=train is not False and weight > 0, weight=float(weight))
        if not (message.content.strip() or message.tool_calls):
            return f"empty_answer: {where} is an assistant message with neither content nor tool_calls"
        return message
    if train or weight not in (0, 1):
        return (
            f"not_an_answer: {where} is to be trained and its role is {role}, but only assistant messages are; remove "
            "the key that says so (data.train_on: all trains every message)"
        )
    return Message(given, train=False, weight=float(weight))


def _problem(raw: Mapping[str, Any], where: str) -> str | None:
    """What is wrong with the fields that say something, as "code: sentence". A tool's result may be an object."""
    for key in ("content", "reasoning_content"):
        is_result = key == "content" and raw.get("role") == "tool" and isinstance(raw.get(key), dict)
        problem = None if is_result else _text_problem(raw.get(key), f"{where}.{key}")
        if problem:
            return problem
    calls = raw.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        return f"bad_message: {where}.tool_calls must be a list of objects"
    for key, instead in _UNREAD_KEYS.items():
        if raw.get(key):
            return f"unread_field: {where}.{key} is not read: {instead}"
    return None


def _trained(raw: Mapping[str, Any], where: str) -> bool | str | None:
    """What the message says of whether it is trained, or "code: sentence"; None where it says nothing."""
    said = {key: raw[key] for key in TRAIN_KEYS if raw.get(key) is not None}
    for key, value in said.items():
        if value not in (True, False):
            return f"bad_message: {where}.{key} is {short(value)}; it must be true or false"
    if len(set(map(bool, said.values()))) > 1:
        both = " and ".join(f"{key}: {str(bool(value)).lower()}" for key, value in said.items())
        return f"bad_message: {where} has {both}; keep one of them"
    return bool(next(iter(said.values()))) if said else None


def _text_problem(value: object, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list):
        return f"bad_message: {where} must be a string or a list of text parts, not {type(value).__name__}"
    for index, part in enumerate(value):
        at = f"{where}[{index}]"
        if not isinstance(part, dict):
            return f'bad_message: {at} is {type(part).__name__}; write a part as {{"type": "text", "text": ...}}'
        if part.get("type", "text") != "text":
            return f"unread_field: {at} is a part of type {short(part['type'])}; only text is trained here"
        if not isinstance(part.get("text"), str):
            return f"bad_message: {at}.text is {short(part.get('text'))}; it must be a string"
    return None


def read_messages(raw: object, source: str, where: str = "messages") -> tuple[Message, ...] | Rejection:
    """The value of a `messages` key -> messages, or the Rejection of the first thing wrong with it."""
    if not isinstance(raw, list) or not raw:
        return Rejection(source, "no_messages", f"{where} must be a list of at least one message")
    messages = []
    for index, item in enumerate(raw):
        message = read_message(item, f"{where}[{index}]")
        if isinstance(message, str):
            code, _, sentence = message.partition(": ")
            return Rejection(source, code, sentence)
        messages.append(message)
    return tuple(messages)


def trainable_turns(messages: Sequence[Message]) -> list[int]:
    """Indices of the assistant messages that are to be trained."""
    return [k for k, message in enumerate(messages) if message.role == "assistant" and message.train]
