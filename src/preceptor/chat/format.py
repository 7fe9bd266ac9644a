"""Chat format: a tokenizer, a chat template, the tokens that end a turn, and the tokens that were added for them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken

from preceptor import config
from preceptor.chat.message_forms import find_forms
from preceptor.chat.origins import MessageList, Tools
from preceptor.chat.render import Renderer
from preceptor.chat.stop_tokens import StopTokens, find_stop_tokens
from preceptor.chat.template import Template, load_template
from preceptor.chat.thinking import TrainedCounts, with_defaults
from preceptor.chat.tokenise import Ids, bos_ids
from preceptor.data.examples import Completion, Document, Rejected
from preceptor.data.forest import Tree
from preceptor.data.sources import OpenSource
from preceptor.errors import ModelError, TemplateError, first_line
from preceptor.hub import cannot_load, causal_kind, find_file, place_of, require_reachable, resolve_model_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of a configuration whose positions are computed for any length: rotary or ALiBi, or none beside a state space.
_COMPUTED = ("rope_parameters", "rope_theta", "rotary_dim", "rotary_pct", "rotary_emb_base", "alibi")
_NO_TABLE = ("mamba", "ssm_", "state_size", "linear_attn", "attention_hidden_size")
_SINUSOIDS = ("xglm",)  # types that make their sinusoids longer where they must


@dataclass(frozen=True)
class ModelLimits:
    """model: its path. num_rows: tokens that have an embedding. num_positions: for which it was made, if known.
    longest: of how many tokens an example may consist at most, where it has learned positions; None for any number."""

    model: str
    num_rows: int | None = None
    num_positions: int | None = None
    longest: int | None = None


def read_limits(path: str, trust_remote_code: bool = False, revision: str | None = None) -> ModelLimits:
    """The limits of the model at `path`. Raises ModelError for what cannot be read or cannot be trained."""
    settings = _config(path, trust_remote_code, revision)
    causal_kind(path, settings)
    quantized = getattr(settings, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise ModelError(
            f"{path}: this checkpoint is quantized ({method or 'config.json has a quantization_config'}) and cannot be "
            "trained; name the model whose weights are not quantized"
        )
    rows = getattr(settings.get_text_config(decoder=True), "vocab_size", None)
    return ModelLimits(path, rows if isinstance(rows, int) else None, _positions(settings), learned_positions(settings))


def _positions(settings: Any) -> int | None:
    text = settings.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def learned_positions(settings: Any) -> int | None:
    """For how many tokens a model of this config has learned positions; None for any number."""
    text = settings.get_text_config(decoder=True)
    computed = any(getattr(text, name, None) not in (None, False) for name in _COMPUTED)
    no_table = text.model_type in _SINUSOIDS or any(key.startswith(_NO_TABLE) for key in text.to_dict())
    return None if computed or no_table else _positions(settings)


def _own_stop_ids(path: str, tokenizer: Any, trust_remote_code: bool, revision: str | None) -> list[int]:
    """The tokens at which the model's own generation config stops; its config's, where it has none.

    Raises ModelError for what cannot be read, and for ids that are none of the tokenizer's.
    """
    from transformers import GenerationConfig

    file, num_tokens = "generation_config.json", max(tokenizer.get_vocab().values()) + 1
    try:
        found: Any = GenerationConfig.from_pretrained(path, revision=revision or "main").eos_token_id
    except Exception as error:  # whatever it raises for a file of another form
        if not isinstance(error, OSError) or find_file(path, file, revision) is not None:
            raise ModelError(f"{path}/{file}: cannot be read: {first_line(error)}") from None
        file = "config.json"
        settings = _config(path, trust_remote_code, revision).get_text_config(decoder=True)
        found = getattr(settings, "eos_token_id", None)
    ids = [] if found is None else list(found) if isinstance(found, list | tuple) else [found]
    wrong = [id_ for id_ in ids if type(id_) is not int or not 0 <= id_ < num_tokens]
    if wrong:
        raise ModelError(
            f"{path}/{file}: eos_token_id is {found!r}, and {wrong[0]!r} is none of the model's {num_tokens:,} tokens; "
            "correct the file"
        )
    return ids


def _config(path: str, trust_remote_code: bool, revision: str | None) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever it raises for values of another type
        raise cannot_load(path, "config.json", error) from error


# The format -----------------------------------------------------------------------------------------------------------

PLAIN = "plain"  # instead of a template's name: none, messages are read as plain text


@dataclass(frozen=True)
class ChatFormat:
    """What both training and inference use to read and write conversations."""

    tokenizer: Any
    template: Template | None  # None: only plain text is read
    stop_token_ids: tuple[int, ...]  # they end a turn; the tokenizer's eos first
    # Special tokens new to the model's tokenizer, with their ids.
    added: Mapping[str, int] = field(default_factory=dict)
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # of all conversations; their own win over them
    limits: ModelLimits | None = None  # of the model, where it is to be trained
    doubts: tuple[str, ...] = ()  # where template and model do not agree on what ends a turn

    @property
    def num_base_tokens(self) -> int:
        """Ids below this are tokens of the base model; added ones come after."""
        return min(self.added.values(), default=len(self.tokenizer))

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset((*self.tokenizer.added_tokens_decoder, *self.added.values()))

    def without_row(self, ids: Iterable[int]) -> list[int]:
        """Ordinary tokens that the model has no row for: only added ones get one."""
        rows = None if self.limits is None else self.limits.num_rows
        if rows is None or len(self.tokenizer) <= rows:
            return []
        return [id_ for id_ in ids if id_ >= rows and id_ not in self._added_ids]

    def require_rows(self, trees: Iterable[Tree]) -> None:
        """Raises ModelError for an ordinary token of the data that the model has no row for."""
        for tree in trees:
            for segment in tree.segments:
                for id_ in self.without_row(segment.ids)[:1]:
                    assert self.limits is not None
                    raise ModelError(
                        f"{self.limits.model}: the model has {self.limits.num_rows:,} embeddings and its tokenizer "
                        f"{len(self.tokenizer):,} tokens; {self.tokenizer.convert_ids_to_tokens(id_)!r} ({id_}), "
                        f"which {tree.source} holds, has none. Tokenizer and model do not belong together"
                    )

    @property
    def num_positions(self) -> int | None:
        """For how many tokens the model has learned positions; None for any number."""
        return None if self.limits is None else self.limits.longest

    @property
    def bos(self) -> Ids:
        """What the tokenizer puts before a plain text; a template writes its own."""
        return bos_ids(self.tokenizer)

    def ids(self, text: str) -> Ids:
        """The tokens of a text, without special tokens that the tokenizer would add."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(
        self, messages: MessageList, tools: Tools = None, template_kwargs: Mapping[str, Any] | None = None
    ) -> str:
        """The text that the model reads before it answers these messages; its `ids` are the context.

        Raises TemplateError if the template rejects the messages.
        """
        assert self.template is not None, "a format of plain text has no prompts"
        arguments = {**self.template_kwargs, **(template_kwargs or {})}
        return self.template.render(self.fit(messages), tools, add_generation_prompt=True, **arguments)

    def fit(self, messages: MessageList) -> list[Mapping[str, Any]]:
        """The messages in the form that the template takes. Raises TemplateError for those that it cannot take."""
        assert self.template is not None, "a format of plain text has no prompts"
        try:
            return find_forms(self.template).fit(messages)
        except Rejected as error:
            raise TemplateError(str(error)) from error

    def renderer(self, data: config.Data) -> Renderer:
        return Renderer(
            self.tokenizer,
            self.template,
            stop_token_ids=self.stop_token_ids,
            special_tokens_in_text=data.special_tokens_in_text,
            targets=data.train_on,
            template_kwargs=self.template_kwargs,
        )

    def trained_with(self, counts: TrainedCounts) -> "ChatFormat":
        """The format as it is saved: the arguments of training are the template's own defaults, the tokenizer's too.

        Raises TemplateError for arguments that cannot be saved.
        """
        if self.template is None:
            return self
        template = with_defaults(self.template, counts.defaults(), counts.switch)
        self.tokenizer.chat_template = template.saved
        return replace(self, template=template)


def load_chat_format(
    model: config.Model, data: config.Data, sources: Iterable[OpenSource] = (), date: datetime | None = None
) -> ChatFormat:
    """The chat format to train with: the model's tokenizer, with the tokens that the template needs.

    date: for a template that writes one; None: that of each render.
    Where neither the run file nor the model names a template, chatml is used if one of the first examples of `sources`
    is a conversation, was rejected and might have been one, or is in a pipe; else there is none and nothing is added,
    so that a base model stays one. Raises ModelError and TemplateError, and DataError as reading the sources does.
    """
    path = resolve_model_path(model.place)
    source: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    limits = read_limits(path, **source)
    tokenizer: Any = load_tokenizer(path, **source)
    template, added, ends = None, {}, StopTokens(())
    own = _own_stop_ids(path, tokenizer, **source)
    if data.chat_template is not None or tokenizer.chat_template or any(map(_may_hold_conversations, sources)):
        template = load_template(data.chat_template, tokenizer)
        added = add_tokens(tokenizer, template.needed_tokens)
        ends = turn_ends(template, tokenizer, own)
        align_tokenizer(tokenizer, template, ends.tokens[0])
        template = replace(template, variables=dict(tokenizer.special_tokens_map))
        template = template if date is None else template.at(date)
    ids = _stop_token_ids(tokenizer, own, ends)
    return ChatFormat(tokenizer, template, ids, added, data.chat_template_kwargs, limits, ends.doubts)


def _may_hold_conversations(source: OpenSource) -> bool:
    return source.is_pipe or any(not isinstance(example, Document | Completion) for example in source.peek())


def load_trained_format(path: str, template: str | None = None, trust_remote_code: bool = False) -> ChatFormat:
    """The chat format of a model as it is, to ask it or to evaluate it; of an adapter, with its base for what it lacks.

    template: as `trained_format`. Raises ModelError, and TemplateError as that.
    """
    place = resolve_model_path(path, adapters=True)
    folder, revision = place_of(place, "tokenizer_config.json")
    tokenizer: Any = load_tokenizer(folder, trust_remote_code, revision)
    folder, revision = place_of(place, "generation_config.json")
    own = _own_stop_ids(folder, tokenizer, trust_remote_code, revision)
    return trained_format(path, tokenizer, own, template)


def trained_format(path: str, tokenizer: Any, own: Sequence[int], template: str | None = None) -> ChatFormat:
    """The chat format of a model that stops at the tokens `own`, to ask it. path: its name, for errors.

    template: as in a run file, or `plain` for none; absent: the tokenizer's own, and none where it has none. Raises
    TemplateError for a template whose special tokens the model lacks.
    """
    chosen = None
    ends = StopTokens(())
    if template != PLAIN and (template is not None or tokenizer.chat_template):
        chosen = load_template(template, tokenizer)
        missing = [token for token in chosen.needed_tokens if token not in tokenizer.get_vocab()]
        if missing:
            raise TemplateError(
                f"template {chosen.name}: {path} has no token {', '.join(missing)}, so it was not trained with this "
                f"template; let it read messages as plain text: --chat-template {PLAIN}"
            )
        if template is not None:  # another than the model's own, which its generation config may not know
            ends = turn_ends(chosen, tokenizer, own)
    return ChatFormat(tokenizer, chosen, _stop_token_ids(tokenizer, own, ends))


def load_tokenizer(
    path: str | Path, trust_remote_code: bool = False, revision: str | None = None
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model. Raises ModelError if there is none or it cannot be reached."""
    from transformers import AutoTokenizer

    place = resolve_model_path(path, adapters=True)
    require_reachable(place, revision)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place, trust_remote_code=trust_remote_code, revision=revision or "main"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if Path(place).is_dir() and not (Path(place) / "tokenizer.json").is_file():
            raise ModelError(
                f"{place}: no tokenizer.json in this folder; copy the model's tokenizer into it"
            ) from error
        raise cannot_load(place, "tokenizer", error) from error
    if not tokenizer.get_vocab():
        raise ModelError(f"{place}: no tokenizer in this folder; it needs tokenizer.json or the files of its kind")
    return tokenizer


def add_tokens(tokenizer: Any, needed: Sequence[str]) -> dict[str, int]:
    """Make each of the `needed` tokens a special token of one id; returns those that are new.

    Raises ModelError where the tokenizer cannot.
    """
    old = tokenizer.get_vocab()
    needed = sorted(dict.fromkeys(needed), key=lambda token: token not in old)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = [AddedToken(token, special=True, normalized=False) for token in needed if token not in special]
    if tokens:
        tokenizer.add_tokens(tokens, special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    for token in needed:
        ids = tokenizer.encode(token, add_special_tokens=False)
        if ids != [vocabulary.get(token)]:
            raise ModelError(f"{token!r} becomes {ids} and not one token; this tokenizer cannot add special tokens")
    return {token: vocabulary[token] for token in needed if token not in old}


def align_tokenizer(tokenizer: Any, template: Template, stop_token: str) -> None:
    """Give the tokenizer its chat template, its eos (the stop token) and, if it can be had, a pad token that is not it.

    A pad token that differs from the eos is kept; else it is one made for padding or kept in reserve that the template
    does not use, else the eos of before. Training needs none: no token is added for it. Raises ModelError if the stop
    token is none of the tokenizer's.
    """
    if stop_token not in tokenizer.get_vocab():
        raise ModelError(f"the stop token {stop_token!r} is not in the tokenizer's vocabulary; add it first")
    earlier = tokenizer.eos_token
    tokenizer.chat_template = template.saved
    tokenizer.eos_token = stop_token
    if tokenizer.pad_token is None or tokenizer.pad_token == stop_token:
        tokenizer.pad_token = _reserved_token(tokenizer, template) or (earlier if earlier != stop_token else None)


def _reserved_token(tokenizer: Any, template: Template) -> str | None:
    """A special token made for padding, else one kept in reserve; None if there is neither."""
    taken = {*template.needed_tokens, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    free = [
        str(token)
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and str(token) not in taken and not any(str(token) in text for text in template.texts.values())
    ]
    patterns = (r"\bpad|pad\b|padding|_pad_", r"reserved|unused")
    return next((token for pattern in patterns for token in free if re.search(pattern, token.lower())), None)


def turn_ends(template: Template, tokenizer: Any, own: Sequence[int] = ()) -> StopTokens:
    """The tokens that end a turn, a plain answer's first: what the template writes, else the eos.

    own: those at which the model itself stops. Base models often carry a chat template whose end of turn is not their
    eos. Raises TemplateError.
    """
    known = [token for token in tokenizer.convert_ids_to_tokens(list(own)) if token is not None]
    found = find_stop_tokens(template, tokenizer, known)
    if not found.tokens and tokenizer.eos_token is None:
        raise TemplateError(
            f"template {template.name}: writes no special token after an answer and the tokenizer has no eos token, so "
            "nothing would end a turn; choose chatml or llama3"
        )
    tokens = found.tokens or (tokenizer.eos_token,)
    doubts = found.doubts
    if template.stop is None and known and tokens[0] not in known:
        both = f"the chat template ends an answer with {tokens[0]}, the model's own files with {', '.join(known)}"
        doubts = (*doubts, f"{both}: the tuned model stops at all of them")
    return StopTokens(tokens, doubts)


def _stop_token_ids(tokenizer: Any, own: Sequence[int], ends: StopTokens) -> tuple[int, ...]:
    """What ends a turn: the tokenizer's eos first, then the model's own stop tokens, then the template's."""
    ids = [tokenizer.eos_token_id, *own, *tokenizer.convert_tokens_to_ids(list(ends.tokens))]
    return tuple(dict.fromkeys(id_ for id_ in ids if id_ is not None))
