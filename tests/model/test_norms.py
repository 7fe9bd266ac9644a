"""Norms that keep less: the same numbers and gradients as the authors' modules, in whichever order those round."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from preceptor.model.activations.modules import FORMS, EfficientNorm, norm_form, root_mean_square_norm
from preceptor.model.activations.passes import DecoderPass, ModelState, adopt
from preceptor.model.numerics import relative_error

NORMS = {"llama": Qwen3RMSNorm, "gemma": Gemma2RMSNorm, "gpt_oss": GptOssRMSNorm}
SIZE = 48


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def norm_of(cls, dtype=torch.float32):
    module = cls(SIZE, eps=1e-5)
    nn.init.normal_(module.weight, 1.0, 0.5)
    return module.to(dtype)


@pytest.mark.parametrize(("form", "cls"), NORMS.items())
def test_the_form_is_found(form, cls):
    assert norm_form(norm_of(cls)) == FORMS[form]
    assert norm_form(norm_of(Olmo2RMSNorm)) == FORMS["gpt_oss"]


def test_what_is_another_norm_or_none_is_left_alone():
    class OtherRoot(Qwen3RMSNorm):
        def forward(self, x):
            return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)

    class WithMore(Qwen3RMSNorm):
        def forward(self, x, gate):
            return super().forward(x) * gate

    for module in (nn.LayerNorm(SIZE, bias=False), nn.LayerNorm(SIZE), nn.Linear(3, 3), nn.Identity()):
        assert norm_form(module) is None
    assert norm_form(OtherRoot(SIZE)) is None and norm_form(WithMore(SIZE)) is None


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", NORMS)
def test_values_and_gradients_are_no_further_from_the_truth_than_the_authors(form, weight_dtype, x_dtype):
    module = norm_of(NORMS[form], weight_dtype)
    x = torch.randn(2, 30, 5, SIZE).to(x_dtype).requires_grad_()
    own = module(x)
    grad = torch.randn_like(own)
    found = root_mean_square_norm(x, module.weight, 1e-5, FORMS[form])
    assert found.dtype == own.dtype

    wide_x, wide_weight = (tensor.detach().double().requires_grad_() for tensor in (x, module.weight))
    scale = 1 + wide_weight if form == "gemma" else wide_weight
    true = wide_x * (wide_x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * scale
    truth = [true.detach(), *torch.autograd.grad(true, (wide_x, wide_weight), grad.double())]
    errors = []
    for y in (own, found):
        parts = [y.detach(), *torch.autograd.grad(y, (x, module.weight), grad)]
        errors.append([relative_error(part.double(), whole) for part, whole in zip(parts, truth, strict=True)])
    for theirs, ours in zip(*errors, strict=True):
        assert ours <= max(1.2 * theirs, 3e-7)


@pytest.mark.parametrize("form", NORMS)
def test_a_frozen_weight_gets_no_gradient_and_changes_none(form):
    module = norm_of(NORMS[form])
    x = torch.randn(7, SIZE, requires_grad=True)
    (trained,) = torch.autograd.grad(root_mean_square_norm(x, module.weight, 1e-5, FORMS[form]).sum(), x)
    module.weight.requires_grad_(False)
    root_mean_square_norm(x, module.weight, 1e-5, FORMS[form]).sum().backward()
    assert torch.equal(x.grad, trained) and module.weight.grad is None


def test_what_is_kept_is_the_input_and_one_number_a_token():
    module = norm_of(Qwen3RMSNorm)
    x = torch.randn(30, SIZE, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        root_mean_square_norm(x, module.weight, 1e-5, FORMS["llama"])
    assert {tuple(tensor.shape) for tensor in kept.values()} == {(30, SIZE), (SIZE,), (30, 1)}
    assert x.data_ptr() in kept


def test_types_that_are_not_handled_go_through_the_authors_own():
    module = norm_of(Qwen3RMSNorm, torch.float64)
    x = torch.randn(3, SIZE, dtype=torch.float64)
    own, state = module(x), ModelState()
    adopt(module, EfficientNorm, state, FORMS["llama"])
    with state.running(DecoderPass(None, "", None, efficient=True)):
        assert torch.equal(module(x), own)
