"""Phases of a packed sequence: its tokens grouped by whether a loss reads them, in the order of computation.

A token is *loss-bearing* if a loss reads its hidden state to predict the next one: the last token of a context and
every token of a target but its last. The others are *context-only*. Each run of a sequence is cut into pieces of the
two kinds in turn, and the pieces are grouped into phases: those of one phase see only each other and earlier phases.

    c c c C t t T c c C t t T      a two-turn conversation; capitals: the last token of its segment
    │0──│1────│2──│3────│          phase: even ones context-only, odd ones loss-bearing. The last token is in none of
                                   them: no loss reads it and no loss-bearing token sees it

So the computation that predicts a trained token is in one phase with the rest of its target, and the even phases serve
only by the keys and values that they leave.

Legend: T tokens of a sequence.
"""

from dataclasses import dataclass

import numpy as np

from preceptor.data.forest import PackedSequence, runs
from preceptor.model.attention.layout import AttentionRun, TokenRange


@dataclass(frozen=True, slots=True)
class Phase:
    """Pieces that go through the model together: `runs` in layout order, all loss-bearing or all context-only."""

    loss_bearing: bool
    runs: tuple[AttentionRun, ...]

    @property
    def num_tokens(self) -> int:
        return sum(end - start for start, end, _ in self.runs)

    def index_T(self) -> np.ndarray:
        """Where in the sequence the phase's tokens are."""
        return np.concatenate([np.arange(0), *(np.arange(start, end) for start, end, _ in self.runs)])


def phases(sequence: PackedSequence, num_levels: int = 0) -> list[Phase]:
    """The sequence's phases in the order of computation, without pieces that no loss-bearing token sees.

    A sequence with trained tokens has at least one. Every loss-bearing token is in exactly one odd phase. num_levels:
    where the sequence has fewer, a chain of single tokens behind its own, which no loss reads, takes part in two phases
    of each level: processes that share the weights of a model pass through its layers equally often.
    """
    bearing_T = loss_bearing(sequence)
    pieces = _pieces(sequence, bearing_T)
    needed: set[TokenRange] = set()
    for start, end, ancestors in pieces:
        if bearing_T[start]:
            needed.update(ancestors, [(start, end)])
    phase_of: dict[TokenRange, int] = {}
    members: dict[int, list[AttentionRun]] = {}
    for start, end, ancestors in pieces:
        if (start, end) not in needed:
            continue
        bearing = bool(bearing_T[start])
        above = phase_of[ancestors[-1]] if ancestors else 0
        phase = above if above % 2 == bearing else above + 1
        phase_of[start, end] = phase
        members.setdefault(phase, []).append((start, end, ancestors))
    if len(members) < 2 * num_levels:
        chain = [(token, token + 1) for token in range(sequence.num_tokens, sequence.num_tokens + 2 * num_levels)]
        for phase, (start, end) in enumerate(chain):
            members.setdefault(phase, []).append((start, end, tuple(chain[:phase])))
    return [Phase(bool(phase % 2), tuple(members[phase])) for phase in sorted(members)]


def num_levels(sequence: PackedSequence) -> int:
    """How often context-only and loss-bearing tokens alternate: 1 for a conversation of one turn, 0 for no trained
    token."""
    return -(-len(phases(sequence)) // 2)


def split_by_loss(sequence: PackedSequence) -> tuple[Phase, Phase]:
    """All context-only pieces that loss-bearing tokens see, and all loss-bearing ones: what a single layer needs."""
    parts = {
        bearing: tuple(sorted(run for phase in phases(sequence) if phase.loss_bearing == bearing for run in phase.runs))
        for bearing in (False, True)
    }
    return Phase(False, parts[False]), Phase(True, parts[True])


def loss_bearing(sequence: PackedSequence) -> np.ndarray:
    """Whether a loss reads each token's hidden state, bool (T,)."""
    bearing_T = np.zeros(sequence.num_tokens, dtype=bool)
    bearing_T[sequence.source_N] = True
    return bearing_T


def _pieces(sequence: PackedSequence, bearing_T: np.ndarray) -> list[AttentionRun]:
    """The sequence's runs, cut where the two kinds of token meet; each with the pieces that it sees, root first."""
    cuts = np.flatnonzero(bearing_T[1:] != bearing_T[:-1]) + 1
    cut_into: dict[TokenRange, list[TokenRange]] = {}
    pieces: list[AttentionRun] = []
    for start, end, ancestors in runs(sequence.spans):
        path = [piece for run in ancestors for piece in cut_into[run]]
        inner = cuts[np.searchsorted(cuts, start, side="right") : np.searchsorted(cuts, end)].tolist()
        cut_into[start, end] = []
        for first, last in zip([start, *inner], [*inner, end], strict=True):
            pieces.append((first, last, tuple(path)))
            path.append((first, last))
            cut_into[start, end].append((first, last))
    return pieces
