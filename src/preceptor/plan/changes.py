"""The cheapest change that makes a run fit: tried in order, from those that change nothing of what is learnt.

1. activation checkpointing: the same gradient, more time
2. shorter sequences: the same gradient, as long as the longest conversation fits
3. full fine-tuning with bfloat16 weights, their other bits kept, then optimizer states of 8 bits, then of 32 bits in
   the host's memory
4. context_gradient: detach: another gradient (that of target tokens alone)
5. an adapter, then frozen weights in bfloat16, then in 4 bits: fewer trained parameters
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from preceptor import config
from preceptor.errors import ConfigError, ModelError
from preceptor.plan.devices import DeviceSpec
from preceptor.plan.epoch import fitted_to, of_model
from preceptor.plan.model import PlannedModel
from preceptor.plan.plan import make_plan, peak_of
from preceptor.plan.sample import Sample

if TYPE_CHECKING:
    from preceptor.plan.dry_run import DryRun

Keys = Mapping[str, Any]
_SHORTEST = 512  # tokens of a sequence, where the data says nothing
_HALF: Keys = {"model.dtype": "bfloat16", "train.precision": "bfloat16"}
_TAKEN_OUT: Mapping[str, Keys] = {  # what does not go with a key
    "adapter.kind": {"model.freeze": [], "model.train_only": [], "optimizer.rounding": None},
    "optimizer.name": {"optimizer.momentum": None},
}
_CHECKPOINTED: Keys = {"memory.activation_checkpointing": "all"}


def find_plan(
    run: config.Run,
    model: PlannedModel,
    sample: Sample | str,
    device: DeviceSpec,
    dry_run: "DryRun",
    rate: float | None = None,
    ranks: tuple[int, int] = (1, 1),
) -> dict[str, Any]:
    """The plan, and the cheapest change where it does not fit. ranks: processes on a node, nodes."""
    of_several = None if ranks == (1, 1) else ranks
    found = make_plan(run, model, sample, device, rate, dry_run, of_several)
    none_needed: dict[str, Any] = {"change": None, "tried": []}
    return found | (none_needed if found["memory"]["fits"] else find_change(run, dry_run, sample, device, of_several))


def find_change(
    run: config.Run,
    dry_run: "DryRun",
    sample: Sample | str,
    device: DeviceSpec,
    ranks: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """The first change after which the run fits, and all that were tried; `change` is None where none does.

    Of each, `set` has what to add to the command line, and `peak_bytes` the peak then; where weights, gradients and
    optimizer are too much by themselves, those.
    """
    tried: list[dict[str, Any]] = []
    for keys in _candidates(run, of_model(sample, dry_run)):
        keys = _with_taken_out(run, keys)
        changed = _changed(run, keys)
        if changed is None:
            continue
        try:
            peak, fits = peak_of(changed, dry_run, sample, device, ranks)
        except ModelError:  # of a context gradient that the layers do not take, or factors of what is frozen then
            continue
        tried.append({"set": [_override(*each) for each in keys.items()], "peak_bytes": peak, "fits": fits})
        if fits:
            return {"change": tried[-1], "tried": tried}
    return {"change": None, "tried": tried}


def _candidates(run: config.Run, sample: Sample | str) -> Iterator[Keys]:
    """Each change as keys of the run file, alone and then on top of those that only cost time."""
    yield {"memory.context_gradient": "recompute"}
    yield _CHECKPOINTED
    shortest = _CHECKPOINTED
    for tokens in _shorter(run, sample):
        shortest = {**_CHECKPOINTED, "data.max_length": tokens}
        yield {"data.max_length": tokens}
        yield shortest
    if run.adapter is None:
        for held in (_HALF, {**_HALF, "optimizer.name": "adamw_8bit"}, {**_HALF, "optimizer.offload": True}):
            for more in ({}, _CHECKPOINTED, shortest):
                yield {**held, **more}
    yield {"memory.context_gradient": "detach"}
    yield {"memory.context_gradient": "detach", **_CHECKPOINTED}
    adapter: Keys = {} if run.adapter is not None else {"adapter.kind": "lora"}
    half: Keys = {**adapter, **_HALF}
    bits: Keys = {**half, "model.quantization": "nf4"}
    for frozen in (adapter, half, bits):
        for more in ({}, _CHECKPOINTED, shortest):
            yield {**frozen, **more}


def _shorter(run: config.Run, sample: Sample | str) -> Iterator[int]:
    """Halves of the sequence, down to what the longest conversation of the sample still fits in."""
    longest = _SHORTEST if isinstance(sample, str) else max([_SHORTEST, *fitted_to(run, sample).lengths])
    tokens = run.data.max_length // 2
    while tokens >= longest:
        yield tokens
        tokens //= 2


def _changed(run: config.Run, keys: Keys) -> config.Run | None:
    """The run with the keys set; None where that is the run itself, or no run that could work."""
    tree = run.model_dump(mode="json")
    for key, value in keys.items():
        section, _, name = key.partition(".")
        tree[section] = {**(tree[section] or {}), name: value}
    try:
        changed = config.build(tree, "plan")
    except ConfigError:
        return None
    return None if changed == run and "adapter.kind" not in keys else changed


def _with_taken_out(run: config.Run, keys: Keys) -> Keys:
    """The keys, and those of the run file that do not go with them."""
    tree, more = run.model_dump(mode="json"), dict(keys)
    for key, none in chain.from_iterable(_TAKEN_OUT[key].items() for key in keys if key in _TAKEN_OUT):
        section, _, name = key.partition(".")
        if tree[section][name] != none:
            more[key] = none
    return more


def _override(key: str, value: Any) -> str:
    return f"{key}={'null' if value is None else value}"
