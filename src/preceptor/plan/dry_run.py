"""Dry run of a training step: the engine's own passes on tensors without values, their bytes counted.

A model is built from its config alone (FakeTensorMode: shapes and types, no memory) and a packed sequence goes through
it forward and backward, under the run's policy, precision and adapter. So any model type that the engine takes has a
prediction, and what is predicted is what the engine does.

Layers repeat. A deep model is run twice, with a few layers and with one period more, and each stretch of the step (a
layer's forward or backward, the loss) is continued to the real depth: its bytes grow by the same amount per period.
"""

import copy
import warnings
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from preceptor import config
from preceptor.chat.format import learned_positions
from preceptor.data.forest import PackedSequence
from preceptor.errors import ModelError, first_line
from preceptor.hub import cannot_load, resolve_model_path
from preceptor.model.activations.passes import StepContext
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.forward import Engine
from preceptor.model.kl import ReferenceModel, kl_to_base
from preceptor.model.load import auto_class
from preceptor.model.loss.linear_cross_entropy import Head, HeadCast
from preceptor.model.numerics import FAILURES
from preceptor.model.optimisations import Mode, install
from preceptor.model.options import ActivationPolicy, LossOptions
from preceptor.model.parts import (
    causal_lm,
    choose_trained,
    decoder_layers,
    decoder_of,
    freeze_towers,
    model_type,
    path_mixers,
    require_factors_fit,
    require_stop_token_learned,
)
from preceptor.model.quantization import quantize
from preceptor.model.routers import router_aux_coef
from preceptor.model.sizes import dry_run_for
from preceptor.plan.counting import count_built
from preceptor.plan.memory import EVERYTHING, HALF, Moment, Patterns, Setup
from preceptor.plan.parameters import LoraSpec, Parameters
from preceptor.plan.timeline import Role, Timeline

Build = Callable[..., Any]
"""(config, dtype=...) -> a model of that config."""


_MIXING_LAYERS = {"linear_attention", "conv", "mamba", "hybrid", "recurrent"}


def dry_run_of(model: config.Model, engine: Mode = "auto") -> "DryRun":
    """Of a run's model, from its config alone. Raises ModelError for what is no causal language model."""
    place = resolve_model_path(model.place)
    source = {"trust_remote_code": model.trust_remote_code, "revision": model.revision or "main"}
    try:
        found = AutoConfig.from_pretrained(place, **source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise cannot_load(place, "config", error) from error
    return DryRun(
        found, partial(auto_class(place, found).from_config, trust_remote_code=model.trust_remote_code), engine
    )


def dry_run_like(model: nn.Module, engine: Mode = "auto") -> "DryRun":
    """Of a model that is there."""
    bare = causal_lm(model)
    return DryRun(bare.config, type(bare)._from_config, engine)


class DryRun:
    """One architecture: how many parameters it has, and what a step of it takes. What was found is kept."""

    def __init__(self, settings: Any, build: Build, engine: Mode = "auto") -> None:
        """settings: a transformers config. build: makes a model of it."""
        self._settings, self._build = settings, build
        self._engine: Mode = "efficient" if engine == "compiled" else engine  # nothing is compiled without values
        self._moments: dict[Any, tuple[Moment, ...]] = {}
        self._parameters: dict[Any, Parameters] = {}
        self._models: dict[Any, Any] = {}
        self.num_positions = learned_positions(settings)
        self.num_rows = int(settings.get_text_config(decoder=True).vocab_size)
        model = self._model(Setup(), self.num_rows)
        self.num_layers = len(decoder_layers(model))
        if not self.num_layers:
            raise ModelError(f"{model_type(model)}: does not say which of its modules are layers, so it has no dry run")
        self._short, self._long, self._side = _depths_of([_signature(layer) for layer in decoder_layers(model)])
        more = self._long - self._short
        self._times = (self.num_layers - self._short) / more if more else 0.0  # that `more` layers are to be added
        keeps_apart = engine != "plain" and path_mixers(model)
        self.reads_alone = not keeps_apart and _mixes_outside_attention(causal_lm(model))

    # Parameters -------------------------------------------------------------------------------------------------------

    def parameters(
        self, adapter: LoraSpec | None = None, num_new_tokens: int = 0, num_rows: int = 0, choice: Patterns = EVERYTHING
    ) -> Parameters:
        """Raises ModelError for an adapter target that the model has not, and as `choose_trained`."""
        num_rows = num_rows or self.num_rows
        key = adapter, num_new_tokens, num_rows, choice
        if key not in self._parameters:
            whole = self._model(Setup(choice=choice), num_rows)
            if adapter is None:
                found = count_built(whole, whole)
            else:
                adapted = Setup(adapter=adapter, num_new_tokens=num_new_tokens)
                short, long = (
                    count_built(whole, self._model(adapted, num_rows, depth)) for depth in self._two_depths(adapter)
                )
                found = short.continued(long, self._times)
            self._parameters[key] = found
        return self._parameters[key]

    def require_trainable(
        self, setup: Setup, num_rows: int, new_stop_token: str | None, patterns: Collection[str]
    ) -> None:
        """Raises ModelError for what training refuses: a new stop token whose row is frozen, and a pattern of
        `optimizer.lr_factors` that fits nothing that is trained.
        """
        if new_stop_token is not None and setup.choice != EVERYTHING:
            chosen = self._model(Setup(choice=setup.choice), num_rows)
            require_stop_token_learned(chosen, new_stop_token, "freeze" if setup.choice[0] else "train_only")
        if patterns:
            own = Setup(adapter=setup.adapter, num_new_tokens=setup.num_new_tokens, choice=setup.choice)
            model = self._model(own, num_rows)
            names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            require_factors_fit(patterns, names)

    def _two_depths(self, adapter: LoraSpec | None) -> tuple[int, int]:
        """That stand for the whole; the whole itself where layers are adapted by name."""
        if adapter is not None and adapter.options.differs_by_layer:
            return self.num_layers, self.num_layers
        return self._short, self._long

    # Steps ------------------------------------------------------------------------------------------------------------

    def step(
        self, setup: Setup, policy: ActivationPolicy, sequence: PackedSequence, num_rows: int
    ) -> tuple[Moment, ...]:
        """Every stretch of a sequence's forward and backward pass. num_rows: of the embedding.

        Of the sequence, its lengths alone count. Raises ModelError where the model cannot run without values.
        """
        setup = replace(setup, sequences_per_step=min(2, setup.sequences_per_step))
        laid_out = sequence.subtree_end_T.tobytes(), sequence.source_N.tobytes(), sequence.alone
        key = setup, policy, num_rows, laid_out
        if key not in self._moments:
            alike = policy.checkpointed_layers(self.num_layers) in (0, self.num_layers)
            alike = alike and setup.choice == EVERYTHING
            depth, more = self._two_depths(setup.adapter) if alike else (self.num_layers, self.num_layers)
            short = long = self._run(setup, policy, sequence, num_rows, depth)
            if depth < more:
                long = self._run(setup, policy, sequence, num_rows, more)
            self._moments[key] = tuple(moment.continued(long[role], self._times) for role, moment in short.items())
        return self._moments[key]

    def _run(
        self, setup: Setup, policy: ActivationPolicy, sequence: PackedSequence, num_rows: int, depth: int
    ) -> dict[Role, Moment]:
        model, base = self._model(setup, num_rows, depth).train(), None
        if setup.kl_to_base and setup.adapter is None:
            base = self._model(Setup(setup.weights), num_rows, depth, copied=True).requires_grad_(False)
        with dry_run_for(setup.device_type):
            state = install(model, self._engine, check=False)
            try:
                return _passes(model, base, sequence, policy, setup, self._side)
            except (ModelError, *FAILURES) as error:
                if "last_layer" not in state.optimisations:
                    if isinstance(error, ModelError):  # says itself what is wrong
                        raise
                    raise ModelError(f"{model_type(model)}: cannot run without values: {first_line(error)}") from error
        state.optimisations.discard("last_layer")  # such a layer may not take fewer tokens than there are
        return self._run(setup, policy, sequence, num_rows, depth)

    def _model(self, setup: Setup, num_rows: int, depth: int | None = None, copied: bool = False) -> Any:
        """A model without values, held and trained as in a setup; depth: so many of its layers, None for all.

        copied: not the model that is trained, but one beside it.
        """
        bits = setup.quantization, setup.double_quantization
        key = setup.weights, setup.adapter, setup.num_new_tokens, setup.choice, bits, num_rows, depth, copied
        if key not in self._models:
            settings = copy.deepcopy(self._settings)
            text = settings.get_text_config(decoder=True)
            text.vocab_size = num_rows
            if depth is not None and depth != self.num_layers:
                _shorten(text, self.num_layers, depth)
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what transformers and peft have to say, they say of the real model
                model = self._build(settings, dtype=getattr(torch, setup.weights))
                freeze_towers(model)
                choose_trained(model, *setup.choice)
                if setup.quantization is not None:
                    quantize(model, setup.quantization, setup.double_quantization, device="meta")
                if (adapter := setup.adapter) is not None:
                    new_ids = range(num_rows - setup.num_new_tokens, num_rows)
                    own = (adapter.rank, adapter.rank, adapter.dropout, adapter.targets, new_ids)
                    options = replace(adapter.options, alpha_pattern=())  # costs nothing, and may name a layer cut off
                    model = add_adapter(model, *own, seed=0, options=options)
            _put_on_fake_cpu(model)
            self._models[key] = model
        return self._models[key]


def _put_on_fake_cpu(model: nn.Module) -> None:
    """From the meta device, where there is neither autocast nor fused attention, to a CPU without memory."""
    made: dict[int, Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
                        parameter = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if parameter else fake
                    own[name] = made[id(tensor)]  # type: ignore[assignment]


def _passes(
    model: Any, base: Any, sequence: PackedSequence, policy: ActivationPolicy, setup: Setup, side: int
) -> dict[Role, Moment]:
    """Forward, loss and backward of a model that exists in full. base: its copy for the divergence, or None."""
    engine = Engine(model)
    options = LossOptions(router_aux_coef=router_aux_coef(setup.router_aux_coef, causal_lm(model).config))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mode: Any = next(iter(trained)).fake_mode
    for parameter in trained:
        if parameter.dtype == torch.bfloat16:
            own = torch.bfloat16 if setup.gradient_bytes == HALF else torch.float32
            parameter.grad_dtype = own  # type: ignore[attr-defined]
        dtype = parameter.grad_dtype  # type: ignore[attr-defined]
        parameter.grad = torch.empty_like(parameter, dtype=dtype) if setup.sequences_per_step > 1 else None
    layers = decoder_layers(model)
    penalty: Any = None
    if setup.kl_to_base:
        num_rows = len(decoder_of(model).get_input_embeddings().weight)
        reference = ReferenceModel(base or model, base is not None, num_rows - setup.num_new_tokens)

        def penalty(hidden_MD: Tensor, source_N: Tensor, head: Head, own: PackedSequence, divisor: float) -> Tensor:
            return kl_to_base(hidden_MD, source_N, head, reference, own) / divisor

    timeline = Timeline([model] if base is None else [model, base], trained, len(layers), side)
    hooks = [hook for index, layer in enumerate(layers) for hook in timeline.watch(layer, index)]
    step = StepContext(accumulates=True, head_cast=HeadCast())
    half = torch.autocast("cpu", dtype=torch.bfloat16) if setup.autocast else nullcontext()
    try:
        with mode, timeline:
            with half:
                loss = engine(sequence, policy, options, step, penalty)
            timeline.mark("backward pass", ("backward",))
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
    return timeline.moments()


def _mixes_outside_attention(model: Any) -> bool:
    """Whether tokens meet outside attention, as far as its config says; preflight proves it."""
    layer_types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    return bool(getattr(model, "_is_stateful", False)) or not _MIXING_LAYERS.isdisjoint(layer_types)


# Depths --------------------------------------------------------------------------------------------------------------


def _signature(layer: nn.Module) -> Any:
    """What makes two layers alike: their parameters' names and sizes, and how far their attention looks."""
    sizes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
    settings = tuple(
        str(getattr(module, name))
        for module in layer.modules()
        for name in ("sliding_window", "attention_type", "layer_type", "is_sliding")
        if hasattr(module, name)
    )
    return sizes, settings


def _depths_of(signatures: list[Any]) -> tuple[int, int, int]:
    """Two numbers of layers, a period apart, that stand for all of them (equal to that where it spares little); and how
    many layers at each end have a place that counts from there.
    """
    total = len(signatures)
    for period in range(1, total):
        first = next((i for i in range(total) if signatures[i : total - period] == signatures[i + period :]), total)
        side = max(first, 1) + period
        short = 2 * side + (total - 2 * side) % period
        if 2 * short + period < total:
            return short, short + period, side
    return total, total, total


def _shorten(text: Any, total: int, depth: int) -> None:
    """A config of fewer layers: what is listed by layer is cut."""
    text.num_hidden_layers = depth
    for name, value in vars(text).items():
        if isinstance(value, list | tuple) and len(value) == total:
            setattr(text, name, value[:depth])
