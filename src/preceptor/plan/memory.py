"""Bytes of a training run on one rank, by component, and the moment at which they are most.

    always               weights, float32 master weights, optimizer state      arithmetic, no torch
    + gradients          of what is trained, until the optimizer has used them  arithmetic, no torch
    + one sequence       activations, copies of weights, the loss               a dry run (dry_run.py)
    + communication      of FSDP2: what a rank gathers of others' shards        arithmetic

Sharded over W ranks (FSDP2, full shard), each rank holds 1/W of weights, master weights, optimizer state and gradients,
and gathers one layer at a time, and the next one ahead of it.

    AdamW in mixed precision: 2 (weights) + 2 (gradients) + 4 (master) + 4 + 4 (two means) = 16 bytes per parameter;
    with float32 weights under autocast 4 + 4 + 4 + 4 = 16 too, and 2 more for copies while a sequence is computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from preceptor.plan.parameters import LoraSpec, Parameters

Weights = Literal["float32", "bfloat16", "bfloat16 + float32 master", "4 bits"]

STATES = ("weights", "gradients", "master weights", "optimizer")
FLOAT32, HALF = 4, 2  # bytes of an element
# 4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023): half a byte, and for each block of 64 an
# 8-bit constant, for each 256 of those a float32: 8/64 + 32/(64 * 256) bits.
BYTES_OF_4_BITS = (4 + 8 / 64 + 32 / (64 * 256)) / 8
ADAM_BYTES = 2 * FLOAT32
"""Optimizer state of a parameter: two means."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How a model is held and trained. autocast: matrix products in bfloat16 (`train.precision`)."""

    weights: Weights = "float32"
    autocast: bool = False
    adapter: LoraSpec | None = None
    num_new_tokens: int = 0
    world_size: int = 1
    sequences_per_step: int = 1
    device_type: str = "cpu"

    @property
    def weight_bytes(self) -> int:
        """Of an element that goes into a matrix product or a norm."""
        return FLOAT32 if self.weights == "float32" else HALF


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
        numbers = ("peak_bytes", "start_bytes", "gradient_bytes", "cast_bytes")
        changed = (round(getattr(self, n) + times * (getattr(other, n) - getattr(self, n))) for n in numbers)
        return Moment(self.name, *changed)


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes on one rank. `components` in the order in which they are shown; peak_bytes: the most at one time."""

    components: Mapping[str, int]
    peak_bytes: int
    moment: str


def state_bytes(setup: Setup, parameters: Parameters) -> dict[str, int]:
    """What lasts from step to step, and gradients: of one rank's share, each tensor rounded up by at most a rank."""
    trained = parameters.num_trained
    if setup.adapter is not None:  # what is trained is float32 beside a frozen base
        weights = _base_bytes(setup, parameters) + FLOAT32 * trained
        states = {"weights": weights, "gradients": FLOAT32 * trained, "master weights": 0}
    else:
        master = FLOAT32 * trained if setup.weights == "bfloat16 + float32 master" else 0
        states = {"weights": setup.weight_bytes * parameters.num_base, "gradients": setup.weight_bytes * trained}
        states["master weights"] = master
    states["optimizer"] = ADAM_BYTES * trained
    return {name: -(-count // setup.world_size) for name, count in states.items()}


def _base_bytes(setup: Setup, parameters: Parameters) -> int:
    """The frozen base. In 4 bits only the linear layers are: embedding, head, norms and experts stay bfloat16."""
    if setup.weights != "4 bits":
        return setup.weight_bytes * parameters.num_base
    matrices = sum(layer.linear for layer in parameters.layers)
    return round(BYTES_OF_4_BITS * matrices) + HALF * (parameters.num_base - matrices)


def step_memory(setup: Setup, parameters: Parameters, moments: Sequence[Moment]) -> StepMemory:
    """The states and what a dry run found of a step."""
    states = state_bytes(setup, parameters)
    communication = communication_bytes(setup, parameters)
    lasting = states["weights"] + states["master weights"] + states["optimizer"] + communication
    at = {moment: lasting + _beside(moment, setup.world_size) for moment in moments}
    highest = max(moments, key=lambda moment: at[moment])
    loss = [moment for moment in moments if moment.name == "loss"][-1]
    copies = loss.cast_bytes if setup.world_size == 1 else 0
    components = {
        **states,
        "communication": communication,
        "activations": loss.start_bytes - loss.gradient_bytes - loss.cast_bytes,
        "copies of weights": copies,
        "loss": loss.peak_bytes - loss.start_bytes,
    }
    peak, moment = max((at[highest], highest.name), (lasting + states["gradients"], "optimizer step"))
    return StepMemory(components, peak, moment)


def _beside(moment: Moment, world_size: int) -> int:
    """Beside the lasting states. Sharded, gradients are too, and what is gathered takes the place of copies."""
    if world_size == 1:
        return moment.peak_bytes
    return moment.peak_bytes - moment.cast_bytes - moment.gradient_bytes + -(-moment.gradient_bytes // world_size)


def communication_bytes(setup: Setup, parameters: Parameters) -> int:
    """FSDP2's buffers: two whole layers gathered, what is outside the layers for the whole pass, one layer's gradients.

    In the type of the products, as a mixed-precision policy has them gathered.
    """
    if setup.world_size == 1:
        return 0
    gathered = HALF if setup.autocast or setup.weights != "float32" else FLOAT32
    each = BYTES_OF_4_BITS if setup.weights == "4 bits" else gathered
    reduced = FLOAT32 * max(parameters.trained_layer, parameters.outside_trained)
    return 2 * round(parameters.largest_layer * each) + parameters.outside * gathered + reduced
