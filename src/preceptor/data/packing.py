"""Which records share a row: the plan of an epoch, from lengths and a seed alone.

Rows are made one after the other from the records that are left, in an order that the seed shuffles:

    │ record │ record │ record │             │     records as they come, while a long one still fits after them,
    │ record │ record │ record │ record │ r. │     then the longest that fits, and so on until none does

So a row is a random sample of the records but for its end, and full to the brim: among many records there is nearly
always one of the length that is wanted. On chat, long-tail and reasoning lengths (benchmarks/packing.py) rows are as
full as best-fit decreasing makes them; but that plan puts records of like length together, and the same ones every
epoch. Here every epoch has groups of its own, as mixed as chance makes them.
"""

from collections.abc import Sequence

import numpy as np

_LONG = 0.9  # the quantile of the lengths that counts as long; with the median, rows are a little less full
_TRIES = 4


def plan_rows(lengths: Sequence[int], max_length: int, seed: int) -> list[list[int]]:
    """Rows of indices into `lengths`, each index once, no row over `max_length`, in an order that `seed` chooses.

    Raises ValueError for a length over `max_length`.
    """
    rng = np.random.default_rng(seed)
    return _shuffled(_fill_rows(_checked(lengths, max_length), max_length, rng), rng)


def count_rows(lengths: Sequence[int], max_length: int, seed: int) -> int:
    """How many rows each epoch shall have: as many as two ways of planning need, and half a percent over."""
    lengths_N = _checked(lengths, max_length)
    filled = _fill_rows(lengths_N, max_length, np.random.default_rng(seed))
    decreasing = best_fit_decreasing(lengths_N, max_length, np.random.default_rng(seed))
    num_rows = max(len(filled), len(decreasing))
    return min(len(lengths_N), num_rows + num_rows // 200)


def plan_epoch(lengths: Sequence[int], max_length: int, num_rows: int, seed: int) -> list[list[int]]:
    """As `plan_rows`, in exactly `num_rows` rows (from `count_rows`), so that all epochs take the same steps.

    Plans of two seeds differ by a few rows in a thousand. One that has too many is drawn anew, at last by best-fit
    decreasing, which makes the same number for every seed; where there are too few, rows of many records are halved.
    Raises ValueError as `plan_rows`, and for a `num_rows` that cannot be kept.
    """
    lengths_N = _checked(lengths, max_length)
    for attempt in range(_TRIES):
        rng = np.random.default_rng([seed, attempt])
        rows = _fill_rows(lengths_N, max_length, rng)
        if len(rows) <= num_rows:
            break
    else:
        rng = np.random.default_rng([seed, _TRIES])
        rows = best_fit_decreasing(lengths_N, max_length, rng)
    if not len(rows) <= num_rows <= len(lengths_N):
        raise ValueError(f"{len(lengths_N)} records make {len(rows)} rows, not {num_rows}")
    return _shuffled(_halved(rows, num_rows), rng)


def _checked(lengths: Sequence[int], max_length: int) -> np.ndarray:
    lengths_N = np.asarray(lengths, dtype=np.int64)
    if len(lengths_N) and lengths_N.max() > max_length:
        raise ValueError(f"record {int(lengths_N.argmax())} has {lengths_N.max()} tokens, a row holds {max_length}")
    return lengths_N


def _shuffled(rows: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
    return [rows[r] for r in rng.permutation(len(rows)).tolist()]


def _fill_rows(lengths_N: np.ndarray, max_length: int, rng: np.random.Generator) -> list[list[int]]:
    """Row after row, full to the brim; the last rows hold what is left. 1 to 3 us a record."""
    if not len(lengths_N):
        return []
    lengths: list[int] = lengths_N.tolist()
    num, long = len(lengths), int(np.quantile(lengths_N, _LONG))
    order: list[int] = rng.permutation(num).tolist()
    by_length: dict[int, list[int]] = {}
    for index in reversed(order):
        by_length.setdefault(lengths[index], []).append(index)
    occurring = sum(1 << length for length in by_length)  # bit n is set if a record of n tokens may be left
    taken = bytearray(num)
    rows: list[list[int]] = []
    for place, first in enumerate(order):
        if taken[first]:
            continue
        row: list[int] = []
        free = max_length
        for next_place in range(place, num):  # as they come
            index = order[next_place]
            if taken[index]:
                continue
            if row and lengths[index] + long > free:
                break
            taken[index] = 1
            row.append(index)
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
            row.append(left.pop())
            free -= length
        rows.append(row)
    return rows


def best_fit_decreasing(lengths_N: np.ndarray, max_length: int, rng: np.random.Generator) -> list[list[int]]:
    """The longest first, each to the fullest row that still holds it; ties between equal lengths are shuffled."""
    shuffled = rng.permutation(len(lengths_N))
    order = shuffled[np.argsort(-lengths_N[shuffled], kind="stable")]
    rows: list[list[int]] = []
    rows_with_free: dict[int, list[int]] = {}
    occurring = 0  # bit f is set iff some row has exactly f tokens free
    for index, length in zip(order.tolist(), lengths_N[order].tolist(), strict=True):
        fitting = occurring >> length
        if fitting:
            free = (fitting & -fitting).bit_length() - 1 + length
            row = rows_with_free[free].pop()
            if not rows_with_free[free]:
                occurring ^= 1 << free
            rows[row].append(index)
        else:
            row, free = len(rows), max_length
            rows.append([index])
        rows_with_free.setdefault(free - length, []).append(row)
        occurring |= 1 << (free - length)
    return rows


def _halved(rows: list[list[int]], num_rows: int) -> list[list[int]]:
    """The same records in `num_rows` rows: those of most records are halved, which adds no token."""
    while len(rows) < num_rows:
        rows = sorted(rows, key=len, reverse=True)
        for place in range(min(num_rows - len(rows), len(rows))):
            middle = len(rows[place]) // 2
            if middle:
                rows.append(rows[place][middle:])
                rows[place] = rows[place][:middle]
    return rows
