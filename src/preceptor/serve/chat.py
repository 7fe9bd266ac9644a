"""Talking to a model in a terminal."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from preceptor.chat.format import load_trained_format
from preceptor.evaluate.generate import generate
from preceptor.model.load import load_model


@dataclass
class Speaker:
    """A model with its tokenizer. With a chat template it answers; without, it continues the words as plain text."""

    name: str
    model: Any
    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    max_new_tokens: int
    messages: list[dict[str, str]] = field(default_factory=list)

    def reply(self, said: str) -> str:
        """Answer in the light of what was said before, and remember both."""
        self.messages.append({"role": "user", "content": said})
        answer = generate(self.model, self.tokenizer, [self._context()], self.stop_token_ids, self.max_new_tokens)[0]
        self.messages.append({"role": "assistant", "content": answer.text})
        return answer.text if answer.stopped else answer.text + " …"

    def _context(self) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self.tokenizer(self.messages[-1]["content"] + "\n")["input_ids"]
        return self.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, return_dict=False)


def load_speaker(path: str, max_new_tokens: int) -> Speaker:
    """Raises ModelError if `path` is no model."""
    chat = load_trained_format(path)
    model = load_model(path, dtype="float32", device="cuda" if torch.cuda.is_available() else "cpu")
    return Speaker(path, model, chat.tokenizer, chat.stop_token_ids, max_new_tokens)


def converse(
    speakers: list[Speaker], said: Iterable[str], system: str | None, write: Callable[[str, str], None]
) -> None:
    """Let each speaker reply to each line. `/new` forgets the conversation; empty lines are passed over.

    `write(name, text)` shows a reply.
    """

    def begin() -> None:
        for speaker in speakers:
            speaker.messages = [{"role": "system", "content": system}] if system else []

    begin()
    for line in said:
        line = line.strip()
        if line == "/new":
            begin()
            write("", "a new conversation")
        elif line:
            for speaker in speakers:
                write(speaker.name, speaker.reply(line))
