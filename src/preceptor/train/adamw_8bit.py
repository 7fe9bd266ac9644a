"""AdamW with 8-bit states, for matrices: codes of equal relative error, with one scale per block of a row.

A mean is held as sign * scale * 2^-e: `scale` is the largest magnitude of its block of BLOCK elements of a row, and the
code says the exponent e in equal steps, so that a small element is as exact as a large one (its square root divides an
update: Dettmers et al. 2021, arXiv:2110.02861, on why equal steps of the value do not do). Of two codes the nearer one
is the likelier one, and the mean is right: rounding to the nearest would hold a slow mean where it is.

Legend: R rows, K columns, B blocks of a row.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from preceptor.model.numerics import random_bits
from preceptor.model.sharding import own_part
from preceptor.plan.memory import BLOCK, chunk_of
from preceptor.train.rounding import first_element, parts_of

_MEAN = (127, 12.0)  # codes beside zero, and the powers of two that they reach down from the scale
_SQUARE = (255, 24.0)
_UNIT = 1 / (1 << 16)


def new_state(weight: Tensor) -> dict[str, Tensor]:
    """Of a matrix. Sharded where the weight is: blocks lie in rows."""
    num_blocks = -(-weight.shape[-1] // BLOCK)
    return {
        "exp_avg": torch.zeros_like(weight, dtype=torch.int8),
        "exp_avg_scale": torch.zeros_like(weight[..., :num_blocks], dtype=torch.float32),
        "exp_avg_sq": torch.zeros_like(weight, dtype=torch.uint8),
        "exp_avg_sq_scale": torch.zeros_like(weight[..., :num_blocks], dtype=torch.float32),
    }


def update(weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: Mapping[str, Any], key: int) -> None:
    """One step of the float32 `weight`, in place; `state["step"]` counts from 1. Rows a few at a time."""
    columns = weight.shape[-1]
    weight_RK, gradient_RK, mean_RK, square_RK = (
        own_part(each).view(-1, columns) for each in (weight, gradient, state["exp_avg"], state["exp_avg_sq"])
    )
    mean_RB, square_RB = (own_part(state[f"{name}_scale"]).flatten(0, -2) for name in ("exp_avg", "exp_avg_sq"))
    beta1, beta2 = group["betas"]
    step, first = int(state["step"]), first_element(weight)
    size = group["lr"] / (1 - beta1**step)
    root_of_correction = (1 - beta2**step) ** 0.5
    for rows in parts_of(len(weight_RK), max(1, chunk_of(weight.device.type) // columns)):
        gradient = gradient_RK[rows]
        mean = decoded(mean_RK[rows], mean_RB[rows], *_MEAN).lerp_(gradient, 1 - beta1)
        square = decoded(square_RK[rows], square_RB[rows], *_SQUARE).mul_(beta2)
        square.addcmul_(gradient, gradient, value=1 - beta2)
        weight_RK[rows] *= 1 - group["lr"] * group["weight_decay"]
        weight_RK[rows].addcdiv_(mean, (square.sqrt() / root_of_correction).add_(group["eps"]), value=-size)
        bits = random_bits(key, first + rows.start * columns, mean.numel(), mean.device).view_as(mean)
        mean_RK[rows], mean_RB[rows] = encoded(mean, bits & 0xFFFF, *_MEAN)
        square_RK[rows], square_RB[rows] = encoded(square, (bits >> 16) & 0xFFFF, *_SQUARE)


def encoded(values_RK: Tensor, noise_RK: Tensor, num_codes: int, octaves: float) -> tuple[Tensor, Tensor]:
    """(codes, scale_RB). noise: 16 random bits of each element; codes of 255 have no sign."""
    scale_RB = _blocks(values_RK).abs().amax(dim=-1)
    share_RK = values_RK.abs() / _spread(scale_RB, values_RK.shape[1]).clamp_(min=torch.finfo(torch.float32).tiny)
    place_RK = share_RK.log2().mul_((num_codes - 1) / octaves).add_(num_codes)
    lower_RK = place_RK.floor_().clamp_(0, num_codes)
    low_RK, high_RK = (_share(lower_RK + more, num_codes, octaves) for more in (0, 1))
    odds_RK = share_RK.sub_(low_RK).div_(high_RK.sub_(low_RK))
    codes_RK = lower_RK.add_(odds_RK > noise_RK * _UNIT).clamp_(max=num_codes)
    if num_codes == 127:
        return codes_RK.copysign_(values_RK).to(torch.int8), scale_RB
    return codes_RK.to(torch.uint8), scale_RB


def decoded(codes_RK: Tensor, scale_RB: Tensor, num_codes: int, octaves: float) -> Tensor:
    """float32; the inverse of `encoded`, up to its rounding."""
    values_RK = codes_RK.float()
    share_RK = _share(values_RK.abs(), num_codes, octaves)
    return share_RK.copysign_(values_RK).mul_(_spread(scale_RB, codes_RK.shape[1]))


def _share(code: Tensor, num_codes: int, octaves: float) -> Tensor:
    """What a code says of its block's scale: 2^(octaves (code - num_codes) / (num_codes - 1)), and 0 for 0."""
    share = (code - num_codes).mul_(octaves / (num_codes - 1)).exp2_()
    return share.masked_fill_(code == 0, 0.0)


def _blocks(values_RK: Tensor) -> Tensor:
    missing = -values_RK.shape[1] % BLOCK
    return pad(values_RK, (0, missing)).unflatten(1, (-1, BLOCK))


def _spread(scale_RB: Tensor, columns: int) -> Tensor:
    return scale_RB.repeat_interleave(BLOCK, dim=1)[:, :columns]
