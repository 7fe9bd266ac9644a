"""Dry run of a training step: the engine's own passes on tensors without values, their bytes counted.

A model is built from its config alone (FakeTensorMode: shapes and types, no memory) and a packed sequence goes through
it forward and backward, under the run's policy, precision and adapter. So any model type that the engine takes has a
prediction, and what is predicted is what the engine does.

Layers repeat. A deep model is run twice, with a few layers and with one period more, and each stretch of the step (a
layer's forward or backward, the loss) is continued to the real depth: its bytes grow by the same amount per period.
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from preceptor import config
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
from preceptor.model.options import ActivationPolicy, LossOptions, Quantization
from preceptor.model.parts import (
    causal_lm,
    choose_trained,
    decoder_layers,
    decoder_of,
    freeze_towers,
    model_type,
    path_mixers,
)
from preceptor.model.quantization import quantize
from preceptor.model.routers import router_aux_coef
from preceptor.model.sizes import dry_run_for
from preceptor.plan.counting import count_built
from preceptor.plan.memory import EVERYTHING, Moment, Patterns, Setup
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
        self.num_rows = int(settings.get_text_config(decoder=True).vocab_size)
        model = self._whole = self._model(torch.float32, None, 0, self.num_rows, None)
        self.num_layers = len(decoder_layers(model))
        if not self.num_layers:
            raise ModelError(f"{model_type(model)}: does not say which of its modules are layers, so it has no dry run")
        self._depths = _Depths.of([_signature(layer) for layer in decoder_layers(model)])
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
            whole = self._model(torch.float32, None, 0, num_rows, None, choice)
            if adapter is None:
                found = count_built(whole, whole)
            else:
                short, long = (
                    count_built(whole, self._model(torch.float32, adapter, num_new_tokens, num_rows, depth))
                    for depth in self._two_depths(adapter)
                )
                found = short.continued(long, self._depths.times)
            self._parameters[key] = found
        return self._parameters[key]

    def _two_depths(self, adapter: LoraSpec | None) -> tuple[int, int]:
        """That stand for the whole; the whole itself where layers are adapted by name."""
        if adapter is not None and adapter.options.differs_by_layer:
            return self.num_layers, self.num_layers
        return self._depths.short, self._depths.long

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
            times = self._depths.times
            self._moments[key] = tuple(moment.continued(long[role], times) for role, moment in short.items())
        return self._moments[key]

    def _run(
        self, setup: Setup, policy: ActivationPolicy, sequence: PackedSequence, num_rows: int, depth: int
    ) -> dict[Role, Moment]:
        dtype = getattr(torch, setup.weights)
        bits = None if setup.quantization is None else (setup.quantization, setup.double_quantization)
        model = self._model(dtype, setup.adapter, setup.num_new_tokens, num_rows, depth, setup.choice, bits).train()
        base = None
        if setup.kl_to_base and setup.adapter is None:
            base = self._model(dtype, None, 0, num_rows, depth, copied=True).requires_grad_(False)
        with dry_run_for(setup.device_type):
            state = install(model, self._engine, check=False)
            try:
                return _passes(model, base, sequence, policy, setup, self._depths.side)
            except (ModelError, *FAILURES) as error:
                if "last_layer" not in state.optimisations:
                    if isinstance(error, ModelError):  # says itself what is wrong
                        raise
                    raise ModelError(f"{model_type(model)}: cannot run without values: {first_line(error)}") from error
        state.optimisations.discard("last_layer")  # such a layer may not take fewer tokens than there are
        return self._run(setup, policy, sequence, num_rows, depth)

    def _model(
        self,
        dtype: torch.dtype,
        adapter: LoraSpec | None,
        num_new_tokens: int,
        num_rows: int,
        depth: int | None,
        choice: Patterns = EVERYTHING,
        bits: tuple[Quantization, bool] | None = None,
        copied: bool = False,
    ) -> Any:
        """A model without values; depth: so many of its layers, None for all. bits: as `quantize` takes them.

        copied: not the model that is trained, but one beside it.
        """
        key = dtype, adapter, num_new_tokens, num_rows, depth, choice, bits, copied
        if key not in self._models:
            settings = copy.deepcopy(self._settings)
            text = settings.get_text_config(decoder=True)
            text.vocab_size = num_rows
            if depth is not None and depth != self.num_layers:
                _shorten(text, self.num_layers, depth)
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what transformers and peft have to say, they say of the real model
                model = self._build(settings, dtype=dtype)
                freeze_towers(model)
                choose_trained(model, *choice)
                if bits is not None:
                    quantize(model, *bits, device="meta")
                if adapter is not None:
                    new_ids = range(num_rows - num_new_tokens, num_rows)
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
            parameter.grad_dtype = torch.bfloat16 if setup.sequences_per_step == 1 else torch.float32  # type: ignore[attr-defined]
        dtype = parameter.grad_dtype  # type: ignore[attr-defined]
        parameter.grad = torch.empty_like(parameter, dtype=dtype) if setup.sequences_per_step > 1 else None
    layers = decoder_layers(model)
    penalty = None
    if setup.kl_to_base:
        num_rows = len(decoder_of(model).get_input_embeddings().weight)
        reference = ReferenceModel(base or model, base is not None, num_rows - setup.num_new_tokens)
        penalty = partial(_divergence, reference)
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


def _divergence(
    base: ReferenceModel, hidden_MD: Tensor, source_N: Tensor, head: Head, sequence: PackedSequence, divisor: float
) -> Tensor:
    return kl_to_base(hidden_MD, source_N, head, base, sequence) / divisor


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


@dataclass(frozen=True, slots=True)
class _Depths:
    """short, long: two numbers of layers, a period apart, that stand for `total`; equal to it where that spares little.

    side: layers at each end whose place counts from there.
    """

    short: int
    long: int
    total: int
    side: int

    @property
    def times(self) -> float:
        """How often the difference is to be added to the shorter one."""
        return (self.total - self.short) / (self.long - self.short) if self.long > self.short else 0.0

    @classmethod
    def of(cls, signatures: list[Any]) -> "_Depths":
        total = len(signatures)
        for period in range(1, total):
            first = next((i for i in range(total) if signatures[i : total - period] == signatures[i + period :]), total)
            side = max(first, 1) + period
            short = 2 * side + (total - 2 * side) % period
            if 2 * short + period < total:
                return cls(short, short + period, total, side)
        return cls(total, total, total, total)


def _shorten(text: Any, total: int, depth: int) -> None:
    """A config of fewer layers: what is listed by layer is cut."""
    text.num_hidden_layers = depth
    for name, value in vars(text).items():
        if isinstance(value, list | tuple) and len(value) == total:
            setattr(text, name, value[:depth])
