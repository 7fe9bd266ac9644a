"""Data files -> records with their `file:line`.

A row of a JSON-lines file is recognised by its keys, each row for itself:

    messages [tools] [chat_template_kwargs]   -> Conversation
    prompt, completion (two lists)            -> Conversation; only the completion's assistant messages are trained
    prompt, completion (two strings)          -> Completion
    text                                      -> Document

Other keys are ignored. A row that is no such thing, or cannot be trained, becomes a Refusal; a file that cannot be
read as JSON lines is a DataError, since more than that row may be damaged.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.data.conversation import (
    Completion,
    Conversation,
    Document,
    Message,
    Record,
    Refusal,
    read_messages,
    trainable_turns,
)
from preceptor.errors import DataError
from preceptor.scholar import data_file

PACKAGED = "scholar:"


def resolve(path: str) -> Path:
    """The file that a run file's `path` names; `scholar:NAME` ships with the package. Raises DataError."""
    file = data_file(path.removeprefix(PACKAGED)) if path.startswith(PACKAGED) else Path(path)
    if file.is_dir():
        raise DataError(f"{path}: is a folder; name a JSON-lines file in it")
    if not file.is_file():
        raise DataError(f"{path}: no such data file")
    return file


def read_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a JSON-lines file with its source, "file:line". Blank lines are passed over.

    Raises DataError for a missing file, one without a row, one that is not UTF-8, and a line that is no JSON object.
    """
    file = resolve(path)
    empty = True
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    empty = False
                    yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8") from None
    if empty:
        raise DataError(f"{path}: the file is empty; it needs at least one row")


def _parse(line: str, source: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}: broken JSON: {error.msg} at column {error.colno}. Each line must be one JSON object; mend or "
            "delete the line (a cut-off last line often means that the file was not written to its end)"
        ) from None
    if not isinstance(row, dict):
        raise DataError(f"{source}: a row must be a JSON object, found {type(row).__name__}")
    return row


def read_records(path: str) -> Iterator[Record | Refusal]:
    """Each row of a file as a record or a refusal. Raises DataError as `read_rows` does."""
    for source, row in read_rows(path):
        yield to_record(row, source)


def to_record(row: dict[str, Any], source: str) -> Record | Refusal:
    """One row, recognised by its keys."""
    if "messages" in row:
        return _conversation(row, source, read_messages(row["messages"], source))
    if "prompt" in row and "completion" in row:
        return _prompt_completion(row, source)
    if "text" in row:
        text = row["text"]
        if not isinstance(text, str) or not text.strip():
            return Refusal(source, "empty_text", f"text is {_short(text)}; it must be a string that is not empty")
        return Document(source, text)
    return Refusal(
        source,
        "unknown_format",
        f"the row has the keys {', '.join(map(repr, row)) or 'none'}; "
        "it needs messages, or prompt and completion, or text",
    )


def _conversation(row: dict[str, Any], source: str, messages: tuple[Message, ...] | Refusal) -> Conversation | Refusal:
    if isinstance(messages, Refusal):
        return messages
    if not any(message.role == "assistant" for message in messages):
        return Refusal(source, "no_assistant_message", "no message has the role assistant, so nothing can be trained")
    if not trainable_turns(messages):
        return Refusal(source, "nothing_to_train", "every assistant message has train: false or weight 0")
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return Refusal(source, "bad_tools", "tools must be a list of JSON schemas")
    kwargs = row.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        return Refusal(source, "bad_template_kwargs", "chat_template_kwargs must be an object")
    return Conversation(source, messages, tools or None, kwargs or {})


def _prompt_completion(row: dict[str, Any], source: str) -> Record | Refusal:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            return Refusal(source, "empty_answer", "completion is empty")
        return Completion(source, prompt, completion)
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        return Refusal(
            source,
            "bad_prompt_completion",
            f"prompt is {type(prompt).__name__} and completion {type(completion).__name__}; "
            "both must be strings or both lists of messages",
        )
    before = read_messages(prompt, source, "prompt")
    after = read_messages(completion, source, "completion")
    if isinstance(before, Refusal):
        return before
    if isinstance(after, Refusal):
        return after
    return _conversation(row, source, (*(replace(message, train=False) for message in before), *after))


def mix(per_source: Iterable[tuple[list[Any], float]], seed: int) -> list[Any]:
    """Rows of several sources in one list, each source `weight` times: whole copies, then a seeded part of one."""
    rng = np.random.default_rng(seed)
    mixed = []
    for rows, weight in per_source:
        copies, part = divmod(weight, 1)
        mixed.extend(rows * int(copies))
        chosen = rng.permutation(len(rows))[: round(part * len(rows))]
        mixed.extend(rows[index] for index in sorted(chosen.tolist()))
    return mixed


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
