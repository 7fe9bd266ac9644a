"""Bytes that live in the course of a training step, by stretch: a layer's forward or backward pass, the loss."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from preceptor.plan.live_bytes import LiveBytes
from preceptor.plan.memory import Moment

aten = torch.ops.aten
Role = tuple[Any, ...]
"""Which stretch of a step it is, whatever the depth: a layer's place from the start or from the end, and its pass."""


class Timeline(LiveBytes):
    """Live bytes beside the weights, stretch by stretch.

    A number that is read from a tensor is 1: that is the gradient of the loss, which the loss asks for.
    """

    def __init__(self, held: Iterable[nn.Module], trained: list[nn.Parameter], num_layers: int, side: int) -> None:
        """held: the models whose weights are there before and after."""
        self._casts: dict[int, int] = {}
        parameters = [parameter for model in held for parameter in model.parameters()]
        super().__init__([*parameters, *(buffer for model in held for buffer in model.buffers())])
        self._weights = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._weight_bytes = self.live_bytes
        for parameter in trained:
            if parameter.grad is not None:
                self.count(parameter.grad)
        self._trained, self._num_layers, self._side = trained, num_layers, side
        self._times_entered: Counter[int] = Counter()
        self._in_backward = False
        self._stretches: list[list[Any]] = []
        self.mark("forward pass", ("embedding",))

    def mark(self, name: str, role: Role, index: int | None = None) -> None:
        """A stretch begins: of layer `index` or of none."""
        self._close()
        self._in_backward |= name == "backward pass"
        self.peak_bytes = self.live_bytes
        gradients = sum(p.grad.untyped_storage().nbytes() for p in self._trained if p.grad is not None)
        self._stretches.append([name, role, index, 0, self.live_bytes, gradients, self._cast_bytes])

    def _close(self) -> None:
        if self._stretches:
            self._stretches[-1][3] = self.peak_bytes

    @property
    def _cast_bytes(self) -> int:
        return sum(self._casts.values())

    def watch(self, layer: nn.Module, index: int) -> Iterator[Any]:
        """Mark where the layer begins and ends, forward and backward."""

        def before(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            if self._in_backward:
                return
            self._times_entered[index] += 1
            turn = self._times_entered[index]
            self.mark("forward pass", ("forward", turn), index)
            hidden = args[0] if args else named.get("hidden_states")
            if index == 0 and isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda gradient: self.mark("backward pass", ("embedding backward", turn)))

        def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if self._in_backward:
                return
            turn = self._times_entered[index]
            hidden = out[0] if isinstance(out, tuple) else out
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: self.mark("backward pass", ("backward", turn), index))
            if index == self._num_layers - 1:
                self.mark("loss", ("loss", turn))

        yield layer.register_forward_pre_hook(before, with_kwargs=True)
        yield layer.register_forward_hook(after)

    def run(self, operation: Any, args: Any, kwargs: Any) -> Any:
        if operation is aten._local_scalar_dense.default:
            return 1.0
        if operation is aten._unique2.default:  # as many as there are: no more than that
            ids = args[0]
            return ids.new_empty(ids.numel()), torch.empty_like(ids), ids.new_empty(0)
        if operation is aten._grouped_mm.default:  # without values torch knows it in bfloat16 only
            return _grouped_product(*args, **kwargs)
        out = operation(*args, **kwargs)
        if operation is aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights:
            self._casts[out.untyped_storage()._cdata] = out.untyped_storage().nbytes()
        return out

    def _forget(self, key: int) -> None:
        super()._forget(key)
        self._casts.pop(key, None)

    def moments(self) -> dict[Role, Moment]:
        """Each stretch under what it is at any depth. Those of layers far from both ends lie between the others."""
        self._close()
        found: dict[Role, Moment] = {}
        for name, role, index, peak, start, gradients, casts in self._stretches:
            moment = Moment(name, peak - self._weight_bytes, start - self._weight_bytes, gradients, casts)
            if index is None:
                places: list[Role] = [role]
            else:
                from_end = self._num_layers - 1 - index
                places = [(*role, "start", index)] * (index < self._side) + [(*role, "end", from_end)] * (
                    from_end < self._side
                )
            for place in places:
                former = found.get(place)
                found[place] = moment if former is None or moment.peak_bytes > former.peak_bytes else former
        return found


def _grouped_product(left: Tensor, right: Tensor, offs: Tensor | None = None, *rest: Any, **named: Any) -> Tensor:
    """The result's size: groups are rows of the left, columns of the right, or what both sum over."""
    rows, columns = left.shape[-2], right.shape[-1]
    if left.dim() == right.dim():
        assert offs is not None or left.dim() == 3
        return left.new_empty(len(left) if offs is None else len(offs), rows, columns)
    return left.new_empty(rows, columns)
