"""Weights in bfloat16 that lose no update: a float32 value split in two halves, or stochastic rounding.

A float32 number is 16 bits that make a bfloat16 number and 16 bits below it. `exact` keeps both, in two tensors: the
weight, with which the model computes, is the nearest bfloat16 number, and the rest is optimizer state, so that the sum
is the float32 weight to the bit. `stochastic` keeps the weight alone and rounds up with the probability that makes the
mean right (Zamirai et al. 2020, arXiv:2010.06192). `nearest` loses what is under half of the last place of a weight.

What is drawn at random is a function of a key (seed, step, parameter's name) and of the element's place in the whole
tensor: the same on every device, sharded or not, after any stop, and no generator has a state.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from preceptor.model.numerics import random_bits
from preceptor.model.sharding import own_part
from preceptor.plan.memory import chunk_of

Rounding = Literal["exact", "stochastic", "nearest"]

_HIGH = -0x10000  # the upper 16 bits of an int32


def first_element(tensor: Tensor) -> int:
    """Place, in the whole tensor, of the first element that this process holds: by rows, as FSDP2 shards."""
    if not isinstance(tensor, DTensor) or not tensor.placements[-1].is_shard(0):
        return 0
    mesh, dim = tensor.device_mesh, len(tensor.placements) - 1
    rows = -(-tensor.shape[0] // mesh.size(dim))
    return int(mesh.get_local_rank(dim)) * rows * (tensor.numel() // max(1, tensor.shape[0]))


def widened(weight: Tensor, low: Tensor | None) -> Tensor:
    """float32: the bfloat16 weight, and what `low` (int16) holds of it below."""
    wide = weight.detach().float()
    if low is not None:
        own_part(wide).view(torch.int32).add_(own_part(low))
    return wide


@torch.no_grad()
def narrow(wide: Tensor, weight: Tensor, rounding: Rounding, low: Tensor | None, key: int) -> None:
    """Write the float32 `wide` into the bfloat16 `weight`, what `exact` keeps of it into `low`. `wide` is used up."""
    if rounding == "nearest":
        weight.copy_(wide)
        return
    wide_X, weight_X = own_part(wide).view(-1), own_part(weight).view(-1)
    first = first_element(weight)
    for part in parts_of(len(wide_X), chunk_of(wide_X.device.type)):
        bits = wide_X[part].view(torch.int32)
        if low is None:
            noise = random_bits(key, first + part.start, len(bits), bits.device)
            high = bits.add_(noise.bitwise_and_(0xFFFF)).bitwise_and_(_HIGH)
        else:
            high = (bits + 0x8000).bitwise_and_(_HIGH)
            own_part(low).view(-1)[part] = (bits - high).to(torch.int16)
        weight_X[part] = high.view(torch.float32).to(torch.bfloat16)


def parts_of(num: int, each: int) -> Iterator[slice]:
    return (slice(start, min(num, start + each)) for start in range(0, num, each))
