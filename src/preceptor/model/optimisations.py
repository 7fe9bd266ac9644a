"""Optimisations of a loaded model, each with a name, and the switch that turns all of them off.

They are installed once, on the model's own modules (activations/passes.py), and act only while the engine runs a pass:
generation and saving meet the model as its authors wrote it. Within decoder layers there is one mechanism, never two:

    compiled    torch.compile makes a few kernels of a layer, attention aside (compiled.py)
    efficient   norms, gated units and linear layers that keep less; on a GPU the formulas of the former are compiled
    auto        compiled on a GPU where nothing speaks against it, else efficient
    plain       no optimisation at all, there or elsewhere; the losses are the same
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from preceptor.data.forest import PackedSequence, Segment, Tree, pack_trees
from preceptor.errors import ModelError, is_out_of_memory
from preceptor.model.activations.inputs import SequenceInputs, split_by_loss
from preceptor.model.activations.layers import EngineLayer, PathMixer
from preceptor.model.activations.linear import FusedAdapter, SharedCastLinear, is_products_alone
from preceptor.model.activations.modules import (
    AccumulatingEmbedding,
    EfficientGLU,
    EfficientNorm,
    glu_activation,
    norm_form,
)
from preceptor.model.activations.passes import ModelState, adopt, decode_whole, release
from preceptor.model.attention.cuda import with_kernels_that_run
from preceptor.model.compiled import why_not
from preceptor.model.embeddings import KeptTokenRows
from preceptor.model.numerics import FAILURES, relative_error, rounding
from preceptor.model.parts import causal_lm, decoder_layers, decoder_of, device_of, evaluating, path_mixers
from preceptor.model.routers import unwatch_routers

Mode = Literal["auto", "compiled", "efficient", "plain"]


@dataclass(frozen=True)
class Optimisation:
    """find: the modules of a model that it changes, with the settings of each; a module is tried before it is one.

    mixin: the class whose `forward` comes before a module's own; None: the engine itself asks for the name.
    within: in which of two modes it changes layers; None: it is outside of them, and on in both. is_proved_first: on a
    GPU, by the preflight, which puts it on.
    """

    name: str
    mixin: type[nn.Module] | None = None
    find: Callable[[nn.Module], dict[nn.Module, Any]] = lambda model: {}
    within: Literal["compiled", "efficient"] | None = None
    is_proved_first: bool = False

    def install(self, model: nn.Module, state: ModelState) -> None:
        """Put it into the model where it applies to anything, and on the list of what is on."""
        if self.is_proved_first:
            return
        if self.mixin is not None:
            found = self.find(model)
            if not found:
                return
            for module, settings in found.items():
                adopt(module, self.mixin, state, settings)
        state.optimisations.add(self.name)

    def remove(self, model: nn.Module, state: ModelState) -> None:
        state.optimisations.discard(self.name)
        if self.mixin is not None:
            for module in causal_lm(model).modules():
                release(module, self.mixin)


def install(model: nn.Module, mode: Mode = "auto", check: bool = True) -> ModelState:
    """What is installed in a model: at the first call that which `mode` says, after adapters have been added.

    check: without it whatever needs a trial pass of the model is taken to be right (a model of fake tensors has none).
    """
    decoder = decoder_of(model)
    state: ModelState | None = decoder.__dict__.get("engine_model_state")
    if state is None:
        state = decoder.__dict__["engine_model_state"] = ModelState()
        layers = decoder_layers(model)
        for index, layer in enumerate(layers):
            adopt(layer, EngineLayer, state, (index, len(layers)))
        for name, module in decoder.named_modules():  # no sequence is padded: such a token is data, and learns
            if isinstance(module, nn.Embedding) and module.padding_idx is not None and "position" not in name:
                module.__dict__["engine_padding_idx"], module.padding_idx = module.padding_idx, None
        state.asked_to_compile = mode == "compiled"
        if mode == "auto":
            state.not_compiled = why_not(model, device_of(model))
            mode = "compiled" if state.not_compiled is None else "efficient"
        for optimisation in OPTIMISATIONS if mode != "plain" else ():
            if optimisation.within in (None, mode):
                optimisation.install(model, state)
        if check and state.optimisations:
            state.optimisations.discard("last_layer")  # until it is tried
            if last_layer_is_exact(model, state):
                state.optimisations.add("last_layer")
    return state


def give_up_compiling(model: nn.Module, state: ModelState, reason: str) -> None:
    """Let the layers be efficient instead of compiled. reason: for the record."""
    state.not_compiled = reason
    for optimisation in OPTIMISATIONS:
        if optimisation.within == "compiled":
            optimisation.remove(model, state)
        elif optimisation.within == "efficient":
            optimisation.install(model, state)


def remove(model: nn.Module) -> None:
    """The model as it was before `install`."""
    state: ModelState | None = decoder_of(model).__dict__.pop("engine_model_state", None)
    if state is not None:
        for optimisation in OPTIMISATIONS:
            optimisation.remove(model, state)
        unwatch_routers(model)
        for module in causal_lm(model).modules():
            if "engine_padding_idx" in module.__dict__:
                module.padding_idx = module.__dict__.pop("engine_padding_idx")
        for layer in decoder_layers(model):
            release(layer, EngineLayer)


def _norms(model: nn.Module) -> dict[nn.Module, Any]:
    return {module: form for module in decoder_of(model).modules() if (form := norm_form(module)) is not None}


def _gated_units(model: nn.Module) -> dict[nn.Module, Any]:
    return {module: pair for module in decoder_of(model).modules() if (pair := glu_activation(module)) is not None}


def _linear_layers(model: nn.Module) -> dict[nn.Module, Any]:
    linear = (module for module in decoder_of(model).modules() if isinstance(module, nn.Linear))
    return {module: None for module in linear if type(module).forward is nn.Linear.forward}


def _adapters(model: nn.Module) -> dict[nn.Module, Any]:
    """Others are left to peft."""
    adapted = (module for module in decoder_of(model).modules() if isinstance(module, LoraLinear))
    return {module: None for module in adapted if all(is_products_alone(module, name) for name in module.lora_A)}


def _token_rows(model: nn.Module) -> dict[nn.Module, Any]:
    return {module: {} for module in causal_lm(model).modules() if isinstance(module, TrainableTokensLayer)}


def _embedding(model: nn.Module) -> dict[nn.Module, Any]:
    layer = decoder_of(model).get_input_embeddings()
    return {layer: None} if isinstance(layer, nn.Embedding) and layer.max_norm is None else {}


def last_layer_is_exact(model: nn.Module, state: ModelState) -> bool:
    """Whether the last layer, run for loss-bearing tokens only, gives them the same states: on a few tokens.

    Not so where the layer takes more than what is laid out by token, or where what transformers calls a layer is not
    what runs last.
    """
    sequence = probe_sequence(model)
    split = split_by_loss(sequence)
    try:
        with torch.no_grad(), evaluating(model):
            true_TD = with_kernels_that_run(lambda: decode_whole(model, state, SequenceInputs.of(model, sequence)))
            found_MD = decode_whole(model, state, SequenceInputs.of(model, sequence, split=split))
    except (ModelError, *FAILURES) as error:
        if is_out_of_memory(error):
            raise
        return False  # whatever a layer does not support about fewer tokens: it then gets all of them
    dtype = next(causal_lm(model).parameters()).dtype
    return relative_error(found_MD, true_TD[split[1].index_T()]) <= rounding(dtype)


def probe_sequence(model: nn.Module) -> PackedSequence:
    """A two-turn conversation and a tree with a branch, of random tokens."""
    num_tokens = len(decoder_of(model).get_input_embeddings().weight)
    rng = np.random.default_rng(0)

    def segment(target: bool, length: int, parent: int | None) -> Segment:
        ids = tuple(rng.integers(num_tokens, size=length).tolist())
        return Segment("target" if target else "context", ids, parent)

    chain = [segment(place % 2 == 1, 12, place - 1 if place else None) for place in range(4)]
    tree = [segment(False, 9, None), segment(True, 7, 0), segment(False, 5, 0), segment(True, 8, 2)]
    return pack_trees([Tree("probe:1", tuple(chain)), Tree("probe:2", tuple(tree))])


OPTIMISATIONS = (
    Optimisation("attention"),  # run by run, or by fused kernels, without a dense mask
    Optimisation(
        "mixers", PathMixer, lambda model: dict.fromkeys(path_mixers(model))
    ),  # layers that carry a state from token to token, run by run
    Optimisation("compile", within="compiled"),  # decoder layers and loss, by torch.compile
    Optimisation("norms", EfficientNorm, _norms, within="efficient"),  # which keep their input alone
    Optimisation("glu", EfficientGLU, _gated_units, within="efficient"),  # which do not keep the gate's activation
    Optimisation("fused", within="efficient", is_proved_first=True),  # both, and the loss, compiled each by itself
    Optimisation("linear", SharedCastLinear, _linear_layers, within="efficient"),  # layers share half-precision copies
    Optimisation("adapters", FusedAdapter, _adapters),  # added to their layer's product in place
    Optimisation("token_rows", KeptTokenRows, _token_rows),  # of new tokens beside an adapter: found without a wait
    Optimisation("embedding_gradient", AccumulatingEmbedding, _embedding),  # in place
    Optimisation("head_gradient"),  # in place; the head's half-precision copy once a step
    Optimisation("last_layer"),  # for loss-bearing tokens only
)
