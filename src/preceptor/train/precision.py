"""Precision of matrix products: the default of a device, and autocast."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

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
