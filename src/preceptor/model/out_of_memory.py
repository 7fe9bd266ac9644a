"""Errors that say that memory ran out, whoever raises them. torch is imported in the function, not at the top."""

_WORDS = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is Python's, torch's or a CUDA library's error for want of memory."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return type(error) is RuntimeError and any(words in str(error) for words in _WORDS)
