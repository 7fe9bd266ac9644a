"""What the page of torch's `varlen_attn` describes, in its place where there is no GPU."""

import torch


def flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size=(-1, -1), enable_gqa=False):
    """Sequence by sequence: query i of Q stands beside key i + P - Q of P and sees `left` keys before it and no later
    one; -1: all before it. (Q, H, D), (P, K, D), (P, K, D) -> (Q, H, D)."""
    left, right = window_size
    assert right == 0 and query.dtype == key.dtype == value.dtype
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and len(cu_seq_q) == len(cu_seq_k)
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key)) and cu_seq_q[0] == cu_seq_k[0] == 0
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
    assert enable_gqa == (query.shape[1] != key.shape[1]) and key.shape == value.shape
    assert query.stride(2) == key.stride(2) == value.stride(2) == 1
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for q0, q1, k0, k1 in zip(cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:], strict=True):
        query_i, key_j, value_j = query[q0:q1], key[k0:k1], value[k0:k1]
        scores = torch.einsum("ihd,jhd->hij", query_i, key_j.repeat_interleave(groups, 1)) * scale
        i = torch.arange(len(query_i))[:, None] + len(key_j) - len(query_i)
        j = torch.arange(len(key_j))[None, :]
        visible = (j <= i) & ((j >= i - left) if left >= 0 else True)
        weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), -1)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, value_j.repeat_interleave(groups, 1)))
    return torch.cat(outputs)


def old_flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """As torch 2.11 has it: heads are grouped without a word."""
    grouped = query.shape[1] != key.shape[1]
    sizes = (cu_seq_q, cu_seq_k, max_q, max_k)
    return flash(query, key, value, *sizes, scale=scale, window_size=window_size, enable_gqa=grouped)
