"""Layout of the tokens that go through the layers together: a whole sequence, or one phase of it.

Legend: T tokens of a sequence, Q queries and P keys of one block.
"""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from preceptor.data.forest import AttentionRun, PackedSequence, TokenRange, attention_runs
from preceptor.model.sizes import device_type_of, on_grid

K = TypeVar("K")


def on_device(arrays: Mapping[K, np.ndarray], device: torch.device) -> dict[K, Tensor]:
    """int64 and float64 arrays of one dimension as tensors, which share one block of memory.

    A GPU gets it from pinned memory while it does what it was asked for before: a copy from other memory would wait for
    all of that to end.
    """
    joined = [np.ascontiguousarray(array).view(np.int64) for array in arrays.values()]
    block = torch.from_numpy(np.concatenate(joined))
    if device.type == "cuda":
        block = block.pin_memory()
    parts = block.to(device, non_blocking=True).split([len(array) for array in arrays.values()])
    return {
        key: part.view(torch.float64) if array.dtype == np.float64 else part
        for (key, array), part in zip(arrays.items(), parts, strict=True)
    }


PathLengths = tuple[Tensor, Tensor, int, int]
"""Where each run's queries and its path's keys begin, with the end of the last, int32; the most of a run."""

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one range, each (1, heads, tokens, head size), with rotary positions in them."""

RangesSeen = dict[TokenRange, KeysValues]
"""Keys and values of the ranges that an attention module has seen."""


@dataclass(frozen=True)
class AttentionOptions:
    """What a layer asks of attention: see runs.py. sinks: (H,), one for each query head."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch's fused kernels compute it: they know neither soft-cap nor sinks."""
        return self.softcap is None and self.sinks is None

    def window_among(self, num_keys: int) -> int | None:
        """The sliding window; None also where no token of so many keys is outside it."""
        return None if self.window is None or self.window >= num_keys else self.window


def path_lengths(runs: Iterable[AttentionRun]) -> tuple[list[int], list[int]]:
    """Of each run its tokens, and those of its path."""
    queries, keys = [], []
    for start, end, ancestors in runs:
        queries.append(end - start)
        keys.append(end - start + sum(b - a for a, b in ancestors))
    return queries, keys


class Scratch:
    """Memory that the backward of each run and layer of a sequence writes in, one after the other."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def take(self, num_elements: int, like: Tensor) -> Tensor:
        """So many elements of the dtype and on the device of `like`, whatever they hold."""
        if len(self._buffer) < num_elements or self._buffer.dtype != like.dtype:
            self._buffer = like.new_empty(num_elements)
        return self._buffer[:num_elements]


class PathMasks:
    """What the last tokens of a path see of it: one mask that all runs, blocks and layers have views of.

    Query i sees key j iff 0 <= i - j < window, both counted from the end of the path, so the mask of Q queries and P
    keys is the lower right corner of that of more. As sdpa saves its mask for backward, a mask for each layer would
    take 128 MB for 1,000 queries, 4,000 keys and 8 layers.
    """

    def __init__(self, runs: Iterable[AttentionRun]) -> None:
        """runs: all that will ask, so that one mask is large enough for them."""
        self._longest = max(path_lengths(runs)[1], default=0)
        self._masks: dict[object, Tensor] = {}
        self.scratch = Scratch()

    def mask(
        self, num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype, device: torch.device, block: int
    ) -> Tensor:
        """(Q, P): true or false, or for another dtype 0 or -inf. Q is at most `block`."""
        on_cpu = device_type_of(device) == "cpu"
        rows, columns = (min(block, self._longest), self._longest) if on_cpu else (num_queries, num_keys)
        if window is not None:
            columns = min(columns, window + rows)
        form = (rows, columns, window, dtype)
        if form not in self._masks:
            index_Q1 = torch.arange(columns - rows, columns, device=device)[:, None]
            index_P = torch.arange(columns, device=device)
            visible_QP = index_P <= index_Q1
            if window is not None:
                visible_QP &= index_Q1 - index_P < window
            if dtype != torch.bool:
                visible_QP = torch.zeros_like(visible_QP, dtype=dtype).masked_fill_(~visible_QP, float("-inf"))
            self._masks[form] = visible_QP
        return self._masks[form][rows - num_queries :, columns - num_keys :]


class ForestLayout:
    """Tokens that go through the layers together: `runs` in layout order, of a whole sequence or of one phase of it.

    lengths: of the runs and their paths; None: found where they are asked for. subtree_end_T, position_T: of a whole
    sequence. dense: attention by the dense mask, as the plain engine has it; there keys and values of `constant_T` get
    no gradient. made: what a kernel needs besides, made by the first layer that asks and kept for all others.

    whole_alone: some layer's attention has a fused kernel for a whole sequence, and none for parts of it.

    kept: for each attention module, keys and values of the ranges that earlier phases computed. recorded: where the
    modules leave theirs, with the earlier ones, for the phases to come; None: nowhere, as when a layer runs again in
    backward and its keys are known already. keys_only: attention stops the layer once these are recorded.

    No dataclass: FSDP2 looks for tensors in a layer's arguments and copies the dataclasses that hold some, so that what
    one layer records would be lost to the others.
    """

    def __init__(
        self,
        runs: tuple[AttentionRun, ...],
        lengths: PathLengths | None = None,
        subtree_end_T: Any = None,
        position_T: Any = None,
    ) -> None:
        self.runs, self.masks, self.lengths = runs, PathMasks(runs), lengths
        self.subtree_end_T, self.position_T = subtree_end_T, position_T
        self.dense = self.whole_alone = False
        self.constant_T: Tensor | None = None
        self.made: dict[Any, Any] = {}
        self.kept: Mapping[nn.Module, RangesSeen] = {}
        self.recorded: dict[nn.Module, RangesSeen] | None = None
        self.keys_only = False

    def for_pass(self, masks: PathMasks | None = None) -> "ForestLayout":
        """The same, to which a pass leaves what it makes, and which goes with it. masks: shared with other passes."""
        own = copy(self)
        own.masks, own.made = masks or PathMasks(self.runs), {}
        return own

    @classmethod
    def from_sequence(cls, sequence: PackedSequence, device: torch.device | str) -> "ForestLayout":
        arrays = {"subtree_end": sequence.subtree_end_T, "position": sequence.position_T}
        found = on_device(arrays, torch.device(device))
        return cls(attention_runs(sequence.spans), subtree_end_T=found["subtree_end"], position_T=found["position"])


def dense_mask(subtree_end_T: Tensor, position_T: Tensor, sliding_window: int | None = None) -> Tensor:
    """mask[i, j] = token j is visible to token i, bool (T, T)."""
    index_T = torch.arange(len(subtree_end_T), device=subtree_end_T.device)
    mask_TT = (index_T[None, :] <= index_T[:, None]) & (index_T[:, None] < subtree_end_T[None, :])
    if sliding_window is not None:
        mask_TT &= position_T[:, None] - position_T[None, :] < sliding_window
    return mask_TT


def computed_tokens(num_tokens: int, value: Tensor) -> int:
    """How many tokens go through the layers for so many: on a CPU in bfloat16 as many as the grid has (sizes.py).

    Those that are added are the last; they are in no run, so attention gives zeros for them and nothing sees them.
    """
    in_half = device_type_of(value.device) == "cpu" and product_dtype(value) == torch.bfloat16
    return on_grid(num_tokens) if in_half else num_tokens


def product_dtype(value: Tensor) -> torch.dtype:
    """The dtype of attention's products: autocast's where that is on, for there rotary embeddings give float32 queries
    and keys beside bfloat16 values."""
    device_type = value.device.type
    if torch.is_autocast_enabled(device_type) and value.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return value.dtype
