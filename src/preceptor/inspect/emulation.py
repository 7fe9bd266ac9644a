"""What the emulations of other trainers share: tokens with their marks, a tokenizer, a chat template, settings."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from preceptor.data.examples import Completion, Conversation, Example

PeerMessages = Sequence[Mapping[str, Any]]
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)


@dataclass(frozen=True)
class PeerTokens:
    """The tokens of an example as the trainer reads it, and which of them count in its loss."""

    ids: list[int]
    trained: list[bool]

    @classmethod
    def of(cls, *pieces: tuple[Sequence[int], bool]) -> Self:
        """Pieces, each with whether it is trained."""
        return cls([id_ for ids, _ in pieces for id_ in ids], [mark for ids, mark in pieces for _ in ids])


class Emulation(ABC):
    """settings: flat, as peer_files.py reads them. template: the chat template of the model (Jinja)."""

    peer: ClassVar[str]

    def __init__(self, settings: Mapping[str, Any], tokenizer: Any, template: str) -> None:
        self.settings, self.tokenizer, self.template = settings, tokenizer, template

    @property
    def says(self) -> str:
        """What is emulated, in a sentence."""
        return f"What {self.peer}'s documented rule trains: {self.what()}"

    @abstractmethod
    def what(self) -> str:
        """The tokens that are trained, in words."""

    @abstractmethod
    def tokens(self, example: Example, row: Mapping[str, Any]) -> PeerTokens | str:
        """Of an example and the row that it was read from; a sentence where it cannot be told."""

    def text_ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"]) if text or special else []

    def rendered(self, messages: PeerMessages, example: Example | None = None, **options: Any) -> str:
        """With the tools and arguments of the example, if it is a conversation."""
        if isinstance(example, Conversation):
            options |= {"tools": example.tools, **example.template_kwargs}
        options |= {"chat_template": self.template, "tokenize": False}
        return str(self.tokenizer.apply_chat_template(list(messages), **options))

    def rendered_ids(self, messages: PeerMessages, example: Example, **options: Any) -> list[int]:
        return self.text_ids(self.rendered(messages, example, **options))


def with_eos(tokenizer: Any, eos_token: Any) -> Any:
    """The tokenizer, or a copy with the eos token that a trainer's file names."""
    if not eos_token:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.eos_token = str(eos_token)
    return changed


def messages_of(example: Conversation | Completion) -> list[dict[str, Any]]:
    """The messages as the file holds them; of prompt and completion one of each role."""
    if isinstance(example, Completion):
        return [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}]
    return [dict(message.given) for message in example.messages]


def read_of(row: Mapping[str, Any], name: str | None = None) -> list[Mapping[str, Any]]:
    """The messages of a row as the file holds them. name: of their column, where it is another one."""
    names = [name] if name else ["messages", "conversations"]
    found: list[Any] = next((row[each] for each in names if isinstance(row.get(each), list)), [])
    return found if all(isinstance(each, Mapping) for each in found) else []


def is_plain(messages: PeerMessages, example: Example) -> bool:
    """Texts alone: no tools, no calls of them, no contents of several parts."""
    if isinstance(example, Conversation) and example.tools:
        return False
    texts = (isinstance(each.get("content"), str) and not each.get("tool_calls") for each in messages)
    return all(texts) and all(each.get("role") != "tool" for each in messages)


def alpaca_prompt(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Prompt and answer of an Alpaca row, in Alpaca's own words."""
    if "instruction" not in row or "output" not in row:
        return None
    given = row.get("input") or ""
    more = ", paired with an input that provides further context" if given else ""
    return _ALPACA.format(more, row["instruction"], f"### Input:\n{given}\n\n" if given else ""), str(row["output"])
