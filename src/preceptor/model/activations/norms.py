"""Root-mean-square norms that keep only their input and one number per token for backward.

    x-hat = x * r        r = (mean(x^2) + eps)^(-1/2), in float32        y = x-hat * weight   (Zhang and Sennrich 2019)

Of the single operations in modelling files, autograd also keeps x-hat, and x in float32 where it is not: an eighth to a
quarter of all activations. Here backward computes x-hat again, one product, and takes fewer passes over memory. Which
order of rounding a module follows is found by a trial on random numbers.

Legend: T tokens (times heads), D normed size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from preceptor.model.parts import is_plain_parameter

_HANDLED = (torch.float32, torch.bfloat16, torch.float16)
_TRIED = ((torch.float32, 1e-6), (torch.bfloat16, 1e-3))  # a wrong order of rounding is off by 2e-3 in bfloat16


@dataclass(frozen=True, slots=True)
class NormForm:
    """one_more: the scale is 1 + weight. rounds_first: x-hat is rounded to x's type before it is scaled, else after."""

    one_more: bool
    rounds_first: bool


FORMS = {"llama": NormForm(False, True), "gpt_oss": NormForm(False, False), "gemma": NormForm(True, False)}


class EfficientNorm(nn.Module):
    """A norm of the form `engine_settings`; its own forward where something is not plain."""

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        norm: Any = self
        handled = x.dtype in _HANDLED and is_plain_parameter(norm.weight) and not rest and not named
        if norm.engine_state.casts is None or not handled:
            return super().forward(x, *rest, **named)
        return root_mean_square_norm(x, norm.weight, _eps(norm), norm.engine_settings)


def norm_form(module: nn.Module, found: dict[Any, NormForm | None] | None = None) -> NormForm | None:
    """What form of norm a module is, or None. found: earlier results, one for all modules of a class and settings."""
    if not _looks_like_one(module):
        return None
    found = {} if found is None else found
    settings = {name: repr(value) for name, value in vars(module).items() if not name.startswith("_")}
    key = type(module), module.weight.dtype, *sorted(settings.items())
    if key not in found:
        found[key] = _tried(module)
    return found[key]


def root_mean_square_norm(x_TD: Tensor, weight_D: Tensor, eps: float, form: NormForm) -> Tensor:
    """x (..., D) -> y of the same shape. `llama` gives the wider of both types, the others give x's."""
    y: Tensor = _Norm.apply(x_TD, weight_D, eps, form)
    return y


def _looks_like_one(module: nn.Module) -> bool:
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers(), *module.named_children())]
    return names == ["weight"] and module.weight.dim() == 1 and _eps(module) is not None  # type: ignore[operator]


def _eps(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def _tried(module: nn.Module) -> NormForm | None:
    """On numbers so small that eps counts, under weights unlike those of a new model; on the CPU."""
    weight_D: Any = module.weight
    generator = torch.Generator().manual_seed(0)
    x_TD, trial_D = (torch.randn(n, len(weight_D), generator=generator) for n in (4, 1))
    x_TD, trial_D = x_TD * _eps(module) ** 0.5, trial_D[0].to(weight_D.dtype)
    for form in FORMS.values():
        try:
            if all(_agree(module, x_TD.to(dtype), trial_D, form, bound) for dtype, bound in _TRIED):
                return form
        except (RuntimeError, TypeError, ValueError, AttributeError):  # it wants something else than one tensor
            return None
    return None


def _agree(module: nn.Module, x_TD: Tensor, weight_D: Tensor, form: NormForm, bound: float) -> bool:
    true_TD = functional_call(module, {"weight": weight_D}, (x_TD,))
    found_TD = root_mean_square_norm(x_TD, weight_D, _eps(module), form)
    error = (found_TD.double() - true_TD.double()).norm() / true_TD.double().norm()
    return found_TD.dtype == true_TD.dtype and bool(error <= bound)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float, form: NormForm) -> Tensor:  # type: ignore[override]
        with torch.autocast(x_TD.device.type, enabled=False):
            wide_TD = x_TD.float()
            norm_T1 = torch.linalg.vector_norm(wide_TD, dim=-1, keepdim=True)
            root_T1 = norm_T1.square_().div_(x_TD.shape[-1]).add_(eps).rsqrt_()
            y_TD = wide_TD * root_T1
            if form.rounds_first:
                y_TD = y_TD.to(x_TD.dtype).to(torch.promote_types(x_TD.dtype, weight_D.dtype)).mul_(weight_D)
            else:
                y_TD = y_TD.mul_(_scale(weight_D, form)).to(x_TD.dtype)
        ctx.save_for_backward(x_TD, weight_D, root_T1)
        ctx.form = form
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """With g the gradient of y and s the scale: s gets g x-hat, x gets r (g s - x-hat mean(g s x-hat))."""
        x_TD, weight_D, root_T1 = ctx.saved_tensors
        with torch.autocast(x_TD.device.type, enabled=False):
            normed_TD, wide_TD, scale_D = x_TD.float() * root_T1, grad_TD.float(), _scale(weight_D, ctx.form)
            product_TD = normed_TD * wide_TD
            flat_TD = product_TD.flatten(0, -2)
            grad_weight_D = flat_TD.sum(dim=0).to(weight_D.dtype) if ctx.needs_input_grad[1] else None
            if not ctx.needs_input_grad[0]:
                return None, grad_weight_D, None, None
            mean_T1 = torch.mv(flat_TD, scale_D).view_as(root_T1).mul_(-1 / x_TD.shape[-1])
            grad_x_TD = torch.mul(wide_TD, scale_D, out=product_TD).addcmul_(normed_TD, mean_T1).mul_(root_T1)
        return grad_x_TD.to(x_TD.dtype), grad_weight_D, None, None


def _scale(weight_D: Tensor, form: NormForm) -> Tensor:
    return 1.0 + weight_D.float() if form.one_more else weight_D.float()
