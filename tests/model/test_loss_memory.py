"""What the loss holds in memory and does only once: chunks, blocks, the head's gradient and its copy."""

import pytest
import torch
from test_loss import D, N, V, error, holding, inputs
from torch.utils._python_dispatch import TorchDispatchMode

from preceptor.model.loss import softmax
from preceptor.model.loss.linear_cross_entropy import Head, HeadCast, linear_cross_entropy
from reference_loss import linear_cross_entropy_reference


class Watch(TorchDispatchMode):
    """Counts what was newly made, by (dtype, shape): results that share no memory with an argument."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {
            a.untyped_storage().data_ptr() for a in [*args, *(kwargs or {}).values()] if isinstance(a, torch.Tensor)
        }
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.made.append((result.dtype, tuple(result.shape)))
        return result

    def most_rows(self, dtype):
        """Of the tensors of this type that are as wide as the vocabulary."""
        return max(shape[0] for made, shape in self.made if made == dtype and len(shape) == 2 and shape[1] == V)


def test_logits_never_exceed_one_chunk_nor_their_float32_one_block(monkeypatch):
    monkeypatch.setitem(softmax._BLOCK_LOGITS, "cpu", 2 * V)
    (hidden_TD, weight_VD, *rest), _ = inputs()
    head = Head(weight_VD, softcap=2.0)
    with torch.autocast("cpu", torch.bfloat16), Watch() as watch:
        linear_cross_entropy(hidden_TD, head, *rest, logits_bytes=holding(8, torch.bfloat16))
    assert watch.most_rows(torch.bfloat16) == 8
    assert watch.most_rows(torch.float32) == 2
    assert watch.made.count((torch.bfloat16, (8, V))) == 1, "one buffer for all chunks"


def test_one_float32_buffer_for_the_gradient_of_the_head_and_none_beside_a_given_one():
    (hidden_TD, weight_VD, *rest), _ = inputs()
    for head_grad_VD, num_made in ((None, 1), (torch.zeros(V, D), 0)):
        with torch.autocast("cpu", torch.bfloat16), Watch() as watch:
            loss = linear_cross_entropy(
                hidden_TD,
                Head(weight_VD),
                *rest,
                logits_bytes=holding(8, torch.bfloat16),
                head_grad_VD=head_grad_VD,
                gradient_is_one=True,
            )
            loss.backward()
        assert watch.made.count((torch.float32, (V, D))) == num_made


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_autograd_adopts_the_gradient_of_the_head_without_a_copy(factor):
    (hidden_TD, weight_VD, *rest), _ = inputs()
    loss = linear_cross_entropy(hidden_TD, Head(weight_VD), *rest)
    address = loss.grad_fn.grads[1].data_ptr()
    (loss * factor).backward()
    assert weight_VD.grad.data_ptr() == address


@pytest.mark.parametrize("autocast", [False, True])
def test_rows_add_up_in_a_given_buffer(autocast):
    """Two rows into weight.grad as they come, against the float64 gradient of both."""
    leaves, rests, trues = [], [], []
    for seed in (0, 1):
        (hidden_TD, weight_VD, *rest), _ = inputs(seed=seed)
        leaves.append((hidden_TD, weight_VD))
        rests.append(rest)
    weight_VD = leaves[0][1]
    weight_VD.grad = torch.zeros_like(weight_VD)
    address = weight_VD.grad.data_ptr()
    for (hidden_TD, _), rest in zip(leaves, rests, strict=True):
        true = linear_cross_entropy_reference(hidden_TD, Head(weight_VD), *rest)
        trues.append(torch.autograd.grad(true, (hidden_TD, weight_VD)))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = linear_cross_entropy(
                hidden_TD, Head(weight_VD), *rest, head_grad_VD=weight_VD.grad, gradient_is_one=True
            )
        loss.backward()
    tolerance = 2e-2 if autocast else 1e-5
    assert weight_VD.grad.data_ptr() == address
    assert error(weight_VD.grad, trues[0][1] + trues[1][1]) < tolerance
    for (hidden_TD, _), true in zip(leaves, trues, strict=True):
        assert error(hidden_TD.grad, true[0]) < tolerance


def test_a_given_buffer_rejects_a_loss_that_is_multiplied_later():
    (hidden_TD, weight_VD, *rest), _ = inputs()
    loss = linear_cross_entropy(
        hidden_TD, Head(weight_VD), *rest, head_grad_VD=torch.zeros_like(weight_VD), gradient_is_one=True
    )
    with pytest.raises(RuntimeError, match="weight_N"):
        (loss / N).backward()


def test_a_given_buffer_is_left_alone_without_gradients():
    (hidden_TD, weight_VD, *rest), _ = inputs()
    head_grad_VD = torch.zeros_like(weight_VD)
    with torch.no_grad():
        linear_cross_entropy(hidden_TD, Head(weight_VD), *rest, head_grad_VD=head_grad_VD, gradient_is_one=True)
    assert not head_grad_VD.any()


def test_a_head_is_cast_once_and_again_when_it_changes():
    (hidden_TD, weight_VD, *rest), _ = inputs()
    weight_VD = torch.nn.Parameter(weight_VD.detach(), requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        before = linear_cross_entropy(hidden_TD, Head(weight_VD), *rest)
        cast = HeadCast()
        with Watch() as watch:
            losses = [linear_cross_entropy(hidden_TD, Head(weight_VD), *rest, head_cast=cast) for _ in range(3)]
        assert watch.made.count((torch.bfloat16, (V, D))) == 1
        assert all(torch.equal(loss, before) for loss in losses)
        with torch.no_grad():
            weight_VD.mul_(0.5)
        changed = linear_cross_entropy(hidden_TD, Head(weight_VD), *rest, head_cast=cast)
        with Watch() as watch:
            assert torch.equal(changed, linear_cross_entropy(hidden_TD, Head(weight_VD), *rest))
        assert watch.made.count((torch.bfloat16, (V, D))) == 1, "made again without it"
    assert not torch.equal(changed, before)
