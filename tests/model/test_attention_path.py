"""Attention of one path in bfloat16 on a CPU: a backward of our own against float64, beside the naive path's."""

import pytest
import torch

from preceptor.model import sizes
from preceptor.model.attention import cpu
from preceptor.model.attention.cpu import attend_path
from preceptor.model.attention.layout import AttentionOptions, PathMasks

H, K, D, V = 6, 2, 16, 24
SCALE = 0.4


def naive(query, key, value, window):
    """As transformers' eager attention, in the dtype of its inputs: scores and weights rounded, softmax in float32."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
    visible = (distance >= 0) & (distance < (window or num_keys))
    key, value = key.repeat_interleave(H // K, dim=1), value.repeat_interleave(H // K, dim=1)
    scores = (query @ key.transpose(2, 3) * SCALE).masked_fill(~visible, -torch.inf)
    return torch.softmax(scores, -1, torch.promote_types(scores.dtype, torch.float32)).to(value.dtype) @ value


def ours(query, key, value, window):
    num_queries, num_keys = query.shape[2], key.shape[2]
    ancestors = ((0, num_keys - num_queries),) if num_keys > num_queries else ()
    masks = PathMasks([(num_keys - num_queries, num_keys, ancestors)])
    return attend_path(query, key, value, AttentionOptions(SCALE, window), masks)


def path(num_queries, num_keys, value_size=V):
    """Leaves in float64 that bfloat16 holds exactly, in the layout that layers hand over, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, num_queries, H, D), (1, num_keys, K, D), (1, num_keys, K, value_size), (1, num_queries, H, value_size)
    made = [torch.randn(shape, generator=generator).bfloat16().double().transpose(1, 2) for shape in shapes]
    return made[:3], made[3]


def grads(function, leaves, grad, dtype, window):
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    output = function(*leaves, window)
    return [output, *torch.autograd.grad(output, leaves, grad.to(dtype))]


def error(found, true):
    return float((found.double() - true).detach().norm() / true.detach().norm())


@pytest.mark.parametrize("window", [None, 1, 7, 40, 1000])
@pytest.mark.parametrize("scratch_elements", [1, 1 << 22], ids=["head by head", "all heads at once"])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 30), (50, 50), (23, 90), (61, 64)])
def test_gradients_are_no_further_from_the_truth_than_the_naive_path(
    num_queries, num_keys, scratch_elements, window, monkeypatch
):
    monkeypatch.setattr(cpu, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(sizes, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(sizes, "_WHOLE_TOKENS", 24)
    monkeypatch.setattr(sizes, "SCRATCH_ELEMENTS", scratch_elements)
    leaves, grad = path(num_queries, num_keys, D)
    true = grads(naive, leaves, grad, torch.float64, window)
    found = grads(ours, leaves, grad, torch.bfloat16, window)
    other = grads(naive, leaves, grad, torch.bfloat16, window)
    for name, one, two, exact in zip(("output", "query", "key", "value"), found, other, true, strict=True):
        assert one.dtype == torch.bfloat16 and one.shape == exact.shape
        if exact.norm() > 0:
            assert error(one, exact) <= 1.35 * error(two, exact) + 1e-3, name
        else:
            assert one.abs().max() < 1e-2, name


def test_what_all_keys_have_in_common_costs_no_bits():
    """Trained models have large scores, most of them the same for all keys: eager attention rounds the rest away."""
    (query, key, value), grad = path(300, 500, D)
    common = torch.full((1, K, 1, D), 4.0, dtype=torch.float64)
    leaves = [query + 1, key + common, value]
    leaves = [leaf.bfloat16().double() for leaf in leaves]
    true = grads(naive, leaves, grad, torch.float64, None)
    found = grads(ours, leaves, grad, torch.bfloat16, None)
    other = grads(naive, leaves, grad, torch.bfloat16, None)
    for one, two, exact in list(zip(found, other, true, strict=True))[1:]:
        assert error(one, exact) < 0.02 < 0.05 < error(two, exact)


def test_values_may_be_of_another_size_than_keys():
    leaves, grad = path(300, 410)
    true = grads(naive, leaves, grad, torch.float64, None)
    for one, exact in zip(grads(ours, leaves, grad, torch.bfloat16, None), true, strict=True):
        assert one.shape == exact.shape and error(one, exact) < 1e-2


def test_autocast_at_backward_changes_nothing():
    leaves, grad = path(20, 50, D)
    plain = grads(ours, leaves, grad, torch.bfloat16, None)
    with torch.autocast("cpu", torch.bfloat16):
        within = grads(ours, leaves, grad, torch.bfloat16, None)
    assert all(torch.equal(one, other) for one, other in zip(plain, within, strict=True))


def test_what_is_kept_for_backward_is_queries_keys_and_values_alone():
    leaves, _ = path(300, 700, D)
    leaves = [leaf.bfloat16().requires_grad_() for leaf in leaves]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        ours(*leaves, None)
    assert sum(kept) == sum(leaf.numel() for leaf in leaves)


def test_without_gradients_nothing_is_kept():
    leaves, _ = path(5, 9, D)
    output = ours(*(leaf.bfloat16() for leaf in leaves), None)
    assert output.grad_fn is None
