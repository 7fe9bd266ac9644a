"""The run file: its sections, durations, overrides and YAML. No torch here."""

from preceptor.config.durations import Duration
from preceptor.config.run import Run, beside, build, dump, load
from preceptor.config.sections import ROW_KEYS, Adapter, Data, Eval, Model, Replay, Section, Source, Train, nearest

__all__ = [
    "ROW_KEYS",
    "Adapter",
    "Data",
    "Duration",
    "Eval",
    "Model",
    "Replay",
    "Run",
    "Section",
    "Source",
    "Train",
    "beside",
    "build",
    "dump",
    "load",
    "nearest",
]
