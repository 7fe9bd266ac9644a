"""Passes of a packed sequence through the decoder under an activation policy (options.py), and the state of each.

State is handed to the modules of a model per optimizer step, per pass, and per model. None of it is global: a step's
is made by the training loop, a pass's by the engine, and a model's lies on the model's own modules, which get a
subclass of their class (`adopt`), as FSDP2 does it. A deep copy of a model has a state of its own.

Legend: T tokens of a sequence, M tokens whose hidden states are asked for, D hidden size.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from preceptor.errors import ModelError
from preceptor.model.activations.inputs import SequenceInputs, SplitPart, TokenGroup
from preceptor.model.activations.modules import EmbeddingNoise, noisy
from preceptor.model.attention.layout import PathMasks, RangesSeen
from preceptor.model.attention.runs import IMPLEMENTATION, attention_implementation, outside_graphs
from preceptor.model.loss.linear_cross_entropy import HeadCast
from preceptor.model.options import KEEP_ALL, ActivationPolicy
from preceptor.model.parts import decoder_layers, decoder_of, model_type


@dataclass(frozen=True, eq=False, slots=True)
class StepContext:
    """What the sequences of one optimizer step share.

    divisor: of every loss. accumulates: embedding and head add their gradients to `.grad` themselves, so backward must
    follow with a gradient of 1. head_cast: the head in the type of matrix products. num_levels: the most that a
    sequence of this pass has on any rank (`inputs.phases`); 0 where no rank waits for another. noise: on the
    embeddings. router_aux: where the load-balancing loss of each sequence is left, over `divisor`; None: nowhere.
    """

    divisor: float = 1.0
    accumulates: bool = False
    head_cast: HeadCast | None = None
    num_levels: int = 0
    noise: EmbeddingNoise | None = None
    router_aux: list[Tensor] | None = None


@dataclass(eq=False)
class SharedCasts:
    """Half-precision copies: of the tensor that a linear layer read last, and with `keep_weights` of each weight."""

    keep_weights: bool = False
    _weights: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _last: tuple[ReferenceType[Tensor], int, Tensor] | None = None

    def of_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        last = self._last
        if last is None or last[0]() is not x or last[1] != x._version or last[2].dtype != dtype:
            self._last = last = ref(x), x._version, x.detach().to(dtype)
        return last[2]

    def of_weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.keep_weights:
            return weight.detach().to(dtype)
        if id(weight) not in self._weights:
            self._weights[id(weight)] = weight, weight.detach().to(dtype)
        return self._weights[id(weight)][1]


@dataclass(frozen=True, eq=False, slots=True)
class DecoderPass:
    """One pass of tokens through the decoder.

    attention: the implementation in force. num_checkpointed: layers, from the first on, that keep only their input.
    group: the tokens; of context-only ones the last layer computes keys and values alone. parts: context-only and
    loss-bearing tokens, of which the last layer returns the latter. Where routers are to be balanced every layer
    computes all of them whole. efficient: with a layout for attention, and our norms, gated units and linear layers,
    where installed; else all is the authors' own.
    """

    decoder: PreTrainedModel
    attention: str
    group: TokenGroup
    num_checkpointed: int = 0
    parts: tuple[SplitPart, ...] = ()
    efficient: bool = True


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
    def fused(self) -> bool:
        """Whether norms, gated units and loss are compiled one by one, where layers are not; when: as `compiles`."""
        return "fused" in self.optimisations

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
        self.current, self.casts = this, (casts or SharedCasts()) if this.efficient else None
        try:
            yield
        finally:
            self.current, self.casts = former


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


def decode_whole(
    model: nn.Module, state: ModelState, inputs: SequenceInputs, policy: ActivationPolicy = KEEP_ALL
) -> Tensor:
    """Hidden states of a whole sequence in one pass: (T, D); where `inputs` are split, of the loss-bearing tokens.

    The plain engine does it by a dense mask, and detaches contexts there; what `recompute` would drop is kept.

    A chain that is alone (`PackedSequence.alone`, prefix_sharing.py takes trees apart) goes through the model as a
    server would have it, by the authors' attention, modules and empty state: for models that cannot be told a
    sequence's layout, and for layers that mix tokens outside attention without a convolution by which they could be
    known (`PathMixer`).
    """
    decoder, sequence, group, parts = decoder_of(model), inputs.sequence, inputs.groups[0], inputs.parts
    alone, layout = sequence.alone, group.layout.for_pass()
    assert not alone or len(set(sequence.subtree_end_T.tolist())) == 1, "one chain"
    if "attention" not in state.optimisations and not alone:
        layout.dense = True
        if policy.context_gradient == "detach":
            layout.constant_T = torch.ones_like(layout.subtree_end_T, dtype=torch.bool)
            layout.constant_T[inputs.source_N] = False
            if group.routed is not None:
                group = replace(group, routed=replace(group.routed, constant_M=layout.constant_T))
    group = replace(group, layout=layout)
    attention = decoder.config._attn_implementation if alone else state.attention
    this = DecoderPass(decoder, attention, group, num_checkpointed(model, policy), parts, efficient=not alone)
    return _decode(state, this, state.noise_TD)[: len(parts[1][0]) if parts else sequence.num_tokens]


def decode_phases(model: nn.Module, state: ModelState, inputs: SequenceInputs, policy: ActivationPolicy) -> Tensor:
    """Hidden states of the loss-bearing tokens, (M, D), phase by phase.

    Raises ModelError where layers mix tokens outside attention.
    """
    if "mixers" in state.optimisations:
        raise no_phases(model, policy)
    num_layers = len(_layers(model))
    checkpointed = policy.checkpointed_layers(num_layers)
    kept: Mapping[nn.Module, RangesSeen] = {}
    hidden = []
    noise_TD = None if state.noise_TD is None else pad(state.noise_TD, (0, 0, 0, 2 * inputs.num_levels))
    masks = PathMasks(run for group in inputs.groups for run in group.layout.runs)
    casts = SharedCasts(keep_weights=len(inputs.groups) > 1 and not state.regathers)
    for group in inputs.groups:
        bearing, layout = group.loss_bearing, group.layout.for_pass(masks)
        layout.kept, layout.recorded = kept, None if group is inputs.groups[-1] else {}
        num_again = checkpointed if bearing else num_layers
        this = DecoderPass(decoder_of(model), state.attention, replace(group, layout=layout), num_again)
        constant = policy.context_gradient == "detach" and not bearing
        with torch.no_grad() if constant else nullcontext():
            hidden_MD = _decode(state, this, None if noise_TD is None else noise_TD[group.index], casts)
        if bearing:
            hidden.append(hidden_MD[: len(group.index)])
        # a layer that runs again must not leave its keys a second time, nor hold on to those of later phases
        kept, layout.recorded = layout.recorded or {}, None
    return torch.cat(hidden)


def no_phases(model: nn.Module, policy: ActivationPolicy) -> ModelError:
    return ModelError(
        f"memory.context_gradient: {policy.context_gradient}, but the layers of a {model_type(model)} model mix tokens "
        f"outside attention, so a context cannot go through them apart from its targets. Set it to `full`."
    )


def _decode(
    state: ModelState, this: DecoderPass, noise_MD: Tensor | None = None, casts: SharedCasts | None = None
) -> Tensor:
    """Last hidden states (M, D) of M tokens, which go through the decoder together.

    More may come behind them, see `computed_tokens`.
    """
    decoder, group = this.decoder, this.group
    given = {"position_ids": group.position, "forest": group.layout} if this.efficient else {}
    with (
        state.running(this, casts),
        attention_implementation(decoder, this.attention),
        nullcontext() if noise_MD is None else noisy(decoder.get_input_embeddings(), noise_MD),
    ):
        output = decoder(input_ids=group.ids, use_cache=False, **given)
    hidden_MD: Tensor = output.last_hidden_state[0]
    return hidden_MD


def num_checkpointed(model: nn.Module, policy: ActivationPolicy) -> int:
    """How many layers keep only their input in a pass over all tokens."""
    return 0 if policy.activation_checkpointing == "none" else policy.checkpointed_layers(len(_layers(model)))


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers. Raises ModelError for a decoder that does not say which modules they are."""
    layers = decoder_layers(model)
    if not layers:
        raise ModelError(
            f"{type(decoder_of(model)).__name__} does not say which of its modules are layers (transformers' "
            f"GradientCheckpointingLayer), so none can be run again. Set memory.context_gradient to `full` and "
            f"memory.activation_checkpointing to `none`."
        )
    return layers
