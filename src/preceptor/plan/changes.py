"""The cheapest change that makes a run fit: tried in order, from those that change nothing of what is learnt.

1. computed again instead of kept: the same gradient, more time
2. shorter rows: the same gradient, as long as the longest conversation fits
3. context_gradient: detach: another gradient (that of target tokens alone)
4. an adapter, then frozen weights in bfloat16: fewer trained parameters
5. more devices, each with a part of weights, gradients and optimizer
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from preceptor import config
from preceptor.errors import ConfigError
from preceptor.plan.devices import Device
from preceptor.plan.memory import Setup, predict_memory
from preceptor.plan.plan import Case, make_case
from preceptor.plan.sample import Sample
from preceptor.plan.shapes import Shape

Keys = Mapping[str, Any]
_SHORTEST_ROW = 512
_WORLD_SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class Change:
    """keys: what to add to the command line; world_size: on how many devices; peak_bytes: a rank's then."""

    keys: Keys
    world_size: int
    peak_bytes: int
    fits: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "set": [f"{key}={value}" for key, value in self.keys.items()],
            "world_size": self.world_size,
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
        }


def find_change(run: config.Run, shape: Shape, sample: Sample | str, device: Device, world_size: int) -> dict[str, Any]:
    """The first change after which the run fits, and all that were tried; and whether QLoRA would fit on one device.

    `change` is None where none does, that is where a single row is too much for any number of devices.
    """
    tried: list[Change] = []
    for keys, ranks in _candidates(run, shape, sample, world_size):
        case = _changed(run, keys, shape, sample, device, ranks)
        if case is None:
            continue
        peak = case.memory.peak_bytes
        tried.append(Change(keys, ranks, peak, peak <= device.usable_bytes))
        if tried[-1].fits:
            break
    found = tried[-1].to_json() if tried and tried[-1].fits else None
    return {
        "change": found,
        "tried": [change.to_json() for change in tried],
        "four_bits_peak_bytes": _in_four_bits(run, shape, sample, device, world_size),
    }


def _candidates(run: config.Run, shape: Shape, sample: Sample | str, world_size: int) -> Iterator[tuple[Keys, int]]:
    """Each change as keys of the run file, alone and then on top of those that only cost time."""
    again: Keys = {"memory.activation_checkpointing": "all"}
    yield {"memory.context_gradient": "recompute"}, world_size
    yield again, world_size
    shortest = again
    for tokens in _shorter(run, sample):
        shortest = {**again, "data.max_length": tokens}
        yield {"data.max_length": tokens}, world_size
        yield shortest, world_size
    yield {"memory.context_gradient": "detach"}, world_size
    yield {"memory.context_gradient": "detach", **again}, world_size
    adapter: Keys = {} if run.adapter is not None else {"adapter.kind": "lora"}
    half: Keys = {**adapter, "model.dtype": "bfloat16", "train.precision": "bfloat16"}
    for frozen in (adapter, half):
        for more in ({}, again, shortest):
            yield {**frozen, **more}, world_size
    for ranks in (size for size in _WORLD_SIZES if size > world_size):
        for keys in ({}, again, half, {**half, **again}, {**half, **shortest}):
            yield keys, ranks


def _shorter(run: config.Run, sample: Sample | str) -> Iterator[int]:
    """Halves of the row, down to what the longest conversation of the sample still fits in."""
    longest = _SHORTEST_ROW if isinstance(sample, str) else max([_SHORTEST_ROW, *sample.lengths])
    tokens = run.data.max_length // 2
    while tokens >= longest:
        yield tokens
        tokens //= 2


def _changed(
    run: config.Run, keys: Keys, shape: Shape, sample: Sample | str, device: Device, world_size: int
) -> Case | None:
    """The run with the keys set; None where that is the run itself, or no run that could work."""
    tree = run.model_dump(mode="json")
    for key, value in keys.items():
        section, _, name = key.partition(".")
        tree[section] = {**(tree[section] or {}), name: value}
    try:
        changed = config.build(tree, "plan")
    except ConfigError:
        return None
    if changed == run and "adapter.kind" not in keys and not (keys == {} and world_size > 1):
        return None
    return make_case(changed, shape, sample, device, world_size)


def _in_four_bits(run: config.Run, shape: Shape, sample: Sample | str, device: Device, world_size: int) -> int | None:
    """The peak of LoRA on 4-bit weights, recomputing. No change to propose: this program does not train in them."""
    case = _changed(
        run, {"adapter.kind": "lora", "memory.activation_checkpointing": "all"}, shape, sample, device, world_size
    )
    if case is None:
        return None
    setup = Setup("4 bits", True, case.setup.adapter, case.setup.num_new_tokens, world_size, case.setup.rows_per_step)
    return predict_memory(case.shape, case.work, setup).peak_bytes
