"""Task files: one JSON object a line, one item an object, all items of a file of one kind.

    generation       {"messages": [...] or "prompt": "...", "accepted": ["..."], "match": "exact"}
    multiple choice  {"messages": [...] or "prompt": "...", "choices": ["...", "..."], "answer": 0}
    perplexity       {"text": "..."}

`match` is exact (if absent), contains, regex or numeric. `until`: texts at the first of which an answer ends. With
messages may go `tools` and `chat_template_kwargs`. `family`, `wording` and `kind` are groups: results are also given
for each of their values. A question file (`messages` that end in the ideal answer, `answers`) is a generation task.

A task is named by the path of its file; `scholar:NAME` is one that ships with the package (`.jsonl` may be left out).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from preceptor.config.sections import nearest
from preceptor.data.examples import Rejection, read_messages
from preceptor.data.sources import read_rows
from preceptor.errors import DataError
from preceptor.evaluate.score import MATCHES, Match, is_number

Kind = Literal["generation", "multiple choice", "perplexity"]
GROUPS = ("family", "wording", "kind")

_GIVEN = ("messages", "prompt", "tools", "chat_template_kwargs")
_KEYS: Mapping[Kind, tuple[str, ...]] = {
    "generation": (*_GIVEN, "accepted", "answers", "match", "until"),
    "multiple choice": (*_GIVEN, "choices", "answer"),
    "perplexity": ("text",),
}


@dataclass(frozen=True, slots=True)
class Given:
    """What a model reads before it answers: messages (with tools and template arguments), or a prompt as plain text."""

    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> str:
        """The last message's words, or the prompt."""
        if self.messages is None:
            return self.prompt or ""
        content = self.messages[-1].get("content")
        return content if isinstance(content, str) else "".join(part["text"] for part in content or ())


@dataclass(frozen=True, slots=True)
class Item:
    """One item. accepted, match and until are of a generation, choices and answer of a choice, text of perplexity."""

    source: str
    given: Given | None = None
    accepted: tuple[str, ...] = ()
    match: Match = "exact"
    until: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    answer: int = 0
    text: str = ""
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """A named list of items of one kind."""

    name: str
    kind: Kind
    items: tuple[Item, ...]

    def limited(self, num_items: int | None, seed: int = 0) -> "Task":
        """A seeded choice of at most `num_items`, in the order of the file."""
        if num_items is None or num_items >= len(self.items):
            return self
        chosen = np.random.default_rng(seed).permutation(len(self.items))[:num_items]
        return Task(self.name, self.kind, tuple(self.items[index] for index in sorted(chosen.tolist())))


def read_task(path: str) -> Task:
    """Raises DataError, naming file:line, for a row that is no item, and for items of several kinds in one file."""
    kind: Kind | None = None
    items = []
    for source, row in read_rows(file_of(path)):
        row = {key: value for key, value in row.items() if value is not None}
        found = _kind_of(row, source)
        if kind not in (None, found):
            raise DataError(f"{source}: a {found} item in a {kind} task; give each kind a file of its own")
        kind = found
        items.append(_READ[kind](row, source))
    assert kind is not None, "a file without rows is rejected when it is read"
    return Task(path, kind, tuple(items))


def read_texts(path: str) -> Task:
    """A perplexity task: a task file, or a .txt file of which each paragraph (up to an empty line) is an item."""
    if not path.endswith(".txt"):
        task = read_task(path)
        if task.kind != "perplexity":
            raise DataError(f"{path}: a {task.kind} task where texts are wanted; its rows need `text`")
        return task
    try:
        whole = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from None
    items, line = [], 1
    for part in re.split(r"(\n\s*\n)", whole):
        if part.strip():
            items.append(Item(f"{path}:{line + len(part) - len(part.lstrip(chr(10)))}", text=part.strip("\n")))
        line += part.count("\n")
    if not items:
        raise DataError(f"{path}: the file holds no text")
    return Task(path, "perplexity", tuple(items))


def read_prompts(path: str) -> list[tuple[str, Given, str]]:
    """Source, what is given, and the reference answer ("" if there is none) of each row with messages or a prompt."""
    prompts = []
    for source, row in read_rows(file_of(path)):
        row = {key: value for key, value in row.items() if value is not None}
        _require(row.keys() & {"messages", "prompt"} != set(), source, "a prompt row needs `messages` or `prompt`")
        given, ideal = _read_given(row, source)
        prompts.append((source, given, ideal or ""))
    return prompts


def choose_prompts(path: str | None, tasks: Sequence[Task], num: int, seed: int) -> list[tuple[str, Given, str]]:
    """At most `num` prompts by `seed`, in order: those of a file, or the messages of the generation tasks.

    A prompt of plain text is not taken from a task: no answer is asked for, and both models go on with it alike.
    """
    if path is not None:
        prompts = read_prompts(path)
    else:
        items = [item for task in tasks if task.kind == "generation" for item in task.items]
        prompts = [
            (item.source, item.given, item.accepted[0] if item.match == "exact" else "")
            for item in items
            if item.given is not None and item.given.messages is not None
        ]
    chosen = np.random.default_rng(seed).permutation(len(prompts))[:num]
    return [prompts[index] for index in sorted(chosen.tolist())]


def file_of(path: str) -> str:
    """`scholar:heldout` is `scholar:heldout.jsonl`; any other path is itself."""
    return f"{path}.jsonl" if path.startswith("scholar:") and not Path(path).suffix else path


# One item ------------------------------------------------------------------------------------------------------------


def _kind_of(row: Mapping[str, Any], source: str) -> Kind:
    kinds: Mapping[str, Kind] = {
        "choices": "multiple choice", "accepted": "generation", "answers": "generation", "text": "perplexity",
    }  # fmt: skip
    kind = next((kind for key, kind in kinds.items() if key in row), None)
    if kind is None:
        raise DataError(
            f"{source}: not an item of a task: it needs `accepted` (generation), `choices` (multiple choice) or "
            f"`text` (perplexity); it has {', '.join(row) or 'no keys'}"
        )
    known = (*_KEYS[kind], *GROUPS)
    for key in row:
        if key not in known:
            raise DataError(f"{source}: unknown key {key!r} of a {kind} item; {nearest(key, known)}")
    return kind


def _read_generation(row: Mapping[str, Any], source: str) -> Item:
    given, ideal = _read_given(row, source)
    _require(not {"accepted", "answers"} <= row.keys(), source, "`accepted` and `answers` are the same; give one")
    accepted = _texts(row.get("accepted", row.get("answers")), "accepted", source)
    match = row.get("match", "exact")
    _require(match in MATCHES, source, f"match is {match!r}; it must be one of {', '.join(MATCHES)}")
    for text in accepted:
        if match == "regex":
            try:
                re.compile(text)
            except re.error as error:
                raise DataError(f"{source}: accepted {text!r} is no regular expression: {error}") from None
        _require(match != "numeric" or is_number(text), source, f"accepted {text!r} is not a number; match is numeric")
    _require(ideal is None or "answers" in row, source, "the last message is an assistant's; nothing is left to answer")
    until = _texts(row["until"], "until", source, blank=True) if "until" in row else ()
    return Item(source, given, accepted, match, until, groups=_groups(row, source))


def _read_choice(row: Mapping[str, Any], source: str) -> Item:
    given, ideal = _read_given(row, source)
    choices = _texts(row["choices"], "choices", source)
    _require(len(set(choices)) == len(choices) > 1, source, "`choices` must be at least two different texts")
    answer = row.get("answer")
    right = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)
    _require(right, source, f"answer is {answer!r}; it must be the index of the right choice, 0 to {len(choices) - 1}")
    _require(ideal is None, source, "the last message is an assistant's; nothing is left to choose")
    return Item(source, given, choices=choices, answer=int(row["answer"]), groups=_groups(row, source))


def _read_text(row: Mapping[str, Any], source: str) -> Item:
    return Item(source, text=_text(row, "text", source), groups=_groups(row, source))


_READ: Mapping[Kind, Callable[[Mapping[str, Any], str], Item]] = {
    "generation": _read_generation,
    "multiple choice": _read_choice,
    "perplexity": _read_text,
}


def _read_given(row: Mapping[str, Any], source: str) -> tuple[Given, str | None]:
    """What is given, and the words of a last message that is the assistant's, which is not given."""
    _require(("messages" in row) != ("prompt" in row), source, "give either `messages` or `prompt`")
    if "prompt" in row:
        for key in ("tools", "chat_template_kwargs"):
            _require(key not in row, source, f"`{key}` goes with messages; a prompt is plain text")
        return Given(prompt=_text(row, "prompt", source)), None
    messages = read_messages(row["messages"], source)
    if isinstance(messages, Rejection):
        raise DataError(f"{source}: {messages.message}")
    tools, kwargs = row.get("tools"), row.get("chat_template_kwargs", {})
    listed = tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools))
    _require(listed, source, "`tools` must be a list of objects")
    _require(isinstance(kwargs, dict), source, "`chat_template_kwargs` must be an object")
    ideal = messages[-1].content if messages[-1].role == "assistant" else None
    asked = messages if ideal is None else messages[:-1]
    _require(len(asked) > 0, source, "the only message is the assistant's; nothing is asked")
    return Given(tuple(dict(message.given) for message in asked), None, tools, kwargs), ideal


def _text(row: Mapping[str, Any], key: str, source: str) -> str:
    text = row[key]
    _require(isinstance(text, str) and text.strip() != "", source, f"`{key}` must be a text that is not empty")
    return str(text)


def _texts(value: object, key: str, source: str, blank: bool = False) -> tuple[str, ...]:
    """A list of texts; blank: space alone is a text too."""
    texts = value if isinstance(value, list) else []
    right = all(isinstance(text, str) and (text.strip() or (blank and text)) for text in texts)
    _require(right and len(texts) > 0, source, f"`{key}` must be a list of texts, none of them empty")
    return tuple(texts)


def _groups(row: Mapping[str, Any], source: str) -> dict[str, str]:
    groups = {key: row[key] for key in GROUPS if key in row}
    for key, value in groups.items():
        _require(isinstance(value, str), source, f"`{key}` must be a string; it names a group")
    return groups


def _require(holds: bool, source: str, sentence: str) -> None:
    if not holds:
        raise DataError(f"{source}: {sentence}")
