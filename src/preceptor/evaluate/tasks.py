"""Task files: one JSON object per line and item; all items of a file have one kind.

    generation       {"messages": [...] or "prompt": "...", "accepted": ["..."], "match": "exact"}
    multiple choice  {"messages": [...] or "prompt": "...", "choices": ["...", "..."], "answer": 0}
    perplexity       {"text": "..."}

`match` is exact (the default), contains, regex or numeric. `until`: an answer ends at the first of these texts.
Messages may come with `tools` and `chat_template_kwargs`. `family`, `wording` and `kind` are groups: results are also
reported for each of their values. A question file (`messages` that end in the ideal answer, and `answers`) is a
generation task.

A task is named by the path of its file. `scholar:NAME` is a task that ships with the package (without `.jsonl`),
`lm_eval:NAME` one of the lm-eval harness (harness.py).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from preceptor.chat.reasoning import content_text
from preceptor.config.code import OwnFunction
from preceptor.config.sections import nearest
from preceptor.data.examples import Rejection, read_messages
from preceptor.data.formats.values import Unreadable, check_values
from preceptor.data.sources import read_rows
from preceptor.errors import DataError, short

OFTEN_EQUAL = 0.5  # share of the prompts that get one answer

# Whether an answer is right ------------------------------------------------------------------------------------------

#     exact      the answer equals an accepted text; whitespace around it is ignored
#     contains   the answer contains an accepted text
#     regex      an accepted pattern is found in the answer (Python's `re.search`)
#     numeric    the last number of the answer equals an accepted one as a decimal: 1,000.0 is 1000, "5 - 3 = 2" is 2
#
# Of an answer with reasoning, only what follows the last `</think>` counts.

Match = Literal["exact", "contains", "regex", "numeric"]

# A sign counts where no digit or bracket stands before it: in "10-5" it is a minus between two numbers.
_SIGN = r"(?:(?<![\d)\]])[-−])?"
_NUMBER = re.compile(rf"{_SIGN}(?:(?<!\d)(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)")


def is_right(text: str, match: Match, accepted: Sequence[str]) -> bool:
    """Whether an answer is right by an accepted text."""
    return any(MATCHES[match](text.rpartition("</think>")[2], each) for each in accepted)


MATCHES: Mapping[Match, Callable[[str, str], bool]] = {
    "exact": lambda text, accepted: text.strip() == accepted.strip(),
    "contains": lambda text, accepted: accepted in text,
    "regex": lambda text, accepted: re.search(accepted, text) is not None,
    "numeric": lambda text, accepted: (found := last_number(text)) is not None and found == last_number(accepted),
}


def last_number(text: str) -> Decimal | None:
    """The last number in digits of a text; None if there is none."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


def is_number(text: str) -> bool:
    """Whether a text is one number and nothing else."""
    return _NUMBER.fullmatch(text.strip()) is not None


def repeated_answer(answers: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A sentence on the answer that most prompts get although they ask for different ones; "" if there is none.

    answers: of each prompt, with the accepted texts.
    """
    given = [(text.strip(), tuple(accepted)) for text, accepted in answers]
    answer, count = next(iter(Counter(text for text, _ in given if text).most_common(1)), ("", 0))
    wanted = {accepted for text, accepted in given if text == answer}
    if count <= max(1, OFTEN_EQUAL * len(given)) or len(wanted) < 2:
        return ""
    which = f"All {count}" if count == len(given) else f"{count} of {len(given)}"
    shown = answer if len(answer) <= 60 else answer[:57] + "..."
    return f"{which} prompts got the same answer: “{shown}”."


T = TypeVar("T")
TaskKind = Literal["generation", "multiple choice", "perplexity"]
HARNESS = "lm_eval:"
GROUPS = ("family", "wording", "kind")

_PROMPT_KEYS = ("messages", "prompt", "tools", "chat_template_kwargs")
_KEYS: Mapping[TaskKind, tuple[str, ...]] = {
    "generation": (*_PROMPT_KEYS, "accepted", "answers", "match", "until"),
    "multiple choice": (*_PROMPT_KEYS, "choices", "answer"),
    "perplexity": ("text",),
}


@dataclass(frozen=True, slots=True)
class TaskPrompt:
    """What a model is given: messages, or plain text."""

    messages: tuple[Mapping[str, Any], ...] | None = None
    text: str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None  # with messages
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # with messages

    @property
    def last_message(self) -> str:
        """The text of the last message, or the plain text."""
        return self.text or "" if self.messages is None else content_text(self.messages[-1])


@dataclass(frozen=True, slots=True)
class TaskItem:
    """One item of a task."""

    source: str
    prompt: TaskPrompt | None = None  # generation and multiple choice
    accepted: tuple[str, ...] = ()  # generation: the right answers, and how they are matched
    match: Match = "exact"
    until: tuple[str, ...] = ()  # generation: texts that end an answer
    choices: tuple[str, ...] = ()  # multiple choice, and the index of the right one
    answer: int = 0
    delimiter: str = ""  # multiple choice: stands before each choice, and is no part of it
    text: str = ""  # perplexity
    groups: Mapping[str, str] = field(default_factory=dict)


class ReferencePrompt(NamedTuple):
    """A prompt with its place in the data and a reference answer, "" if there is none."""

    source: str
    prompt: TaskPrompt
    reference: str


@dataclass(frozen=True, slots=True)
class Task:
    """A named list of items of one kind."""

    name: str
    kind: TaskKind
    items: tuple[TaskItem, ...]
    own: OwnFunction | None = None  # of an answer and its item: one more figure of a generation task
    max_new_tokens: int | None = None  # of an answer, whatever the limit of others

    def limited(self, num_items: int | None, seed: int = 0) -> "Task":
        """A random sample of at most `num_items`, in the order of the file."""
        if num_items is None or num_items >= len(self.items):
            return self
        return replace(self, items=tuple(self.items[at] for at in _sample(len(self.items), num_items, seed)))


def read_task(path: str) -> Task:
    """Read a task file. Raises DataError for a row that is not an item, and for items of several kinds."""
    kind: TaskKind | None = None
    items = []
    for source, row in _rows(path):
        found = _kind_of(row, source)
        if kind not in (None, found):
            raise DataError(f"{source}: a {found} item in a {kind} task; give each kind a file of its own")
        kind = found
        items.append(_item(_READ[kind], row, source))
    assert kind is not None, "reading rejects a file without rows"
    return Task(path, kind, tuple(items))


def read_texts(path: str) -> Task:
    """A perplexity task: a task file, or a .txt file whose paragraphs (separated by empty lines) are the items."""
    if not path.endswith(".txt"):
        task = read_task(path)
        if task.kind != "perplexity":
            raise DataError(f"{path}: a {task.kind} task where texts are wanted; its items need `text`")
        return task
    try:
        whole = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from None
    items, line = [], 1
    for part in re.split(r"(\n\s*\n)", whole):
        if part.strip():
            items.append(TaskItem(f"{path}:{line + len(part) - len(part.lstrip(chr(10)))}", text=part.strip("\n")))
        line += part.count("\n")
    if not items:
        raise DataError(f"{path}: the file holds no text")
    return Task(path, "perplexity", tuple(items))


def read_prompts(path: str) -> list[ReferencePrompt]:
    """The prompts of a file whose rows have `messages` or a `prompt`."""
    return [_item(_read_reference, row, source) for source, row in _rows(path)]


def choose_prompts(path: str | None, tasks: Sequence[Task], num: int, seed: int) -> list[ReferencePrompt]:
    """A random sample of at most `num` prompts, in order: those of a file, or the messages of the generation tasks.

    Plain-text prompts of a task are left out: they ask for no answer, and both models continue them alike.
    """
    if path is not None:
        prompts = read_prompts(path)
    else:
        items = [item for task in tasks if task.kind == "generation" for item in task.items]
        prompts = [
            ReferencePrompt(item.source, item.prompt, item.accepted[0] if item.match == "exact" else "")
            for item in items
            if item.prompt is not None and item.prompt.messages is not None
        ]
    return [prompts[index] for index in _sample(len(prompts), num, seed)]


def _sample(num: int, num_wanted: int, seed: int) -> list[int]:
    """At most `num_wanted` of the indices below `num`, drawn by `seed`, in order."""
    return sorted(np.random.default_rng(seed).permutation(num)[:num_wanted].tolist())


def file_of(path: str) -> str:
    """`scholar:heldout` is `scholar:heldout.jsonl`; any other path is itself."""
    return f"{path}.jsonl" if path.startswith("scholar:") and not Path(path).suffix else path


def _rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and the keys of each row, without those that are null."""
    for source, row in read_rows(file_of(path)):
        yield source, {key: value for key, value in row.items() if value is not None}


def _item(read: Callable[[Mapping[str, Any], str], T], row: Mapping[str, Any], source: str) -> T:
    """What `read` makes of a row. Raises DataError whatever the row holds."""
    try:
        check_values(row, "")
        return read(row, source)
    except (DataError, Unreadable) as error:
        raise DataError(f"{source}: {error}") from None
    except Exception as error:  # a value that no check foresaw
        raise DataError(f"{source}: cannot be read: {type(error).__name__}: {short(str(error))}") from None


# One item ------------------------------------------------------------------------------------------------------------


def _kind_of(row: Mapping[str, Any], source: str) -> TaskKind:
    kinds: Mapping[str, TaskKind] = {
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


def _read_generation(row: Mapping[str, Any], source: str) -> TaskItem:
    prompt, ideal = _read_prompt(row)
    _require(not {"accepted", "answers"} <= row.keys(), "`accepted` and `answers` mean the same; give one of them")
    accepted = _texts(row.get("accepted", row.get("answers")), "accepted")
    match = row.get("match", "exact")
    is_known = isinstance(match, str) and match in MATCHES
    _require(is_known, f"match is {short(match)}; it must be one of {', '.join(MATCHES)}")
    for text in accepted:
        if match == "regex":
            try:
                re.compile(text)
            except re.error as error:
                raise DataError(f"accepted {text!r} is not a regular expression: {error}") from None
        _require(match != "numeric" or is_number(text), f"accepted {text!r} is not a number; match is numeric")
    _require(ideal is None or "answers" in row, "the last message is an assistant's; there is nothing to answer")
    until = _texts(row["until"], "until", blank=True) if "until" in row else ()
    return TaskItem(source, prompt, accepted, match, until, groups=_groups(row))


def _read_choice(row: Mapping[str, Any], source: str) -> TaskItem:
    prompt, ideal = _read_prompt(row)
    choices = _texts(row["choices"], "choices")
    _require(len(set(choices)) == len(choices) > 1, "`choices` must be at least two different texts")
    answer = row.get("answer")
    right = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)
    _require(right, f"answer is {answer!r}; it must be the index of the right choice, 0 to {len(choices) - 1}")
    _require(ideal is None, "the last message is an assistant's; there is nothing to choose")
    return TaskItem(source, prompt, choices=choices, answer=int(row["answer"]), groups=_groups(row))


def _read_text(row: Mapping[str, Any], source: str) -> TaskItem:
    return TaskItem(source, text=_text(row, "text"), groups=_groups(row))


_READ: Mapping[TaskKind, Callable[[Mapping[str, Any], str], TaskItem]] = {
    "generation": _read_generation,
    "multiple choice": _read_choice,
    "perplexity": _read_text,
}


def _read_reference(row: Mapping[str, Any], source: str) -> ReferencePrompt:
    _require(row.keys() & {"messages", "prompt"} != set(), "an example needs `messages` or a `prompt`")
    prompt, reference = _read_prompt(row)
    return ReferencePrompt(source, prompt, reference or "")


def _read_prompt(row: Mapping[str, Any]) -> tuple[TaskPrompt, str | None]:
    """The prompt, and the text of a last message that is the assistant's, which is not part of the prompt."""
    _require(("messages" in row) != ("prompt" in row), "give either `messages` or `prompt`")
    if "prompt" in row:
        for key in ("tools", "chat_template_kwargs"):
            _require(key not in row, f"`{key}` goes with messages; a prompt is plain text")
        return TaskPrompt(text=_text(row, "prompt")), None
    messages = read_messages(row["messages"], "")
    if isinstance(messages, Rejection):
        raise DataError(messages.message)
    tools, kwargs = row.get("tools"), row.get("chat_template_kwargs", {})
    listed = tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools))
    _require(listed, "`tools` must be a list of objects")
    _require(isinstance(kwargs, dict), "`chat_template_kwargs` must be an object")
    ideal = messages[-1].content if messages[-1].role == "assistant" else None
    asked = messages if ideal is None else messages[:-1]
    _require(len(asked) > 0, "the only message is the assistant's; there is no prompt")
    return TaskPrompt(tuple(dict(message.given) for message in asked), None, tools, kwargs), ideal


def _text(row: Mapping[str, Any], key: str) -> str:
    text = row[key]
    _require(isinstance(text, str) and text.strip() != "", f"`{key}` must be a text that is not empty")
    return str(text)


def _texts(value: object, key: str, blank: bool = False) -> tuple[str, ...]:
    """A list of texts that are not empty. blank: whitespace alone is allowed."""
    texts = value if isinstance(value, list) else []
    right = all(isinstance(text, str) and (text.strip() or (blank and text)) for text in texts)
    _require(right and len(texts) > 0, f"`{key}` must be a list of texts, none of them empty")
    return tuple(texts)


def _groups(row: Mapping[str, Any]) -> dict[str, str]:
    groups = {key: row[key] for key in GROUPS if key in row}
    for key, value in groups.items():
        _require(isinstance(value, str), f"`{key}` must be a string; it names a group")
    return groups


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise DataError(sentence)
