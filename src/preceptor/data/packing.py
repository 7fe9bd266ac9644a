"""Packing: which examples share a sequence in an epoch, from their lengths and a seed alone.

Sequences are filled one after the other from the examples that are left, in an order that the seed shuffles:

    │ example │ example │ example │              │     examples in order, while a long one still fits after them,
    │ example │ example │ example │ example │ e. │     then the longest that fits, and so on until none does

So a sequence is a random sample of the examples but for its end, and completely filled: among many examples there is
nearly always one of the wanted length. On chat, long-tail and reasoning lengths (benchmarks/packing.py) sequences are
as full as those of best-fit decreasing, which however puts examples of similar length together, the same ones in every
epoch. Here each epoch has groups of its own, drawn at random.

Of more than 200,000 examples, blocks of 100,000 and more are packed, each when its first sequence is asked for:

    all examples, by length    1 2 3 | 4 5 6 | 7 8 9 | ...     strata of as many examples as there are blocks
    an epoch's blocks          2 6 7 ... │ 1 4 9 ... │ 3 5 8 ...     of each stratum one to each block, at random

So all blocks have nearly the same lengths, and the number of sequences that one needs is enough for every other. Where
nearly every example has a sequence to itself, a block that has one example less also has one sequence less.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_LONG = 0.9  # the quantile of the lengths that counts as long; with the median, sequences are a little less full
_TRIES = 4
_BLOCK = 100_000  # examples; 0.1 to 0.3 s to pack


def plan_sequences(lengths: Sequence[int], max_length: int, seed: int) -> list[list[int]]:
    """Sequences of indices into `lengths`, each index once, none over `max_length` tokens, in a seeded order.

    Raises ValueError for a length over `max_length`.
    """
    rng = np.random.default_rng(seed)
    return _shuffled(_fill_sequences(_checked(lengths, max_length), max_length, rng), rng)


def count_sequences(lengths: Sequence[int] | np.ndarray, max_length: int, seed: int) -> int:
    """The number of sequences of each epoch: what two ways of packing need at most, and half a percent more."""
    lengths_N = _checked(lengths, max_length)
    filled = _fill_sequences(lengths_N, max_length, np.random.default_rng(seed))
    decreasing = best_fit_decreasing(lengths_N, max_length, np.random.default_rng(seed))
    num_sequences = max(len(filled), len(decreasing))
    return min(len(lengths_N), num_sequences + num_sequences // 200)


def plan_epoch(
    lengths: Sequence[int] | np.ndarray, max_length: int, num_sequences: int, seed: int | Sequence[int]
) -> list[list[int]]:
    """As `plan_sequences`, in exactly `num_sequences` (from `count_sequences`), so that all epochs take the same steps.

    Plans of two seeds differ by a few sequences in a thousand. One with too many is drawn again, at the end by best-fit
    decreasing, which makes the same number for every seed; where there are too few, sequences of many examples are
    halved. Raises ValueError as `plan_sequences`, and for a `num_sequences` that cannot be kept.
    """
    lengths_N = _checked(lengths, max_length)
    seeds = [seed] if isinstance(seed, int) else seed
    for attempt in range(_TRIES):
        rng = np.random.default_rng([*seeds, attempt])
        sequences = _fill_sequences(lengths_N, max_length, rng)
        if len(sequences) <= num_sequences:
            break
    else:
        rng = np.random.default_rng([*seeds, _TRIES])
        sequences = best_fit_decreasing(lengths_N, max_length, rng)
    if not len(sequences) <= num_sequences <= len(lengths_N):
        raise ValueError(f"{len(lengths_N)} examples make {len(sequences)} sequences, not {num_sequences}")
    return _shuffled(_halved(sequences, num_sequences), rng)


class EpochPlans:
    """The sequences of every epoch, as many in each; a pure function of the lengths, `max_length` and the seed.

    Memory holds 4 bytes for each example in each of: the order by length, and the blocks of one epoch.
    """

    def __init__(self, lengths_N: np.ndarray, max_length: int, seed: int) -> None:
        """Raises ValueError for a length over `max_length`."""
        self._lengths_N, self._max_length, self._seed = lengths_N, max_length, seed
        self._num_blocks = max(1, len(lengths_N) // _BLOCK)
        if self._num_blocks == 1:
            self.sequences_per_block = count_sequences(lengths_N, max_length, seed)
        else:
            small = np.uint16 if lengths_N.max() < 1 << 16 else np.int32  # NumPy sorts small numbers ten times as fast
            order_N = np.argsort(lengths_N.astype(small), kind="stable").astype(np.int32)
            num_rest = len(order_N) % self._num_blocks
            self._rest, self._strata = order_N[:num_rest], order_N[num_rest:].reshape(-1, self._num_blocks)
            self.sequences_per_block = count_sequences(self._longest_N, max_length, seed)
        self.num_sequences = int(self._ends(0)[-1])

    def _ends(self, epoch: int) -> np.ndarray:
        """The number of sequences of an epoch up to the end of each block."""
        sizes_B = np.full(self._num_blocks, self.sequences_per_block)
        if self._num_blocks > 1 and self.sequences_per_block > len(self._strata):  # more than others have examples
            sizes_B -= 1
            sizes_B[self._drawn(epoch)[1]] += 1
        return np.cumsum(sizes_B)

    @property
    def _longest_N(self) -> np.ndarray:
        """The lengths of a block that has the longest of each stratum: no block needs more sequences than it."""
        found: np.ndarray = self._lengths_N[np.concatenate([self._rest[-1:], self._strata[:, -1]])]
        return found

    def sequences(self, epoch: int, start: int, end: int) -> list[list[int]]:
        """The sequences `start` to `end` of an epoch, in training order, as indices of examples."""
        found: list[list[int]] = []
        ends_B = self._ends(epoch)
        while start < end:
            block = int(np.searchsorted(ends_B, start, side="right"))
            within = start - int(ends_B[block - 1] if block else 0)
            planned = self._block(epoch, block)[within : within + end - start]
            found += planned
            start += len(planned)
        return found

    @lru_cache(maxsize=2)  # noqa: B019 (it lives as long as its run)
    def _block(self, epoch: int, block: int) -> list[list[int]]:
        seed = self._seed * 1_000_003 + epoch
        if self._num_blocks == 1:
            return plan_epoch(self._lengths_N, self._max_length, self.sequences_per_block, seed)
        strata, blocks_of_rest = self._drawn(epoch)
        members_N = np.concatenate([self._rest[blocks_of_rest == block], strata[:, block]])
        plan = self._plan_of(self._lengths_N[members_N], [seed, block])
        return [members_N[sequence].tolist() for sequence in plan]

    @lru_cache(maxsize=1)  # noqa: B019
    def _drawn(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of each stratum in the order of their blocks, and the blocks of those in no whole stratum."""
        rng = np.random.default_rng([self._seed, epoch])
        return rng.permuted(self._strata, axis=1), rng.permutation(self._num_blocks)[: len(self._rest)]

    def _plan_of(self, lengths_N: np.ndarray, seed: int | Sequence[int]) -> list[list[int]]:
        num_sequences = min(self.sequences_per_block, len(lengths_N))
        try:
            return plan_epoch(lengths_N, self._max_length, num_sequences, seed)
        except ValueError:  # a packing of the longest of each stratum holds every block, example by example
            rng = np.random.default_rng(seed)
            longest_N = self._longest_N
            sequences = best_fit_decreasing(longest_N, self._max_length, rng)
            absent = len(longest_N) - len(lengths_N)  # the first, where the block has none of the rest
            kept = [[rank - absent for rank in sequence if rank >= absent] for sequence in sequences]
            return _shuffled(_halved([sequence for sequence in kept if sequence], num_sequences), rng)


def _checked(lengths: Sequence[int] | np.ndarray, max_length: int) -> np.ndarray:
    lengths_N = np.asarray(lengths, dtype=np.int64)
    if len(lengths_N) and lengths_N.max() > max_length:
        longest = int(lengths_N.argmax())
        raise ValueError(f"example {longest} has {lengths_N[longest]} tokens, a sequence holds {max_length}")
    return lengths_N


def _shuffled(sequences: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
    return [sequences[r] for r in rng.permutation(len(sequences)).tolist()]


def _fill_sequences(lengths_N: np.ndarray, max_length: int, rng: np.random.Generator) -> list[list[int]]:
    """Fill one sequence after the other; the last ones hold what is left. 1 to 3 us per example."""
    if not len(lengths_N):
        return []
    lengths: list[int] = lengths_N.tolist()
    num, long = len(lengths), int(np.quantile(lengths_N, _LONG))
    order: list[int] = rng.permutation(num).tolist()
    by_length: dict[int, list[int]] = {}
    for index in reversed(order):
        by_length.setdefault(lengths[index], []).append(index)
    occurring = sum(1 << length for length in by_length)  # bit n is set if an example of n tokens may be left
    taken = bytearray(num)
    sequences: list[list[int]] = []
    for place, first in enumerate(order):
        if taken[first]:
            continue
        sequence: list[int] = []
        free = max_length
        for next_place in range(place, num):  # as they come
            index = order[next_place]
            if taken[index]:
                continue
            if sequence and lengths[index] + long > free:
                break
            taken[index] = 1
            sequence.append(index)
            free -= lengths[index]
        while fitting := occurring & ((2 << free) - 1):  # the longest that fits
            length = fitting.bit_length() - 1
            left = by_length[length]
            while left and taken[left[-1]]:
                left.pop()
            if not left:
                occurring ^= 1 << length
                continue
            taken[left[-1]] = 1
            sequence.append(left.pop())
            free -= length
        sequences.append(sequence)
    return sequences


def best_fit_decreasing(lengths_N: np.ndarray, max_length: int, rng: np.random.Generator) -> list[list[int]]:
    """The longest first, each to the fullest sequence that still holds it; ties between equal lengths are shuffled."""
    shuffled = rng.permutation(len(lengths_N))
    order = shuffled[np.argsort(-lengths_N[shuffled], kind="stable")]
    sequences: list[list[int]] = []
    sequences_with_free: dict[int, list[int]] = {}
    occurring = 0  # bit f is set iff some sequence has exactly f tokens free
    for index, length in zip(order.tolist(), lengths_N[order].tolist(), strict=True):
        fitting = occurring >> length
        if fitting:
            free = (fitting & -fitting).bit_length() - 1 + length
            sequence = sequences_with_free[free].pop()
            if not sequences_with_free[free]:
                occurring ^= 1 << free
            sequences[sequence].append(index)
        else:
            sequence, free = len(sequences), max_length
            sequences.append([index])
        sequences_with_free.setdefault(free - length, []).append(sequence)
        occurring |= 1 << (free - length)
    return sequences


def _halved(sequences: list[list[int]], num_sequences: int) -> list[list[int]]:
    """The same examples in `num_sequences` sequences: those of most examples are halved, which adds no token."""
    assert num_sequences <= sum(map(len, sequences)), "an example cannot be halved"
    while len(sequences) < num_sequences:
        sequences = sorted(sequences, key=len, reverse=True)
        for place in range(min(num_sequences - len(sequences), len(sequences))):
            middle = len(sequences[place]) // 2
            if middle:
                sequences.append(sequences[place][middle:])
                sequences[place] = sequences[place][:middle]
    return sequences
