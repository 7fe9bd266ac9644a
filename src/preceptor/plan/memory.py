"""Bytes of a training run on one rank, by component, from shapes alone; and the moment at which they are most.

    always               weights, float32 master weights, optimizer state
    + gradients          of what is trained, until the optimizer has used them
    + one row            activations, autocast's copies of the weights, the loss's chunk and gradients
    + communication      of FSDP2: what a rank gathers of others' shards

A step is at its peak at one of three moments: in the loss of a row, with all of its activations; in its backward pass,
when a layer is computed again; or in the optimizer's step, when there are no activations. Sharded over W ranks (FSDP2,
full shard), each rank holds 1/W of weights, master weights, optimizer state and gradients, and gathers one layer at a
time, and the next one ahead of it.

    AdamW in mixed precision: 2 (weights) + 2 (gradients) + 4 (master) + 4 + 4 (two means) = 16 bytes a parameter; with
    float32 weights under autocast 4 + 4 + 4 + 4 = 16 as well, and 2 more for the copies while a row is computed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from preceptor.model.loss.options import chunk_tokens
from preceptor.plan.activations import Activations, Work, kept_for_backward
from preceptor.plan.parameters import Adapter, Parameters, count_parameters
from preceptor.plan.saved import FLOAT32, HALF, Precision
from preceptor.plan.shapes import Shape

Weights = Literal["float32", "bfloat16", "bfloat16 + float32 master", "4 bits"]

# 4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023): half a byte, and for each block of 64 an
# 8-bit constant, for each 256 of those a float32: 8/64 + 32/(64 * 256) bits.
BYTES_OF_4_BITS = (4 + 8 / 64 + 32 / (64 * 256)) / 8
_ADAM = 2 * FLOAT32


@dataclass(frozen=True, slots=True)
class Setup:
    """How a model is held and trained. autocast: matrix products in bfloat16 (`train.precision`)."""

    weights: Weights = "float32"
    autocast: bool = False
    adapter: Adapter | None = None
    num_new_tokens: int = 0
    world_size: int = 1
    rows_per_step: int = 1
    cpu: bool = False

    @property
    def weight_bytes(self) -> int:
        """Of an element that goes into a matrix product or a norm."""
        return FLOAT32 if self.weights == "float32" else HALF

    @property
    def precision(self) -> Precision:
        return Precision(self.weight_bytes, self.autocast)

    @property
    def token_rows(self) -> bool:
        return self.adapter is not None and self.num_new_tokens > 0


@dataclass(frozen=True, slots=True)
class PredictedMemory:
    """Bytes on one rank. `components` in the order in which they are shown; peak_bytes: the most at one time."""

    components: Mapping[str, int]
    peak_bytes: int
    moment: str


def predict_memory(shape: Shape, work: Work, setup: Setup, parameters: Parameters | None = None) -> PredictedMemory:
    """Weights, gradients and optimizer exactly; the rest from what each operation keeps (activations.py)."""
    parameters = parameters or count_parameters(shape, setup.adapter, setup.num_new_tokens)
    states = state_bytes(shape, setup, parameters)
    activations = kept_for_backward(shape, work, setup.precision, setup.adapter, setup.token_rows, setup.cpu)
    loss = _loss_bytes(shape, work, setup)
    row = {
        "activations": activations.kept_bytes,
        "computed again": activations.again_bytes,
        "casts of weights": _casts_in_flight(setup, activations),
        "loss": sum(loss.values()),
    }
    communication = communication_bytes(setup, parameters)
    lasting = states["weights"] + states["master weights"] + states["optimizer"] + communication
    # With one row a step the gradients come as the activations go; of the next rows, both are there at once.
    earlier = states["gradients"] if setup.rows_per_step > 1 else 0
    kept = earlier + row["activations"] + row["casts of weights"]
    moments = {
        "a row's loss": lasting + kept + row["loss"],
        "a row's backward pass": lasting
        + activations.scratch_bytes
        + max(
            kept + row["computed again"] + loss["hidden states and gradient"] + loss["gradient of the head"],
            activations.later_bytes + row["casts of weights"] + states["gradients"],
        ),
        "the optimizer's step": lasting + states["gradients"],
    }
    moment = max(moments, key=lambda name: moments[name])
    return PredictedMemory(
        components={**states, "communication": communication, **row},
        peak_bytes=moments[moment],
        moment=moment,
    )


def state_bytes(shape: Shape, setup: Setup, parameters: Parameters) -> dict[str, int]:
    """What lasts from step to step, and gradients: of one rank's share, each tensor rounded up by at most a rank."""
    trained = parameters.num_trained
    if setup.adapter is not None:  # what is trained is float32 beside a frozen base
        weights = base_bytes(shape, setup, parameters) + FLOAT32 * trained
        states = {"weights": weights, "gradients": FLOAT32 * trained, "master weights": 0}
    else:
        master = FLOAT32 * trained if setup.weights == "bfloat16 + float32 master" else 0
        states = {"weights": setup.weight_bytes * parameters.num_base, "gradients": setup.weight_bytes * trained}
        states["master weights"] = master
    states["optimizer"] = _ADAM * trained
    return {name: -(-count // setup.world_size) for name, count in states.items()}


def base_bytes(shape: Shape, setup: Setup, parameters: Parameters) -> int:
    """The frozen base. In 4 bits only the linear layers are: embedding, head, norms and experts stay bfloat16."""
    if setup.weights != "4 bits":
        return setup.weight_bytes * parameters.num_base
    matrices = sum(linear.inputs * linear.outputs for linear in shape.linears())
    return round(BYTES_OF_4_BITS * matrices) + HALF * (parameters.num_base - matrices)


def communication_bytes(setup: Setup, parameters: Parameters) -> int:
    """FSDP2's buffers: two whole layers gathered, what is outside the layers for the whole pass, one layer's gradients.

    In the type of the products, as a mixed-precision policy has them gathered.
    """
    if setup.world_size == 1:
        return 0
    gathered = HALF if setup.autocast or setup.weights != "float32" else FLOAT32
    if setup.weights == "4 bits":
        layer = round(parameters.largest_layer * BYTES_OF_4_BITS)
    else:
        layer = parameters.largest_layer * gathered
    reduced = FLOAT32 * max(parameters.largest_trained_layer, parameters.outside_trained)
    return 2 * layer + parameters.outside * gathered + reduced


def _casts_in_flight(setup: Setup, activations: Activations) -> int:
    """Autocast's copies of float32 weights; sharded, only gathered layers have them, and are counted as such."""
    return activations.casts_bytes if setup.world_size == 1 else 0


def _loss_bytes(shape: Shape, work: Work, setup: Setup) -> dict[str, int]:
    """What the loss holds at once: a chunk's logits, hidden states and their gradient, the head's copy and gradient."""
    product_bytes = setup.precision.product_bytes
    trained = work.num_trained
    chunk = chunk_tokens(trained, shape.rows, product_bytes)
    head = shape.rows * shape.hidden
    loss = {
        "logits": chunk * shape.rows * product_bytes,
        "hidden states and gradient": 2 * trained * shape.hidden * setup.weight_bytes,
    }
    if product_bytes != setup.weight_bytes:
        loss["copy of the head"] = head * product_bytes
    loss["gradient of the head"] = head * FLOAT32 if setup.adapter is None else 0
    return loss
