"""A conversation with one or several models in a terminal."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from preceptor.errors import DataError, TemplateError
from preceptor.evaluate.model import EvaluatedModel
from preceptor.evaluate.tasks import TaskPrompt


@dataclass
class Speaker:
    """A model and its conversation. Without a chat template it continues the last message as plain text."""

    model: EvaluatedModel
    max_new_tokens: int
    messages: list[dict[str, str]] = field(default_factory=list)

    def reply(self, text: str) -> str:
        """Answer a message, given the conversation so far, and remember both.

        Where the conversation is longer than the model can read, or the chat template refuses it, say so and forget
        the message.
        """
        self.messages.append({"role": "user", "content": text})
        prompt = TaskPrompt(tuple(self.messages if self.model.chat.template is not None else self.messages[-1:]))
        try:
            (answer,) = self.model.generate([self.model.prompt_ids(prompt)], self.max_new_tokens)
        except (DataError, TemplateError) as error:
            self.messages.pop()
            advice = "shorten the message, or begin a new conversation with /new"
            if isinstance(error, TemplateError):
                advice = "/system alone begins a conversation with the system prompt of the training, or none"
            return f"(no answer: {error}; {advice})"
        self.messages.append({"role": "assistant", "content": answer.text})
        return answer.text if answer.stopped else answer.text + " …"


def converse(
    speakers: list[Speaker],
    lines: Iterable[str],
    system: str | None,
    write: Callable[[str, str], None],
    trained: str | None = None,
) -> None:
    """Let each speaker reply to each line; empty lines are skipped. `write(name, text)` shows a reply.

    `/new` starts a new conversation, `/system TEXT` one with another system prompt; `/system` takes that in `trained`,
    with which the model was trained. Any other word after a slash is taken for a mistyped command.
    """

    def begin() -> None:
        for speaker in speakers:
            speaker.messages = [{"role": "system", "content": system}] if system else []

    begin()
    for line in lines:
        line = line.strip()
        command, _, text = line.replace("\t", " ").partition(" ")
        if line == "/new" or command == "/system":
            if command == "/system":
                system = text.strip() or trained
            begin()
            write("", f"new conversation, with{f' the system prompt: {system}' if system else 'out a system prompt'}")
        elif command[:1] == "/" and command[1:].isalpha():
            write("", f"{command} is no message, and was not sent. Commands: /new, /system TEXT, /system; Ctrl-D ends")
        elif line:
            for speaker in speakers:
                write(speaker.model.name, speaker.reply(line))
