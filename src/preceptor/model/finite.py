"""Search for weights that are not finite: one NaN in them makes all that a model says worthless."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, and how many; None where all are finite."""
    for name, tensor in named:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = tensor.aminmax()  # both are NaN where one value is; no copy is made
        if not bool(low.isfinite() & high.isfinite()):
            num = tensor.numel() - int(tensor.isfinite().sum())
            return f"{name} holds {num:,} value{'s' * (num != 1)} of {tensor.numel():,} that are NaN or infinite"
    return None
