"""Preceptor: supervised fine-tuning that trains exactly what inference will see."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preceptor.train.textbook import SFTTrainer as SFTTrainer

__version__ = "0.1.0"
__all__ = ["SFTTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    """`from preceptor import SFTTrainer` imports torch when it is asked for, and `preceptor --help` does not."""
    if name == "SFTTrainer":
        from preceptor.train.textbook import SFTTrainer

        return SFTTrainer
    raise AttributeError(f"module 'preceptor' has no attribute {name!r}")
