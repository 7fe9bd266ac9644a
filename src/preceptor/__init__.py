"""Preceptor: supervised fine-tuning that trains exactly what inference will see."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preceptor.api.arguments import SFTConfig as SFTConfig
    from preceptor.api.chat_format import collate as collate
    from preceptor.api.chat_format import load_chat_format as load_chat_format
    from preceptor.api.run import Run as Run
    from preceptor.api.trainer import SFTTrainer as SFTTrainer

__version__ = "0.1.0"

# Waiting threads sleep instead of spinning. On a machine with anything else to do, spinning made small models 3 to 40
# times slower (docs/decisions/2026-11-22-waiting-threads.md). Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_PLACES = {
    "Run": "api.run",
    "SFTConfig": "api.arguments",
    "SFTTrainer": "api.trainer",
    "collate": "api.chat_format",
    "load_chat_format": "api.chat_format",
}
__all__ = [*_PLACES, "__version__"]


def __getattr__(name: str) -> Any:
    """`from preceptor import SFTTrainer` imports torch when it is asked for, and `preceptor --help` does not."""
    if name in _PLACES:
        return getattr(import_module(f"preceptor.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'preceptor' has no attribute {name!r}")
