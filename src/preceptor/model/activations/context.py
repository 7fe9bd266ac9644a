"""State that the engine hands to the modules of a model: per optimizer step, per pass, and per model.

Nothing here is global: a step's state is made by the training loop, a pass's by the engine, and a model's lies on the
model's own modules, which get a subclass of their class (`adopt`), as FSDP2 does it. A deep copy of a model has a state
of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preceptor.model.activations.inputs import OccurringRows, SplitPart
from preceptor.model.activations.noise import EmbeddingNoise
from preceptor.model.activations.routing import RoutedTokens
from preceptor.model.attention.layout import AttentionRun
from preceptor.model.attention.runs import IMPLEMENTATION, outside_graphs
from preceptor.model.loss.linear_cross_entropy import HeadCast


@dataclass(frozen=True, eq=False, slots=True)
class StepContext:
    """What the sequences of one optimizer step share.

    divisor: of every loss. accumulates: embedding and head add their gradients to `.grad` themselves, so backward must
    follow with a gradient of 1. head_cast: the head in the type of matrix products. num_levels: the most that a
    sequence of this pass has on any rank (activations/phases.py); 0 where no rank waits for another. noise: on the
    embeddings. router_aux: where the load-balancing loss of each sequence is left, over `divisor`; None: nowhere.
    """

    divisor: float = 1.0
    accumulates: bool = False
    head_cast: HeadCast | None = None
    num_levels: int = 0
    noise: EmbeddingNoise | None = None
    router_aux: list[Tensor] | None = None


class SharedCasts:
    """Half-precision copies: of the tensor that a linear layer read last, and with `keep_weights` of each weight."""

    def __init__(self, keep_weights: bool) -> None:
        self._keep_weights = keep_weights
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}
        self._last: tuple[ReferenceType[Tensor], int, Tensor] | None = None

    def of_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        last = self._last
        if last is None or last[0]() is not x or last[1] != x._version or last[2].dtype != dtype:
            self._last = last = ref(x), x._version, x.detach().to(dtype)
        return last[2]

    def of_weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if not self._keep_weights:
            return weight.detach().to(dtype)
        if id(weight) not in self._weights:
            self._weights[id(weight)] = weight, weight.detach().to(dtype)
        return self._weights[id(weight)][1]


@dataclass(frozen=True, eq=False, slots=True)
class DecoderPass:
    """One pass of tokens through the decoder.

    attention: the implementation in force. num_checkpointed: layers, from the first on, that keep only their input.
    keys_only: the last layer computes keys and values alone. parts: context-only and loss-bearing tokens, of which the
    last layer returns the latter. efficient: our norms, gated units and linear layers, instead of the authors' own.
    ids, rows: what the embedding is given, (1, M), and which of its rows that is. routed: where routers are to be
    balanced; then every layer computes all tokens whole. runs: of a whole sequence in which conversations stand side by
    side.
    """

    decoder: PreTrainedModel
    attention: str
    num_checkpointed: int = 0
    keys_only: bool = False
    parts: tuple[SplitPart, ...] = ()
    efficient: bool = False
    ids: Tensor | None = None
    rows: OccurringRows | None = None
    routed: RoutedTokens | None = None
    runs: tuple[AttentionRun, ...] | None = None


@dataclass(eq=False)
class Ranks:
    """The processes over which a model is spread (sharding.py).

    mesh: its dimensions are named, `replicate` and `shard`, one of them or both. root: the engine whose forward pass
    gathers what is sharded; None: each rank holds the whole model. regathers: a layer's weights are gathered when they
    are needed and freed afterwards; else they stay from the first forward pass of a step to its last backward pass.
    skeleton: the model without its values, since FSDP2 has no copy of a sharded one. inside: the root is running.
    """

    mesh: Any
    root: Any = None
    regathers: bool = False
    skeleton: Any = None
    inside: bool = False

    def __deepcopy__(self, memo: Any) -> "Ranks":
        return self

    @contextmanager
    def entered(self) -> Iterator[None]:
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def reshard(self) -> None:
        """Free what was gathered, so that `parameters()` are the shards: after passes without a backward one."""
        for module in self.root.modules():
            if hasattr(module, "reshard"):
                module.reshard()


@dataclass(eq=False)
class ModelState:
    """What the engine has installed in one model, by name, and the pass that is running in it.

    casts: of that pass; None where the modules run as their authors wrote them. accumulates: as in StepContext.
    ranks: how the model is spread over processes (sharding.py); None: it is in this one alone.
    noise_TD: on the embeddings of the sequence that is running. routers: how many are watched (routers.py).
    asked_to_compile: by the run file; else the engine chooses, and not_compiled is why it did not.
    """

    optimisations: set[str] = field(default_factory=set)
    current: DecoderPass | None = None
    casts: SharedCasts | None = None
    accumulates: bool = False
    ranks: Ranks | None = None
    noise_TD: Tensor | None = None
    routers: int = 0
    asked_to_compile: bool = False
    not_compiled: str | None = None

    @property
    def compiles(self) -> bool:
        """Whether layers and loss are compiled: in training, and whatever keeps a graph; evaluation runs as written."""
        return "compile" in self.optimisations

    @property
    def attention(self) -> str:
        """The implementation in force within a pass."""
        return outside_graphs() if self.compiles else IMPLEMENTATION

    @property
    def regathers(self) -> bool:
        return self.ranks is not None and self.ranks.regathers

    @contextmanager
    def running(self, this: DecoderPass, casts: SharedCasts | None = None) -> Iterator[None]:
        """casts: given where several passes share them. What runs again in backward holds on to `this`, not to them."""
        former = self.current, self.casts
        self.current, self.casts = this, (casts or SharedCasts(keep_weights=False)) if this.efficient else None
        try:
            yield
        finally:
            self.current, self.casts = former

    @contextmanager
    def accumulating(self, accumulates: bool, noise_TD: Tensor | None = None) -> Iterator[None]:
        self.accumulates, self.noise_TD = accumulates, noise_TD
        try:
            yield
        finally:
            self.accumulates, self.noise_TD = False, None


def adopt(module: nn.Module, mixin: type[nn.Module], state: ModelState, settings: Any = None) -> None:
    """Put `mixin.forward` before the module's own, which it reaches by `super()`."""
    module.__dict__["engine_state"], module.__dict__["engine_settings"] = state, settings
    module.__class__ = _subclass(mixin, type(module))  # type: ignore[arg-type]


def release(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Undo `adopt` where it was done."""
    own = type(module).__bases__
    if own[0] is mixin:
        module.__class__ = own[1]
        del module.__dict__["engine_state"], module.__dict__["engine_settings"]


@cache
def _subclass(mixin: type, cls: type) -> type:
    """One class for all modules of a class, under its name: that is what messages and transformers read."""
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
