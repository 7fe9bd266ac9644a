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

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from preceptor.data.forest import AttentionRun, TokenRange
from preceptor.errors import ModelError
from preceptor.model.activations.inputs import SequenceInputs, SplitPart, TokenGroup, loss_bearing
from preceptor.model.activations.modules import EmbeddingNoise, noisy
from preceptor.model.attention.layout import ForestLayout, KeysValues, PathMasks, PhaseLayout
from preceptor.model.attention.runs import IMPLEMENTATION, attention_implementation, outside_graphs
from preceptor.model.loss.linear_cross_entropy import HeadCast
from preceptor.model.options import KEEP_ALL, ActivationPolicy
from preceptor.model.parts import decoder_layers, decoder_of, device_of, model_type


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
    keys_only: the last layer computes keys and values alone. parts: context-only and loss-bearing tokens, of which the
    last layer returns the latter. efficient: our norms, gated units and linear layers, instead of the authors' own.
    group: the tokens; where routers are to be balanced every layer computes all of them whole. runs: of a whole
    sequence in which conversations stand side by side.
    """

    decoder: PreTrainedModel
    attention: str
    group: TokenGroup
    num_checkpointed: int = 0
    keys_only: bool = False
    parts: tuple[SplitPart, ...] = ()
    efficient: bool = False
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
    """Hidden states of a whole sequence in one pass: (T, D); where `inputs` are split, of the loss-bearing tokens."""
    num_tokens, group = inputs.sequence.num_tokens, inputs.groups[0]
    position_T, masks = group.position[0, :num_tokens], PathMasks(inputs.runs)
    layout = ForestLayout(position_T, inputs.subtree_end_T, inputs.runs, masks, lengths=group.lengths)
    this = DecoderPass(
        decoder_of(model),
        state.attention,
        group,
        num_checkpointed=num_checkpointed(model, policy),
        parts=inputs.parts,
        efficient=True,
        runs=inputs.runs,
    )
    num_asked = inputs.parts[1].phase.num_tokens if inputs.parts else num_tokens
    return _decode(group, layout, state, this, state.noise_TD)[:num_asked]


def decode_dense(
    model: nn.Module, state: ModelState, inputs: SequenceInputs, policy: ActivationPolicy = KEEP_ALL
) -> Tensor:
    """The same (T, D) by the authors' modules and a dense mask. What `recompute` would drop is kept."""
    constant_T = ~loss_bearing(inputs.sequence) if policy.context_gradient == "detach" else None
    layout = ForestLayout.from_sequence(inputs.sequence, device_of(model), dense=True, constant_T=constant_T)
    group = inputs.groups[0]
    if group.routed is not None:
        group = replace(group, routed=replace(group.routed, constant_M=layout.constant_T))
    this = DecoderPass(decoder_of(model), state.attention, group, num_checkpointed(model, policy))
    return _decode(group, layout, state, this, state.noise_TD)


def decode_phases(
    model: nn.Module, state: ModelState, inputs: SequenceInputs, policy: ActivationPolicy
) -> tuple[Tensor, np.ndarray]:
    """Hidden states of the loss-bearing tokens, (M, D), phase by phase; and where in the sequence they are, (M,).

    Raises ModelError where layers mix tokens outside attention.
    """
    if "mixers" in state.optimisations:
        raise no_phases(model, policy)
    decoder = decoder_of(model)
    num_layers = len(_layers(model))
    checkpointed = policy.checkpointed_layers(num_layers)
    kept: Mapping[nn.Module, Mapping[TokenRange, KeysValues]] = {}
    hidden, index = [], []
    plan = inputs.phases
    noise_TD = None if state.noise_TD is None else pad(state.noise_TD, (0, 0, 0, 2 * inputs.num_levels))
    masks = PathMasks(run for phase in plan for run in phase.runs)
    casts = SharedCasts(keep_weights=len(plan) > 1 and not state.regathers)
    for group, phase in zip(inputs.groups, plan, strict=True):
        recorded: Any = None if phase is plan[-1] else {}
        layout = PhaseLayout(phase.runs, kept, recorded, masks, lengths=group.lengths)
        this = DecoderPass(
            decoder,
            state.attention,
            group,
            num_checkpointed=checkpointed if phase.loss_bearing else num_layers,
            keys_only=not phase.loss_bearing,
            efficient=True,
        )
        constant = policy.context_gradient == "detach" and not phase.loss_bearing
        with torch.no_grad() if constant else nullcontext():
            noise_MD = None if noise_TD is None else noise_TD[group.index]
            hidden_MD = _decode(group, layout, state, this, noise_MD, casts)
        if phase.loss_bearing:
            hidden.append(hidden_MD[: phase.num_tokens])
            index.append(phase.index_T())
        # a layer that runs again must not leave its keys a second time, nor hold on to those of later phases
        kept, layout.recorded = layout.recorded or {}, None
    return torch.cat(hidden), np.concatenate(index)


def no_phases(model: nn.Module, policy: ActivationPolicy) -> ModelError:
    return ModelError(
        f"memory.context_gradient: {policy.context_gradient}, but the layers of a {model_type(model)} model mix tokens "
        f"outside attention, so a context cannot go through them apart from its targets. Set it to `full`."
    )


def decode_alone(
    model: nn.Module, state: ModelState, inputs: SequenceInputs, policy: ActivationPolicy = KEEP_ALL
) -> Tensor:
    """Hidden states (T, D) of one conversation, by the model's own attention, modules and empty state.

    For models that compute attention in a way that cannot be told a sequence's layout, and for layers that mix tokens
    outside attention without a convolution by which they could be known (`PathMixer`). Such a model reads one chain at
    a time (`PackedSequence.alone`, prefix_sharing.py takes trees apart), as a server would.
    """
    sequence = inputs.sequence
    assert sequence.alone and len(set(sequence.subtree_end_T.tolist())) == 1, "one chain"
    decoder, group = decoder_of(model), inputs.groups[0]
    this = DecoderPass(decoder, decoder.config._attn_implementation, group, num_checkpointed(model, policy))
    embedding, noise_TD = decoder.get_input_embeddings(), state.noise_TD
    with state.running(this), nullcontext() if noise_TD is None else noisy(embedding, noise_TD):
        output = decoder(input_ids=group.ids, use_cache=False)
    hidden_TD: Tensor = output.last_hidden_state[0]
    return hidden_TD


def _decode(
    group: TokenGroup,
    layout: ForestLayout | PhaseLayout,
    state: ModelState,
    this: DecoderPass,
    noise_MD: Tensor | None = None,
    casts: SharedCasts | None = None,
) -> Tensor:
    """Last hidden states (M, D) of M tokens, which go through the decoder together.

    More may come behind them, see `computed_tokens`.
    """
    with (
        state.running(this, casts),
        attention_implementation(this.decoder, this.attention),
        nullcontext() if noise_MD is None else noisy(this.decoder.get_input_embeddings(), noise_MD),
    ):
        output = this.decoder(input_ids=group.ids, position_ids=group.position, use_cache=False, forest=layout)
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
