"""Bytes of a training run, by component, and the moment at which they are most.

    always               weights, optimizer state                               arithmetic, no torch
    + gradients          of what is trained, until the optimizer has used them  arithmetic, no torch
    + one sequence       activations, copies of weights, the loss               a dry run (dry_run.py)

AdamW with float32 weights: 4 (weights) + 4 (gradients) + 4 + 4 (two means) = 16 bytes per parameter, and under autocast
2 more for copies while a sequence is computed. With bfloat16 weights: 2 + 2 + 2 (their other half) + 8 = 14, and with
states of 8 bits 8.1; a step of several sequences sums their gradients in float32, which is 2 more.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

from preceptor.model.options import Quantization
from preceptor.plan.parameters import LoraSpec, Parameters

Weights = Literal["float32", "bfloat16"]

STATES = ("weights", "gradients", "optimizer")
BASE = "copy of the base"
FLOAT32, HALF = 4, 2  # bytes of an element
LOW = 2  # bytes below a bfloat16 weight that `optimizer.rounding: exact` keeps
BLOCK = 128  # elements of a row with one scale, in states of 8 bits

_RULE_BYTES = {"adamw": 0, "adamw_8bit": 38, "muon": 8, "adafactor": 4, "sgd": 4}
_ROUNDING_BYTES = {None: 0, "nearest": 0, "stochastic": 12, "exact": 8}

OptimizerName = Literal["adamw", "adamw_8bit", "muon", "adafactor", "sgd"]


def chunk_of(device_type: str) -> int:
    """Elements at a time where each is updated on its own: of a cache's size, on a GPU enough for few launches."""
    return 1 << 20 if device_type == "cpu" else 1 << 24


def rule_of(optimizer: OptimizerName, shape: tuple[int, ...], in_layer: bool) -> str:
    """How one weight is updated: muon is for the matrices of the layers, 8 bits for matrices, adamw for the rest.

    in_layer: it is one of the layers, and no stack of several experts' matrices under LoRA.
    """
    matrix = len(shape) == 2 and in_layer if optimizer == "muon" else len(shape) >= 2
    return "adamw" if optimizer in ("muon", "adamw_8bit") and not matrix else optimizer


def state_tensors(rule: str, shape: tuple[int, ...], momentum: float | None = None) -> tuple[int, ...]:
    """Bytes of each tensor in the state of one weight under a rule: adamw has two means, muon and sgd one, adafactor
    those of rows and columns. Without momentum sgd has none.
    """
    count = math.prod(shape)
    if rule == "sgd" and momentum == 0:
        return ()
    if len(shape) < 2:
        return (FLOAT32 * count,) * (1 if rule in ("adafactor", "sgd") else 2)
    rows = count // max(1, shape[-1])
    if rule == "adamw_8bit":
        return (count, FLOAT32 * rows * -(-shape[-1] // BLOCK)) * 2
    if rule == "adafactor":
        return FLOAT32 * rows, FLOAT32 * (count // max(1, shape[-2]))
    return (FLOAT32 * count,) * (2 if rule == "adamw" else 1)


def quantized_bytes(kind: Quantization, double: bool, shape: tuple[int, ...]) -> int:
    """Of one linear layer's weight (model/quantization.py): its bits, scales and tables."""
    count = math.prod(shape)
    if kind == "int8":
        return count + FLOAT32 * shape[0]
    scales = -(-count // 64)
    if not double:
        return -(-count // 2) + FLOAT32 * scales
    return -(-count // 2) + scales + FLOAT32 * (-(-scales // 256) + 256 + 1)


Patterns = tuple[tuple[str, ...], tuple[str, ...]]  # `model.freeze` and `model.train_only`
EVERYTHING: Patterns = ((), ())


@dataclass(frozen=True, slots=True)
class Setup:
    """How a model is held and trained. autocast: matrix products in bfloat16 (`train.precision`).

    rounding: of trained bfloat16 weights (`optimizer.rounding`). offload: optimizer states are in the host's memory.
    sequences_per_step: of one process. wide_gradients: those of bfloat16 weights are float32, also where a process has
    but one of a step's. router_aux_coef: as in the run file. kl_to_base: the base runs as well (`loss.kl_coef`); in
    full fine-tuning it is a copy of its own. momentum: of muon and sgd; None: some.
    """

    weights: Weights = "float32"
    autocast: bool = False
    adapter: LoraSpec | None = None
    num_new_tokens: int = 0
    sequences_per_step: int = 1
    device_type: str = "cpu"
    optimizer: OptimizerName = "adamw"
    rounding: str | None = None
    choice: Patterns = EVERYTHING
    quantization: Quantization | None = None
    double_quantization: bool = False
    offload: bool = False
    router_aux_coef: float | None = None
    kl_to_base: bool = False
    wide_gradients: bool = False
    momentum: float | None = None

    @property
    def weight_bytes(self) -> int:
        """Of an element that goes into a matrix product or a norm."""
        return FLOAT32 if self.weights == "float32" else HALF

    @property
    def half_trained(self) -> bool:
        """Whether trained weights are bfloat16: what an adapter trains is float32 beside a frozen base."""
        return self.weights == "bfloat16" and self.adapter is None

    @property
    def gradient_bytes(self) -> int:
        """Of an element of `.grad`; gradients of several sequences are summed in float32."""
        several = self.wide_gradients or self.sequences_per_step > 1
        return HALF if self.half_trained and not several else FLOAT32


@dataclass(frozen=True, slots=True)
class Moment:
    """The most bytes during a stretch of the step, beside the weights.

    Of these, gradient_bytes are gradients that were there when it began, and cast_bytes half-precision copies of
    weights. start_bytes: when it began, copies included.
    """

    name: str
    peak_bytes: int
    start_bytes: int
    gradient_bytes: int
    cast_bytes: int

    def continued(self, other: "Moment", times: float) -> "Moment":
        """This one and `times` the difference that `other` makes to it."""
        pairs = zip(astuple(self)[1:], astuple(other)[1:], strict=True)
        return Moment(self.name, *(round(own + times * (its - own)) for own, its in pairs))


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes. `components` in the order in which they are shown; peak_bytes: the most at one time."""

    components: Mapping[str, int]
    peak_bytes: int
    moment: str


def state_bytes(setup: Setup, parameters: Parameters) -> dict[str, int]:
    """What lasts from step to step on the device, and gradients."""
    trained = parameters.num_trained
    weights = setup.weight_bytes * parameters.num_base
    if setup.quantization is not None:
        for shape, count in parameters.linears.items():
            quantized = quantized_bytes(setup.quantization, setup.double_quantization, shape)
            weights += count * (quantized - setup.weight_bytes * math.prod(shape))
    if setup.adapter is not None:
        weights += FLOAT32 * trained
    states = {
        "weights": weights,
        "gradients": setup.gradient_bytes * trained,
        "optimizer": 0 if setup.offload else _optimizer_bytes(setup, parameters),
    }
    return {**states, BASE: weights} if setup.kl_to_base and setup.adapter is None else states


def lasting_bytes(setup: Setup, parameters: Parameters) -> int:
    """What is there at every moment: `state_bytes` but for gradients."""
    return sum(count for name, count in state_bytes(setup, parameters).items() if name != "gradients")


def host_bytes(setup: Setup, parameters: Parameters) -> int:
    """Of optimizer states that are not on the device."""
    return _optimizer_bytes(setup, parameters) if setup.offload else 0


def _optimizer_bytes(setup: Setup, parameters: Parameters) -> int:
    tensors = parameters.tensors.items()
    return sum(count * _weight_state_bytes(setup, shape, in_layer) for (in_layer, shape), count in tensors)


def _weight_state_bytes(setup: Setup, shape: tuple[int, ...], in_layer: bool) -> int:
    low = LOW * math.prod(shape) if setup.half_trained and setup.rounding == "exact" else 0
    return sum(state_tensors(rule_of(setup.optimizer, shape, in_layer), shape, setup.momentum)) + low


def update_bytes(setup: Setup, parameters: Parameters) -> int:
    """The most that an update of one weight takes beside states and gradients.

    A bfloat16 weight and its gradient are widened; what a rule computes, with weight decay, is added. Fused AdamW
    needs none. States in the host's memory are on the device while their weight is updated.
    """
    most = 0
    for in_layer, shape in parameters.tensors:
        states = _weight_state_bytes(setup, shape, in_layer) if setup.offload else 0
        rule, half = rule_of(setup.optimizer, shape, in_layer), setup.half_trained
        narrow = half and setup.gradient_bytes == HALF
        own = weight_update_bytes(rule, shape, setup.device_type, half, narrow, setup.rounding)
        most = max(most, states + own)
    return most


def weight_update_bytes(
    rule: str, shape: tuple[int, ...], device_type: str, half: bool, narrow_gradient: bool, rounding: str | None
) -> int:
    """Beside state and gradient of one weight, while it is updated. half: it is bfloat16; so may its gradient be."""
    count = math.prod(shape)
    wide = FLOAT32 * count * (1 + narrow_gradient) if half else 0
    part = min(count, chunk_of(device_type))
    between = _RULE_BYTES[rule] * (part if rule == "adamw_8bit" else count)
    between += FLOAT32 * min(shape) ** 2 if rule == "muon" else 0  # its Gram matrices
    after = _ROUNDING_BYTES[rounding] * part if half else 0
    return wide + max(between, after)


def step_memory(setup: Setup, parameters: Parameters, moments: Sequence[Moment]) -> StepMemory:
    """The states and what a dry run found of a step."""
    states = state_bytes(setup, parameters)
    lasting = lasting_bytes(setup, parameters)
    highest = max(moments, key=lambda moment: moment.peak_bytes)
    loss = [moment for moment in moments if moment.name == "loss"][-1]
    components = {
        **states,
        "activations": loss.start_bytes - loss.gradient_bytes - loss.cast_bytes,
        "copies of weights": loss.cast_bytes,
        "loss": loss.peak_bytes - loss.start_bytes,
    }
    update = states["gradients"] + update_bytes(setup, parameters)
    peak, moment = max((lasting + highest.peak_bytes, highest.name), (lasting + update, "optimizer step"))
    return StepMemory(components, peak, moment)
