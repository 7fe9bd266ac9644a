"""Block sizes of attention and matrix products on a CPU, and what a dry run (plan/dry_run.py) changes of them.

oneDNN compiles a kernel for every size of a product in bfloat16 that it meets: milliseconds and up to a megabyte each,
of which it keeps the last thousand (benchmarks/new_sizes.py). Tokens of sequences, of what a loss reads and of single
conversations are hardly ever as many twice. On the grid they are, at the price of about one token in forty.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

FINEST = 64  # tokens
BLOCK_TOKENS = 256  # queries per block where scores or a mask are written out; 1024 are no faster
_WHOLE_TOKENS = 384  # queries up to which attention's backward in bfloat16 is one block
SCRATCH_ELEMENTS = 1 << 22  # of each of the three (heads, Q, P) that a block of that backward writes, or one head's
SHORT_RUN_TOKENS = 160  # below, float32 attention forward and backward beats bfloat16, with AMX
ROWS_MULTIPLE = 64  # embedding rows come in multiples of this, on GPUs too


def on_grid(num_tokens: int) -> int:
    """The next size on the grid: multiples of 64, and from 2,048 on of 1/32 to 1/16 of the size; 0 for none."""
    step = max(FINEST, 1 << max(0, (num_tokens - 1).bit_length() - 5))
    return -(-num_tokens // step) * step


def rows_for(rows: int, num_tokens: int) -> int:
    """Rows of an embedding for a tokenizer of `num_tokens`: they grow to a multiple and never shrink."""
    return rows if num_tokens <= rows else -(-num_tokens // ROWS_MULTIPLE) * ROWS_MULTIPLE


def backward_block(num_queries: int) -> int:
    """Queries of a block in attention's backward in bfloat16."""
    return num_queries if num_queries <= _WHOLE_TOKENS else BLOCK_TOKENS


def heads_at_once(num_kv_heads: int, scores_of_head: int) -> int:
    """Key-value heads that a block of that backward takes together, at least 1, so that its buffers stay small."""
    return min(num_kv_heads, max(1, SCRATCH_ELEMENTS // scores_of_head))


def mostly_short(runs: Iterable[tuple[int, int]]) -> bool:
    """Whether most tokens are in short runs, (queries, keys) each: few tokens on a long path are as long as the root of
    their product. Then attention is float32, 3 times as fast for 32 tokens."""
    num_tokens = short_tokens = 0
    for num_queries, num_keys in runs:
        num_tokens += num_queries
        short_tokens += num_queries if num_queries * num_keys < SHORT_RUN_TOKENS**2 else 0
    return 2 * short_tokens > num_tokens


# Dry runs -------------------------------------------------------------------------------------------------------------

_dry_run_for: ContextVar[str | None] = ContextVar("_dry_run_for", default=None)


@contextmanager
def dry_run_for(device_type: str) -> Iterator[None]:
    """Within the block the engine runs on tensors without values, for their bytes alone, as it would on such a device.

    So a plan for a GPU needs none: the tensors themselves count as the CPU's.
    """
    token = _dry_run_for.set(device_type)
    try:
        yield
    finally:
        _dry_run_for.reset(token)


def is_dry_run() -> bool:
    return _dry_run_for.get() is not None


def device_type_of(device: Any) -> str:
    """What the engine's choices go by: the type of a torch device, or the one that a dry run is for."""
    return _dry_run_for.get() or device.type


def representative(steps: Sequence[T]) -> Sequence[T]:
    """The steps of a loop; in a dry run the last three, where all take the same memory or later ones more."""
    return steps[-3:] if is_dry_run() else steps
