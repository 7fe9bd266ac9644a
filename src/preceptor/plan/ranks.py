"""Bytes of each process where a model is spread over several, and the strategy that `parallel.strategy: auto` takes.

    replicate   weights, gradients and optimizer whole on each; beside them a bucket of gradients that are summed
    shard       1/N of each on each of N; beside that lies what is gathered for a while: weights and gradients outside
                the layers (last norm, head, embedding), and those of two layers, one that runs and the next
    hybrid      `shard` over the processes of a node, replicated over nodes

A sharded model either gathers each layer again for every pass, or, where there is room, keeps whole weights and
gradients from the first sequence of a step to the last (`regathers` False), which sends less. No torch here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from preceptor.plan.memory import BASE, FLOAT32, Moment, Setup, lasting_bytes, state_bytes, update_bytes
from preceptor.plan.parameters import Parameters

if TYPE_CHECKING:
    from preceptor.model.sharding import Strategy

BUCKET_BYTES = 64 * 2**20  # of gradients that are summed together (model/sharding.py)
_NEXT = 2  # layers that are gathered at one time


@dataclass(frozen=True, slots=True)
class Placement:
    """A strategy, and what it takes. num_parts: processes that share one copy of the model.

    peak_bytes: the most on one process at one time; None: not known. fits: None where that is not known.
    """

    strategy: "Strategy"
    num_parts: int
    regathers: bool
    peak_bytes: int | None
    fits: bool | None


def placements(
    setup: Setup,
    parameters: Parameters,
    moments: Sequence[Moment],
    num_ranks: int,
    ranks_per_node: int,
    usable_bytes: int,
) -> Iterator[Placement]:
    """Every way to spread the model, the one that sends least first. moments: of a dry run; none: states alone."""
    ways: list[tuple[Strategy, int]] = [("replicate", 1), ("hybrid", ranks_per_node), ("shard", num_ranks)]
    keeps_part = setup.adapter is not None and setup.adapter.options.keeps_first_values
    if setup.quantization is not None or keeps_part or setup.offload or setup.optimizer == "adafactor":
        ways = ways[:1]  # quantized weights cannot be sharded, nor what keeps a part of a tensor or needs all of it
    for strategy, num_parts in ways:
        if strategy == "hybrid" and not has_nodes(num_ranks, ranks_per_node):
            continue
        for regathers in (False, True) if num_parts > 1 else (False,):
            peak = rank_peak_bytes(setup, parameters, moments, num_parts, regathers)
            yield Placement(strategy, num_parts, regathers, peak, peak <= usable_bytes)


def has_nodes(num_ranks: int, ranks_per_node: int) -> bool:
    """Whether there are several nodes of several processes each, as many on each."""
    return 1 < ranks_per_node < num_ranks and num_ranks % ranks_per_node == 0


def unknown(asked: str, num_ranks: int, ranks_per_node: int) -> Placement:
    """Of a model of which nothing can be said: what is asked for, else `replicate`."""
    asked = "shard" if asked == "hybrid" and not has_nodes(num_ranks, ranks_per_node) else asked
    parts: dict[Strategy, int] = {"hybrid": ranks_per_node, "shard": num_ranks}
    for strategy, num_parts in parts.items():
        if strategy == asked:
            return Placement(strategy, num_parts, True, None, None)
    return Placement("replicate", 1, False, None, None)


def choose(found: Sequence[Placement], asked: str) -> Placement:
    """The first that fits, of the strategy that is asked for; where none does, the one that takes least.

    `hybrid` on one node is `shard`.
    """
    asked = "shard" if asked == "hybrid" and all(each.strategy != "hybrid" for each in found) else asked
    of_asked = [each for each in found if asked in ("auto", each.strategy)]
    assert all(each.peak_bytes is not None for each in of_asked)
    smallest = min(of_asked, key=lambda each: each.peak_bytes or 0)
    return next((each for each in of_asked if each.fits), smallest)


def in_words(placement: Placement, asked: str) -> str:
    """What `train` says of it."""
    how = {
        "replicate": "the whole model in each",
        "shard": f"one model spread over all {placement.num_parts}",
        "hybrid": f"a model spread over the {placement.num_parts} of each node",
    }[placement.strategy]
    if placement.num_parts > 1:
        how += ", each layer gathered for each pass" if placement.regathers else ", gathered once a step"
    chosen = f" (parallel.strategy: {placement.strategy}{', chosen by memory' * (asked == 'auto')}"
    if placement.peak_bytes is None:
        return f"{how}{chosen}; its memory cannot be predicted)"
    peak = f"{placement.peak_bytes / 1e9:.2f} GB"
    too_much = "" if placement.fits else ", which may be more than there is"
    return f"{how}{chosen}; predicted peak of each: {peak}{too_much})"


def rank_peak_bytes(
    setup: Setup, parameters: Parameters, moments: Sequence[Moment], num_parts: int, regathers: bool
) -> int:
    """The most bytes on one process, num_parts of which share the model (1: each has its own)."""
    states = state_bytes(setup, parameters)
    gradients, copied = states["gradients"], states.get(BASE, 0)
    peaks = [moment.peak_bytes for moment in moments]
    passes: list[float]  # what lies beside weights and optimizer before the update
    if num_parts == 1:
        passes = [gradients + min(BUCKET_BYTES, gradients), *peaks]
    elif not regathers:  # whole gradients are there until the last backward pass of the step
        passes = [states["weights"] + copied + max(peaks, default=gradients)]
    else:
        outside, layer = _gathered_bytes(setup, parameters)
        first = setup.sequences_per_step == 1
        passes = [_gathered_by_layer(moment, outside, layer, num_parts, first) for moment in moments]
        passes = passes or [gradients / num_parts + sum(outside) + _NEXT * layer[0] + layer[1]]
    lasting = lasting_bytes(setup, parameters) / num_parts
    update = (gradients + update_bytes(setup, parameters)) / num_parts
    return round(lasting + max(update, *passes))


def _gathered_by_layer(
    moment: Moment, outside: tuple[float, float], layer: tuple[float, float], num_parts: int, first: bool
) -> float:
    """What lies beside weights and optimizer at a moment, each layer gathered for each pass.

    first: no gradients of a sequence before. Those outside the layers are scattered when a backward pass ends.
    """
    backward = moment.name == "backward pass"
    before = moment.gradient_bytes
    (outside_weights, outside_gradients), (layer_weights, layer_gradients) = outside, layer
    whole = min(before, outside_gradients) if first else outside_gradients * (moment.name != "forward pass")
    scattered = (before - whole if first else before) / num_parts
    layers = 0.0 if moment.name == "loss" else _NEXT * layer_weights + layer_gradients * backward
    return moment.peak_bytes - before + whole + scattered + outside_weights + layers


def _gathered_bytes(setup: Setup, parameters: Parameters) -> tuple[tuple[float, float], tuple[float, float]]:
    """Weights and gradients of what is in no layer (but towers, which no text goes through); of the largest layer."""
    outside = setup.weight_bytes * (parameters.outside - parameters.base.get("towers", 0))
    largest = setup.weight_bytes * max((layer.total for layer in parameters.layers), default=0)
    if setup.adapter is None:
        return (outside, outside), (largest, largest)
    rows = FLOAT32 * (parameters.trained.get("token rows", 0) + parameters.trained.get("whole modules", 0))
    adapter = FLOAT32 * parameters.trained.get("adapter", 0) / max(1, len(parameters.layers))
    return (outside + rows, rows), (largest + adapter, adapter)
