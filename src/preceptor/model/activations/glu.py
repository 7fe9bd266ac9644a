"""Gated linear units, down(act(gate(x)) * up(x)), that do not keep act(gate) for backward.

It is computed again, one pointwise function of a tensor that is kept in any case: an eighth of all activations less.
(Shazeer 2020, "GLU Variants Improve Transformer".)
"""

from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

Pointwise = Callable[..., Tensor]

_silu_backward = torch.ops.aten.silu_backward.grad_input
_gelu_backward = torch.ops.aten.gelu_backward.grad_input

# Each function, and its backward: (gradient of the result, input) -> gradient of the input, in the place of the former.
_ACTIVATIONS: tuple[tuple[Pointwise, Pointwise], ...] = (
    (functional.silu, lambda g, x: _silu_backward(g, x, grad_input=g)),
    (
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda g, x: _gelu_backward(g, x, approximate="tanh", grad_input=g),
    ),
    (functional.gelu, lambda g, x: _gelu_backward(g, x, grad_input=g)),
)
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_TRIED = torch.tensor([1.0, 10.0, 100.0])  # how large the numbers are: a module that clamps them is another one


class EfficientGLU(nn.Module):
    """A gated linear unit; `engine_settings`: its activation and the activation's backward."""

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        unit: Any = self
        if unit.engine_state.casts is None or rest or named:
            return super().forward(x, *rest, **named)
        return unit.down_proj(_Gated.apply(unit.gate_proj(x), unit.up_proj(x), *unit.engine_settings))


def glu_activation(module: nn.Module) -> tuple[Pointwise, Pointwise] | None:
    """The activation and its backward if a module is such a layer, found by a trial on random numbers, or None."""
    children = dict(module.named_children())
    if not children.keys() >= set(_PROJECTIONS) or dict(module.named_parameters(recurse=False)):
        return None
    others = {name: child for name, child in children.items() if name not in _PROJECTIONS}
    if any(True for child in others.values() for _ in child.parameters()):
        return None
    try:
        return _tried(module, others)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # it wants something else than one tensor
        return None


@torch.no_grad()
def _tried(module: nn.Module, others: dict[str, nn.Module]) -> tuple[Pointwise, Pointwise] | None:
    """Through a copy whose projections give random numbers, in training mode, so that a dropout shows."""
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 1, len(_TRIED), 64, generator=generator) * _TRIED[:, None]
    twin = copy(module)
    projections = dict(zip(_PROJECTIONS, (_Gives(gate), _Gives(up), nn.Identity()), strict=True))
    twin._modules = {**{name: deepcopy(child) for name, child in others.items()}, **projections}
    true = type(module).forward(twin.train(), torch.zeros_like(gate))
    return next((pair for pair in _ACTIVATIONS if torch.equal(true, pair[0](gate) * up)), None)


class _Gives(nn.Module):
    """Gives the same tensor whatever it is given."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.tensor


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Pointwise, act_backward: Pointwise) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.act_backward = act, act_backward
        return act(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        of_gate, of_up = ctx.needs_input_grad[:2]
        grad_gate = ctx.act_backward(grad * up, gate) if of_gate else None
        grad_up = ctx.act(gate).mul_(grad) if of_up else None
        return grad_gate, grad_up, None, None
