"""Numbers: the precision of matrix products, equality up to rounding, values that are not finite, random bits.

A GPU sums a product of half-precision matrices in float32 and can leave it so (torch's `out_dtype`); a CPU's has half
precision before it can be added to a float32 gradient. Random numbers are a function of a key and a place: the same on
every device, and no generator has a state.
"""

import hashlib
import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preceptor.errors import ModelError
from preceptor.model.sizes import device_type_of, is_dry_run

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element
_PART = 1 << 24  # elements that are summed at a time: torch makes an int64 copy of them


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left right, at least in float32."""
    if not stays_wide(left, left):
        return (left @ right).to(torch.promote_types(left.dtype, torch.float32))
    if not torch.compiler.is_compiling() and is_dry_run():
        return left.new_empty(len(left), right.shape[1], dtype=torch.float32)
    return torch.mm(left, right, out_dtype=torch.float32)


def stays_wide(place: Tensor, factor: Tensor) -> bool:
    device_type = place.device.type if torch.compiler.is_compiling() else device_type_of(place.device)
    return factor.dtype in (torch.float16, torch.bfloat16) and device_type == "cuda"


FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
"""Exceptions by which a layer shows that it does not support its inputs. Running out of memory, a RuntimeError too,
is not meant."""


def rounding(dtype: torch.dtype) -> float:
    """The relative error that the rounding of many layers may add up to: 6e-6 for float32, 0.03 for bfloat16."""
    return float(torch.finfo(dtype).eps ** 0.75)


def relative_error(found: Tensor, true: Tensor) -> float:
    return float((found - true).double().norm() / true.double().norm().clamp_min(1e-30))


def require_close(
    found: Tensor,
    true: Tensor,
    problem: str,
    advice: str = "Use another model type.",
    dtype: torch.dtype | None = None,
    bound: float | None = None,
) -> None:
    """Raise ModelError, with `problem` and `advice`, where the two differ by more than the rounding of `dtype`.

    dtype: in which the numbers were computed; by default that of `true`. bound: of the relative error, instead.
    """
    error, bound = relative_error(found, true), bound or rounding(dtype or true.dtype)
    if not error <= bound:
        raise ModelError(f"{problem}: a relative difference of {error:.1e}, rounding allows {bound:.1e}. {advice}")


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


@torch.no_grad()
def hash_of_bits(named: Iterable[tuple[str, Tensor]]) -> str:
    """Of names, shapes, dtypes and of the sum of each tensor's bits as integers: one pass, to tell models apart."""
    about, sums = [], []
    for name, tensor in named:
        bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
        sums.append([part.sum(dtype=torch.int64) for part in bits.split(_PART)])
        about.append((name, tuple(tensor.shape), str(tensor.dtype)))
    found = [(*own, sum(map(int, parts))) for own, parts in zip(about, sums, strict=True)]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def random_key(*parts: object) -> int:
    """An int32 that follows from the parts."""
    return zlib.crc32(repr(parts).encode()) - (1 << 31)


def random_bits(key: int | Tensor, first: int | Tensor, num: int, device: torch.device) -> Tensor:
    """int32 (num,): of the elements first, first + 1, ...: a hash of place and key (the finalizer of MurmurHash3).

    key, first: tensors of one element where this is compiled, so that one graph serves all.
    """
    start = 0 if isinstance(first, Tensor) else first
    bits = torch.arange(start, start + num, dtype=torch.int64, device=device).to(torch.int32)
    if isinstance(first, Tensor):
        bits.add_(first.to(torch.int32))
    bits.mul_(-1640531535).bitwise_xor_(key)
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << 32 - shift) - 1)).mul_(factor)
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


_CPU_FEATURES = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16"}
"""Flags of /proc/cpuinfo: instructions that multiply bfloat16 matrices faster than float32 ones."""


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """`bfloat16`: matrix products in bfloat16, everything else as the tensors are; `float32`: no change."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def resolve_precision(precision: str | None, device: torch.device) -> str:
    """`train.precision` as given; absent: bfloat16 on a GPU that has it, otherwise float32."""
    if precision is not None:
        return precision
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bfloat16 else "float32"


def cpu_bfloat16_feature(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The instructions with which this CPU computes in bfloat16 faster than in float32; None: none that is known."""
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return None
    flags = {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split()}
    return next((name for flag, name in _CPU_FEATURES.items() if flag in flags), None)
