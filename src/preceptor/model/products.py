"""Products of half-precision matrices whose results are float32: on a GPU as they are summed, elsewhere rounded first.

A GPU sums such a product in float32 and can leave it so (torch's `out_dtype`); a CPU's has half precision before it can
be added to a float32 gradient.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from preceptor.model.sizes import device_type_of, is_dry_run

_SINCE = "2.10"  # of torch: earlier ones take no float32 matrix to add to


def add_product(total: Tensor, left: Tensor, right: Tensor, rows: Iterable[slice]) -> None:
    """total += left right, in place. rows: of a temporary each, where one is needed."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif not _stays_wide(total, left):
        for part in rows:
            total[part] += left[part] @ right
    elif not is_dry_run():  # which has no such product on its tensors, and here no temporary to count
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left right."""
    if not _stays_wide(left, left):
        return (left @ right).float()
    if is_dry_run():
        return left.new_empty(len(left), right.shape[1], dtype=torch.float32)
    return torch.mm(left, right, out_dtype=torch.float32)


def _stays_wide(place: Tensor, factor: Tensor) -> bool:
    half = factor.dtype in (torch.float16, torch.bfloat16)
    return half and device_type_of(place.device) == "cuda" and torch.__version__ >= _SINCE
