"""Bytes of the tensors that live, in the course of a step by stretch: a layer's forward or backward pass, the loss."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from preceptor.plan.memory import Moment

aten = torch.ops.aten
Role = tuple[Any, ...]
"""Which stretch of a step it is, whatever the depth: a layer's place from the start or from the end, and its pass."""
_NOTHING = Moment("", -1, 0, 0, 0)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages, each from the operation that makes it to its end.

    What an operation needs for itself while it runs (the workspace of a matrix product) is not seen.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        """known: tensors that live already and count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        for tensor in known:
            self.count(tensor)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self.run(operation, args, kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return out

    def run(self, operation: Any, args: Any, kwargs: Any) -> Any:
        return operation(*args, **kwargs)

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


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
        self._begun: tuple[str, Role, int | None, tuple[int, int, int]] | None = None
        self._moments: dict[Role, Moment] = {}
        self.mark("forward pass", ("embedding",))

    def mark(self, name: str, role: Role, index: int | None = None) -> None:
        """A stretch begins: of layer `index` or of none."""
        self._close()
        self._in_backward |= name == "backward pass"
        self.peak_bytes = self.live_bytes
        gradients = sum(p.grad.untyped_storage().nbytes() for p in self._trained if p.grad is not None)
        start = self.live_bytes - self._weight_bytes, gradients, sum(self._casts.values())
        self._begun = name, role, index, start

    def _close(self) -> None:
        """The stretch ends. It is kept under what it is at any depth, of equal ones the first with the highest peak."""
        if self._begun is None:
            return
        name, role, index, start = self._begun
        moment = Moment(name, self.peak_bytes - self._weight_bytes, *start)
        places: list[Role] = [role]
        if index is not None:
            from_end = self._num_layers - 1 - index
            places = [(*role, "start", index)] * (index < self._side)
            places += [(*role, "end", from_end)] * (from_end < self._side)
        for place in places:
            if moment.peak_bytes > self._moments.get(place, _NOTHING).peak_bytes:
                self._moments[place] = moment

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
        return self._moments


def _grouped_product(left: Tensor, right: Tensor, offs: Tensor | None = None, *rest: Any, **named: Any) -> Tensor:
    """The result's size: groups are rows of the left, columns of the right, or what both sum over."""
    rows, columns = left.shape[-2], right.shape[-1]
    if left.dim() == right.dim():
        assert offs is not None or left.dim() == 3
        return left.new_empty(len(left) if offs is None else len(offs), rows, columns)
    return left.new_empty(rows, columns)
