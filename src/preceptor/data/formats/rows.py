"""Which format a row has, and the example that it becomes.

A row is recognised by its keys, each row for itself; a key that holds null is absent.

    messages, or conversations               role and content, or from and value (ShareGPT) -> Conversation
    prompt, completion                       two strings -> Completion, which no template touches;
                                             two lists of messages -> Conversation, only the completion trained
    instruction [input] [history], output    Alpaca -> Conversation
    instruction, response | question, answer | prompt, response          -> Conversation
    text                                     -> Document

With any conversation go `system` (a system prompt, put first), `tools` and `chat_template_kwargs`; lists and objects
may be JSON strings. `messages` or `conversations` win over other keys, and all win over `text`, which next to them is a
rendering of the same. A row that fits two formats otherwise, or has a key without which the question is not whole, is
rejected: `columns` in the run file says what is meant. So is one with images, a flag of another trainer and what else
is in UNREAD_COLUMNS. All other keys are ignored.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from preceptor.config import are_documents
from preceptor.data.examples import (
    MEDIA_KEYS,
    ROLES,
    TRAIN_KEYS,
    Completion,
    Conversation,
    Document,
    Example,
    Message,
    Rejection,
    read_message,
    require_json,
    trainable_turns,
)
from preceptor.data.formats.columns import PAIRS, pair_of, unknown_format
from preceptor.data.formats.values import (
    Nulls,
    RawRecord,
    Row,
    Struct,
    Unreadable,
    check_values,
    of_message,
    of_plain_data,
    of_schema,
    parsed,
    spelled,
    text_in,
    unpad,
)
from preceptor.errors import short

UNKNOWN = "no known format"


def read_row(row: Row, source: str, nulls: Nulls = "reject") -> tuple[str, Example | Rejection]:
    """The name of the row's format, for people, and the example that it becomes.

    Whatever goes wrong with one row is its rejection, and the next is read. nulls: what becomes of nulls that may be
    padding (values.py).
    """
    name = UNKNOWN
    try:
        if isinstance(row, Unreadable):
            raise row
        name = format_of(row)
        return name, _example(row, source, nulls)
    except Unreadable as error:
        return name, Rejection(source, error.code, str(error))
    except Exception as error:
        return UNKNOWN, Rejection(
            source, "unreadable", f"it cannot be read: {type(error).__name__}: {short(str(error))}"
        )


def format_of(row: RawRecord) -> str:
    """The name of the row's format, for people. Raises Unreadable for what `parsed` cannot read."""
    keys = [key for key, value in row.items() if value is not None]
    for key in ("messages", "conversations"):
        if key in keys:
            messages = parsed(row[key])
            first = next(iter(messages), None) if isinstance(messages, list) else None
            return "ShareGPT conversations" if isinstance(first, dict) and "from" in first else "messages"
    try:
        pair = pair_of(keys)
    except Unreadable:
        return UNKNOWN
    if pair is not None:
        if pair == PAIRS[1]:
            return f"Alpaca: instruction, {'input and ' * ('input' in row)}output"
        as_messages = pair == PAIRS[0] and not isinstance(_read_messages(row["prompt"]), str)
        return " and ".join(pair) + " as messages" * as_messages
    return "text" if "text" in keys else UNKNOWN


def _check_columns(row: RawRecord) -> None:
    """Raises Unreadable for a key without which the example would say something else than the file does."""
    for key, instead in UNREAD_COLUMNS.items():
        value = row.get(key)
        if value or (key == "enable_thinking" and value == 0):  # which asks for something too
            raise Unreadable(
                "unread_column", f"the example has {key!r}, which is not read: {instead}{_TO_READ_WITHOUT}"
            )
    for key in (*TRAIN_KEYS, "weight", "train_detail"):
        value = spelled(row.get(key))
        changes = value != 1 if key == "weight" else value == 0  # asks for more than to train the example as it is
        if isinstance(value, list | dict) or (changes and value is not None and not isinstance(value, str)):
            raise Unreadable(
                "unread_column",
                f"the example has {key}: {short(value)}, which is not read here: give it to the messages that it is "
                f"meant for, or set `weight` for the source{_TO_READ_WITHOUT}",
            )


def _example(given: RawRecord, source: str, nulls: Nulls) -> Example:
    row = {key: value for key, value in given.items() if value is not None}
    check_values(row, "")
    _check_columns(row)
    if "messages" in row and "conversations" in row:
        raise Unreadable("ambiguous_format", "the example has messages and conversations; say which with `columns`")
    key = next((key for key in ("messages", "conversations") if key in row), None)
    if key is not None:
        if row.get("documents"):
            raise Unreadable(
                "unread_column",
                "the example has 'documents', which is not read: write `chat_template_kwargs: {documents: ...}`, which "
                f"a template can read{_TO_READ_WITHOUT}",
            )
        return _conversation(row, source, nulls, ((key, row[key], True),))
    pair = pair_of(list(row))
    if pair is not None:
        check_whole(row, pair)
    if pair == PAIRS[0]:
        return _prompt_completion(row, source, nulls)
    if pair is not None:
        return _conversation(row, source, nulls, ((pair[0], pair_messages(row, pair), True),))
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise Unreadable("empty_text", f"text is {short(row['text'])}; it must be a string that is not empty")
        return Document(source, row["text"])
    raise Unreadable("unknown_format", unknown_format(given))


MessageField = tuple[str, Any, bool]  # the key that holds messages, the messages, whether they are trained


def _conversation(row: RawRecord, source: str, nulls: Nulls, parts: Sequence[MessageField]) -> Conversation:
    tools = _tools(row, nulls) if row.get("tools", "") != "" else []
    messages: list[Message] = []
    rule = of_message(tools)
    for key, value, trained in parts:
        raw = [  # nulls of a message that a function has made are meant
            unpad(message, rule, nulls, f"{key}[{k}]") if isinstance(message, Struct) else message
            for k, message in enumerate(_message_list(value, key))
        ]
        if key == parts[0][0] and row.get("system", "") != "":
            raw = _with_system(row, raw)
        read = [read_message(message, f"{key}[{k}]") for k, message in enumerate(raw)]
        messages += read if trained else [replace(message, train=False) for message in read]
    if not any(message.role == "assistant" for message in messages):
        raise Unreadable("no_assistant_message", "no message has the role assistant, so nothing can be trained")
    if not trainable_turns(messages):
        raise Unreadable("nothing_to_train", "every assistant message has train: false or weight 0")
    given = _template_kwargs(row, nulls) if row.get("chat_template_kwargs", "") != "" else {}
    return Conversation(source, tuple(messages), tools or None, given)


def _message_list(value: Any, key: str) -> list[Any]:
    value = parsed(value)
    if not isinstance(value, list) or not value:
        raise Unreadable("no_messages", f"{key} is {short(value)}; it must be a list of at least one message")
    if any(isinstance(message, dict) and "from" in message for message in value):
        return from_sharegpt(value, key)
    return value


def _read_messages(value: Any) -> Any:
    """Of a string of JSON that is messages, the messages; anything else, also what only looks like JSON, as it is."""
    if not (isinstance(value, str) and value.lstrip().startswith("[")):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    is_messages = found and all(isinstance(each, dict) and _looks_like_message(each) for each in found)
    return parsed(value) if is_messages else value


def _looks_like_message(given: Mapping[str, Any]) -> bool:
    """And not like a record in which someone has a role, or a journey leads from somewhere."""
    role, said_by = given.get("role"), given.get("from")
    own = isinstance(role, str) and role in ROLES and bool({"content", "tool_calls"} & given.keys())
    return own or (isinstance(said_by, str) and said_by in _SHAREGPT_ROLES and "value" in given)


def _with_system(row: RawRecord, messages: list[Any]) -> list[Any]:
    system = row["system"]
    if not isinstance(system, str):
        raise Unreadable("bad_system", f"system is {short(system)}; it must be a string")
    first = messages[0] if isinstance(messages[0], dict) else {}
    if first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    if first.get("content") != system:
        raise Unreadable("two_system_prompts", "it has a system prompt and its first message is another; keep one")
    return messages


def _tools(row: RawRecord, nulls: Nulls) -> list[dict[str, Any]]:
    tools = parsed(row["tools"])
    if isinstance(tools, list):
        tools = [parsed(tool) for tool in tools]
        if all(isinstance(tool, dict) for tool in tools):
            require_json(tools, "tools")
            return [unpad(tool, of_schema, nulls, f"tools[{k}]") for k, tool in enumerate(tools)]
    raise Unreadable("bad_tools", f"tools is {short(tools)}; it must be a list of JSON schemas, or that list as JSON")


def _template_kwargs(row: RawRecord, nulls: Nulls) -> dict[str, Any]:
    kwargs = parsed(row["chat_template_kwargs"])
    if not isinstance(kwargs, dict):
        raise Unreadable("bad_template_kwargs", f"chat_template_kwargs is {short(kwargs)}; it must be an object")
    require_json(kwargs, "chat_template_kwargs")
    if not are_documents(kwargs.get("documents")):
        where = "chat_template_kwargs.documents"
        raise Unreadable(
            "bad_template_kwargs", f"{where} is {short(kwargs['documents'])}; it must be a list of objects"
        )
    given = {k: v for k, v in kwargs.items() if v is not None or not isinstance(kwargs, Struct)}
    return {key: unpad(value, of_plain_data, nulls, f"chat_template_kwargs.{key}") for key, value in given.items()}


def _prompt_completion(row: RawRecord, source: str, nulls: Nulls) -> Example:
    prompt, completion = _read_messages(row["prompt"]), _read_messages(row["completion"])
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise Unreadable("empty_answer", "completion is empty")
        for key in ("system", "tools", "chat_template_kwargs"):
            if row.get(key):
                raise Unreadable(
                    "needs_template",
                    f"prompt and completion are plain strings, which no template touches, so {key} would be lost; for "
                    "a conversation set `columns: {prompt: prompt, response: completion}` and its other keys",
                )
        return Completion(source, prompt, completion)
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise _one_of_two(prompt, "completion", completion)
    return _conversation(row, source, nulls, (("prompt", prompt, False), ("completion", completion, True)))


def _one_of_two(prompt: Any, key: str, answer: Any) -> Unreadable:
    found = f"prompt is {type(prompt).__name__} and {key} {type(answer).__name__}"
    return Unreadable("bad_prompt_completion", f"{found}; both must be strings or both lists of messages")


# What may belong to a question that is asked of a pair's first key; training without it would teach to guess.
UNREAD_COLUMNS: Mapping[str, str] = {
    **dict.fromkeys(MEDIA_KEYS, "only text is trained here"),
    "functions": "write them as `tools`",
    "function_call": "write calls as `tool_calls` of a message",
    "enable_thinking": "write `chat_template_kwargs: {enable_thinking: ...}`",
}
"""Keys of an example without which it would say something else -> what to do."""
_TO_READ_WITHOUT = ". To read the example without it, name the columns to read with `columns`"
PARTS_OF_A_QUESTION = ("input", "history", "context", "passage", "document", "documents", "choices", "options")


def check_whole(row: RawRecord, pair: tuple[str, str]) -> None:
    """Raises Unreadable for a key that the question may need and that this pair does not read."""
    for key in PARTS_OF_A_QUESTION:
        if row.get(key) and not (pair[0] == "instruction" and key in ("input", "history")):
            raise Unreadable(
                "unread_column",
                f"the example has {key!r}, which {' and '.join(pair)} leave out; make it part of the question, or set "
                f"`columns: {{{pair[0]}: {pair[0]}, {pair[1]}: {pair[1]}}}` to read these alone",
            )


def pair_messages(row: RawRecord, pair: tuple[str, str]) -> list[dict[str, Any]]:
    """A prompt and its answer as messages.

    Alpaca's `input`, where it is not blank, follows the instruction after a blank line; `history` is a list of earlier
    [instruction, answer] pairs, trained like the last. A `prompt`, or it and its `response`, may be messages. Raises
    Unreadable for what is no text.
    """
    if pair[0] == "prompt":
        prompt, said = _read_messages(row["prompt"]), _read_messages(row["response"])
        if isinstance(prompt, list):
            said = said if isinstance(said, list) else [{"role": "assistant", "content": text_in(row, "response")}]
            return [*(_message_list(prompt, "prompt") if prompt else []), *_message_list(said, "response")]
        if isinstance(said, list):
            raise _one_of_two(prompt, "response", said)
    exchanges, question = [], text_in(row, pair[0])
    if pair[0] == "instruction":
        exchanges = _history(row.get("history"))
        if text_in(row, "input").strip():
            question = f"{question}\n\n{row['input']}" if question.strip() else row["input"]
    answer = text_in(row, pair[1])
    for key, text, code in ((pair[0], question, "empty_prompt"), (pair[1], answer, "empty_answer")):
        if not text.strip():
            raise Unreadable(code, f"{key} is empty")
    return [
        {"role": role, "content": content}
        for exchange in [*exchanges, (question, answer)]
        for role, content in zip(("user", "assistant"), exchange, strict=True)
    ]


def _history(value: Any) -> list[tuple[str, str]]:
    value = parsed(value) or []
    if isinstance(value, list) and all(
        isinstance(pair, list) and [type(t) for t in pair] == [str, str] for pair in value
    ):
        return [(asked, said) for asked, said in value]
    raise Unreadable("bad_history", f"history is {short(value)}; it must be a list of [instruction, answer] pairs")


# ShareGPT: messages with `from` and `value` ---------------------------------------------------------------------------

# A function_call becomes an assistant's message with tool_calls: `value` is JSON, {"name": ..., "arguments": ...}, or a
# list of such, as LLaMA-Factory writes it. All other keys (train, weight, reasoning_content, ...) stay as they are.

_SHAREGPT_ROLES = {
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
    elif isinstance(said_by, str) and said_by in _SHAREGPT_ROLES:
        read = {"role": _SHAREGPT_ROLES[said_by], "content": value}
    else:
        known = ", ".join([*_SHAREGPT_ROLES, "function_call"])
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
