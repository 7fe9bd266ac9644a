"""Linear layers that share half-precision copies under autocast.

Layers that read the same tensor (q, k and v; gate and up) share one copy of it. Under autocast alone each would make
a copy of its own, which autograd keeps. A weight's copy lives until the layer's own backward, or with several phases
until the last one; autocast's own cache would hold all of them to the end of the pass. Of a weight that is sharded
and gathered again for backward no copy outlives the layer's forward: copies of all layers would be what sharding
spares.

An adapter of peft takes its input to float32 first, the type of its weights, from which autocast goes back to half
precision: a copy and a tensor to keep for each adapted layer, of the values that its base layer read.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from preceptor.model.parts import is_plain_parameter
from preceptor.model.products import float32_product


class SharedCastLinear(nn.Module):
    """nn.Linear for a plain float32 weight under autocast, whichever type its input has; else its own forward."""

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


class UncastAdapter(nn.Module):
    """A linear layer with LoRA of peft that, under autocast, reads the tensor that its base layer reads."""

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        layer: Any = self
        if layer.engine_state.casts is None or not torch.is_autocast_enabled(x.device.type):
            return super()._cast_input_dtype(x, dtype)  # type: ignore[misc]
        return x


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
        return linear(x_half, weight_half, None if bias is None else bias.to(x_half.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_half, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_x = None if weight is None else (grad @ weight.to(grad.dtype)).to(ctx.dtype)
        grad_weight = None if x_half is None else float32_product(flat.T, x_half.flatten(0, -2))
        grad_bias = flat.sum(dim=0, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None
