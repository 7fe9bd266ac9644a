"""Random numbers as a function of a key and a place: the same on every device, and no generator has a state."""

import zlib

import torch
from torch import Tensor


def random_key(*parts: object) -> int:
    """An int32 that follows from the parts."""
    return zlib.crc32(repr(parts).encode()) - (1 << 31)


def random_bits(key: int, first: int, num: int, device: torch.device) -> Tensor:
    """int32 (num,): of the elements first, first + 1, ...: a hash of place and key (the finalizer of MurmurHash3)."""
    bits = torch.arange(first, first + num, dtype=torch.int64, device=device).to(torch.int32)
    bits.mul_(-1640531535).bitwise_xor_(key)
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << 32 - shift) - 1)).mul_(factor)
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))
