"""Special tokens that a chat template needs: finding or adding them, and the first values of their embedding rows."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from preceptor.errors import ModelError

ROWS_MULTIPLE = 64  # embedding rows come in multiples of this, for the matrix kernels
PAD_TOKEN = "<|pad|>"
_JITTER = 0.01  # of the embedding's standard deviation: tokens of one description must not start as one row

# A row for a new token starts at the mean of what these words mean to the model.
_DESCRIPTIONS = {
    "<|im_start|>": "start of a message",
    "<|im_end|>": "end of a message",
    "<|start_header_id|>": "start of the name of the speaker",
    "<|end_header_id|>": "end of the name of the speaker",
    "<|eot_id|>": "end of the turn",
    "<|eom_id|>": "end of the message",
    "<|begin_of_text|>": "start of the text",
    "<|end_of_text|>": "end of the text",
    PAD_TOKEN: "nothing",
}


@dataclass(frozen=True)
class TokenPlan:
    """Which special tokens the tokenizer had (`found`) and which are new to it (`added`), with their ids."""

    found: Mapping[str, int] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)

    @property
    def new_ids(self) -> list[int]:
        return sorted(self.added.values())


def plan_tokens(tokenizer: PreTrainedTokenizerBase, needed: Sequence[str]) -> TokenPlan:
    """Which of the `needed` tokens exist and which ids the others will get; the tokenizer is left as it is."""
    vocabulary = tokenizer.get_vocab()
    unique = list(dict.fromkeys(needed))
    found = {token: vocabulary[token] for token in unique if token in vocabulary}
    missing = [token for token in unique if token not in vocabulary]
    first = max(len(tokenizer), max(vocabulary.values(), default=-1) + 1)
    return TokenPlan(found, {token: first + offset for offset, token in enumerate(missing)})


def add_tokens(tokenizer: PreTrainedTokenizerBase, needed: Sequence[str]) -> TokenPlan:
    """Make each of the `needed` tokens a special token of one id. Raises ModelError where the tokenizer cannot."""
    plan = plan_tokens(tokenizer, needed)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = [t for t in (*plan.found, *plan.added) if t not in special]
    if tokens:
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in tokens], special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    for token in (*plan.found, *plan.added):
        ids = tokenizer.encode(token, add_special_tokens=False)
        if ids != [vocabulary.get(token)]:
            raise ModelError(f"{token!r} becomes {ids} and not one token; this tokenizer cannot add special tokens")
    return TokenPlan(plan.found, {token: vocabulary[token] for token in plan.added})


def align_tokenizer(
    tokenizer: PreTrainedTokenizerBase, template_text: str, stop_token: str, plan: TokenPlan
) -> TokenPlan:
    """Give the tokenizer its chat template, its eos (the stop token) and a pad token that is not the eos.

    A pad token that differs from the eos is kept; else a reserved one that the template does not use becomes it, else
    one is added. Returns the plan, with the pad token where that was added. Raises ModelError if the stop token is
    none of the tokenizer's.
    """
    if stop_token not in tokenizer.get_vocab():
        raise ModelError(f"the stop token {stop_token!r} is not in the tokenizer's vocabulary; add it first")
    tokenizer.chat_template = template_text
    tokenizer.eos_token = stop_token
    if tokenizer.pad_token is not None and tokenizer.pad_token != stop_token:
        return plan
    pad = _reserved_token(tokenizer, template_text, plan)
    if pad is None:
        pad_plan = add_tokens(tokenizer, [PAD_TOKEN])
        plan = TokenPlan({**plan.found, **pad_plan.found}, {**plan.added, **pad_plan.added})
        pad = PAD_TOKEN
    tokenizer.pad_token = pad
    return plan


def _reserved_token(tokenizer: PreTrainedTokenizerBase, template_text: str, plan: TokenPlan) -> str | None:
    """A special token made for padding, else one kept in reserve; None if there is neither."""
    taken = {*plan.found, *plan.added, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    free = [
        str(token)
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and str(token) not in taken and str(token) not in template_text
    ]
    for pattern in (r"\bpad|pad\b|padding|_pad_", r"reserved|unused"):
        for token in free:
            if re.search(pattern, token.lower()):
                return token
    return None


@torch.no_grad()
def resize_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: TokenPlan, seed: int) -> None:
    """Give every token of the tokenizer a row, and the plan's added tokens a meaningful one.

    Rows grow to a multiple of ROWS_MULTIPLE and never shrink; a tied head stays tied. A new token's row is the mean of
    the rows of its description's tokens, with a jitter of a hundredth of the standard deviation by `seed`; rows that
    only fill up the multiple are the mean of all. An untied head's rows, and its bias, likewise.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    old_rows = embedding.weight.shape[0]
    needed_rows = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    if needed_rows > old_rows:
        rows = -(-needed_rows // ROWS_MULTIPLE) * ROWS_MULTIPLE
        model.resize_token_embeddings(rows, mean_resizing=False)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    described = {id_: _description_ids(tokenizer, token, plan, old_rows) for token, id_ in plan.added.items()}
    generator = torch.Generator().manual_seed(seed)
    _first_values(embedding.weight, old_rows, described, generator)
    if head is not None and head.weight is not embedding.weight:
        _first_values(head.weight, old_rows, described, generator)
        if head.bias is not None:
            _first_values(head.bias[:, None], old_rows, described, generator)


def _description_ids(tokenizer: PreTrainedTokenizerBase, token: str, plan: TokenPlan, old_rows: int) -> list[int]:
    ids = tokenizer.encode(describe(token), add_special_tokens=False)
    return [id_ for id_ in ids if id_ < old_rows and id_ not in plan.added.values()]


def describe(token: str) -> str:
    """A few words for a special token: from the table, else from its own letters; `</x>` is "end of x"."""
    if token in _DESCRIPTIONS:
        return _DESCRIPTIONS[token]
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", token)
    phrase = " ".join(words).lower() or "special"
    if re.match(r"[<\[|]+/", token):
        return f"end of {phrase}"
    return phrase


def _first_values(
    weight_VD: Tensor, old_rows: int, described: Mapping[int, Sequence[int]], generator: torch.Generator
) -> None:
    known = torch.ones(old_rows, dtype=torch.bool)
    known[[id_ for id_ in described if id_ < old_rows]] = False
    known_VD = weight_VD[:old_rows][known.to(weight_VD.device)].float()
    mean_D, deviation = known_VD.mean(dim=0), known_VD.std()
    weight_VD[old_rows:] = mean_D.to(weight_VD.dtype)
    for id_, ids in sorted(described.items()):
        row_D = weight_VD[list(ids)].float().mean(dim=0) if ids else mean_D
        noise_D = torch.randn(row_D.shape, generator=generator).to(row_D.device)
        weight_VD[id_] = (row_D + _JITTER * deviation * noise_D).to(weight_VD.dtype)


def align_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, closings: Sequence[int] = ()) -> None:
    """Set eos, pad and bos of the model's config and generation config to the tokenizer's.

    The generation config stops at the tokenizer's eos first, at the other `closings` of the template (a tool call may
    end with a token of its own), and still at what the model stopped at before: a base model's end-of-text token
    remains one.
    """
    eos, settings = tokenizer.eos_token_id, model.config.get_text_config(decoder=True)
    generation = model.generation_config
    assert generation is not None
    if eos is not None:
        earlier = [*_as_list(generation.eos_token_id), *_as_list(settings.eos_token_id)]
        stops = list(dict.fromkeys([eos, *closings, *earlier]))
        generation.eos_token_id = stops if len(stops) > 1 else eos
        settings.eos_token_id = eos
    for holder in (generation, settings):
        holder.pad_token_id = tokenizer.pad_token_id
        holder.bos_token_id = tokenizer.bos_token_id


def stop_token_ids(
    path: str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False, revision: str | None = None
) -> tuple[int, ...]:
    """What ends a turn of the model at `path`: the tokenizer's eos first, then its generation config's eos tokens."""
    try:
        earlier = _as_list(GenerationConfig.from_pretrained(path, revision=revision or "main").eos_token_id)
    except OSError:  # no generation config: the model's config says what ends a text
        settings = AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=trust_remote_code)
        earlier = _as_list(getattr(settings.get_text_config(decoder=True), "eos_token_id", None))
    return tuple(id_ for id_ in dict.fromkeys([tokenizer.eos_token_id, *earlier]) if id_ is not None)


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
