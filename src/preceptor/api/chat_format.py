"""Contexts, targets and labels for programs that train with something else than this package.

>>> from preceptor import collate, load_chat_format
>>> chat = load_chat_format("scholar")
>>> conversation = chat.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}])
>>> conversation.turns[0].target_text
'Hello!<|im_end|>'
>>> batch = collate([conversation])  # input_ids, labels, attention_mask, position_ids
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from preceptor import config
from preceptor.chat import format as chat_format
from preceptor.chat.render import Renderer
from preceptor.chat.tokenise import SpecialTokens
from preceptor.data.examples import Conversation, Rejection, read_messages
from preceptor.data.forest import RenderedTurn, Tree, turns_of
from preceptor.data.prefix_sharing import chains_of
from preceptor.data.workers import Targets
from preceptor.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # the label of a token that is not trained, as transformers has it


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """A conversation whose turns are proved. `tree` holds each token once: turns share what they have in common."""

    tree: Tree
    turns: tuple[RenderedTurn, ...]


@dataclass(frozen=True)
class ConversationRenderer:
    """Renders conversations for one model. tokenizer: with the template's tokens, its template and its stop token."""

    chat: chat_format.ChatFormat
    data: config.Data

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer as the tuned model has to be saved with it."""
        return self.chat.tokenizer

    @property
    def added(self) -> Mapping[str, int]:
        """Tokens that the template needs and the tokenizer lacked: the model needs rows for them, and trains them."""
        return self.chat.added

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Where a server stops; each target ends with one of them."""
        return self.chat.stop_token_ids

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> RenderedConversation:
        """Each turn's context, as an inference server builds it, and its target.

        messages: in the chat-completions format; `train: False` leaves an assistant's message untrained. Raises
        DataError for what cannot be proved, with the reason and what to do.
        """
        read = read_messages(list(messages), "messages")
        if isinstance(read, Rejection):
            raise DataError(f"{read.code}: {read.message}")
        tree = self._renderer.render(Conversation("messages", read, tools, chat_template_kwargs or {}))
        if isinstance(tree, Rejection):
            raise DataError(f"{tree.code}: {tree.message}")
        return RenderedConversation(tree, turns_of(tree))

    @cached_property
    def _renderer(self) -> Renderer:
        return self.chat.renderer(self.data)


def load_chat_format(
    model: str | Path,
    *,
    chat_template: str | Path | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    train_on: Targets = "assistant",
    special_tokens_in_text: SpecialTokens = "reject",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ConversationRenderer:
    """The chat format of a model: a folder, or a name on the Hub. Its weights are not loaded.

    chat_template: `chatml`, `llama3` or a Jinja file; absent: the model's own, else `chatml`. The other arguments are
    those of the run file (docs/run-file.md). Raises ConfigError, ModelError and TemplateError.
    """
    try:
        settings = config.Model(path=str(model), revision=revision, trust_remote_code=trust_remote_code)
        data = config.Data(
            train=[config.Source(path="-")],
            chat_template=None if chat_template is None else str(chat_template),
            chat_template_kwargs=dict(chat_template_kwargs or {}),
            train_on=train_on,
            special_tokens_in_text=special_tokens_in_text,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    chat = chat_format.load_chat_format(settings, data)
    if chat.template is None:
        chat = chat_format.load_chat_format(settings, data.model_copy(update={"chat_template": "chatml"}))
    return ConversationRenderer(chat, data)


def collate(
    conversations: Sequence[RenderedConversation], *, max_length: int | None = None, packed: bool = False
) -> dict[str, "Tensor"]:
    """A batch for a model of transformers: `input_ids`, `labels`, `attention_mask`, `position_ids`, all int64 (B, T).

    The label of a token that is not trained is -100; a token's label stands at its own place, since transformers'
    models shift them. A conversation whose template rewrites history has several paths of tokens, each a row; what
    they share is trained in the first alone. Rows are padded at the right, with 0, whatever the pad token.
    packed: all in one row without padding, position_ids begin again at each path (for attention that keeps them apart
    by these, as FlashAttention under transformers does); then there is no `attention_mask`. It can be the
    `data_collator` of a transformers Trainer. Raises DataError for a row of more than `max_length` tokens, and for
    messages with a `weight`, which labels cannot express.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [_row(chain, max_length) for each in conversations for chain in chains_of(each.tree)]
    if not rows:
        raise DataError("collate: no conversations")
    columns = {
        "input_ids": [torch.tensor(ids, dtype=torch.long) for ids, _ in rows],
        "labels": [torch.tensor(labels, dtype=torch.long) for _, labels in rows],
        "attention_mask": [torch.ones(len(ids), dtype=torch.long) for ids, _ in rows],
        "position_ids": [torch.arange(len(ids)) for ids, _ in rows],
    }
    if packed:
        return {name: torch.cat(columns[name])[None] for name in columns if name != "attention_mask"}
    padding = {"labels": IGNORED}
    return {name: pad_sequence(column, True, padding.get(name, 0)) for name, column in columns.items()}


def _row(chain: Tree, max_length: int | None) -> tuple[list[int], list[int]]:
    """The ids and labels of one path of tokens; the first token of all follows nothing and is not trained."""
    ids: list[int] = []
    labels: list[int] = []
    for segment in chain.segments:
        trained = segment.kind == "target" and segment.weight > 0
        if trained and segment.weight != 1:
            raise DataError(f"{chain.source}: a message has the weight {segment.weight:g}, which labels cannot express")
        ids += segment.ids
        labels += segment.ids if trained else [IGNORED] * len(segment.ids)
    if max_length is not None and len(ids) > max_length:
        raise DataError(f"{chain.source}: {len(ids):,} tokens, more than max_length {max_length:,}")
    return ids, [IGNORED, *labels[1:]]
