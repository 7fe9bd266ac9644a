"""A model that is examined, and how it reads: messages through a chat template, or everything as plain text.

A model with a chat template reads messages as a server would hand them to it. One without (a base model) reads them as
plain text: the content of each message on a line of its own, the answer to be written on the next. A prompt is plain
text for every model. The tokenizer's bos token comes first where the tokenizer puts it there by itself.
"""

from dataclasses import dataclass
from typing import Any

import torch

from preceptor.chat.format import load_trained_format
from preceptor.chat.template import Template
from preceptor.errors import DataError, TemplateError
from preceptor.evaluate.likelihood import must_read_alone
from preceptor.evaluate.tasks import Given
from preceptor.model.load import load_model

ROW_TOKENS = 4096  # tokens in one forward pass, and the window in which longer texts are read

Ids = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class EvaluatedModel:
    """A model with its tokenizer. template None: messages are read as plain text. alone: it reads one chain a row."""

    name: str
    model: Any
    tokenizer: Any
    template: Template | None
    stop_token_ids: tuple[int, ...]
    alone: bool = False

    @property
    def reads(self) -> str:
        """How messages are read, for results."""
        return "plain text" if self.template is None else f"chat template ({self.template.name})"

    @property
    def max_tokens(self) -> int | None:
        """The longest text that the model knows positions for; None: it does not say."""
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None

    @property
    def row_tokens(self) -> int:
        return min(ROW_TOKENS, self.max_tokens or ROW_TOKENS)

    @property
    def bos(self) -> Ids:
        bos = self.tokenizer.bos_token_id
        return (bos,) if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else ()

    def ids(self, text: str) -> Ids:
        """A text's tokens, without any that the tokenizer would add."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, given: Given) -> str:
        """What the model reads, as text. Raises TemplateError where the template rejects the messages."""
        if given.messages is None:
            return given.prompt or ""
        if self.template is None:
            return "".join(f"{Given((message,)).asked}\n" for message in given.messages)
        return self.template.render(given.messages, given.tools, add_generation_prompt=True, **given.template_kwargs)

    def is_plain(self, given: Given) -> bool:
        """Whether the model reads it as plain text, in which tokens may join what is given and what follows."""
        return given.messages is None or self.template is None

    def context(self, given: Given, source: str, num_new: int = 0) -> Ids:
        """The tokens that the model reads before its answer of at most `num_new` tokens.

        Raises DataError where there is none, or the model knows no position for all of them.
        """
        try:
            ids = (*(self.bos if self.is_plain(given) else ()), *self.ids(self.text(given)))
        except TemplateError as error:
            raise TemplateError(f"{source}: {error}") from None
        if not ids:
            raise DataError(f"{source}: nothing is given to the model: no token comes before its answer")
        if self.max_tokens is not None and len(ids) + num_new > self.max_tokens:
            raise DataError(
                f"{source}: {len(ids)} tokens and an answer of {num_new} are more than the {self.max_tokens} of the "
                "model's context; shorten the item or the answer's limit"
            )
        return ids


def load_evaluated_model(path: str, dtype: str, device: str, template: str | None = None) -> EvaluatedModel:
    """Load a model to be examined.

    template: as in a run file, or `plain` for none. Raises ModelError and TemplateError as `load_trained_format`.
    """
    chat = load_trained_format(path, template)
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    model = load_model(path, dtype=dtype, device=place)
    return EvaluatedModel(path, model, chat.tokenizer, chat.template, chat.stop_token_ids, must_read_alone(model))
