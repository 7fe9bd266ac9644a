"""linear_cross_entropy against the formula in float64: values, gradients, precision, edges."""

import pytest
import torch

from preceptor.model.loss import TrainedRows, linear_cross_entropy, linear_cross_entropy_reference, token_losses

T, D, V, N = 40, 16, 96, 29


def inputs(dtype=torch.float32, bias=False, seed=0, n=N):
    """Random inputs, with sources that occur more than once, as where a tree branches, and uneven weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias_V = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    source_N = torch.randint(T // 2, (n,), generator=generator)
    target_N = torch.randint(V, (n,), generator=generator)
    weight_N = torch.rand(n, generator=generator, dtype=torch.float64) * 2
    return (hidden_TD, weight_VD, source_N, target_N, weight_N), bias_V


def loss_and_grads(function, arguments, bias_V=None, **options):
    leaves = [leaf for leaf in (arguments[0], arguments[1], bias_V) if leaf is not None]
    loss = function(*arguments, bias_V=bias_V, **options)
    return loss, torch.autograd.grad(3.0 * loss, leaves)


def error(found, true):
    found, true = found.detach().double(), true.detach().double()
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("chunk_tokens", [1, 7, N, None])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("logit_scale", "bias"), [(1.0, False), (0.3, True)])
def test_equals_the_reference(chunk_tokens, softcap, logit_scale, bias):
    arguments, bias_V = inputs(bias=bias)
    options = {"softcap": softcap, "logit_scale": logit_scale}
    true_loss, true_grads = loss_and_grads(linear_cross_entropy_reference, arguments, bias_V, **options)
    loss, grads = loss_and_grads(linear_cross_entropy, arguments, bias_V, chunk_tokens=chunk_tokens, **options)
    assert loss.dtype == torch.float32
    assert error(loss, true_loss) < 1e-6
    for found, true in zip(grads, true_grads, strict=True):
        assert error(found, true) < 1e-5


def test_float64_stays_float64():
    arguments, bias_V = inputs(torch.float64, bias=True)
    true_loss, true_grads = loss_and_grads(linear_cross_entropy_reference, arguments, bias_V, softcap=3.0)
    loss, grads = loss_and_grads(linear_cross_entropy, arguments, bias_V, softcap=3.0, chunk_tokens=5)
    assert loss.dtype == torch.float64
    assert error(loss, true_loss) < 1e-14
    assert all(error(found, true) < 1e-13 for found, true in zip(grads, true_grads, strict=True))


def naive(hidden_TD, weight_VD, source_N, target_N, weight_N, bias_V=None):
    """What a model and cross_entropy do: logits of the row in the products' dtype, softmax in float32."""
    logits_NV = (hidden_TD @ weight_VD.T)[source_N].float()
    losses_N = torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="none")
    return (losses_N * weight_N.float()).sum()


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_no_further_from_the_truth_than_the_naive_path(autocast):
    (hidden_TD, weight_VD, _, target_N, weight_N), _ = inputs(torch.float32 if autocast else torch.bfloat16)
    arguments = (hidden_TD, weight_VD, torch.randperm(T)[:N], target_N, weight_N)
    true_loss, true_grads = loss_and_grads(linear_cross_entropy_reference, arguments)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        naive_loss, naive_grads = loss_and_grads(naive, arguments)
        loss, grads = loss_and_grads(linear_cross_entropy, arguments, chunk_tokens=6)
    assert loss.dtype == torch.float32
    assert error(loss, true_loss) <= 1.5 * error(naive_loss, true_loss) + 1e-6
    for found, other, true in zip(grads, naive_grads, true_grads, strict=True):
        assert found.dtype == other.dtype
        assert error(found, true) <= 1.5 * error(
            other, true
        )  # one rounding more: the loss is scaled after the gradients


def test_many_chunks_do_not_wear_down_the_gradient_of_a_bfloat16_head():
    """Added up in bfloat16, small contributions are lost beside what is there already."""
    (hidden_TD, weight_VD, *_), _ = inputs(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    source_N, target_N = torch.randint(T, (600,), generator=generator), torch.randint(4, (600,), generator=generator)
    arguments = (hidden_TD.detach().abs(), weight_VD, source_N, target_N, torch.ones(600))
    true = torch.autograd.grad(linear_cross_entropy_reference(*arguments), weight_VD)[0]
    other = torch.autograd.grad(naive(*arguments), weight_VD)[0]
    found = torch.autograd.grad(linear_cross_entropy(*arguments, chunk_tokens=2), weight_VD)[0]
    assert error(found, true) <= 1.1 * error(other, true)


def test_matrix_products_follow_autocast():
    arguments, _ = inputs()
    plain = linear_cross_entropy(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = linear_cross_entropy(*arguments)
    assert 1e-5 < error(under_autocast, plain) < 1e-2


def test_without_trained_tokens_backward_gives_zeros():
    (hidden_TD, weight_VD, *rest), bias_V = inputs(bias=True, n=0)
    loss = linear_cross_entropy(hidden_TD, weight_VD, *rest, bias_V=bias_V)
    assert loss.item() == 0.0
    loss.backward()
    for leaf in (hidden_TD, weight_VD, bias_V):
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


def test_a_frozen_head_gets_no_gradient_and_no_accumulator():
    (hidden_TD, weight_VD, *rest), _ = inputs()
    true_grad = torch.autograd.grad(linear_cross_entropy_reference(hidden_TD, weight_VD, *rest), hidden_TD)[0]
    loss = linear_cross_entropy(hidden_TD, weight_VD.detach(), *rest)
    assert [grad is None for grad in loss.grad_fn.grads] == [False, True, True, True]
    loss.backward()
    assert error(hidden_TD.grad, true_grad) < 1e-5


def test_trained_rows_of_a_frozen_head():
    (hidden_TD, weight_VD, *rest), _ = inputs()
    rows_R = torch.tensor([3, 90, 41])
    rows = TrainedRows(rows_R, weight_VD[rows_R].detach().requires_grad_())
    true = torch.autograd.grad(linear_cross_entropy_reference(hidden_TD, weight_VD, *rest), (hidden_TD, weight_VD))
    for function, options in ((linear_cross_entropy, {"chunk_tokens": 8}), (linear_cross_entropy_reference, {})):
        loss = function(hidden_TD, weight_VD.detach(), *rest, trained_rows=rows, **options)
        found = torch.autograd.grad(loss, (hidden_TD, rows.weight_RD))
        assert error(found[0], true[0]) < 1e-5
        assert error(found[1], true[1][rows_R]) < 1e-5


def test_a_tied_head_gets_the_sum_of_both_gradients():
    (_, weight_VD, *rest), _ = inputs()
    ids_T = torch.arange(T) % V
    found = torch.autograd.grad(linear_cross_entropy(weight_VD[ids_T] * 2, weight_VD, *rest), weight_VD)[0]
    true = torch.autograd.grad(linear_cross_entropy_reference(weight_VD[ids_T] * 2, weight_VD, *rest), weight_VD)[0]
    assert error(found, true) < 1e-5


def test_extreme_logits_stay_finite():
    (hidden_TD, weight_VD, *rest), _ = inputs()
    loss = linear_cross_entropy(hidden_TD * 1e4, weight_VD, *rest)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden_TD.grad).all()


def test_logits_never_exceed_one_chunk(monkeypatch):
    rows = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda logits, dim: rows.append(len(logits)) or softmax(logits, dim))
    arguments, _ = inputs()
    linear_cross_entropy(*arguments, chunk_tokens=8)
    assert rows == [8, 8, 8, 5]


def test_a_second_backward_is_an_error():
    arguments, _ = inputs()
    loss = linear_cross_entropy(*arguments)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()


def test_without_gradients_the_loss_is_the_same():
    arguments, bias_V = inputs(bias=True)
    with torch.no_grad():
        loss = linear_cross_entropy(*arguments, bias_V=bias_V, softcap=2.0, chunk_tokens=4)
    assert not loss.requires_grad
    assert error(loss, linear_cross_entropy_reference(*arguments, bias_V=bias_V, softcap=2.0)) < 1e-6


def test_token_losses():
    (hidden_TD, weight_VD, source_N, target_N, weight_N), bias_V = inputs(bias=True)
    options = {"bias_V": bias_V, "softcap": 2.0, "logit_scale": 0.5}
    logits_NV = 0.5 * (hidden_TD[source_N] @ weight_VD.T + bias_V)
    target_N[::2] = logits_NV.argmax(dim=-1)[::2]
    losses_N, correct_N = token_losses(hidden_TD, weight_VD, source_N, target_N, **options)
    true = linear_cross_entropy_reference(hidden_TD, weight_VD, source_N, target_N, weight_N, **options)
    assert losses_N.dtype == torch.float32
    assert error((losses_N.double() * weight_N).sum(), true) < 1e-6
    assert torch.equal(correct_N, logits_NV.argmax(dim=-1) == target_N)
    assert correct_N[::2].all()
