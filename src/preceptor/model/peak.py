"""Bytes that a process has used."""

import resource
import sys

import torch


def peak_memory_bytes(device: torch.device | str) -> int:
    """The peak so far: allocated by torch on a CUDA device, else the resident memory of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes
