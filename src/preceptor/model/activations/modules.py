"""The decoder's own modules, made to keep less for backward while a row goes through: same results, same gradients.

    norms    keep their input and one number a token (norms.py)
    gates    keep gate and up, and not the activation of the gate (gates.py)
    linear   under autocast, layers that read the same tensor share one half-precision copy of it, which autocast would
             make, and autograd keep, for each anew: q, k and v; gate and up

For the time of a pass a class's `forward` is replaced, so that no module is changed by it. check_isolation compares the
whole with the model as its authors wrote it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from preceptor.model.activations.glu import gate_activation, lean_gate
from preceptor.model.activations.norms import lean_norm, norm_form
from preceptor.model.attention.runs import decoder_of

Forward = Callable[..., Any]
Lean = Callable[[Any, Forward, Tensor], Any]
"""Stands for a module's forward: (the module, its class's own `forward`, its input)."""

_FOUND: "WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, Lean]]" = WeakKeyDictionary()
_within = False


@contextmanager
def lean_modules(model: nn.Module) -> Iterator[None]:
    """Within the block, the decoder's modules keep no more than they must. Blocks may be nested.

    Layers that run again in backward need a block of their own there; where transformers' own gradient checkpointing is
    on, which knows of none, nothing changes.
    """
    global _within
    decoder = decoder_of(model)
    if _within or any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules()):
        yield
        return
    found = _found(decoder)
    forwards = {cls: _through(found, cls.forward) for cls in {type(module) for module in found}}
    forwards[nn.Linear] = _sharing(Casts(), nn.Linear.forward)
    former = {cls: cls.__dict__.get("forward") for cls in forwards}
    for cls, forward in forwards.items():
        cls.forward = forward
    _within = True
    try:
        yield
    finally:
        _within = False
        for cls, own in former.items():
            if own is None:  # it was inherited
                del cls.forward
            else:
                cls.forward = own


def _found(decoder: nn.Module) -> "WeakKeyDictionary[nn.Module, Lean]":
    """What can stand for the forward of each module of the decoder; tried once."""
    if decoder not in _FOUND:
        found: WeakKeyDictionary[nn.Module, Lean] = WeakKeyDictionary()
        for module in decoder.modules():
            if (form := norm_form(module)) is not None:
                found[module] = lean_norm(form)
            elif (activation := gate_activation(module)) is not None:
                found[module] = lean_gate(*activation)
        _FOUND[decoder] = found
    return _FOUND[decoder]


def _through(found: "WeakKeyDictionary[nn.Module, Lean]", forward: Forward) -> Forward:
    """A class's `forward`: what was found for the instance, else its own."""

    def lean(module: Any, *arguments: Any, **named: Any) -> Any:
        own = found.get(module)
        if own is None or named or len(arguments) != 1:
            return forward(module, *arguments, **named)
        return own(module, forward, *arguments)

    return lean


class Casts:
    """Half-precision copies: of each weight once, and of the tensor that a linear layer read last."""

    def __init__(self) -> None:
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}
        self._last: tuple[ReferenceType[Tensor], int, Tensor] | None = None

    def of_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        last = self._last
        if last is None or last[0]() is not x or last[1] != x._version or last[2].dtype != dtype:
            self._last = last = ref(x), x._version, x.detach().to(dtype)
        return last[2]

    def of_weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if id(weight) not in self._weights:
            self._weights[id(weight)] = weight, weight.detach().to(dtype)
        return self._weights[id(weight)][1]


def _sharing(casts: Casts, forward: Forward) -> Forward:
    """nn.Linear's `forward` under autocast, for what is float32 and plain; otherwise its own."""

    def shared(module: Any, x: Tensor) -> Any:
        device_type = x.device.type
        weight = module.weight
        plain = type(weight) is nn.Parameter and weight.dtype == x.dtype == torch.float32
        if not plain or not torch.is_autocast_enabled(device_type):
            return forward(module, x)
        dtype = torch.get_autocast_dtype(device_type)
        return _Linear.apply(x, weight, module.bias, casts.of_input(x, dtype), casts.of_weight(weight, dtype))

    return shared


class _Linear(torch.autograd.Function):
    """x W^T + b in the type of the copies; gradients in that type too, then in the type of what they belong to."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, x_half: Tensor, weight_half: Tensor
    ) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x_half if of_weight else None, weight_half if of_x else None)
        return linear(x_half, weight_half, None if bias is None else bias.to(x_half.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_half, weight_half = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_x = None if weight_half is None else (grad @ weight_half).float()
        grad_weight = None if x_half is None else (flat.T @ x_half.flatten(0, -2)).float()
        grad_bias = flat.sum(dim=0, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None
