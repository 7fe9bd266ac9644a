"""Arrays of the host, copied to a device together and without a wait."""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

K = TypeVar("K")


def on_device(arrays: Mapping[K, np.ndarray], device: torch.device) -> dict[K, Tensor]:
    """int64 and float64 arrays of one dimension as tensors, which share one block of memory.

    A GPU gets it from pinned memory while it does what it was asked for before: a copy from other memory would wait for
    all of that to end.
    """
    joined = [np.ascontiguousarray(array).view(np.int64) for array in arrays.values()]
    block = torch.from_numpy(np.concatenate(joined))
    if device.type == "cuda":
        block = block.pin_memory()
    parts = block.to(device, non_blocking=True).split([len(array) for array in arrays.values()])
    return {
        key: part.view(torch.float64) if array.dtype == np.float64 else part
        for (key, array), part in zip(arrays.items(), parts, strict=True)
    }
