"""Bytes of the tensors that live at one time, counted as torch makes and frees them, with or without values."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages, each from the operation that makes it to its end.

    What an operation needs for itself while it runs (the workspace of a matrix product) is not seen.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        """known: tensors that live already and count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        for tensor in known:
            self.count(tensor)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self.run(operation, args, kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return out

    def run(self, operation: Any, args: Any, kwargs: Any) -> Any:
        return operation(*args, **kwargs)

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)
