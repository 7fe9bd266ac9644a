"""What the passes of a sequence read of it: made on the host, on the device in one copy (transfer.py).

Tokens go through the decoder in groups: all at once, or phase by phase. Nothing that a pass reads is found on the
device, where to look at a result means to wait for it.

Legend: T tokens of a sequence, M tokens of a group, R different ones among them, N trained tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from preceptor.data.forest import PackedSequence
from preceptor.model.activations.phases import Phase
from preceptor.model.activations.routing import RoutedTokens, Routing, balanced_paths
from preceptor.model.attention.layout import AttentionRun, PathLengths, attention_runs, computed_tokens, path_lengths
from preceptor.model.parts import decoder_of, device_of
from preceptor.model.transfer import on_device

OccurringRows = tuple[Tensor, Tensor]
"""Of an embedding: the rows that occur (R,), and which of them each token has (M,)."""

_WHOLE = 0  # the group that all tokens are


@dataclass(frozen=True, eq=False, slots=True)
class SplitPart:
    """Tokens of a sequence that a layer treats on their own (layers.py)."""

    phase: Phase
    index_M: Tensor
    lengths: PathLengths


@dataclass(frozen=True, eq=False, slots=True)
class SequenceInputs:
    """phases: the groups, in the order of computation; empty: all tokens are one.

    split: context-only and loss-bearing tokens, of which the last layer returns the latter. runs: of the whole.
    num_levels: as in `phases`; tokens that it adds are numbered after the sequence's own. routing: where routers are to
    be balanced, what they do in the passes of this sequence.
    """

    sequence: PackedSequence
    phases: tuple[Phase, ...]
    split: tuple[Phase, ...]
    runs: tuple[AttentionRun, ...]
    num_levels: int
    routing: Routing | None
    _arrays: dict[Any, Tensor]

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
        weight_VD = decoder_of(model).get_input_embeddings().weight
        runs = attention_runs(sequence)
        ids_T = np.pad(sequence.ids_T, (0, 2 * num_levels), mode="edge")
        position_T = np.concatenate([sequence.position_T, np.arange(2 * num_levels)])
        host: dict[Any, np.ndarray] = {"subtree_end": sequence.subtree_end_T}
        paths = balanced_paths(sequence) if balanced else None
        groups = [(phase.index_T(), phase.runs) for phase in phases] or [(np.arange(sequence.num_tokens), runs)]
        for group, (index_M, of_group) in enumerate(groups):
            added = computed_tokens(len(index_M), weight_VD) - len(index_M) if padded else 0
            host["index", group] = index_M
            host["ids", group] = ids_M = np.pad(ids_T[index_M], (0, added))
            host["position", group] = np.pad(position_T[index_M], (0, added))
            host["queries", group], host["keys", group] = _begins(of_group)
            if paths is not None:
                cell_T = np.pad(paths.cell_T, (0, 2 * num_levels), constant_values=paths.num_cells)
                host["cell", group] = np.pad(cell_T[index_M], (0, added), constant_values=paths.num_cells)
            if weight_VD.requires_grad:
                host["rows", group], host["row", group] = np.unique(ids_M, return_inverse=True)
        for place, part in enumerate(split):
            host["part", place] = part.index_T()
            host["part queries", place], host["part keys", place] = _begins(part.runs)
        asked = [phase.index_T() for phase in phases if phase.loss_bearing] or [part.index_T() for part in split[1:]]
        place_T = np.zeros(len(ids_T), dtype=np.int64)
        index_M = np.concatenate(asked) if asked else np.arange(len(ids_T))
        place_T[index_M] = np.arange(len(index_M))
        host |= {"source": place_T[sequence.source_N], "target": sequence.target_N, "weight": sequence.weight_N}
        if paths is not None:
            host |= {"path cell": paths.cell, "path": paths.path, "share": paths.share_G}
        arrays = on_device(host, device_of(model))
        routing = None
        if paths is not None:
            routing = Routing(paths.num_cells, arrays["path cell"], arrays["path"], arrays["share"])
        return cls(sequence, tuple(phases), tuple(split), runs, num_levels, routing, arrays)

    # the loss

    @property
    def source_N(self) -> Tensor:
        """Where among the hidden states that the decoder returns each trained token is predicted."""
        return self._arrays["source"]

    @property
    def target_N(self) -> Tensor:
        return self._arrays["target"]

    @property
    def weight_N(self) -> Tensor:
        return self._arrays["weight"]

    # a group

    def ids(self, group: int = _WHOLE) -> Tensor:
        return self._arrays["ids", group]

    def position(self, group: int = _WHOLE) -> Tensor:
        return self._arrays["position", group]

    def index(self, group: int = _WHOLE) -> Tensor:
        return self._arrays["index", group]

    def rows(self, group: int = _WHOLE) -> OccurringRows | None:
        """None: of an embedding that is not trained."""
        if ("rows", group) not in self._arrays:
            return None
        return self._arrays["rows", group], self._arrays["row", group]

    def lengths(self, group: int = _WHOLE) -> PathLengths:
        runs = self.phases[group].runs if self.phases else self.runs
        return self._lengths(runs, self._arrays["queries", group], self._arrays["keys", group])

    def routed(self, group: int = _WHOLE, constant_M: Tensor | None = None) -> RoutedTokens | None:
        """constant_M: as in RoutedTokens."""
        return None if self.routing is None else RoutedTokens(self.routing, self._arrays["cell", group], constant_M)

    def parts(self) -> tuple[SplitPart, ...]:
        """What `split` says, for the last layer."""
        names = ("part", "part queries", "part keys")
        arrays = [[self._arrays[name, place] for name in names] for place in range(len(self.split))]
        return tuple(
            SplitPart(phase, index_M, self._lengths(phase.runs, *begins))
            for phase, (index_M, *begins) in zip(self.split, arrays, strict=True)
        )

    @staticmethod
    def _lengths(runs: Sequence[AttentionRun], queries: Tensor, keys: Tensor) -> PathLengths:
        longest_run, longest_path = (max(each, default=0) for each in path_lengths(runs))
        return queries.to(torch.int32), keys.to(torch.int32), longest_run, longest_path

    # the whole

    @property
    def subtree_end_T(self) -> Tensor:
        return self._arrays["subtree_end"]


def _begins(runs: Sequence[AttentionRun]) -> tuple[np.ndarray, np.ndarray]:
    """Where the queries of each run begin, and the keys of its path, with the end of the last."""
    queries, keys = path_lengths(runs)
    return np.cumsum([0, *queries]), np.cumsum([0, *keys])
