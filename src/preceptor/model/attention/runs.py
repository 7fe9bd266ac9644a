"""Attention over a forest: token j is visible to token i iff `j <= i < subtree_end[j]` (see data/forest.py).

`attend_reference` is the dense mask, for any length that fits; `attend_runs` goes run by run, so no token is compared
with a token that it cannot see; attention_cuda.py has fused kernels. All have one signature and honour what is asked:

    sliding window W   of what i sees, only j with position_i - position_j < W
    soft-cap c         scores become c * tanh(score / c)                                           (Gemma 2)
    sinks s_H          one further score per head takes part in the softmax and carries no value   (gpt-oss)

`preceptor_forest` is registered with transformers' AttentionInterface and in force within `forest_attention(model)`;
the decoder layers hand the layout on as the keyword `forest`. No mask function is registered under that name, so
transformers builds no mask at all.

Legend: T tokens of a row, H query heads, K key-value heads, D head size, Q queries and P keys of one block.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from preceptor.errors import ModelError
from preceptor.model.attention.cpu import attend_path, attend_under_mask
from preceptor.model.attention.cuda import fast_path
from preceptor.model.attention.layout import (
    ForestLayout,
    KeysValues,
    PassLayout,
    Range,
    Run,
    dense_mask,
    product_dtype,
)
from preceptor.model.sizes import mostly_short

IMPLEMENTATION = "preceptor_forest"


def attend_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ForestLayout,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query (1, H, T, D), key and value (1, K, T, D), sinks (H,) -> (1, H, T, D), by the dense mask."""
    mask_TT = dense_mask(layout.subtree_end_T, layout.position_T, sliding_window)
    return attend_under_mask(query, key, value, mask_TT, scale, softcap, sinks)


def attend_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ForestLayout | PassLayout,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    seen: dict[Range, KeysValues] | None = None,
) -> Tensor:
    """The same as `attend_reference`, run by run: work and memory follow what is visible, not T squared.

    seen: keys and values of ranges that are not in `key` and `value`; those that are get added to it.
    """
    seen = {} if seen is None else seen
    dtype = keep_runs(key, value, layout, seen)
    lengths = [end - start for start, end, _ in layout.runs]
    outputs = []
    with torch.autocast(value.device.type, enabled=False):
        *queries, added = query.to(dtype).split([*lengths, query.shape[2] - sum(lengths)], dim=2)
        for (start, end, ancestors), query_Q in zip(layout.runs, queries, strict=True):
            path = [seen[run] for run in (*ancestors, (start, end))]
            key_P, value_P = (_joined(pieces, dtype) for pieces in zip(*path, strict=True))
            attended = attend_path(query_Q, key_P, value_P, scale, sliding_window, softcap, sinks, layout.masks)
            outputs.append(attended.transpose(1, 2))
        if added.shape[2]:
            outputs.append(value.new_zeros(1, added.shape[2], query.shape[1], value.shape[-1], dtype=dtype))
        output = torch.cat(outputs, dim=1).transpose(1, 2)
    return output.to(product_dtype(value))


def keep_runs(
    key: Tensor, value: Tensor, layout: ForestLayout | PassLayout, seen: dict[Range, KeysValues]
) -> torch.dtype:
    """Put each run's keys and values into `seen`, cast once, to the dtype of the products, which is returned.

    Taken apart by `split`, not by slices: the backward of a slice writes a whole row of zeros, that of `split` is one
    concatenation (100 runs of 40 tokens, 16 heads: 1.6 s against 0.1 s a layer).
    """
    lengths = [end - start for start, end, _ in layout.runs]
    added = key.shape[2] - sum(lengths)  # the last tokens may be in no run, see `computed_tokens`
    dtype = _fastest_dtype(product_dtype(value), layout.runs, value.device)
    split = (part.to(dtype).split([*lengths, added], dim=2)[:-1] for part in (key, value))
    for (start, end, _), piece in zip(layout.runs, zip(*split, strict=True), strict=True):
        seen[start, end] = piece
    return dtype


def _joined(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return pieces[0].to(dtype) if len(pieces) == 1 else torch.cat([piece.to(dtype) for piece in pieces], dim=2)


def _fastest_dtype(asked: torch.dtype, runs: Sequence[Run], device: torch.device) -> torch.dtype:
    """On a CPU half precision is the slower one for short runs."""
    if device.type != "cpu" or asked.itemsize != 2:
        return asked
    lengths = [end - start for start, end, _ in runs]
    before = [sum(end - start for start, end in ancestors) for _, _, ancestors in runs]
    path_lengths = [length + more for length, more in zip(lengths, before, strict=True)]
    return torch.float32 if mostly_short(zip(lengths, path_lengths, strict=True)) else asked


class KeysKept(Exception):
    """What was wanted of this layer is done: nothing reads its output."""


# What layers may hand to an attention function without any effect on the result.
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "cache_position", "use_cache", "past_key_values", "output_hidden_states", "output_router_logits"}
    | {"output_attentions", "return_dict", "position_embeddings", "logits_to_keep", "num_items_in_batch"}
)


def forest_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    forest: ForestLayout | PassLayout | None = None,
    forest_keys_only: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function in transformers' AttentionInterface. Raises ModelError for what it cannot honour, by name.

    With `forest_keys_only`, raises KeysKept as soon as the layer's keys and values are on record.
    """
    layer = type(module).__name__
    if forest is None:
        raise ModelError(
            f"{layer} calls attention without the row's layout: the model drops keyword arguments on the way to its "
            f"layers, so conversations cannot be kept apart in one row. Use a model whose layers pass them on."
        )
    asked = {name: setting for name, setting in kwargs.items() if setting is not None and setting is not False}
    if attention_mask is not None:
        asked["attention_mask"] = attention_mask
    if dropout:
        asked["dropout"] = dropout
    if is_causal is False or not getattr(module, "is_causal", True):
        asked["is_causal"] = False
    unknown = sorted(asked.keys() - _WITHOUT_EFFECT)
    if unknown:
        advice = " Set attention_dropout to 0 in the model's config.json." if "dropout" in unknown else ""
        raise ModelError(f"{layer} asks attention for {', '.join(unknown)}, which no row layout can honour.{advice}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    seen = dict(forest.kept.get(module, {})) if isinstance(forest, PassLayout) else {}
    if isinstance(forest, PassLayout) and forest.recorded is not None:
        forest.recorded[module] = seen
    if forest_keys_only:
        keep_runs(key, value, forest, seen)
        raise KeysKept
    attend = fast_path(query, key, value, forest, softcap, s_aux) or attend_runs
    output = attend(query, key, value, forest, scale, sliding_window, softcap, s_aux, seen)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, forest_attention_forward)


@contextmanager
def forest_attention(model: nn.Module) -> Iterator[None]:
    """Within the block, the decoder's attention is over a forest; afterwards it is as before.

    So generation and saving never see it. With activation checkpointing the block must enclose backward too, since
    layers run again there. `model` is a transformers causal LM, bare or wrapped by peft. Raises ModelError for a model
    that does not look its attention up in transformers' AttentionInterface.
    """
    with attention_implementation(model, IMPLEMENTATION):
        yield


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Within the block, the decoder's attention is the one registered as `name`; a ModelError where it is fixed."""
    decoder = decoder_of(model)
    former = decoder.config._attn_implementation
    if former == name:
        yield
        return
    if not decoder._can_set_attn_implementation():
        raise ModelError(
            f"{type(decoder).__name__} computes attention by itself, not through transformers' AttentionInterface, so "
            f"conversations cannot be kept apart in one row. Use a model type that supports attn_implementation."
        )
    decoder.config._attn_implementation = name
    try:
        yield
    finally:
        decoder.config._attn_implementation = former


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, out of its peft wrapper if it has one."""
    bare: Callable[[], PreTrainedModel] | None = getattr(model, "get_base_model", None)
    return model if bare is None else bare()  # type: ignore[return-value]


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """The part of a causal LM that turns tokens into hidden states. Raises ModelError where there is no telling."""
    bare = causal_lm(model)
    decoder = bare.get_decoder()
    if decoder is not bare and isinstance(decoder, PreTrainedModel):
        return decoder_of(decoder) if decoder.can_generate() else decoder  # Llama 4 with a tower: a causal LM in it
    # transformers looks it up by names that are not those of all models: Llama 4's, and what ModernBERT calls its head
    inner = [child for child in bare.children() if isinstance(child, PreTrainedModel)]
    if len(inner) != 1:
        raise ModelError(f"{type(bare).__name__} does not say which part of it is the decoder. Use another model type.")
    return inner[0]
