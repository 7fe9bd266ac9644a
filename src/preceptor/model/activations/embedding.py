"""Input embedding whose gradient is added to `.grad` in place: no V x D temporary for each sequence of a step.

Autograd's own backward of a lookup makes a whole gradient, nearly all of it zeros, and adds it to `.grad`: for a
vocabulary of 152k and a hidden size of 1,024, 0.6 GB for each sequence, however few tokens it has. Here the lookup is
in the rows that occur, and their gradient is added to theirs.

Legend: T tokens of a sequence, R different ones among them, V vocabulary, D hidden size.
"""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from preceptor.model.parts import is_plain_parameter


class AccumulatingEmbedding(nn.Module):
    """While a step accumulates, backward adds the gradient to `.grad` itself (None: made there).

    So `torch.autograd.grad` gives none for it. Where the weight is more than a plain float32 parameter that is trained
    (sharded, wrapped by peft, hooked, frozen), nothing changes.
    """

    def forward(self, ids: Tensor) -> Any:
        layer: Any = self
        accumulates = layer.engine_state.accumulates and torch.is_grad_enabled()
        if not accumulates or not takes_gradient_in_place(layer.weight):
            return super().forward(ids)
        this = layer.engine_state.current
        if this is not None and ids is this.ids and this.rows is not None:
            occurring_R, place_T = this.rows[0], this.rows[1].view_as(ids)
        else:  # the model has put others in their place; to find their number waits for the device
            occurring_R, place_T = torch.unique(ids, return_inverse=True)
        # A copy of the layer, in which the rows stand for the weight, looks them up by its own forward, scale and all.
        twin: Any = copy(layer)
        twin._parameters = {}
        twin.weight = _Rows.apply(layer.weight, occurring_R)
        return super(AccumulatingEmbedding, twin).forward(place_T)


def takes_gradient_in_place(weight: Any) -> bool:
    """Whether a weight is a plain trained float32 parameter, whose `.grad` nobody else watches."""
    plain = is_plain_parameter(weight) and weight.requires_grad and weight.dtype == torch.float32
    return plain and not weight._backward_hooks and not weight._post_accumulate_grad_hooks  # type: ignore[attr-defined]


def gradient_of(weight: Tensor) -> Tensor:
    """Its `.grad`, made if it has none."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


class _Rows(torch.autograd.Function):
    """weight_VD[rows_R]; backward adds to the rows of the weight's `.grad`."""

    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, rows_R: Tensor) -> Tensor:  # type: ignore[override]
        ctx.weight_VD, ctx.rows_R = weight_VD, rows_R
        return weight_VD.detach()[rows_R]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[None, None]:  # type: ignore[override]
        gradient_of(ctx.weight_VD).index_add_(0, ctx.rows_R, grad_RD)
        return None, None
