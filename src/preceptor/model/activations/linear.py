"""Linear layers under autocast, and with an adapter, that share copies and make fewer tensors (see modules.py)."""

from typing import Any

import torch
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from preceptor.model.activations.modules import is_plain_parameter
from preceptor.model.numerics import wide_product


class SharedCastLinear(nn.Module):
    """nn.Linear for a plain float32 weight under autocast, whichever type its input has; else its own forward.

    Layers that read the same tensor (q, k and v; gate and up) share one half-precision copy of it. Under autocast alone
    each would make a copy of its own, which autograd keeps. A weight's copy lives until the layer's own backward, or
    with several phases until the last one; autocast's own cache would hold all of them to the end of the pass. Of a
    weight that is sharded and gathered again for backward no copy outlives the layer's forward: copies of all layers
    would be what sharding spares.
    """

    def forward(self, x: Tensor) -> Any:
        layer: Any = self
        casts, weight, device_type = layer.engine_state.casts, layer.weight, x.device.type
        plain = is_plain_parameter(weight) and weight.dtype == torch.float32
        if casts is None or not plain or not torch.is_autocast_enabled(device_type):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(device_type)
        if x.dtype not in (torch.float32, dtype):
            return super().forward(x)
        x_half = x.detach() if x.dtype == dtype else casts.of_input(x, dtype)
        copies = x_half, casts.of_weight(weight, dtype)
        return _HalfLinear.apply(x, weight, layer.bias, *copies, layer.engine_state.regathers)


class FusedAdapter(nn.Module):
    """A linear layer with LoRA of peft, y = x W^T + s (x A^T) B^T, or with DoRA, in plain matrix products.

    peft makes the second product, s times it and the sum, each a tensor of the layer's size. Under autocast it also
    takes x to float32, the type of its weights, from which autocast goes back to half precision: a copy, and a tensor
    to keep for each adapted layer. Autograd adds the gradients of x by W and by A, a tensor more. Here each product is
    added to the other in place, forward and backward, and A reads the half-precision copy that W reads. Compiled
    layers get the formula alone.
    """

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        layer: Any = self
        state, adapters = layer.engine_state, [name for name in layer.active_adapters if name in layer.lora_A]
        off = state.casts is None or layer.disable_adapters or layer.merged or len(adapters) != 1
        if off or rest or named or not is_products_alone(layer, adapters[0]):
            return super().forward(x, *rest, **named)
        lora_A, lora_B, scale = (getattr(layer, name)[adapters[0]] for name in ("lora_A", "lora_B", "scaling"))
        casts_input = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if casts_input else lora_A.weight.dtype
        if x.dtype != dtype and not (casts_input and x.dtype == torch.float32):
            return super().forward(x)
        if state.compiles:
            rows = x.flatten(0, -2)
            y = torch.addmm(layer.base_layer(rows), lora_A(rows), lora_B.weight.T, alpha=scale)
        else:
            x_half = x.detach() if x.dtype == dtype else state.casts.of_input(x, dtype)
            rows, low = _Branch.apply(x, x_half, lora_A.weight)
            y = _AddedProduct.apply(layer.base_layer(rows), low, lora_B.weight, scale)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return _with_lengths(layer, adapters[0], y) if adapters[0] in layer.lora_variant else y


def is_products_alone(layer: Any, name: str) -> bool:
    """Whether an adapter of peft is LoRA or DoRA of a linear layer, without dropout or bias of its own."""
    variant = layer.lora_variant.get(name)
    known = variant is None or (isinstance(variant, DoraLinearVariant) and not layer.fan_in_fan_out)
    return known and layer.lora_B[name].bias is None and isinstance(layer.lora_dropout[name], nn.Identity)


def _with_lengths(layer: Any, name: str, y: Tensor) -> Tensor:
    """DoRA (Liu et al., arXiv:2402.09353) of y = x (W + s B A)^T + b: each row of the matrix gets its trained length.

    Without a gradient through the length that it has, as in section 4.3 there.
    """
    base, lora_A, lora_B = layer.get_base_layer(), layer.lora_A[name].weight, layer.lora_B[name].weight
    lengths = _lengths_of_rows(base.weight, lora_A, lora_B, layer.scaling[name])
    factor = layer.lora_magnitude_vector[name].weight / lengths
    scaled = y * factor if base.bias is None else y * factor + base.bias * (1 - factor)
    return scaled.to(y.dtype)


@torch.no_grad()
def _lengths_of_rows(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """|W + s B A| by row, without a matrix of that size: the root of |W|^2 + (2 s W A^T + s^2 B A A^T) . B."""
    with torch.autocast(weight.device.type, enabled=False):
        wide = torch.promote_types(weight.dtype, torch.float32)
        low_A, low_B = lora_A.to(wide), lora_B.to(wide)
        own = torch.linalg.vector_norm(weight, dim=1, dtype=wide)
        cross = wide_product(weight, lora_A.T.to(weight.dtype))
        more = torch.addmm(cross, low_B, low_A @ low_A.T, beta=2 * scale, alpha=scale**2)
        return own.square().add((more * low_B).sum(dim=1)).sqrt()


class _Branch(torch.autograd.Function):
    """(rows of x in the type of products, x A^T). Backward adds A's gradient of x to that which the rows get, in place.

    x_half: x in that type; without a gradient.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, x_half: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = x_half.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, weight)
        ctx.like = x.shape, x.dtype
        ctx.set_materialize_grads(False)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(rows)
        return rows, rows @ weight.to(rows.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_low: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if rows is not None:
            grad_weight = wide_product(grad_low.T, rows)
        if ctx.needs_input_grad[0]:
            shape, dtype = ctx.like
            grad_x = grad_rows.addmm_(grad_low, weight.to(grad_low.dtype)).view(shape).to(dtype)
        return grad_x, None, grad_weight


class _AddedProduct(torch.autograd.Function):
    """y + scale * low B^T, in the place of y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, low: Tensor, weight: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(low, weight)
        ctx.scale = scale
        ctx.mark_dirty(y)
        y.view(-1, y.shape[-1]).addmm_(low.flatten(0, -2).to(y.dtype), weight.to(y.dtype).T, alpha=scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        low, weight = ctx.saved_tensors
        of_y, of_low, of_weight = ctx.needs_input_grad[:3]
        grad_low = grad_weight = None
        if of_low:
            grad_low = (grad @ weight.to(grad.dtype)).mul_(ctx.scale).to(low.dtype)
        if of_weight:
            grad_weight = wide_product(grad.flatten(0, -2).T, low.flatten(0, -2).to(grad.dtype)).mul_(ctx.scale)
        return grad if of_y else None, grad_low, grad_weight, None


class _HalfLinear(torch.autograd.Function):
    """x W^T + b in the type of the copies; gradients in that type too, then in the type of what they belong to."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, x_half: Tensor, weight_half: Tensor, cast_again: bool
    ) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad[:2]
        kept = weight if cast_again else weight_half
        ctx.save_for_backward(x_half if of_weight else None, kept if of_x else None)
        ctx.dtype = x.dtype
        if bias is None:
            return linear(x_half, weight_half)
        y = x_half.new_empty(*x.shape[:-1], len(weight))  # `linear` would give a view, into which nothing may be added
        torch.addmm(bias.to(y.dtype), x_half.flatten(0, -2), weight_half.T, out=y.view(-1, len(weight)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_half, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_x = None if weight is None else (grad @ weight.to(grad.dtype)).to(ctx.dtype)
        grad_weight = None if x_half is None else wide_product(flat.T, x_half.flatten(0, -2))
        grad_bias = flat.sum(dim=0, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None
