"""The tokens of a packed sequence as the passes read them: grouped in phases, on the device in one copy.

Tokens go through the decoder in groups: all at once, or phase by phase. All that a pass reads is made on the host:
nothing is found on the device, where to look at a result means to wait for it.

A token is *loss-bearing* if a loss reads its hidden state to predict the next one: the last token of a context and
every token of a target but its last. The others are *context-only*. Each run of a sequence is cut into pieces of the
two kinds in turn, and the pieces are grouped into phases: those of one phase see only each other and earlier phases.

    c c c C t t T c c C t t T      a two-turn conversation; capitals: the last token of its segment
    │0──│1────│2──│3────│          phase: even ones context-only, odd ones loss-bearing. The last token is in none of
                                   them: no loss reads it and no loss-bearing token sees it

So the computation that predicts a trained token is in one phase with the rest of its target, and the even phases serve
only by the keys and values that they leave.

Legend: T tokens of a sequence, M tokens of a group, R different ones among them, N trained tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from preceptor.data.forest import AttentionRun, PackedSequence, TokenRange, attention_runs
from preceptor.model.activations.routing import RoutedTokens, Routing, balanced_paths
from preceptor.model.attention.layout import (
    ForestLayout,
    PathLengths,
    computed_tokens,
    on_device,
    path_lengths,
)
from preceptor.model.parts import decoder_of


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
    found = phases(sequence)
    context, bearing = (
        tuple(sorted(run for phase in found if phase.loss_bearing == asked for run in phase.runs))
        for asked in (False, True)
    )
    return Phase(False, context), Phase(True, bearing)


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
    for start, end, ancestors in attention_runs(sequence.spans):
        path = [piece for run in ancestors for piece in cut_into[run]]
        inner = cuts[np.searchsorted(cuts, start, side="right") : np.searchsorted(cuts, end)].tolist()
        cut_into[start, end] = []
        for first, last in zip([start, *inner], [*inner, end], strict=True):
            pieces.append((first, last, tuple(path)))
            path.append((first, last))
            cut_into[start, end].append((first, last))
    return pieces


# On the device -------------------------------------------------------------------------------------------------------

OccurringRows = tuple[Tensor, Tensor]
"""Of an embedding: the rows that occur (R,), and which of them each token has (M,)."""


def _bounds(found: Mapping[Any, Tensor], number: int, queries: Sequence[int], keys: Sequence[int]) -> PathLengths:
    most = max(queries, default=0), max(keys, default=0)
    return found["queries", number].int(), found["keys", number].int(), *most


SplitPart = tuple[Tensor, ForestLayout]
"""Tokens of a sequence that a layer treats on their own (layers.py): where they are (M,), and their layout."""


@dataclass(frozen=True, eq=False, slots=True)
class TokenGroup:
    """Tokens that go through the decoder together; behind them may be more, see `computed_tokens`.

    ids, position: (1, M). index: where in the sequence they are, without those behind them. loss_bearing: whether a
    loss reads any. rows: of the embedding; None: it is not trained. routed: where routers are to be balanced.
    """

    ids: Tensor
    position: Tensor
    index: Tensor
    layout: ForestLayout
    loss_bearing: bool
    rows: OccurringRows | None = None
    routed: RoutedTokens | None = None


@dataclass(frozen=True, eq=False, slots=True)
class SequenceInputs:
    """groups: of each phase, in the order of computation, or one of all tokens (by_phases False).

    parts: context-only and loss-bearing tokens, of which the last layer returns the latter. num_levels: as in `phases`;
    tokens that it adds are numbered after the sequence's own. routing: where routers are to be balanced, what they do
    in the passes of this sequence. source_N: where among the hidden states that the decoder returns each trained token
    is predicted.
    """

    sequence: PackedSequence
    by_phases: bool
    groups: tuple[TokenGroup, ...]
    parts: tuple[SplitPart, ...]
    num_levels: int
    routing: Routing | None
    source_N: Tensor
    target_N: Tensor
    weight_N: Tensor

    @classmethod
    def of(
        cls,
        model: nn.Module,
        sequence: PackedSequence,
        phases: Sequence[Phase] = (),
        split: Sequence[Phase] = (),
        num_levels: int = 0,
        padded: bool = True,
        balanced: bool = False,
    ) -> "SequenceInputs":
        """padded: the tokens of a group may be more, see `computed_tokens`. balanced: with `routing`."""
        plan = tuple(phases) or (Phase(True, attention_runs(sequence.spans)),)
        every = (*plan, *split)
        index = [each.index_T() for each in every]
        lengths = [path_lengths(each.runs) for each in every]
        asked = np.concatenate([each.index_T() for each in split[1:] or plan if each.loss_bearing])
        weight_VD = decoder_of(model).get_input_embeddings().weight
        ids_T = np.pad(sequence.ids_T, (0, 2 * num_levels), mode="edge")
        position_T = np.concatenate([sequence.position_T, np.arange(2 * num_levels)])
        place_T = np.zeros(len(ids_T), dtype=np.int64)
        place_T[asked] = np.arange(len(asked))
        host: dict[Any, np.ndarray] = {"subtree_end": sequence.subtree_end_T, "target": sequence.target_N}
        host |= {"source": place_T[sequence.source_N], "weight": sequence.weight_N}
        if balanced:
            cell_T, num_cells, of_paths = balanced_paths(sequence)
            cell_T = np.pad(cell_T, (0, 2 * num_levels), constant_values=num_cells)
            host |= of_paths
        for number, index_M in enumerate(index):
            host["index", number] = index_M
            host["queries", number], host["keys", number] = (np.cumsum([0, *each]) for each in lengths[number])
        for number, index_M in enumerate(index[: len(plan)]):
            added = computed_tokens(len(index_M), weight_VD) - len(index_M) if padded else 0
            host["ids", number] = ids_M = np.pad(ids_T[index_M], (0, added))
            host["position", number] = np.pad(position_T[index_M], (0, added))
            if balanced:
                host["cell", number] = np.pad(cell_T[index_M], (0, added), constant_values=num_cells)
            if weight_VD.requires_grad:
                host["rows", number], host["row", number] = np.unique(ids_M, return_inverse=True)
        found = on_device(host, weight_VD.device)
        layouts = [ForestLayout(each.runs, _bounds(found, n, *lengths[n])) for n, each in enumerate(every)]
        routing = Routing(num_cells, found["cell"], found["path"], found["share_G"]) if balanced else None
        groups = tuple(
            TokenGroup(
                found["ids", number][None],
                found["position", number][None],
                found["index", number],
                layouts[number],
                each.loss_bearing,
                rows=(found["rows", number], found["row", number]) if weight_VD.requires_grad else None,
                routed=None if routing is None else RoutedTokens(routing, found["cell", number]),
            )
            for number, each in enumerate(plan)
        )
        if not phases:
            layouts[0].subtree_end_T = found["subtree_end"]
            layouts[0].position_T = groups[0].position[0, : sequence.num_tokens]
        parts = tuple((found["index", number], layouts[number]) for number in range(len(plan), len(every)))
        of_loss = found["source"], found["target"], found["weight"]
        return cls(sequence, bool(phases), groups, parts, num_levels, routing, *of_loss)
