"""A row taken apart by what a loss reads, so that it can go through the model level by level.

A token is *read* if a loss reads its hidden state to predict the next one: the last token of a context and every token
of a target but its last. Each run of a row falls into pieces of read and unread tokens in turn, and the pieces into
levels: those of one level see only each other and earlier levels.

    c c c C t t T c c C t t T      a two-turn conversation; capitals: the last token of its segment
    │0──│1────│2──│3────│          level: even ones unread, odd ones read. The last token is in none of them: no loss
                                   reads it and no read token sees it

So the computation that predicts a trained token is in one level with the rest of its target, and what remains, the
even levels, serves only by the keys and values that it leaves.

Legend: T tokens of a row.
"""

from dataclasses import dataclass

import numpy as np

from preceptor.data.forest import PackedSequence, runs
from preceptor.model.attention.layout import Range, Run


@dataclass(frozen=True, slots=True)
class Level:
    """Pieces that go through the model together: `runs` in layout order, all of them read or all unread."""

    read: bool
    runs: tuple[Run, ...]

    @property
    def num_tokens(self) -> int:
        return sum(end - start for start, end, _ in self.runs)

    def index_T(self) -> np.ndarray:
        """Where in the row the level's tokens are."""
        return np.concatenate([np.arange(0), *(np.arange(start, end) for start, end, _ in self.runs)])


def levels(row: PackedSequence) -> list[Level]:
    """The row's levels in the order in which they can be computed, without pieces that no read token sees.

    A row with T tokens and a token that a loss reads has at least one. Every read token is in exactly one odd level.
    """
    read_T = _read(row)
    pieces = _pieces(row, read_T)
    needed: set[Range] = set()
    for start, end, ancestors in pieces:
        if read_T[start]:
            needed.update(ancestors, [(start, end)])
    level_of: dict[Range, int] = {}
    members: dict[int, list[Run]] = {}
    for start, end, ancestors in pieces:
        if (start, end) not in needed:
            continue
        read = bool(read_T[start])
        above = level_of[ancestors[-1]] if ancestors else 0
        level = above if above % 2 == read else above + 1
        level_of[start, end] = level
        members.setdefault(level, []).append((start, end, ancestors))
    return [Level(bool(level % 2), tuple(members[level])) for level in sorted(members)]


def split(row: PackedSequence) -> tuple[Level, Level]:
    """All unread pieces that read tokens see, and all read ones: what a single layer needs, whatever the levels."""
    parts = {
        read: tuple(sorted(run for level in levels(row) if level.read == read for run in level.runs))
        for read in (False, True)
    }
    return Level(False, parts[False]), Level(True, parts[True])


def _read(row: PackedSequence) -> np.ndarray:
    read_T = np.zeros(row.num_tokens, dtype=bool)
    read_T[row.source_N] = True
    return read_T


def _pieces(row: PackedSequence, read_T: np.ndarray) -> list[Run]:
    """The row's runs, cut wherever read and unread tokens meet; each with the pieces that it sees, root first."""
    cuts = np.flatnonzero(read_T[1:] != read_T[:-1]) + 1
    cut_into: dict[Range, list[Range]] = {}
    pieces: list[Run] = []
    for start, end, ancestors in runs(row.spans):
        path = [piece for run in ancestors for piece in cut_into[run]]
        inner = cuts[np.searchsorted(cuts, start, side="right") : np.searchsorted(cuts, end)].tolist()
        cut_into[start, end] = []
        for first, last in zip([start, *inner], [*inner, end], strict=True):
            pieces.append((first, last, tuple(path)))
            path.append((first, last))
            cut_into[start, end].append((first, last))
    return pieces
