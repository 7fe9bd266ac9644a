"""Errors that say that memory ran out, whoever raises them, and what is said of them. torch is not imported here."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from preceptor.errors import ModelError, PreceptorError

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is Python's, torch's or a CUDA library's error for want of memory."""
    if isinstance(error, PreceptorError):
        return False
    torch = sys.modules.get("torch")  # what is not imported has raised nothing
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


@contextmanager
def explaining_out_of_memory(message: str) -> Iterator[None]:
    """Raises ModelError where memory runs out inside. message: what did not fit, and the keys that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(message) from error
