"""Embedding rows of tokens that are new to a model, and the special tokens in its configuration."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from preceptor.model.sizes import rows_for

_JITTER = 0.01  # of the embedding's standard deviation: tokens of one description must not start as one row
_NEAR = 0.01  # of the usual distance of a row from the mean of all: no training leaves two rows that close
_SAMPLED_ROWS = 4096

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
def never_trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, used: Collection[int]) -> dict[str, int]:
    """The added tokens of a tokenizer that the model does not know, with their ids: those that have no row, and those
    among `used` whose row no training has touched, in the embedding or in the head."""
    num_rows = model.get_input_embeddings().weight.shape[0]
    added = {id_: str(token) for id_, token in sorted(tokenizer.added_tokens_decoder.items())}
    missing = {token: id_ for id_, token in added.items() if id_ >= num_rows}
    asked = [id_ for id_ in added if id_ < num_rows and id_ in used]
    untrained = {id_ for table_VD in _tables(model) for id_ in _untrained_rows(table_VD, asked, list(added))}
    return {**{added[id_]: id_ for id_ in sorted(untrained)}, **missing}


def _tables(model: PreTrainedModel) -> list[Tensor]:
    """The weights that have a row for each token: of the embedding, and of a head that is not tied to it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embedding.weight, *([head.weight] if head is not None and head.weight is not embedding.weight else [])]


def _untrained_rows(weight_VD: Tensor, ids: Sequence[int], added: Sequence[int]) -> set[int]:
    """Which rows of `ids` are zero, the mean of all rows, or the row of another of the `added` tokens, up to rounding.

    That is what models are released with for tokens that were kept in reserve. Rows that training has touched
    are far from all of these.
    """
    if not ids:
        return set()
    mean_D = weight_VD.mean(dim=0, dtype=torch.float32)
    sample_SD = weight_VD[:: -(-len(weight_VD) // _SAMPLED_ROWS)].float()
    near = _NEAR * (sample_SD - mean_D).norm(dim=1).median()
    others = torch.tensor([id_ for id_ in added if id_ < len(weight_VD)], device=weight_VD.device)
    others_KD = weight_VD[others].float()
    found = set()
    for id_ in ids:
        row_D = weight_VD[id_].float()
        alike = (others_KD - row_D).norm(dim=1) < near
        if row_D.norm() < near or (row_D - mean_D).norm() < near or bool((alike & (others != id_)).any()):
            found.add(id_)
    return found


@torch.no_grad()
def resize_embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    added: Mapping[str, int],
    seed: int,
    untrained: Mapping[str, int] | None = None,
) -> None:
    """Give every token of the tokenizer a row, and the `added` ones (with their ids) a meaningful one.

    Rows grow to a multiple (`rows_for`) and never shrink; a tied head stays tied. A new token's row is the mean of
    the rows of its description's tokens, with a jitter of a hundredth of the standard deviation by `seed`; rows that
    only fill up the multiple are the mean of all. An untied head's rows, and its bias, likewise. `untrained`: tokens
    as `never_trained` finds them; they get such a row where theirs was never trained. Of a model without values (on the
    meta device) the shapes alone change.
    """
    old_rows, has_values = model.get_input_embeddings().weight.shape[0], model.device.type != "meta"
    new = {**added, **(untrained or {})}
    decoder = list(tokenizer.added_tokens_decoder)
    present = [id_ for id_ in (untrained or {}).values() if id_ < old_rows]
    tables = _tables(model) if has_values else []
    trained = [set(present) - _untrained_rows(table_VD, present, decoder) for table_VD in tables]
    needed_rows = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    if needed_rows > old_rows:
        model.resize_token_embeddings(rows_for(old_rows, needed_rows), mean_resizing=False)
    if not has_values:
        return
    described = {}
    for token, id_ in new.items():
        ids = tokenizer.encode(describe(token), add_special_tokens=False)
        described[id_] = [each for each in ids if each < old_rows and each not in new.values()]
    generator = torch.Generator().manual_seed(seed)
    for table_VD, kept in zip(_tables(model), trained, strict=True):
        _first_values(table_VD, old_rows, described, kept, generator)
    head = model.get_output_embeddings()
    if len(trained) > 1 and head.bias is not None:
        _first_values(head.bias[:, None], old_rows, described, trained[1], generator)


@dataclass(frozen=True)
class TokenRows:
    """The rows of some tokens, and the number of all rows, before `resize_embeddings` changed them.

    values: of the embedding; where the head is not tied to it, of the head and of its bias.
    """

    ids: list[int]
    num_rows: int
    values: list[Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel, ids: Collection[int]) -> "TokenRows":
        num_rows = model.get_input_embeddings().weight.shape[0]
        found = sorted(id_ for id_ in ids if id_ < num_rows)
        return cls(found, num_rows, [tensor.detach()[found].clone() for tensor in _with_bias(model)])

    @torch.no_grad()
    def put_back(self, model: PreTrainedModel) -> None:
        if model.get_input_embeddings().weight.shape[0] != self.num_rows:
            model.resize_token_embeddings(self.num_rows, mean_resizing=False)
        for tensor, rows in zip(_with_bias(model), self.values, strict=True):
            tensor[self.ids] = rows.to(tensor.device)


def _with_bias(model: PreTrainedModel) -> list[Tensor]:
    tables, head = _tables(model), model.get_output_embeddings()
    return [*tables, *([head.bias] if len(tables) > 1 and head.bias is not None else [])]


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
    weight_VD: Tensor,
    old_rows: int,
    described: Mapping[int, Sequence[int]],
    kept: Collection[int],
    generator: torch.Generator,
) -> None:
    """kept: of the described ids, those whose row stays as it is."""
    known = torch.ones(old_rows, dtype=torch.bool)
    known[[id_ for id_ in described if id_ < old_rows]] = False
    known_VD = weight_VD[:old_rows][known.to(weight_VD.device)].float()
    mean_D, deviation = known_VD.mean(dim=0), known_VD.std()
    weight_VD[old_rows:] = mean_D.to(weight_VD.dtype)
    for id_, ids in sorted(described.items()):
        row_D = weight_VD[list(ids)].float().mean(dim=0) if ids else mean_D
        noise_D = torch.randn(row_D.shape, generator=generator).to(row_D.device)
        if id_ not in kept:
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


def num_token_rows(model: nn.Module) -> int:
    """How many tokens have rows that are trained as they are, beside an adapter; 0 without one."""
    rows = [config.trainable_token_indices for config in getattr(model, "peft_config", {}).values()]
    return max((len(ids) for by_name in rows if by_name for ids in by_name.values()), default=0)


class KeptTokenRows(nn.Module):
    """peft's layer of rows that are trained beside a frozen table. `engine_settings`: their numbers, by adapter.

    peft copies the numbers to the device in each pass, for which the host waits; here they are kept there.
    """

    def rows_of(self, adapter: str) -> Tensor:
        layer: Any = self
        kept, device = layer.engine_settings, layer.base_layer.weight.device
        if adapter not in kept or kept[adapter].device != device:
            kept[adapter] = torch.tensor(layer.token_indices[adapter], device=device)
        rows_R: Tensor = kept[adapter]
        return rows_R

    def get_merged_weights(self, active_adapters: Sequence[str]) -> Tensor:
        layer: Any = self
        weight_VD: Tensor = layer.base_layer.weight
        for adapter in active_adapters:
            rows_RD = layer.trainable_tokens_delta[adapter].to(weight_VD)
            weight_VD = weight_VD.index_copy(0, self.rows_of(adapter), rows_RD)
        return weight_VD
