"""What a run will cost, before it: parameters, bytes by component, operations, steps and time; and what would fit.

`make_plan` gives one plain object that `preceptor plan --json` prints; text.py shows it, changes.py finds what would
make the run fit. Parameters and the bytes of weights, gradients and optimizer are arithmetic on config.json, without
torch; all else follows from a dry run of the model (dry_run.py), which any model type has that can be trained.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from preceptor import config
from preceptor.data.loader import few_steps
from preceptor.errors import DataError, ModelError
from preceptor.model.options import ActivationPolicy, LoraOptions, Quantization, adapter_name
from preceptor.model.sizes import rows_for
from preceptor.plan.devices import DEVICES, SHARE_OF_RATE, DeviceSpec
from preceptor.plan.memory import (
    EVERYTHING,
    STATES,
    Moment,
    OptimizerName,
    Setup,
    StepMemory,
    Weights,
    host_bytes,
    state_bytes,
    step_memory,
)
from preceptor.plan.model import PlannedModel
from preceptor.plan.parameters import LoraSpec, Parameters, count_parameters
from preceptor.plan.ranks import Placement, choose, placements, unknown
from preceptor.plan.sample import Sample
from preceptor.plan.work import TurnLengths, Work, operations

if TYPE_CHECKING:
    from preceptor.data.forest import PackedSequence
    from preceptor.plan.dry_run import DryRun

CONTEXT_SHARE = 0.75  # of a sequence's tokens, assumed where the data cannot be sampled
_RANK = 16  # of the adapter in what would fit, where the run has none


@dataclass(frozen=True, slots=True)
class Case:
    """One way to run: parameters, the largest sequence of the data, the setup, and the memory of a step."""

    parameters: Parameters
    work: Work
    setup: Setup
    memory: StepMemory


def make_plan(
    run: config.Run,
    model: PlannedModel,
    sample: Sample | str,
    device: DeviceSpec,
    rate: float | None = None,
    dry_run: "DryRun | None" = None,
    ranks: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """The plan as one object. rate: measured operations per second of this machine's matrix products, if they were.
    ranks: processes on a node, and nodes, for which a placement of the model is planned too.

    Without a dry run: parameters and states alone, as far as config.json or the weight files tell. Raises ModelError
    for adapter targets and `optimizer.lr_factors` that the model has not, for a frozen row of a new stop token, and
    where the model cannot run without values; DataError where no example is short enough.
    """
    plan: dict[str, Any] = {
        "model": {"path": model.path, "model_type": model.model_type, "towers_open": False},
        "run": _run_facts(run, device),
        "device": {"name": device.name, "memory_bytes": device.memory_bytes, "usable_bytes": device.usable_bytes},
        "quick": dry_run is None,
    }
    _require_fitting(run, sample)
    if dry_run is None:
        plan["model"]["towers_open"] = model.towers_open
        return plan | _states(run, model, sample, device)
    num_rows, stop = _num_rows(dry_run.num_rows, sample), None if isinstance(sample, str) else sample.new_stop_token
    dry_run.require_trainable(setup_of(run, sample, device), num_rows, stop, run.optimizer.lr_factors)
    case = make_case(run, dry_run, sample, device)
    return plan | {
        "parameters": case.parameters.to_json(),
        "sequence": {
            "num_tokens": case.work.num_tokens,
            "num_trained": case.work.num_trained,
            "num_conversations": len(case.work.conversations),
            "assumed": _known_largest(run, sample) is None,
        },
        "memory": {
            "components": dict(case.memory.components),
            "host_bytes": host_bytes(case.setup, case.parameters),
            "peak_bytes": case.memory.peak_bytes,
            "moment": case.memory.moment,
            "fits": case.memory.peak_bytes <= device.usable_bytes,
        },
        "ranks": None if ranks is None else _ranks_facts(run, dry_run, case, sample, device, ranks),
        "data": _data_facts(run, sample),
        "work": _work_facts(run, case, sample, device, rate),
        "would_fit": would_fit(run, dry_run, sample),
    }


def _states(run: config.Run, model: PlannedModel, sample: Sample | str, device: DeviceSpec) -> dict[str, Any]:
    """Parameters and their bytes, by arithmetic; of a model type without a shape, those of its weight files."""
    setup = setup_of(run, sample, device)
    by_name = setup.adapter is not None and setup.adapter.options.differs_by_layer
    if setup.choice != EVERYTHING or by_name:  # names of parameters are not in config.json
        return {"parameters": {"total": model.num_stored}, "memory": None}
    if model.shape is not None:
        grown = replace(model.shape, rows=_num_rows(model.shape.rows, sample))
        parameters = count_parameters(grown, setup.adapter, setup.num_new_tokens)
    elif model.num_stored is not None and setup.adapter is None and setup.optimizer in ("adamw", "sgd"):
        stored = {"stored": model.num_stored}
        parameters = Parameters(stored, stored, model.num_stored, tensors={(False, (model.num_stored,)): 1})
    else:
        return {"parameters": {"total": model.num_stored}, "memory": None}
    memory = {"components": state_bytes(setup, parameters), "host_bytes": host_bytes(setup, parameters)}
    return {"parameters": parameters.to_json(), "memory": memory}


def setup_of(run: config.Run, sample: Sample | str, device: DeviceSpec) -> Setup:
    adapter = None
    if run.adapter is not None:
        targets = run.adapter.target_modules
        chosen, own = None if targets is None else tuple(targets), run.adapter
        adapter = LoraSpec(own.rank, chosen, own.dropout, LoraOptions.of(own))
    return Setup(
        weights=run.model.dtype,
        autocast=device.precision(run.train.precision) == "bfloat16",
        adapter=adapter,
        num_new_tokens=0 if isinstance(sample, str) else sample.num_new_tokens,
        sequences_per_step=run.train.batch_size,
        device_type=device.device_type,
        optimizer=run.optimizer.name,
        rounding=run.optimizer.rounding,
        choice=(tuple(run.model.freeze), tuple(run.model.train_only)),
        quantization=run.model.quantization,
        double_quantization=bool(run.model.double_quantization),
        offload=run.optimizer.offload and device.device_type != "cpu",
        router_aux_coef=run.loss.router_aux_coef,
        kl_to_base=run.loss.kl_coef > 0,
    )


def make_case(run: config.Run, dry_run: "DryRun", sample: Sample | str, device: DeviceSpec) -> Case:
    """The run on this device, its largest sequence and its peak."""
    work = Work(largest_sequence(run, sample), _policy(run))
    return _case(dry_run, setup_of(run, sample, device), work, _num_rows(dry_run.num_rows, sample))


def _policy(run: config.Run) -> ActivationPolicy:
    return ActivationPolicy(run.memory.context_gradient, run.memory.activation_checkpointing)


def _case(dry_run: "DryRun", setup: Setup, work: Work, num_rows: int) -> Case:
    if not dry_run.reads_alone:
        try:
            moments = dry_run.step(setup, work.policy, work.sequence(), num_rows)
        except ModelError:  # of its attention, which cannot be told how a sequence is laid out
            if work.policy.context_gradient != "full":
                raise
            dry_run.reads_alone = True
    if dry_run.reads_alone:
        work = work.longest_alone()
        moments = dry_run.step(_in_passes(setup, True), work.policy, work.sequence(), num_rows)
    parameters = dry_run.parameters(setup.adapter, setup.num_new_tokens, num_rows, setup.choice)
    memory = step_memory(_in_passes(setup, dry_run.reads_alone), parameters, moments)
    return Case(parameters, work, setup, memory)


def _in_passes(setup: Setup, reads_alone: bool, num_ranks: int = 1) -> Setup:
    """The setup of a step with the most sequences that one of `num_ranks` processes gets.

    A model that reads one conversation at a time takes several passes per sequence, so that gradients accumulate.
    """
    own = max(1 + reads_alone, -(-setup.sequences_per_step // num_ranks))
    return replace(setup, sequences_per_step=own, wide_gradients=setup.sequences_per_step > 1 or reads_alone)


def _num_rows(rows: int, sample: Sample | str) -> int:
    """Rows of the embedding: one for each of the tokenizer's tokens, those that the template adds among them."""
    return rows if isinstance(sample, str) else rows_for(rows, sample.num_tokenizer)


def largest_sequence(run: config.Run, sample: Sample | str) -> tuple[TurnLengths, ...]:
    """The sample's largest sequence.

    Without a sample, and of a stream, of which larger ones may come: one conversation that fills the sequence,
    CONTEXT_SHARE of it context.
    """
    context = int(run.data.max_length * CONTEXT_SHARE)
    return _known_largest(run, sample) or (((context, run.data.max_length - context),),)


def _known_largest(run: config.Run, sample: Sample | str) -> tuple[TurnLengths, ...] | None:
    return None if isinstance(sample, str) or run.data.streaming else sample.largest_sequence(run.data.max_length)


def _require_fitting(run: config.Run, sample: Sample | str) -> None:
    """Raises DataError where training would have no example, as far as the sample tells."""
    if isinstance(sample, str) or run.data.overflow != "reject" or not sample.whole or not sample.conversations:
        return
    if not sample.fitting(run.data.max_length).conversations:
        raise DataError(
            f"data.train: no example fits in data.max_length ({run.data.max_length:,} tokens); the shortest has about "
            f"{min(sample.lengths):,}: raise it, or set data.overflow"
        )


def _run_facts(run: config.Run, device: DeviceSpec) -> dict[str, Any]:
    return {
        "trained": "everything" if run.adapter is None else adapter_name(run.adapter),
        "weights": run.model.dtype,
        "quantization": run.model.quantization,
        "optimizer": run.optimizer.name,
        "rounding": run.optimizer.rounding,
        "precision": device.precision(run.train.precision),
        "context_gradient": run.memory.context_gradient,
        "activation_checkpointing": run.memory.activation_checkpointing,
        "max_length": run.data.max_length,
        "batch_size": run.train.batch_size,
    }


def _ranks_facts(
    run: config.Run, dry_run: "DryRun", case: Case, sample: Sample | str, device: DeviceSpec, ranks: tuple[int, int]
) -> dict[str, Any]:
    """Every way to spread the model over processes, and the one that the run takes."""
    ranks_per_node, num_ranks = ranks[0], ranks[0] * ranks[1]
    setup = _in_passes(case.setup, dry_run.reads_alone, num_ranks)
    moments = dry_run.step(setup, case.work.policy, case.work.sequence(), _num_rows(dry_run.num_rows, sample))
    usable_bytes = device.usable_bytes // (ranks_per_node if device.device_type == "cpu" else 1)
    found = list(placements(setup, case.parameters, moments, num_ranks, ranks_per_node, usable_bytes))
    return {
        "num_ranks": num_ranks,
        "ranks_per_node": ranks_per_node,
        "usable_bytes": usable_bytes,
        "ways": [asdict(each) for each in found],
        "chosen": asdict(choose(found, run.parallel.strategy)),
    }


def _data_facts(run: config.Run, sample: Sample | str) -> dict[str, Any]:
    """Sequences, tokens and steps; `open` says why they are not known, but for the steps of a stream."""
    if isinstance(sample, str):
        return {"open": sample}
    fitting = sample.fitting(run.data.max_length)
    if sample.conversations and not fitting.conversations:
        return {"open": "every example that was read is longer than data.max_length"}
    sample = fitting if run.data.overflow == "reject" else sample
    sequences_per_epoch = sample.sequences_per_epoch(run.data.max_length)
    if sequences_per_epoch is None or sample.num_examples is None:
        found = "how many examples the data has is known only once it is read"
        if run.data.streaming:
            return {"open": f"{found}; {run.train.duration} are trained", "num_steps": run.train.duration.steps(0)}
        return {"open": found}
    count = len(sample.conversations)
    tokens = sum(sample.lengths)
    trained = Work(sample.conversations).num_trained
    steps_per_epoch = math.ceil(sequences_per_epoch / run.train.batch_size)
    num_steps, per_epoch = run.train.duration.steps(steps_per_epoch), round(tokens * sample.num_examples / count)
    longest = min(run.data.max_length, max(sample.lengths))
    return {
        "examples_per_epoch": round(sample.num_examples),
        "num_sampled": count,
        "tokens_per_epoch": per_epoch,
        "share_trained": trained / tokens,
        "sequences_per_epoch": sequences_per_epoch,
        "steps_per_epoch": steps_per_epoch,
        "num_steps": num_steps,
        "few_steps": few_steps(num_steps, steps_per_epoch, per_epoch, longest, run.train.duration.unit == "epochs"),
    }


def _work_facts(
    run: config.Run, case: Case, sample: Sample | str, device: DeviceSpec, rate: float | None
) -> dict[str, Any]:
    """Operations of a step by what is multiplied, beside 6 N T, and what they take at SHARE_OF_RATE of the rate."""
    sequences = case.setup.sequences_per_step
    by_kind = operations(case.parameters, case.work, case.setup.kl_to_base)
    total = sum(by_kind.values()) * sequences
    half = case.setup.autocast or case.setup.weight_bytes == 2
    of_device = rate or device.rate(half)
    seconds = None if of_device is None else total / (of_device * SHARE_OF_RATE)
    steps = _data_facts(run, sample).get("num_steps")
    return {
        "operations_per_step": total,
        "by_kind": {kind: count * sequences for kind, count in by_kind.items()},
        "six_n_t": 6.0 * case.parameters.active * case.work.num_tokens * sequences,
        "rate": of_device,
        "rate_is_measured": rate is not None,
        "share_of_rate": SHARE_OF_RATE,
        "seconds_per_step": seconds,
        "seconds": None if seconds is None or steps is None else seconds * steps,
    }


def would_fit(run: config.Run, dry_run: "DryRun", sample: Sample | str) -> list[dict[str, Any]]:
    """The run's model and sequence on one GPU, in five ways.

    All in mixed precision; the ways differ in what is trained and how the frozen weights are held. Each with the
    activations that the run keeps, and with `activation_checkpointing: all`.
    """
    rank = _RANK if run.adapter is None else run.adapter.rank
    ways: Sequence[tuple[str, Weights, LoraSpec | None, OptimizerName, Quantization | None]] = (
        ("everything, float32 weights", "float32", None, "adamw", None),
        ("everything, bfloat16, adamw_8bit", "bfloat16", None, "adamw_8bit", None),
        (f"LoRA of rank {rank}, frozen float32", "float32", LoraSpec(rank), "adamw", None),
        (f"LoRA of rank {rank}, frozen bfloat16", "bfloat16", LoraSpec(rank), "adamw", None),
        (f"LoRA of rank {rank}, frozen nf4", "bfloat16", LoraSpec(rank), "adamw", "nf4"),
    )
    work, num_rows = Work(largest_sequence(run, sample), _policy(run)), _num_rows(dry_run.num_rows, sample)
    checkpointed = replace(work, policy=ActivationPolicy("full", "all"))
    new = 0 if isinstance(sample, str) else sample.num_new_tokens
    found = []
    for name, weights, adapter, optimizer, bits in ways:
        rounding = "exact" if adapter is None and weights == "bfloat16" else None
        setup = Setup(weights, True, adapter, new, 2, "cuda", optimizer, rounding, EVERYTHING, bits, bits == "nf4")
        setup = replace(setup, router_aux_coef=run.loss.router_aux_coef, kl_to_base=run.loss.kl_coef > 0)
        memory, again = (_case(dry_run, setup, each, num_rows).memory for each in (work, checkpointed))
        found.append(
            {
                "way": name,
                "states_bytes": sum(memory.components[state] for state in STATES),
                "components": dict(memory.components),
                "peak_bytes": memory.peak_bytes,
                "fits_on": _fits_on(memory),
                "peak_bytes_checkpointed": again.peak_bytes,
                "fits_on_checkpointed": _fits_on(again),
            }
        )
    return found


def _fits_on(memory: StepMemory) -> list[str]:
    return [device.name for device in DEVICES if memory.peak_bytes <= device.usable_bytes]


def place_on_ranks(
    run: config.Run,
    sequence: "PackedSequence",
    num_new_tokens: int,
    num_tokenizer: int,
    device: DeviceSpec,
    num_ranks: int,
    ranks_per_node: int,
) -> Placement:
    """How a run spreads its model over processes, decided before it is loaded. device: of one process.

    sequence: the run's largest. num_tokenizer: tokens of its tokenizer. Where a model cannot run without values, and
    with `loss.kl_coef` (which runs the base as well), the bytes of weights, gradients, optimizer and a copy of the
    base decide alone, and may fill half of the device.
    """
    from preceptor.model.numerics import FAILURES
    from preceptor.plan.dry_run import dry_run_of

    setup = replace(setup_of(run, "", device), num_new_tokens=num_new_tokens)
    try:
        dry_run = dry_run_of(run.model, run.engine)
        num_rows = rows_for(dry_run.num_rows, num_tokenizer)
        parameters = dry_run.parameters(setup.adapter, num_new_tokens, num_rows, setup.choice)
    except (ModelError, *FAILURES):  # what cannot be loaded either says so when it is loaded
        return unknown(run.parallel.strategy, num_ranks, ranks_per_node)
    setup = _in_passes(setup, dry_run.reads_alone, num_ranks)
    moments: Sequence[Moment] = ()
    with suppress(ModelError, *FAILURES):
        if run.loss.kl_coef == 0:
            moments = dry_run.step(setup, _policy(run), sequence, num_rows)
    usable_bytes = device.usable_bytes if moments else device.usable_bytes // 2
    found = placements(setup, parameters, moments, num_ranks, ranks_per_node, usable_bytes)
    return choose(list(found), run.parallel.strategy)


def predict_peak_bytes(
    run: config.Run, model: Any, sequence: "PackedSequence", num_new_tokens: int, device_type: str
) -> int | None:
    """Bytes of tensors at the peak of a step, on one device, from the model that is to be trained.

    model: before or after an adapter was added; its weights are not looked at. sequence: the run's largest.
    num_new_tokens: those that were added to its vocabulary. None for a model that cannot run without values.
    """
    from preceptor.model.numerics import FAILURES
    from preceptor.plan.dry_run import dry_run_like

    device = DeviceSpec("the run's own", 0, None, None, device_type)
    setup = _in_passes(replace(setup_of(run, "", device), num_new_tokens=num_new_tokens), sequence.alone)
    try:
        dry_run = dry_run_like(model, run.engine)
        moments = dry_run.step(setup, _policy(run), sequence, dry_run.num_rows)
        parameters = dry_run.parameters(setup.adapter, num_new_tokens, dry_run.num_rows, setup.choice)
    except (ModelError, *FAILURES):  # whatever a model's code cannot do without values: no run may end for a prediction
        return None
    return step_memory(setup, parameters, moments).peak_bytes
