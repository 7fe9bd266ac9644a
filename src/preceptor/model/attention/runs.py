"""Attention over a forest: token j is visible to token i iff `j <= i < subtree_end[j]` (see data/forest.py).

`attend_reference` and `attend_dense` use the dense mask, for any length that fits; `attend_runs` goes run by run, so no
token is compared with a token that it cannot see; cuda.py has fused kernels. All have one signature and honour what is
asked:

    sliding window W   of what i sees, only j with position_i - position_j < W
    soft-cap c         scores become c * tanh(score / c)                                           (Gemma 2)
    sinks s_H          one further score per head takes part in the softmax and carries no value   (gpt-oss)

`preceptor_forest` is registered with transformers' AttentionInterface and in force within
`attention_implementation(decoder, IMPLEMENTATION)`; the decoder layers hand the layout on as the keyword `forest`. No
mask function is registered under that name, so transformers builds no mask at all.

Legend: T tokens of a sequence, H query heads, K key-value heads, D head size, Q queries and P keys of one block.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from preceptor.errors import ModelError
from preceptor.model.attention.cpu import attend_fused, attend_path, attend_written_out
from preceptor.model.attention.cuda import fast_path
from preceptor.model.attention.layout import (
    AttentionOptions,
    ForestLayout,
    RangesSeen,
    dense_mask,
    path_lengths,
    product_dtype,
)
from preceptor.model.sizes import device_type_of, mostly_short

IMPLEMENTATION = "preceptor_forest"


def attend_reference(
    query: Tensor, key: Tensor, value: Tensor, layout: ForestLayout, options: AttentionOptions
) -> Tensor:
    """query (1, H, T, D), key and value (1, K, T, D) -> (1, H, T, D), by the dense mask."""
    mask_TT = dense_mask(layout.subtree_end_T, layout.position_T, options.window)
    return attend_written_out(query, key, value, mask_TT, options)


def attend_dense(query: Tensor, key: Tensor, value: Tensor, layout: ForestLayout, options: AttentionOptions) -> Tensor:
    """The same by torch's own attention where it can, and with `layout.constant_T` honoured: the plain engine's."""
    dtype = product_dtype(value)
    if layout.constant_T is not None:
        constant_T1 = layout.constant_T[:, None]
        key, value = (torch.where(constant_T1, part.detach(), part) for part in (key, value))
    with torch.autocast(value.device.type, enabled=False):
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if not options.is_plain:
            return attend_reference(query, key, value, layout, options)
        mask_TT = dense_mask(layout.subtree_end_T, layout.position_T, options.window)
        return attend_fused(query, key, value, mask_TT, options)


def attend_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ForestLayout,
    options: AttentionOptions,
    seen: RangesSeen | None = None,
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
            attended = attend_path(query_Q, key_P, value_P, options, layout.masks)
            outputs.append(attended.transpose(1, 2))
        if added.shape[2]:
            outputs.append(value.new_zeros(1, added.shape[2], query.shape[1], value.shape[-1], dtype=dtype))
        output = torch.cat(outputs, dim=1).transpose(1, 2)
    return output.to(product_dtype(value))


def keep_runs(key: Tensor, value: Tensor, layout: ForestLayout, seen: RangesSeen) -> torch.dtype:
    """Put each run's keys and values into `seen`, cast once, to the dtype of the products, which is returned.

    Taken apart by `split`, not by slices: the backward of a slice writes zeros for all tokens, that of `split` is one
    concatenation (100 runs of 40 tokens, 16 heads: 1.6 s against 0.1 s a layer).
    """
    lengths = [end - start for start, end, _ in layout.runs]
    added = key.shape[2] - sum(lengths)  # the last tokens may be in no run, see `computed_tokens`
    dtype = product_dtype(value)
    if device_type_of(value.device) == "cpu" and dtype.itemsize == 2:  # half precision is the slower one for short runs
        dtype = torch.float32 if mostly_short(zip(*path_lengths(layout.runs), strict=True)) else dtype
    split = (part.to(dtype).split([*lengths, added], dim=2)[:-1] for part in (key, value))
    for (start, end, _), piece in zip(layout.runs, zip(*split, strict=True), strict=True):
        seen[start, end] = piece
    return dtype


def _joined(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return pieces[0].to(dtype) if len(pieces) == 1 else torch.cat([piece.to(dtype) for piece in pieces], dim=2)


class KeysRecorded(Exception):
    """Stops a layer whose keys and values are recorded where nothing reads its output (activations/layers.py)."""


# What layers may hand to an attention function without any effect on the result.
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "cache_position", "use_cache", "past_key_values", "output_hidden_states", "output_router_logits"}
    | {"output_attentions", "return_dict", "position_embeddings", "logits_to_keep", "num_items_in_batch"}
)


def attention_dropout(config: Any) -> tuple[str, float] | None:
    """The key and rate of dropout of attention's weights in a model's config; None: it has none.

    What runs here has none, as the fused kernels of packed sequences: the rate is told, and not applied.
    """
    keys = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")  # by their authors
    rates = {key: getattr(config, key, None) or 0.0 for key in keys}
    return next(((key, rate) for key, rate in rates.items() if rate > 0), None)


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
    forest: ForestLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function in transformers' AttentionInterface. Raises ModelError for what it cannot honour, by name.

    dropout: not applied, see `attention_dropout`. Raises KeysRecorded where the layout asks for keys and values only.
    """
    layer = type(module).__name__
    if forest is None:
        raise ModelError(
            f"{layer} calls attention without the sequence's layout: the model drops keyword arguments on the way to "
            f"its layers, so conversations cannot be kept apart in one sequence. Use a model whose layers pass them on."
        )
    asked = {**kwargs, "attention_mask": attention_mask}
    asked["is_causal"] = is_causal is False or not getattr(module, "is_causal", True)
    asked = {name: setting for name, setting in asked.items() if setting is not None and setting is not False}
    unknown = sorted(asked.keys() - _WITHOUT_EFFECT)
    if unknown:
        raise ModelError(f"{layer} asks attention for {', '.join(unknown)}, which no sequence layout can honour.")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    options = AttentionOptions(scale, sliding_window, softcap, s_aux)
    if forest.dense:
        output = attend_dense(query, key, value, forest, options)
        return output.transpose(1, 2).contiguous(), None
    seen = {**forest.kept.get(module, {})}
    if forest.recorded is not None:
        forest.recorded[module] = seen
    if forest.keys_only:
        keep_runs(key, value, forest, seen)
        raise KeysRecorded
    attend = fast_path(query, key, value, forest, options) or attend_runs
    output = attend(query, key, value, forest, options, seen)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, forest_attention_forward)


@cache
def outside_graphs() -> str:
    """The name under which it is left alone, with all that it calls, where a layer is compiled."""
    name = f"{IMPLEMENTATION}_outside_graphs"
    AttentionInterface.register(name, torch.compiler.disable(forest_attention_forward))
    return name


@contextmanager
def attention_implementation(decoder: PreTrainedModel, name: str) -> Iterator[None]:
    """Within the block, the decoder's attention is the one registered as `name`; afterwards it is as before.

    So generation and saving never see ours. Raises ModelError for a decoder that does not look its attention up in
    transformers' AttentionInterface.
    """
    former = decoder.config._attn_implementation
    if former == name:
        yield
        return
    if not decoder._can_set_attn_implementation():
        raise ModelError(
            f"{type(decoder).__name__} computes attention by itself, not through transformers' AttentionInterface, so "
            f"conversations cannot be kept apart in one sequence. Use a model type that supports attn_implementation."
        )
    decoder.config._attn_implementation = name
    try:
        yield
    finally:
        decoder.config._attn_implementation = former
