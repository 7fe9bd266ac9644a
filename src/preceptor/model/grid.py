"""Sizes to which numbers of tokens are rounded up where a CPU multiplies in bfloat16.

oneDNN compiles a kernel for every size of a matrix product that it meets, which takes milliseconds and up to a megabyte
each, and keeps the last thousand. Tokens of rows, of what a loss reads and of single conversations are hardly ever as
many twice; on this grid they are, at the price of one token in forty.
"""

FINEST = 64  # tokens


def on_grid(num_tokens: int) -> int:
    """The next size on the grid: multiples of 64, and from 2,048 on of 1/32 to 1/16 of the size; 0 for none."""
    step = max(FINEST, 1 << max(0, (num_tokens - 1).bit_length() - 5))
    return -(-num_tokens // step) * step
