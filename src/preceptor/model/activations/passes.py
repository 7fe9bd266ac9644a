"""Passes of a packed sequence through the decoder under an activation policy (policy.py).

Legend: T tokens of a sequence, M tokens whose hidden states are asked for, D hidden size.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from preceptor.errors import ModelError
from preceptor.model.activations.context import DecoderPass, ModelState, SharedCasts
from preceptor.model.activations.inputs import SequenceInputs
from preceptor.model.activations.noise import noisy
from preceptor.model.activations.phases import loss_bearing
from preceptor.model.activations.policy import KEEP_ALL, ActivationPolicy
from preceptor.model.attention.layout import (
    ForestLayout,
    KeysValues,
    PathMasks,
    PhaseLayout,
    TokenRange,
)
from preceptor.model.attention.runs import attention_implementation
from preceptor.model.parts import decoder_layers, decoder_of, device_of, model_type


def decode_whole(
    model: nn.Module, state: ModelState, inputs: SequenceInputs, policy: ActivationPolicy = KEEP_ALL
) -> Tensor:
    """Hidden states of a whole sequence in one pass: (T, D); where `inputs` are split, of the loss-bearing tokens."""
    num_tokens = inputs.sequence.num_tokens
    layout = ForestLayout(
        inputs.position()[:num_tokens],
        inputs.subtree_end_T,
        inputs.runs,
        PathMasks(inputs.runs),
        lengths=inputs.lengths(),
    )
    this = DecoderPass(
        decoder_of(model),
        state.attention,
        num_checkpointed=num_checkpointed(model, policy),
        parts=inputs.parts(),
        efficient=True,
        ids=inputs.ids()[None],
        rows=inputs.rows(),
        routed=inputs.routed(),
        runs=inputs.runs,
    )
    num_asked = inputs.split[1].num_tokens if inputs.split else num_tokens
    return _decode(inputs.position(), layout, state, this, state.noise_TD)[:num_asked]


def decode_dense(
    model: nn.Module, state: ModelState, inputs: SequenceInputs, policy: ActivationPolicy = KEEP_ALL
) -> Tensor:
    """The same (T, D) by the authors' modules and a dense mask. What `recompute` would drop is kept."""
    constant_T = ~loss_bearing(inputs.sequence) if policy.context_gradient == "detach" else None
    layout = ForestLayout.from_sequence(inputs.sequence, device_of(model), dense=True, constant_T=constant_T)
    this = DecoderPass(
        decoder_of(model),
        state.attention,
        num_checkpointed=num_checkpointed(model, policy),
        ids=inputs.ids()[None],
        rows=inputs.rows(),
        routed=inputs.routed(constant_M=layout.constant_T),
    )
    return _decode(inputs.position(), layout, state, this, state.noise_TD)


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
    for group, phase in enumerate(plan):
        recorded: Any = None if phase is plan[-1] else {}
        layout = PhaseLayout(phase.runs, kept, recorded, masks, lengths=inputs.lengths(group))
        this = DecoderPass(
            decoder,
            state.attention,
            num_checkpointed=checkpointed if phase.loss_bearing else num_layers,
            keys_only=not phase.loss_bearing,
            efficient=True,
            ids=inputs.ids(group)[None],
            rows=inputs.rows(group),
            routed=inputs.routed(group),
        )
        constant = policy.context_gradient == "detach" and not phase.loss_bearing
        with torch.no_grad() if constant else nullcontext():
            noise_MD = None if noise_TD is None else noise_TD[inputs.index(group)]
            hidden_MD = _decode(inputs.position(group), layout, state, this, noise_MD, casts)
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
    outside attention without a convolution by which they could be known (mixers.py). Such a model reads one chain at a
    time (`PackedSequence.alone`, prefix_sharing.py takes trees apart), as a server would.
    """
    sequence = inputs.sequence
    assert sequence.alone and len(set(sequence.subtree_end_T.tolist())) == 1, "one chain"
    decoder = decoder_of(model)
    this = DecoderPass(
        decoder,
        decoder.config._attn_implementation,
        num_checkpointed=num_checkpointed(model, policy),
        ids=inputs.ids()[None],
        rows=inputs.rows(),
        routed=inputs.routed(),
    )
    with state.running(this), noisy(decoder.get_input_embeddings(), state.noise_TD):
        output = decoder(input_ids=this.ids, use_cache=False)
    hidden_TD: Tensor = output.last_hidden_state[0]
    return hidden_TD


def _decode(
    position_M: Tensor,
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
        noisy(this.decoder.get_input_embeddings(), noise_MD),
    ):
        output = this.decoder(input_ids=this.ids, position_ids=position_M[None], use_cache=False, forest=layout)
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
