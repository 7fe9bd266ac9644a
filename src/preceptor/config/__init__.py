"""The run file: its sections, durations, overrides and YAML. No torch here."""

from preceptor.config.durations import Duration
from preceptor.config.run import Run, beside, build, dump, load
from preceptor.config.sections import (
    RESERVED_ARGUMENTS,
    ROW_KEYS,
    Adapter,
    Checkpoint,
    Data,
    Eval,
    Loss,
    Memory,
    Model,
    Optimizer,
    Parallel,
    Replay,
    Section,
    Source,
    Train,
    are_documents,
    nearest,
)

__all__ = [
    "RESERVED_ARGUMENTS",
    "ROW_KEYS",
    "Adapter",
    "Checkpoint",
    "Data",
    "Duration",
    "Eval",
    "Loss",
    "Memory",
    "Model",
    "Optimizer",
    "Parallel",
    "Replay",
    "Run",
    "Section",
    "Source",
    "Train",
    "are_documents",
    "beside",
    "build",
    "dump",
    "load",
    "nearest",
]
