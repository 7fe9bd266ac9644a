"""Attention of one path: its last Q tokens attend to all P tokens of it. The index on a path is the position.

Three ways, by what is asked and where:

    written out    soft-cap and sinks, which torch's fused kernels do not know: scores of a block of queries at a time
    fused          all else, by torch's `scaled_dot_product_attention`, a path with ancestors in blocks under a mask
    bfloat16, CPU  forward as fused; backward of our own, which computes the weights again by batched matrix products

Torch's fused backward in bfloat16 on a CPU has kernels compiled for every length that it meets. Ours multiplies sizes
on a grid (sizes.py), and keeps queries, keys and values alone: neither the output nor a mask.

Legend: H query heads, K key-value heads, G = H / K, D head size, Q queries and P keys of one path or block.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from preceptor.model.attention.layout import AttentionOptions, PathMasks, Scratch
from preceptor.model.sizes import BLOCK_TOKENS, backward_block, device_type_of, heads_at_once, on_grid, representative


def attend_path(query_Q: Tensor, key_P: Tensor, value_P: Tensor, options: AttentionOptions, masks: PathMasks) -> Tensor:
    """query (1, H, Q, D), key and value (1, K, P, D) -> (1, H, Q, D)."""
    parts = (query_Q, key_P, value_P)
    own_backward = device_type_of(query_Q.device) == "cpu" and query_Q.dtype == torch.bfloat16 and options.is_plain
    if own_backward and torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        output: Tensor = _AttendInHalf.apply(*parts, options, masks)
        return output
    return _attend_in_blocks(*parts, options, masks)


def _blocks(num_queries: int, num_keys: int, window: int | None, block_tokens: int) -> Iterator[tuple[slice, slice]]:
    """Queries of a block and the keys that any of them sees; the last of those is the last query's own."""
    offset = num_keys - num_queries
    for start in range(0, num_queries, block_tokens):
        end = min(start + block_tokens, num_queries)
        first_key = 0 if window is None else max(0, offset + start - window + 1)
        yield slice(start, end), slice(first_key, offset + end)


def _attend_in_blocks(
    query_Q: Tensor, key_P: Tensor, value_P: Tensor, options: AttentionOptions, masks: PathMasks
) -> Tensor:
    num_queries, num_keys = query_Q.shape[2], key_P.shape[2]
    window = options.window_among(num_keys)
    if options.is_plain and window is None and num_queries == num_keys:
        return attend_fused(query_Q, key_P, value_P, None, options)
    attend, mask_dtype = (attend_fused, query_Q.dtype) if options.is_plain else (attend_written_out, torch.bool)
    outputs = []
    for queries, keys in _blocks(num_queries, num_keys, window, BLOCK_TOKENS):
        sizes = (queries.stop - queries.start, keys.stop - keys.start)
        mask_QP = masks.mask(*sizes, window, mask_dtype, query_Q.device, BLOCK_TOKENS)
        block = (query_Q[:, :, queries], key_P[:, :, keys], value_P[:, :, keys])
        outputs.append(attend(*block, mask_QP, options))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def attend_fused(
    query: Tensor, key: Tensor, value: Tensor, mask_QP: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Attention under any mask, or causal, by torch's fused kernels, without soft-cap and sinks.

    On a GPU keys and values get as many heads as queries: of its fused kernels flash alone takes fewer, which takes
    neither float32 nor a mask; torch would fall back on one that writes all scores out.
    """
    groups, causal = query.shape[1] // key.shape[1], mask_QP is None
    if groups > 1 and device_type_of(query.device) == "cuda":
        key, value, groups = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1), 1
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask_QP, is_causal=causal, scale=options.scale, enable_gqa=groups > 1
    )


def attend_written_out(query: Tensor, key: Tensor, value: Tensor, mask_QP: Tensor, options: AttentionOptions) -> Tensor:
    """Softmax attention with its scores written out, under any mask of bools; the softmax is float32 at least."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask_QP, float("-inf"))
    if options.sinks is not None:
        sink = options.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if options.sinks is not None:
        weights = weights[..., :-1]
    return weights.to(value.dtype) @ value


# bfloat16 on a CPU ---------------------------------------------------------------------------------------------------


class _AttendInHalf(torch.autograd.Function):
    """Fused attention whose backward computes a block's weights again.

    With scores S = scale * q k^T, weights P = softmax(S), output O = P v and its gradient dO:
    dv = P^T dO,  dP = dO v^T,  dS = P * (dP - rowsum(dP * P)),  dq = scale * dS k,  dk = scale * dS^T q.
    Products round their results to bfloat16, as the written-out path's do; sums over blocks are in float32. Keys are
    centred first.
    """

    @staticmethod
    def forward(
        ctx: Any, query_Q: Tensor, key_P: Tensor, value_P: Tensor, options: AttentionOptions, masks: PathMasks
    ) -> Tensor:
        ctx.save_for_backward(query_Q, key_P, value_P)
        ctx.options, ctx.scratch = options, masks.scratch
        return _attend_in_blocks(query_Q, key_P, value_P, options, masks)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_Q: Tensor) -> tuple[Tensor | None, ...]:
        query_Q, key_P, value_P = ctx.saved_tensors
        num_queries, num_keys = query_Q.shape[2], key_P.shape[2]
        blocks = list(_blocks(num_queries, num_keys, ctx.options.window, backward_block(num_queries)))
        end = max(keys.start + on_grid(keys.stop - keys.start) for _, keys in blocks)
        key_KPD, value_KPD = (_padded(part, end) for part in (_centred(key_P[0]), value_P[0]))
        query_KGQD, grad_KGQD = (part[0].unflatten(0, (len(key_KPD), -1)) for part in (query_Q, grad_Q))
        grads = _backward(query_KGQD, key_KPD, value_KPD, grad_KGQD, blocks, ctx.options, ctx.scratch)
        grad_key, grad_value = (grad[None, :, :num_keys] for grad in grads[1:])
        return grads[0].flatten(0, 1)[None], grad_key, grad_value, None, None


def _centred(key_KPD: Tensor) -> Tensor:
    """Keys less their mean over the tokens: no weight changes by it, nor does dS k, as the rows of dS add up to zero.

    The scores that are rounded are smaller by what all keys have in common, which in trained models is most of them
    (Zhang et al. 2024, SageAttention, arXiv:2410.02367).
    """
    wide = key_KPD.float()
    return (wide - wide.mean(dim=1, keepdim=True)).to(key_KPD.dtype)


def _padded(tensor: Tensor, num_tokens: int) -> Tensor:
    """A copy of (..., tokens, D) with zeros behind it."""
    *heads, present, size = tensor.shape
    padded = tensor.new_empty(*heads, num_tokens, size)
    padded[..., :present, :] = tensor
    padded[..., present:, :] = 0
    return padded


def _backward(
    query_KGQD: Tensor,
    key_KPD: Tensor,
    value_KPD: Tensor,
    grad_KGQD: Tensor,
    blocks: list[tuple[slice, slice]],
    options: AttentionOptions,
    scratch: Scratch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values: block by block, for so many heads at once as scratch memory is for.

    Keys and values have rows enough for each block's on the grid; those of theirs that are no keys get zeros.
    """
    num_kv_heads, groups = query_KGQD.shape[:2]
    scores_of_head = groups * max(
        on_grid(queries.stop - queries.start) * on_grid(keys.stop - keys.start) for queries, keys in blocks
    )
    num_together = heads_at_once(num_kv_heads, scores_of_head)
    buffers = scratch.take(3 * num_together * scores_of_head, query_KGQD).view(3, -1)
    grad_query = torch.empty_like(query_KGQD, memory_format=torch.contiguous_format)
    sum_dtype = key_KPD.dtype if len(blocks) == 1 else torch.float32
    grad_key, grad_value = (torch.zeros_like(part, dtype=sum_dtype) for part in (key_KPD, value_KPD))
    for first_head in representative(range(0, num_kv_heads, num_together)):
        heads = slice(first_head, first_head + num_together)
        for queries, keys in representative(blocks):
            num_keys = keys.stop - keys.start
            keys = slice(keys.start, keys.start + on_grid(num_keys))
            pieces = query_KGQD[heads, :, queries], key_KPD[heads, keys], value_KPD[heads, keys]
            found = _block_backward(*pieces, grad_KGQD[heads, :, queries], num_keys, options, buffers)
            grad_query[heads, :, queries] = found[0]
            grad_key[heads, keys] += found[1]
            grad_value[heads, keys] += found[2]
    return grad_query, grad_key.to(key_KPD.dtype), grad_value.to(value_KPD.dtype)


def _block_backward(
    query_KGQD: Tensor,
    key_KPD: Tensor,
    value_KPD: Tensor,
    grad_KGQD: Tensor,
    num_keys: int,
    options: AttentionOptions,
    buffers: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries (K, G, Q, D), keys and values, of whose P tokens the first `num_keys` are keys.

    Queries are padded to the grid by zeros, whose gradient is zero. buffers: three of K * G * Q * P elements.
    """
    num_kv_heads, groups, num_queries, _ = query_KGQD.shape
    padded = on_grid(num_queries)
    query, grad = (_padded(part, padded).flatten(1, 2) for part in (query_KGQD, grad_KGQD))  # (K, G * Q, D)
    shape = (num_kv_heads, groups * padded, key_KPD.shape[1])
    scores, weights, grad_weights = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
    torch.baddbmm(scores, query, key_KPD.transpose(1, 2), beta=0, alpha=options.scale, out=scores)
    _hide(scores.view(-1, padded, shape[2])[:, :num_queries], num_keys, options.window)
    torch.softmax(scores, dim=-1, out=weights)
    torch.bmm(grad, value_KPD.transpose(1, 2), out=grad_weights)
    grad_value = torch.bmm(weights.transpose(1, 2), grad)
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype, grad_input=scores)
    grad_query = torch.baddbmm(query, grad_scores, key_KPD, beta=0, alpha=options.scale)
    grad_key = torch.baddbmm(key_KPD, grad_scores.transpose(1, 2), query, beta=0, alpha=options.scale)
    return grad_query.unflatten(1, (groups, padded))[:, :, :num_queries], grad_key, grad_value


def _hide(scores_HQP: Tensor, num_keys: int, window: int | None) -> None:
    """Put -inf, in place, where a block's query does not see a key; the last query's own key is the last of all."""
    num_queries = scores_HQP.shape[1]
    own = scores_HQP[:, :, num_keys - num_queries :]
    own += torch.full_like(own[0], -torch.inf, memory_format=torch.contiguous_format).triu_(1)
    if window is not None and window < num_keys:
        before = torch.full_like(scores_HQP[0], -torch.inf, memory_format=torch.contiguous_format)
        scores_HQP += before.tril_(num_keys - num_queries - window)
