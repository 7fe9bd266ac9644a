"""Examples: conversations with their messages, completions, documents; and the validation of messages.

An *example* is one record of the data: a `Conversation` (messages, rendered by a chat template), a `Completion` (a
prompt and what must follow it, as plain strings) or a `Document` (plain text, every token trained). Every example knows
its `source`, "file:line". What cannot be trained is a `Rejection` with a reason code and a sentence.
"""

import difflib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from preceptor.config import nearest
from preceptor.errors import ConfigError, DataError, short

ROLES = ("system", "developer", "user", "assistant", "tool")

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

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

_BESIDE_ARGUMENTS = frozenset({"name", "function", "id", "type", "index"})  # keys of a tool call
_OTHER_ARGUMENTS = frozenset({"args", "kwargs", "parameters", "params", "input", "inputs", "tool_input"})
_A_CALL = '{"type": "function", "function": {"name": ..., "arguments": {...}}}'


@dataclass(frozen=True, slots=True)
class Rejection:
    """An example that is not trained: its place, a reason code to count by, and a sentence that says what to do."""

    source: str
    code: str
    message: str


class Unreadable(Exception):
    """What is wrong with a row or message: a code of READING and a sentence; becomes a Rejection."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation, in the chat-completions format.

    `given` is the message exactly as the file holds it, but for reasoning in parts, which is one text; the template
    sees this and nothing else, so that no field is renamed, padded with nulls or lost. The attributes read from it are
    what the rest of the program needs to know. weight: 0 where the message says that it is context only.
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
        """The message's reasoning, in whichever field; "" where there is none."""
        return next((self.given[name] for name in REASONING_FIELDS if self.given.get(name)), "")

    @property
    def tool_calls(self) -> Sequence[Mapping[str, Any]]:
        return self.given.get("tool_calls") or ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, with the tools that were offered (JSON schemas, exactly as given) and template arguments.

    is_shortened: messages before others were left out (truncation.py).
    """

    source: str
    messages: tuple[Message, ...]
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    is_shortened: bool = False


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


def read_message(raw: object, where: str) -> Message:
    """One message of a file. Raises Unreadable."""
    if not isinstance(raw, dict):
        raise Unreadable("bad_message", f"{where} is {type(raw).__name__}, not an object with role and content")
    role = raw.get("role")
    if role not in ROLES:
        near = difflib.get_close_matches(str(role).lower(), ROLES, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise Unreadable("unknown_role", f"{where} has role {short(role)}; {meant}known roles are {', '.join(ROLES)}")
    others = ((key, raw.get(key)) for key in ("text", "value", "message"))
    under = next((key for key, text in others if isinstance(text, str) and text.strip()), None)
    if under is not None and role != "tool" and not raw.get("content") and not raw.get("tool_calls"):
        raise Unreadable("bad_message", f"{where} has no content; its text is under {under!r}: write it as content")
    _check_fields(raw, where)
    train, weight = _trained(raw, where), 1.0 if raw.get("weight") is None else raw["weight"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise Unreadable("bad_message", f"{where}.weight is {short(weight)}; it must be a number of at least 0")
    own_weight = 0.0 if train is False else float(weight)
    given = {key: value for key, value in raw.items() if key not in (*TRAIN_KEYS, "weight")}
    for key in REASONING_FIELDS:
        if isinstance(given.get(key), list):
            given[key] = "".join(part["text"] for part in given[key])
    if role == "assistant":
        message = Message(given, train=own_weight > 0, weight=own_weight)
        if not (message.content.strip() or message.tool_calls):
            raise Unreadable("empty_answer", f"{where} is an assistant message with neither content nor tool_calls")
        return message
    if train or weight not in (0, 1):
        raise Unreadable(
            "not_an_answer",
            f"{where} is to be trained and its role is {role}, but only assistant messages are; remove the key that "
            "says so (data.train_on: all trains every message)",
        )
    return Message(given, train=False, weight=own_weight)


def _check_fields(raw: Mapping[str, Any], where: str) -> None:
    """Raises Unreadable for a field that says something wrong. A tool's result may be an object."""
    for key in ("content", *REASONING_FIELDS):
        if key == "content" and raw.get("role") == "tool" and isinstance(raw.get(key), dict):
            require_json(raw[key], f"{where}.{key}")
        else:
            _check_text(raw.get(key), f"{where}.{key}")
    require_json(raw.get("tool_calls"), f"{where}.tool_calls")
    calls = raw.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise Unreadable("bad_message", f"{where}.tool_calls must be a list of objects")
    for index, call in enumerate(calls or ()):
        _check_call(call, f"{where}.tool_calls[{index}]")
    for key, instead in _UNREAD_KEYS.items():
        if raw.get(key):
            raise Unreadable("unread_field", f"{where}.{key} is not read: {instead}")


def _check_call(call: Mapping[str, Any], where: str) -> None:
    """Raises Unreadable for a tool call without a name, and for one whose arguments stand under another key."""
    inner = call.get("function")
    function, at = (inner, f"{where}.function") if isinstance(inner, Mapping) else (call, where)
    name, arguments = function.get("name"), function.get("arguments")
    if not (isinstance(name, str) and name.strip()):
        raise Unreadable("bad_tool_call", f"{at}.name is {short(name)}; write a call as {_A_CALL}")
    if arguments and str(arguments).strip() not in ("", "{}"):
        return
    for place, of in ((where, call), (at, function)):
        for key, value in of.items():
            may_hold = key in _OTHER_ARGUMENTS if "arguments" in function else key not in _BESIDE_ARGUMENTS
            if value and value is not arguments and (may_hold or (key == "arguments" and of is not function)):
                instead = f"and the call has no arguments: write it as {_A_CALL}"
                raise Unreadable("unread_field", f"{place}.{key} is not read, {instead}")


def require_json(value: object, where: str, is_key: bool = False) -> None:
    """Raises Unreadable for what JSON cannot spell, such as a date of a Parquet file."""
    if isinstance(value, Mapping) and not is_key:
        for key, inner in value.items():
            require_json(key, f"a key of {where}", is_key=True)
            require_json(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple) and not is_key:
        for index, inner in enumerate(value):
            require_json(inner, f"{where}[{index}]")
    elif not (value is None or isinstance(value, str | int | float)):
        kind = type(value).__name__
        raise Unreadable("unreadable", f"{where} is {short(value)}, and JSON has no {kind}: write a string or a number")


def _trained(raw: Mapping[str, Any], where: str) -> bool | None:
    """What the message says of whether it is trained; None where it says nothing. Raises Unreadable."""
    said = {key: raw[key] for key in TRAIN_KEYS if raw.get(key) is not None}
    for key, value in said.items():
        if value not in (True, False):
            raise Unreadable("bad_message", f"{where}.{key} is {short(value)}; it must be true or false")
    if len(set(map(bool, said.values()))) > 1:
        both = " and ".join(f"{key}: {str(bool(value)).lower()}" for key, value in said.items())
        raise Unreadable("bad_message", f"{where} has {both}; keep one of them")
    return bool(next(iter(said.values()))) if said else None


def _check_text(value: object, where: str) -> None:
    if value is None or isinstance(value, str):
        return
    if not isinstance(value, list):
        kind = type(value).__name__
        raise Unreadable("bad_message", f"{where} must be a string or a list of text parts, not {kind}")
    for index, part in enumerate(value):
        at = f"{where}[{index}]"
        if not isinstance(part, dict):
            kind = type(part).__name__
            raise Unreadable("bad_message", f'{at} is {kind}; write a part as {{"type": "text", "text": ...}}')
        if part.get("type", "text") != "text":
            kind = short(part["type"])
            raise Unreadable("unread_field", f"{at} is a part of type {kind}; only text is trained here")
        if not isinstance(part.get("text"), str):
            raise Unreadable("bad_message", f"{at}.text is {short(part.get('text'))}; it must be a string")


def read_messages(raw: object, source: str, where: str = "messages") -> tuple[Message, ...] | Rejection:
    """The value of a `messages` key -> messages, or the Rejection of the first thing wrong with it."""
    if not isinstance(raw, list) or not raw:
        return Rejection(source, "no_messages", f"{where} must be a list of at least one message")
    try:
        return tuple(read_message(item, f"{where}[{index}]") for index, item in enumerate(raw))
    except Unreadable as error:
        return Rejection(source, error.code, str(error))


def trainable_turns(messages: Sequence[Message]) -> list[int]:
    """Indices of the assistant messages that are to be trained."""
    return [k for k, message in enumerate(messages) if message.role == "assistant" and message.train]


# Why an example is not trained ----------------------------------------------------------------------------------------

READING = frozenset(
    """unreadable broken_character unknown_format ambiguous_format ambiguous_null unread_column unread_field
    no_messages bad_message unknown_role not_an_answer no_assistant_message empty_answer empty_prompt empty_text
    not_text nothing_to_train bad_system two_system_prompts bad_tools bad_tool_call bad_template_kwargs
    bad_prompt_completion bad_history needs_template
    left_out too_long""".split()  # noqa: SIM905 (as words, the list can be read)
)
"""Codes of what is found while an example is read or cut; docs/data.md says what they mean."""

ADVICE: dict[str, str] = {
    # the example itself
    "no_turn": "give it an assistant message that is to be trained (train: true, weight above 0)",
    "special_token_in_text": "remove the token from the text, or set special_tokens_in_text to plain (the text is read "
    "as ordinary characters) or allow (it acts as the token)",
    "unknown_token": "the vocabulary has no token for some of the text: use a tokenizer that covers it, or change it",
    "text_too_large": "a tokenizer would take more than a gigabyte of memory for it: split the text",
    "nothing_to_predict": "an example needs at least two tokens, one to read and one to predict",
    "reasoning_unclosed": "the reasoning does not end, so there is no answer to learn: complete the turn, or set "
    "train: false on it",
    "weight_under_all": "with data.train_on: all each token before the last answer is trained with weight 1, and so is "
    "this message: remove it, or what it says of its training, or set data.train_on: assistant",
    # the template and the messages
    "no_template": "the data began with plain text and the model has no chat template, so none was set: set "
    "data.chat_template",
    "no_prompt": "no server asks a model to speak before anyone has said anything: put a user message first, or set "
    "train: false on this message",
    "template_rejects": "change the messages as the template asks, or choose another template",
    "reserved_argument": "these are arguments of the server's own and reach no template: remove them",
    "arguments_not_object": "write a tool call's arguments as an object, or as a string that holds a JSON object",
    "render_differs": "the template does something that cannot be followed exactly: choose another, and report it",
    # what the template makes of the turn
    "turn_missing": "the template leaves this message out; choose another template, or set train: false on it",
    "content_dropped": "the template leaves the text out (often beside a tool call): move it to a message of its own, "
    "remove it, or choose another template",
    "content_changed": "the template alters the text, so the model would learn something else than what was given: "
    "write it as the template would, or choose another template",
    "reasoning_dropped": "the template does not render reasoning: write it into content, remove it, or choose a "
    "template that renders it (chatml does)",
    "reasoning_twice": "the template puts a reasoning block of its own before that of the content, and leaves "
    "reasoning_content out: remove the block, or choose another template",
    "tool_call_dropped": "the template leaves tool calls, or a part of them, out; choose a template that renders them "
    "(chatml does)",
    # where the turn starts
    "prompt_opens_reasoning": "the prompt that a server builds opens a reasoning block and this turn has none: give it "
    "reasoning_content, set chat_template_kwargs so that the prompt does not open one, or choose another template",
    "prompt_closes_reasoning": "the prompt closes the reasoning block and this turn has reasoning: turn thinking on in "
    "chat_template_kwargs, or remove the reasoning from the turn",
    "prompt_conflicts": "what a server puts before the answer does not stand where the template renders this turn. Fix "
    "the template, or choose another",
    # where the turn ends
    "no_stop_token": "nothing ends this turn: give the tokenizer an eos token, or the model a generation config",
    "stop_inside_turn": "a server would stop in the middle of this turn: remove the stop token from the text, or from "
    "the stop tokens (generation config)",
}
"""Codes of what is found while an example is rendered, and what to do."""

CODES = READING | ADVICE.keys()


def check_codes(allowed: Iterable[str]) -> None:
    """Raises ConfigError for a code of `data.allow_rejected` that no rejection can have."""
    for code in allowed:
        if code not in CODES:
            raise ConfigError(
                f"data.allow_rejected: no example is rejected as {short(code)}; {nearest(code, sorted(CODES))}"
            )


class Rejected(Exception):
    """Raised while an example is rendered, with a code of ADVICE and what was found; becomes a Rejection."""

    def __init__(self, code: str, found: str, helps: str = "") -> None:
        """helps: what is known to help here, said instead of what helps in general."""
        assert code in (CODES if helps else ADVICE), code
        super().__init__(f"{found}: {helps or ADVICE[code]}")
        self.code, self.found = code, found

    def helped_by(self, helps: str) -> "Rejected":
        return Rejected(self.code, self.found, helps)


@dataclass(slots=True)
class Reason:
    """How many examples were rejected with one code; `first` is the first of them, whose sentence says what to do."""

    first: Rejection
    count: int
    allowed: bool


class RejectionCounts:
    """Counts rejections. allowed: the codes for which examples may be left out (`data.allow_rejected`)."""

    def __init__(self, allowed: Collection[str] = (), rejections: Iterable[Rejection] = ()) -> None:
        self._allowed = frozenset(allowed)
        self._reasons: dict[str, Reason] = {}
        for rejection in rejections:
            self.add(rejection)

    def add(self, rejection: Rejection) -> None:
        reason = self._reasons.setdefault(rejection.code, Reason(rejection, 0, rejection.code in self._allowed))
        reason.count += 1

    @property
    def reasons(self) -> list[Reason]:
        """The most frequent first; of equally frequent ones that which came first."""
        return sorted(self._reasons.values(), key=lambda reason: -reason.count)

    @property
    def num_rejected(self) -> int:
        return sum(reason.count for reason in self._reasons.values())

    @property
    def num_not_allowed(self) -> int:
        return sum(reason.count for reason in self._reasons.values() if not reason.allowed)

    def require_few(self, num_rejected: int, num_examples: int, most: float) -> None:
        """Raises DataError where so many, for reasons that are not allowed, are more than the share `most`."""
        if num_rejected > most * num_examples:
            codes = ", ".join([*sorted(self._allowed), *self.not_allowed])
            helps = f", or let such examples be left out with `data.allow_rejected: [{codes}]`"
            raise DataError(
                f"{num_rejected} of {num_examples} examples cannot be trained "
                f"({num_rejected / num_examples:.1%}; data.max_rejected allows {most:.1%}):\n{self}\n"
                f"Fix the data{helps if num_rejected < num_examples else ': none of them is left'}"
            )

    @property
    def not_allowed(self) -> list[str]:
        """Codes of rejections that are not allowed."""
        return [reason.first.code for reason in self.reasons if not reason.allowed]

    @property
    def never_seen(self) -> list[str]:
        """Allowed codes that no rejection has."""
        return sorted(self._allowed - self._reasons.keys())

    def __str__(self) -> str:
        """One line per reason: how often, where first, and what it says there."""
        return "\n".join(
            f"  {reason.count:>6} x {reason.first.code}{' (allowed)' * reason.allowed}: "
            f"first at {reason.first.source}: {reason.first.message}"
            for reason in self.reasons
        )
