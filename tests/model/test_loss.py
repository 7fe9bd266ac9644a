"""linear_cross_entropy against the formula in float64: values, gradients, variants, precision, edges."""

import pytest
import torch

from preceptor.model.loss.linear_cross_entropy import Head, TrainedRows, linear_cross_entropy, token_losses
from preceptor.model.loss.softmax import chunk_tokens
from preceptor.model.options import LossOptions
from reference_loss import linear_cross_entropy_reference

T, D, V, N = 40, 16, 96, 29

OPTIONS = {
    "cross_entropy": LossOptions(),
    "label_smoothing": LossOptions(label_smoothing=0.1),
    "z_loss": LossOptions(z_loss=0.01),
    "dft": LossOptions(dft=True),
    "all": LossOptions(label_smoothing=0.2, z_loss=0.003, dft=True),
}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "softcap": 2.0, "logit_scale": 0.3},
}


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


def holding(num_tokens, dtype=torch.float32):
    """A budget for the logits of so many tokens."""
    return num_tokens * V * dtype.itemsize


def loss_and_grads(function, arguments, bias_V=None, softcap=None, logit_scale=1.0, **options):
    hidden_TD, weight_VD, *rest = arguments
    leaves = [leaf for leaf in (hidden_TD, weight_VD, bias_V) if leaf is not None]
    loss = function(hidden_TD, Head(weight_VD, bias_V, softcap, logit_scale), *rest, **options)
    return loss, torch.autograd.grad(3.0 * loss, leaves)


def error(found, true):
    found, true = found.detach().double(), true.detach().double()
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_reference(options, head, dtype, tolerance):
    head = dict(HEADS[head])
    arguments, bias_V = inputs(dtype, bias=head.pop("bias", False))
    true_loss, true_grads = loss_and_grads(
        linear_cross_entropy_reference, arguments, bias_V, options=OPTIONS[options], **head
    )
    for num_tokens in (1, 7, N):
        loss, grads = loss_and_grads(
            linear_cross_entropy,
            arguments,
            bias_V,
            options=OPTIONS[options],
            logits_bytes=holding(num_tokens, dtype),
            **head,
        )
        assert loss.dtype == dtype
        assert error(loss, true_loss) < tolerance / 10
        for found, true in zip(grads, true_grads, strict=True):
            assert error(found, true) < tolerance


@pytest.mark.parametrize("options", OPTIONS)
def test_trained_rows_of_a_frozen_head(options):
    (hidden_TD, weight_VD, *rest), _ = inputs()
    rows_R = torch.tensor([3, 90, 41])
    rows = TrainedRows(rows_R, weight_VD[rows_R].detach().requires_grad_())
    head = Head(weight_VD, softcap=2.0)
    true = torch.autograd.grad(
        linear_cross_entropy_reference(hidden_TD, head, *rest, options=OPTIONS[options]), (hidden_TD, weight_VD)
    )
    head = Head(weight_VD.detach(), softcap=2.0, trained_rows=rows)
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        loss = function(hidden_TD, head, *rest, options=OPTIONS[options], logits_bytes=holding(8))
        found = torch.autograd.grad(loss, (hidden_TD, rows.weight_RD))
        assert error(found[0], true[0]) < 1e-5
        assert error(found[1], true[1][rows_R]) < 1e-5


def test_the_gradient_is_the_slope_of_the_loss():
    """Central differences along random directions, with everything on that has no constant in it."""
    (hidden_TD, weight_VD, *rest), bias_V = inputs(torch.float64, bias=True)
    options = LossOptions(label_smoothing=0.1, z_loss=0.01)

    def loss_of(hidden_TD, weight_VD, bias_V):
        return linear_cross_entropy(hidden_TD, Head(weight_VD, bias_V, 2.0, 0.7), *rest, options=options)

    leaves = (hidden_TD, weight_VD, bias_V)
    grads = torch.autograd.grad(loss_of(*leaves), leaves)
    for which, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        direction = torch.randn(leaf.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(which))
        ends = []
        for step in (1e-5, -1e-5):
            moved = [leaf + step * direction if at == which else leaf for at, leaf in enumerate(leaves)]
            ends.append(loss_of(*moved).item())
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float((direction * grad).sum()), rel=1e-7)


def test_label_smoothing_is_that_of_torch():
    (hidden_TD, weight_VD, source_N, target_N, weight_N), _ = inputs()
    losses_N = torch.nn.functional.cross_entropy(
        hidden_TD[source_N] @ weight_VD.T, target_N, reduction="none", label_smoothing=0.1
    )
    options = LossOptions(label_smoothing=0.1)
    loss = linear_cross_entropy(hidden_TD, Head(weight_VD), source_N, target_N, weight_N, options=options)
    assert error(loss, (losses_N * weight_N).sum()) < 1e-6


def test_dft_weighs_each_token_by_its_probability():
    (hidden_TD, weight_VD, source_N, target_N, weight_N), _ = inputs()
    losses_N, _ = token_losses(hidden_TD, Head(weight_VD), source_N, target_N)
    arguments = (hidden_TD, weight_VD, source_N, target_N)
    true_loss, true_grads = loss_and_grads(linear_cross_entropy, (*arguments, weight_N * torch.exp(-losses_N)))
    loss, grads = loss_and_grads(linear_cross_entropy, (*arguments, weight_N), options=LossOptions(dft=True))
    assert error(loss, true_loss) < 1e-6
    assert all(error(found, true) < 1e-6 for found, true in zip(grads, true_grads, strict=True))


def naive(hidden_TD, head, source_N, target_N, weight_N):
    """What a model and cross_entropy do: logits of the row in the products' dtype, softmax in float32."""
    logits_NV = (hidden_TD @ head.weight_VD.T)[source_N].float()
    losses_N = torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="none")
    return (losses_N * weight_N.float()).sum()


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_no_further_from_the_truth_than_the_naive_path(autocast):
    (hidden_TD, weight_VD, _, target_N, weight_N), _ = inputs(torch.float32 if autocast else torch.bfloat16)
    arguments = (hidden_TD, weight_VD, torch.randperm(T)[:N], target_N, weight_N)
    true_loss, true_grads = loss_and_grads(linear_cross_entropy_reference, arguments)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        naive_loss, naive_grads = loss_and_grads(naive, arguments)
        loss, grads = loss_and_grads(linear_cross_entropy, arguments, logits_bytes=holding(6, torch.bfloat16))
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
    arguments = (hidden_TD.detach().abs(), Head(weight_VD), source_N, target_N, torch.ones(600))
    true = torch.autograd.grad(linear_cross_entropy_reference(*arguments), weight_VD)[0]
    other = torch.autograd.grad(naive(*arguments), weight_VD)[0]
    loss = linear_cross_entropy(*arguments, logits_bytes=holding(2, torch.bfloat16))
    assert error(torch.autograd.grad(loss, weight_VD)[0], true) <= 1.1 * error(other, true)


def test_a_confident_token_keeps_its_small_loss_in_bfloat16():
    """p = 0.9999 is 1 in bfloat16: neither the loss nor the gradient may be read from a rounded probability."""
    weight_VD = torch.zeros(V, D, dtype=torch.bfloat16).requires_grad_()
    with torch.no_grad():
        weight_VD[5, 0] = 1.0
    hidden_TD = torch.zeros(1, D, dtype=torch.bfloat16)
    hidden_TD[0, 0] = 13.75
    arguments = (hidden_TD, Head(weight_VD), torch.tensor([0]), torch.tensor([5]), torch.ones(1))
    true = linear_cross_entropy_reference(*arguments)
    loss = linear_cross_entropy(*arguments)
    assert 5e-5 < true.item() < 2e-4 and loss.item() == pytest.approx(true.item(), rel=5e-3)
    true_VD, found_VD = (torch.autograd.grad(value, weight_VD)[0] for value in (true, loss))
    assert found_VD[5, 0].item() == pytest.approx(true_VD[5, 0].item(), rel=1e-2)


def test_matrix_products_follow_autocast():
    (hidden_TD, weight_VD, *rest), _ = inputs()
    plain = linear_cross_entropy(hidden_TD, Head(weight_VD), *rest)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = linear_cross_entropy(hidden_TD, Head(weight_VD), *rest)
    assert 1e-5 < error(under_autocast, plain) < 1e-2


def test_without_trained_tokens_backward_gives_zeros():
    (hidden_TD, weight_VD, *rest), bias_V = inputs(bias=True, n=0)
    loss = linear_cross_entropy(hidden_TD, Head(weight_VD, bias_V), *rest)
    assert loss.item() == 0.0
    loss.backward()
    for leaf in (hidden_TD, weight_VD, bias_V):
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


def test_a_frozen_head_gets_no_gradient_and_no_accumulator():
    (hidden_TD, weight_VD, *rest), _ = inputs()
    true_grad = torch.autograd.grad(linear_cross_entropy_reference(hidden_TD, Head(weight_VD), *rest), hidden_TD)[0]
    loss = linear_cross_entropy(hidden_TD, Head(weight_VD.detach()), *rest)
    assert [grad is None for grad in loss.grad_fn.grads] == [False, True, True, True]
    loss.backward()
    assert error(hidden_TD.grad, true_grad) < 1e-5


def test_a_tied_head_gets_the_sum_of_both_gradients():
    (_, weight_VD, *rest), _ = inputs()
    ids_T = torch.arange(T) % V
    found, true = (
        torch.autograd.grad(function(weight_VD[ids_T] * 2, Head(weight_VD), *rest), weight_VD)[0]
        for function in (linear_cross_entropy, linear_cross_entropy_reference)
    )
    assert error(found, true) < 1e-5


@pytest.mark.parametrize("options", OPTIONS)
def test_extreme_logits_stay_finite(options):
    (hidden_TD, weight_VD, *rest), _ = inputs()
    loss = linear_cross_entropy(hidden_TD * 1e4, Head(weight_VD), *rest, options=OPTIONS[options])
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden_TD.grad).all()


def test_what_is_not_finite_shows():
    (hidden_TD, weight_VD, *rest), _ = inputs()
    for value in (float("nan"), float("inf")):
        spoilt_TD = hidden_TD.detach().clone()
        spoilt_TD[rest[0][0], 0] = value
        assert not torch.isfinite(linear_cross_entropy(spoilt_TD, Head(weight_VD), *rest))


def test_a_second_backward_is_an_error():
    (hidden_TD, weight_VD, *rest), _ = inputs()
    loss = linear_cross_entropy(hidden_TD, Head(weight_VD), *rest)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()


@pytest.mark.parametrize("options", OPTIONS)
def test_without_gradients_the_loss_is_the_same(options):
    (hidden_TD, weight_VD, *rest), bias_V = inputs(bias=True)
    arguments = (hidden_TD, Head(weight_VD, bias_V, softcap=2.0), *rest)
    with torch.no_grad():
        loss = linear_cross_entropy(*arguments, options=OPTIONS[options], logits_bytes=holding(4))
    assert not loss.requires_grad
    assert error(loss, linear_cross_entropy_reference(*arguments, options=OPTIONS[options])) < 1e-6


def test_token_losses():
    (hidden_TD, weight_VD, source_N, target_N, weight_N), bias_V = inputs(bias=True)
    head = Head(weight_VD, bias_V, 2.0, 0.5)
    logits_NV = 0.5 * (hidden_TD[source_N] @ weight_VD.T + bias_V)
    target_N[::2] = logits_NV.argmax(dim=-1)[::2]
    losses_N, correct_N = token_losses(hidden_TD, head, source_N, target_N)
    true = linear_cross_entropy_reference(hidden_TD, head, source_N, target_N, weight_N)
    assert losses_N.dtype == torch.float32
    assert error((losses_N.double() * weight_N).sum(), true) < 1e-6
    assert torch.equal(correct_N, logits_NV.argmax(dim=-1) == target_N)
    assert correct_N[::2].all()


def test_chunks_are_of_about_one_size_and_within_the_budget():
    assert chunk_tokens(29, V, 4, holding(8)) == 8  # 8, 8, 8, 5
    assert chunk_tokens(2000, 152_000, 4, 256 * 2**20) == 400  # not 441 and a rest
    assert chunk_tokens(2000, 152_000, 2, 128 * 2**20) == 334  # of at most 384, which is on the grid
    assert chunk_tokens(5, 152_000, 2, 128 * 2**20) == 5
    assert chunk_tokens(100, 152_000, 2, 1000) == 1
    assert chunk_tokens(0, 152_000, 2) == 1
    assert chunk_tokens(2050, 32_000, 2) == 684  # a budget for 4194, but on CPU never more than 1024
    assert chunk_tokens(2050, 32_000, 2, device_type="cuda") == 2050
