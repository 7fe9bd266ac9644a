"""Embedding rows of new tokens, and the special tokens in a model's configuration."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS_MULTIPLE = 64  # embedding rows come in multiples of this, for the matrix kernels
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
}


@torch.no_grad()
def resize_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, added: Mapping[str, int], seed: int
) -> None:
    """Give every token of the tokenizer a row, and the `added` ones (with their ids) a meaningful one.

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
    described = {id_: _description_ids(tokenizer, token, added, old_rows) for token, id_ in added.items()}
    generator = torch.Generator().manual_seed(seed)
    _first_values(embedding.weight, old_rows, described, generator)
    if head is not None and head.weight is not embedding.weight:
        _first_values(head.weight, old_rows, described, generator)
        if head.bias is not None:
            _first_values(head.bias[:, None], old_rows, described, generator)


def _description_ids(
    tokenizer: PreTrainedTokenizerBase, token: str, added: Mapping[str, int], old_rows: int
) -> list[int]:
    ids = tokenizer.encode(describe(token), add_special_tokens=False)
    return [id_ for id_ in ids if id_ < old_rows and id_ not in added.values()]


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


def align_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int] = ()) -> None:
    """Set eos, pad and bos of the model's config and generation config to the tokenizer's.

    The generation config stops at the tokenizer's eos first, at the other `stop_token_ids` of the template (a tool
    call may end with a token of its own), and still at what the model stopped at before: a base model's end-of-text
    token remains one.
    """
    eos, settings = tokenizer.eos_token_id, model.config.get_text_config(decoder=True)
    generation = model.generation_config
    assert generation is not None
    if eos is not None:
        earlier = [*_as_list(generation.eos_token_id), *_as_list(settings.eos_token_id)]
        stops = list(dict.fromkeys([eos, *stop_token_ids, *earlier]))
        generation.eos_token_id = stops if len(stops) > 1 else eos
        settings.eos_token_id = eos
    for holder in (generation, settings):
        holder.pad_token_id = tokenizer.pad_token_id
        holder.bos_token_id = tokenizer.bos_token_id


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
