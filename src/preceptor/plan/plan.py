"""What a run will cost, before it: parameters, bytes by component, operations, steps and time; and what would fit.

From config.json, the run file and a sample of the data alone: no weights, no torch. `make_plan` gives one plain object
that `preceptor plan --json` prints; plan_text.py shows it, plan_changes.py finds what would make the run fit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from preceptor import config
from preceptor.data.forest import Tree
from preceptor.errors import ModelError
from preceptor.plan.activations import Work
from preceptor.plan.devices import DEVICES, SHARE_OF_RATE, Device
from preceptor.plan.flops import operations
from preceptor.plan.memory import PredictedMemory, Setup, Weights, predict_memory
from preceptor.plan.model import PlannedModel, read_model
from preceptor.plan.parameters import Adapter, Parameters, check_targets, count_parameters, rows_for
from preceptor.plan.sample import Sample, Turns
from preceptor.plan.shapes import Shape

WORLD_SIZES = (1, 8, 16, 64)
CONTEXT_SHARE = 0.75  # of a row's tokens, assumed where the data cannot be sampled
_RANK = 16  # of the adapter in what would fit, where the run has none
_STATES = ("weights", "gradients", "master weights", "optimizer")
_UNSHAPED_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Case:
    """One way to run: a model's shape and parameters, the largest row of the data, the setup and the memory of it."""

    shape: Shape
    parameters: Parameters
    work: Work
    setup: Setup
    memory: PredictedMemory


def make_plan(
    run: config.Run, model: PlannedModel, sample: Sample | str, device: Device, world_size: int, rate: float | None
) -> dict[str, Any]:
    """The plan as one object. rate: measured operations per second of this machine's matrix products, if they were.

    A model type that is not known has parameters and their bytes only, as far as its weight files tell.
    Raises ModelError for adapter targets that the model has not.
    """
    plan: dict[str, Any] = {
        "model": {
            "path": model.path,
            "model_type": model.model_type,
            "known": model.shape is not None,
            "towers_open": model.towers_open,
        },
        "run": _run_facts(run, device, world_size),
        "device": _device_facts(device),
    }
    if model.shape is None:
        return plan | {"parameters": _stored(model), "memory": _stored_bytes(run, model)}
    case = make_case(run, model.shape, sample, device, world_size)
    fits = case.memory.peak_bytes <= device.usable_bytes
    return plan | {
        "parameters": case.parameters.to_json(),
        "sequence": _sequence_facts(case.work, sample),
        "memory": {
            "components": dict(case.memory.components),
            "peak_bytes": case.memory.peak_bytes,
            "moment": case.memory.moment,
            "fits": fits,
        },
        "data": _data_facts(run, sample, world_size),
        "work": _work_facts(run, case, sample, device, rate),
        "would_fit": would_fit(run, model.shape, sample),
    }


def make_case(run: config.Run, shape: Shape, sample: Sample | str, device: Device, world_size: int) -> Case:
    """The run on this device, its largest row and its peak."""
    adapter = None
    if run.adapter is not None:
        check_targets(shape, run.adapter.target_modules)
        targets = run.adapter.target_modules
        adapter = Adapter(run.adapter.rank, None if targets is None else tuple(targets), run.adapter.dropout)
    setup = Setup(
        weights=run.model.dtype,
        autocast=device.precision(run.train.precision) == "bfloat16",
        adapter=adapter,
        num_new_tokens=0 if isinstance(sample, str) else sample.num_new_tokens,
        world_size=world_size,
        rows_per_step=math.ceil(run.train.batch_size / world_size),
        cpu=device.cpu,
    )
    return _case(run, with_rows(shape, sample), setup, largest_row(run, sample))


def _case(run: config.Run, shape: Shape, setup: Setup, row: tuple[Turns, ...]) -> Case:
    parameters = count_parameters(shape, setup.adapter, setup.num_new_tokens)
    work = Work(row, run.memory.context_gradient, _checkpointed(run, shape))
    return Case(shape, parameters, work, setup, predict_memory(shape, work, setup, parameters))


def _checkpointed(run: config.Run, shape: Shape) -> int:
    if isinstance(run.memory.activation_checkpointing, int):
        return run.memory.activation_checkpointing
    return len(shape.layers) if run.memory.activation_checkpointing == "all" else 0


def with_rows(shape: Shape, sample: Sample | str) -> Shape:
    """The shape with an embedding row for each of the tokenizer's tokens, those that the template adds among them."""
    return shape if isinstance(sample, str) else replace(shape, rows=rows_for(shape.rows, sample.num_tokenizer))


def largest_row(run: config.Run, sample: Sample | str) -> tuple[Turns, ...]:
    """The sample's largest row, stretched to `max_length` where there may be more data than the sample.

    Without a sample: one conversation that fills the row, CONTEXT_SHARE of it context.
    """
    limit = run.data.max_length
    found = None if isinstance(sample, str) else sample.largest_row(limit)
    if found is None:
        context = int(limit * CONTEXT_SHARE)
        return (((context, limit - context),),)
    return found


def _run_facts(run: config.Run, device: Device, world_size: int) -> dict[str, Any]:
    return {
        "trained": "everything" if run.adapter is None else f"LoRA of rank {run.adapter.rank}",
        "weights": run.model.dtype,
        "precision": device.precision(run.train.precision),
        "context_gradient": run.memory.context_gradient,
        "activation_checkpointing": run.memory.activation_checkpointing,
        "max_length": run.data.max_length,
        "batch_size": run.train.batch_size,
        "world_size": world_size,
    }


def _device_facts(device: Device) -> dict[str, Any]:
    return {"name": device.name, "memory_bytes": device.memory_bytes, "usable_bytes": device.usable_bytes}


def _sequence_facts(work: Work, sample: Sample | str) -> dict[str, Any]:
    return {
        "num_tokens": work.num_tokens,
        "num_trained": work.num_trained,
        "num_conversations": len(work.conversations),
        "assumed": isinstance(sample, str),
    }


def _stored(model: PlannedModel) -> dict[str, Any]:
    return {"total": model.num_stored}


def _stored_bytes(run: config.Run, model: PlannedModel) -> dict[str, Any] | None:
    """Of full fine-tuning, what follows from the number of parameters alone."""
    if model.num_stored is None or run.adapter is not None:
        return None
    each = _UNSHAPED_BYTES[run.model.dtype] * model.num_stored
    return {"components": {"weights": each, "gradients": each, "optimizer": 8 * model.num_stored}}


def _data_facts(run: config.Run, sample: Sample | str, world_size: int) -> dict[str, Any]:
    """Rows, tokens and steps; `open` says why there are none."""
    if isinstance(sample, str):
        return {"open": sample}
    rows_per_epoch = sample.rows_per_epoch(run.data.max_length)
    if rows_per_epoch is None or sample.num_rows is None:
        return {"open": "how many rows the data has only reading it would tell"}
    count = len(sample.conversations)
    tokens = sum(sample.lengths)
    trained = sum(target for turns in sample.conversations for _, target in turns)
    steps_per_epoch = math.ceil(rows_per_epoch / run.train.batch_size)
    return {
        "examples_per_epoch": round(sample.num_rows),
        "num_sampled": count,
        "tokens_per_epoch": round(tokens * sample.num_rows / count),
        "share_trained": trained / tokens,
        "sequences_per_epoch": rows_per_epoch,
        "steps_per_epoch": steps_per_epoch,
        "num_steps": run.train.duration.steps(steps_per_epoch),
    }


def _work_facts(
    run: config.Run, case: Case, sample: Sample | str, device: Device, rate: float | None
) -> dict[str, Any]:
    """Operations of a step by what is multiplied, beside 6 N T, and what they take at SHARE_OF_RATE of the rate."""
    rows = case.setup.rows_per_step * case.setup.world_size
    found = operations(case.shape, case.work, case.setup.adapter)
    total = found.total * rows
    half = case.setup.autocast or case.setup.weight_bytes == 2
    of_device = rate or device.rate(half)
    seconds = None if of_device is None else total / (of_device * SHARE_OF_RATE * case.setup.world_size)
    steps = _data_facts(run, sample, case.setup.world_size).get("num_steps")
    return {
        "operations_per_step": total,
        "by_kind": {
            "linear layers": found.linear * rows,
            "attention": found.attention * rows,
            "head": found.head * rows,
            "adapter": found.adapter * rows,
            "computed again": found.again * rows,
        },
        "six_n_t": 6.0 * case.parameters.active * case.work.num_tokens * rows,
        "rate": of_device,
        "rate_is_measured": rate is not None,
        "share_of_rate": SHARE_OF_RATE,
        "seconds_per_step": seconds,
        "seconds": None if seconds is None or steps is None else seconds * steps,
    }


def would_fit(run: config.Run, shape: Shape, sample: Sample | str) -> list[dict[str, Any]]:
    """The run's model and row on GPUs, in four ways on 1, 8, 16 and 64 of them: bytes of a rank, and where that fits.

    All in mixed precision; the ways differ in what is trained and how the frozen weights are held. Each with the
    activations that the run keeps, and with `activation_checkpointing: all`.
    """
    rank = _RANK if run.adapter is None else run.adapter.rank
    ways: Sequence[tuple[str, Weights, Adapter | None]] = (
        ("everything, float32 weights under autocast", "float32", None),
        ("everything, bfloat16 weights and float32 master", "bfloat16 + float32 master", None),
        (f"LoRA of rank {rank}, frozen bfloat16", "bfloat16", Adapter(rank)),
        (f"QLoRA of rank {rank}, frozen 4 bits", "4 bits", Adapter(rank)),
    )
    row = largest_row(run, sample)
    grown = with_rows(shape, sample)
    new = 0 if isinstance(sample, str) else sample.num_new_tokens
    found = []
    for name, weights, adapter in ways:
        for world_size in WORLD_SIZES:
            setup = Setup(weights, True, adapter, new, world_size, rows_per_step=2)
            memory = _case(run, grown, setup, row).memory
            again = predict_memory(grown, Work(row, "full", len(grown.layers)), setup)
            found.append(
                {
                    "way": name,
                    "world_size": world_size,
                    "states_bytes": sum(memory.components[state] for state in _STATES),
                    "components": dict(memory.components),
                    "peak_bytes": memory.peak_bytes,
                    "fits_on": _fits_on(memory),
                    "peak_bytes_checkpointed": again.peak_bytes,
                    "fits_on_checkpointed": _fits_on(again),
                }
            )
    return found


def _fits_on(memory: PredictedMemory) -> list[str]:
    return [device.name for device in DEVICES if memory.peak_bytes <= device.usable_bytes]


def predict_peak_bytes(
    run: config.Run, row: Sequence[Tree], num_new_tokens: int, num_tokenizer: int, cpu: bool
) -> int | None:
    """Bytes of tensors at a step's peak on one device. row: the trees of the run's largest row.

    num_new_tokens: added to the tokenizer, which has `num_tokenizer` with them. None where the plan does not know the
    model type or what the run asks for (`loss.kl_coef`: the base's own row of logits, and its copy in full training).
    """
    if run.loss.kl_coef > 0:
        return None
    try:
        model = read_model(run.model)
    except ModelError:  # a model of the Hub, loaded, of which no config.json can be had alone
        return None
    if model.shape is None:
        return None
    sample = Sample(tuple(turns_of(tree) for tree in row), len(row), True, num_new_tokens, num_tokenizer)
    device = Device("the run's own", 0, None, None, cpu=cpu)
    return make_case(run, model.shape, sample, device, world_size=1).memory.peak_bytes


def turns_of(tree: Tree) -> Turns:
    """The tree as (context, target) tokens in turn, each token once; what follows the last target is context too."""
    turns: list[tuple[int, int]] = []
    context = target = 0
    for segment in tree.segments:
        if segment.kind == "context" and target:
            turns.append((context, target))
            context = target = 0
        if segment.kind == "context":
            context += len(segment.ids)
        else:
            target += len(segment.ids)
    return (*turns, (context, target))
