"""What to say when a row does not fit in memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from preceptor.data.forest import PackedSequence
from preceptor.errors import ModelError

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


@contextmanager
def naming_what_does_not_fit(row: PackedSequence, what: str) -> Iterator[None]:
    """Raises ModelError, with the row's size and the keys that help, where memory runs out inside."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        raise ModelError(
            f"{what}, {row.num_tokens:,} tokens, {row.num_trained:,} of them trained, does not fit in memory beside "
            f"weights, gradients and optimizer state. Lower data.max_length, save activations "
            f"(memory.context_gradient, memory.activation_checkpointing), or train an adapter"
        ) from error
