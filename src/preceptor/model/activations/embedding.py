"""The gradient of the input embedding, added where it belongs: no V x D temporary for each row of a step.

Autograd's own backward of a lookup makes a whole gradient, nearly all of it zeros, and adds it to `.grad`: for a
vocabulary of 152k and a hidden size of 1,024, 0.6 GB for each row, however few tokens it has. Here the lookup is in the
rows that occur, and their gradient is added to theirs.

Legend: T tokens of a row, R different ones among them, V vocabulary, D hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from preceptor.model.attention.runs import decoder_of


@contextmanager
def embedding_gradient_in_place(model: nn.Module) -> Iterator[None]:
    """Within it, backward adds the gradient of the input embedding to its `.grad` itself (None: made there).

    So `torch.autograd.grad` gives none for it. Where the embedding is more than a plain float32 parameter that is
    trained (sharded, wrapped by peft, hooked, frozen), nothing changes.
    """
    layer = decoder_of(model).get_input_embeddings()
    if not isinstance(layer, nn.Embedding) or not takes_gradient_in_place(layer.weight) or layer.max_norm is not None:
        yield
        return
    lookup = layer.forward

    def forward(ids: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return lookup(ids)
        occurring_R, place_T = torch.unique(ids, return_inverse=True)
        weight_VD, padding_idx = layer.weight, layer.padding_idx
        # What stands in the instance hides the parameter: the layer's own forward, scale and all, looks up in the rows.
        layer.__dict__["weight"] = _Rows.apply(weight_VD, occurring_R)
        layer.padding_idx = None
        try:
            return lookup(place_T)
        finally:
            del layer.__dict__["weight"]
            layer.padding_idx = padding_idx

    layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        del layer.__dict__["forward"]


def takes_gradient_in_place(weight: Any) -> bool:
    """Whether a weight is a plain trained float32 parameter, whose `.grad` nobody else watches."""
    plain = type(weight) is nn.Parameter and weight.requires_grad and weight.dtype == torch.float32
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
