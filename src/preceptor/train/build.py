"""The model of a run as it is before the first step, on its device or spread over the processes; its optimizer."""

import os
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from preceptor import config
from preceptor.chat.format import load_tokenizer
from preceptor.config.held import LiveModel
from preceptor.data.loader import Loader, StreamLoader
from preceptor.errors import ConfigError, DataError, ModelError
from preceptor.files import readable_bytes
from preceptor.model.embeddings import align_model, never_trained, num_token_rows, resize_embeddings
from preceptor.model.forward import Engine
from preceptor.model.load import load_model, stored_dtype
from preceptor.model.numerics import cpu_bfloat16_feature, first_not_finite, hash_of_bits, resolve_precision
from preceptor.model.optimisations import install
from preceptor.model.options import LoraOptions, lr_factors
from preceptor.model.parts import choose_trained, freeze_towers, require_stop_token_learned
from preceptor.model.sharding import device_mesh, is_sharded, shard_from_first, shard_model
from preceptor.plan.devices import DeviceSpec, host_memory_bytes
from preceptor.plan.model import read_model
from preceptor.plan.parameters import count_parameters
from preceptor.plan.plan import place_on_ranks, predict_peak_bytes
from preceptor.plan.ranks import Placement, in_words
from preceptor.train.earlier_run import adapter_to_continue
from preceptor.train.finish import Say
from preceptor.train.optimizer import accumulate_in_float32, build_optimizer
from preceptor.train.prepare import Prepared
from preceptor.train.provenance import trees_hashes
from preceptor.train.quantized import quantize_base
from preceptor.train.run_folder import RunFolder
from preceptor.world import ONE, World, num_cores

_NAMED_TOKENS = 8
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # by which a user chooses


def choose_device(device: str, world: World = ONE) -> torch.device:
    """The device of this process. Of several on a machine, each has a GPU of its own, or its share of the cores.

    Raises ConfigError where `cuda` is asked for and not there, and where there are fewer GPUs than processes.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device: cuda, but torch sees no GPU here; use `auto` or `cpu`")
    if device == "cpu" or not torch.cuda.is_available():
        if world.size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":  # which torchrun sets by itself
            torch.set_num_threads(max(1, num_cores() // world.local_size))
        return torch.device("cpu")
    _let_segments_grow()
    if world.size == 1:
        return torch.device("cuda")
    num = torch.cuda.device_count()
    if world.local_rank >= num:
        raise ConfigError(
            f"{world.local_size} processes on this machine, but torch sees {num} GPU{'s' * (num != 1)}: start one "
            "process for each (`--nproc gpu`)"
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def _let_segments_grow() -> None:
    """Sequences differ in length: else a GPU's memory falls into pieces of which none is large enough.

    The command line says so by the environment, which torch reads once; here torch may long be there.
    """
    choose = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # torch has no public name for it
    if choose is not None and not any(name in os.environ for name in _ALLOCATOR):
        choose("expandable_segments:True")


def connected(prepared: Prepared, world: World) -> torch.device:
    """The device of this process, which can compute together with the others from here on.

    Raises DataError where the processes have prepared other examples: each reads the files of its own machine.
    """
    device = choose_device(prepared.run.train.device, world)
    world.connect(device.type)
    of_ranks = world.gather(trees_hashes(prepared))
    for rank, hashes in enumerate(of_ranks):
        other = [what for what, sha256 in hashes.items() if sha256 != of_ranks[0][what]]
        if other:
            raise DataError(
                f"process {rank} has other {' and '.join(other)} than process 0: all must read the same files, by the "
                "same versions of the packages"
            )
    return device


def with_precision(prepared: Prepared, device: torch.device, folder: RunFolder, say: Say) -> Prepared:
    """The run with `train.precision` written out: as given, as the run began, or as the device has it.

    Says so where the default is not the fastest on this CPU.
    """
    train = prepared.run.train
    if train.precision is None and folder.goes_on:
        began = folder.run_file.get("train", {}).get("precision")
        train = train.model_copy(update={"precision": began})
    if train.precision is None and device.type == "cpu" and (feature := cpu_bfloat16_feature()):
        say(f"precision: float32; this CPU has {feature}: `train.precision: bfloat16` would be faster")
    train = train.model_copy(update={"precision": resolve_precision(train.precision, device)})
    return replace(prepared, run=prepared.run.model_copy(update={"train": train}))


def placement_of(prepared: Prepared, device: torch.device, world: World, say: Say) -> Placement | None:
    """How the model is spread over the processes, of which `say` gets a line; None for one process.

    Raises ModelError where this machine has no room to read it.
    """
    asked = prepared.run.parallel.strategy
    if world.size == 1:
        if asked in ("shard", "hybrid"):
            say(f"parallel.strategy: {asked} means nothing to one process")
        require_room_to_read(prepared.run, device, num_whole=1)
        return None
    run = prepared.run
    if isinstance(run.model, LiveModel):
        if asked not in ("auto", "replicate"):
            raise ConfigError(
                f"parallel.strategy: {asked}, but each process holds a whole live model; give the model by its path"
            )
        run = run.model_copy(update={"parallel": run.parallel.model_copy(update={"strategy": "replicate"})})
    on_machines = sorted(set(world.gather(world.local_size)))
    if asked == "hybrid" and len(on_machines) > 1:
        raise ConfigError(
            "parallel.strategy: hybrid needs as many processes on each machine, but here they have "
            f"{' and '.join(map(str, on_machines))}; use `shard`"
        )
    if world.is_first:
        found = place_on_ranks(
            run,
            prepared.loader().largest_sequences()[0],
            len(prepared.chat.added),
            len(prepared.chat.tokenizer),
            process_device(device, world),
            world.size,
            world.local_size if len(on_machines) == 1 else world.size,  # no `hybrid`
        )
        require_room_to_read(run, device, 1 if found.strategy != "replicate" else world.local_size)
        world.publish("placement", asdict(found))
    found = Placement(**world.published("placement"))
    say(f"{world.size} processes: {in_words(found, asked)}")
    return found


def require_room_to_read(run: config.Run, device: torch.device, num_whole: int) -> None:
    """Raises ModelError where this machine's memory has no room for the weights on their way to GPUs, or quantized.

    num_whole: processes of this machine that each read all of them. What stays on the CPU is in the plan. Files that
    hold `model.dtype` are mapped from the disk, not copied; but experts, which files may hold one by one, are joined.
    """
    kind, available = run.model.quantization, host_memory_bytes()[1]
    if isinstance(run.model, LiveModel) or available is None or (device.type == "cpu" and kind is None):
        return
    num = None
    with suppress(ModelError):  # what cannot be read says so when it is loaded
        planned = read_model(run.model)
        stored = stored_dtype(run.model.path, run.model.trust_remote_code, run.model.revision)
        joins = planned.shape is not None and any(planned.shape.experts)
        if run.model.init != "random" and stored == getattr(torch, run.model.dtype) and not joins:
            return
        num = planned.num_stored if planned.shape is None else count_parameters(planned.shape).num_base
    each = (num or 0) * getattr(torch, run.model.dtype).itemsize
    needed = num_whole * each
    if needed > available:
        whose = "one process" if num_whole == 1 else f"each of {num_whole} processes on this machine"
        first = "quantized" if kind is not None else "brought to the GPU"
        helps = [
            *["parallel.strategy: shard (one process reads for all)"] * (num_whole > 1 and kind is None),
            *["fewer processes"] * (num_whole > 1),
            *["model.dtype: bfloat16"] * (run.model.dtype != "bfloat16"),
            "a machine with more memory",
        ]
        raise ModelError(
            f"{run.model.path}: {whose} reads all weights, {readable_bytes(each)} in {run.model.dtype}, before they "
            f"are {first}. That takes {readable_bytes(needed)}, and {readable_bytes(available)} of host RAM is free. "
            f"Use {' or '.join(helps)}"
        )


def process_device(device: torch.device, world: World) -> DeviceSpec:
    """What one process has: its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
    else:
        memory_bytes = host_memory_bytes()[0] // world.local_size
    return DeviceSpec("the run's own", memory_bytes, None, None, device.type)


def build_model(prepared: Prepared, device: torch.device, first_values: bool = True) -> Any:
    """The model as it is before the first step: loaded, resized, aligned with the tokenizer, adapted, optimised."""
    return build(prepared, device, lambda _: None, first_values=first_values)[0]


def build(
    prepared: Prepared,
    device: torch.device,
    say: Say,
    placement: Placement | None = None,
    world: World = ONE,
    first_values: bool = True,
) -> tuple[Any, list[int]]:
    """As `build_model`, and the tokens that the base has and never saw, of which `say` gets a line.

    placement: how the model is spread over the processes; where it is sharded, the first reads it for all.
    first_values False: an adapter's values will be replaced, so neither PiSSA's nor those of another run are needed.
    """
    run, chat = prepared.run, prepared.chat
    held = run.model.held if isinstance(run.model, LiveModel) else None
    if held is not None and held.built is not None:  # by a session of this program before
        model, untrained_ids = held.take_again()
        return _spread(model, run.engine, device, placement, world), untrained_ids
    model = _loaded(prepared, device, say, placement, world)
    has_values = model.device.type != "meta"
    if has_values and (found := first_not_finite(model.named_parameters())):
        raise ModelError(f"{run.model.path}: {found}; the checkpoint is damaged: download or merge it again")
    freeze_towers(model)
    asked = has_values and run.model.init != "random"
    untrained = world.gather(_untrained_tokens(model, prepared, say) if asked else {})[0]
    if held is not None:
        held.keep_rows({*chat.added.values(), *untrained.values()})
    resize_embeddings(model, chat.tokenizer, chat.added, run.train.seed, untrained)
    align_model(model, chat.tokenizer, chat.stop_token_ids)
    if frozen := choose_trained(model, run.model.freeze, run.model.train_only):
        say(frozen)
        new = {**chat.added, **untrained}
        if chat.tokenizer.eos_token_id in new.values():
            require_stop_token_learned(model, chat.tokenizer.eos_token, "freeze" if run.model.freeze else "train_only")
        if new and not model.get_input_embeddings().weight.requires_grad:
            say(f"the embedding is not trained, so these tokens stay at their first values: {' '.join(new)}")
    if kind := run.model.quantization:
        precision = resolve_precision(run.train.precision, device)
        _require_same_values(model, run, placement, world)  # whose scales are no parameters afterwards
        quantize_base(model, kind, bool(run.model.double_quantization), prepared.loader(), precision, device, say)
    if run.adapter is not None:
        new_token_ids = {*chat.added.values(), *untrained.values()}
        model = _adapted(model, run, new_token_ids, chat.tokenizer, has_values and first_values, say)
    _require_same_values(model, run, placement, world)
    if held is not None:
        held.keep(model, sorted(untrained.values()))
    return _spread(model, run.engine, device, placement, world), sorted(untrained.values())


def _require_same_values(model: Any, run: config.Run, placement: Placement | None, world: World) -> None:
    """Raises ModelError where processes that each hold a whole model hold other values of it."""
    if placement is None or placement.strategy != "replicate":
        return
    of_ranks = world.gather(hash_of_bits(model.named_parameters()))
    others = [str(rank) for rank, sha256 in enumerate(of_ranks) if sha256 != of_ranks[0]]
    if others:
        raise ModelError(
            f"{run.model.path}: process{'es' * (len(others) > 1)} {', '.join(others)} of {world.size} "
            f"{'has' if len(others) == 1 else 'have'} other weights before the first step than process 0. Give all "
            "nodes the same files (of the Hub: the same model.revision) and versions of the packages, or let the first "
            "process read the model for all (parallel.strategy: shard, without model.quantization)"
        )


def _adapted(model: Any, run: config.Run, new_token_ids: set[int], tokenizer: Any, first_values: bool, say: Say) -> Any:
    from preceptor.model.adapters.lora import add_adapter, load_adapter, token_rows_of

    assert run.adapter is not None and run.adapter.alpha is not None, "a resolved run has an alpha"
    options = LoraOptions.of(run.adapter)
    live_revision = getattr(model.config, "_commit_hash", None)  # of one that was loaded from the Hub
    start = adapter_to_continue(run)
    if start is not None:
        _require_same_ids(start, tokenizer, run.model.trust_remote_code)
        new_token_ids = new_token_ids | token_rows_of(start)
    model = add_adapter(
        model,
        rank=run.adapter.rank,
        alpha=run.adapter.alpha,
        dropout=run.adapter.dropout,
        target_modules=run.adapter.target_modules,
        new_token_ids=sorted(new_token_ids),
        seed=run.train.seed,
        options=options,
        first_values=first_values and start is None,
        revision=live_revision if isinstance(run.model, LiveModel) else run.model.revision,
    )
    if start is not None and first_values:
        load_adapter(model, start, options)
        say(f"trains on the adapter of {run.model.from_run}")
    return model


def _require_same_ids(adapter: Path, tokenizer: Any, trust_remote_code: bool) -> None:
    """Raises ModelError where special tokens of a saved adapter are none here, or have other ids."""
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(adapter, trust_remote_code).get_added_vocab()
    other = [
        f"{token} is {id_} there, {ours.get(token, 'absent')} here"
        for token, id_ in theirs.items()
        if ours.get(token) != id_
    ]
    if other:
        raise ModelError(
            f"{adapter}: this adapter has rows for other tokens than the run's, so it cannot be trained on: "
            f"{'; '.join(other[:_NAMED_TOKENS])}. Set data.chat_template as in the run that saved it, or leave out the "
            "section `adapter` to train its merged model"
        )


def _loaded(prepared: Prepared, device: torch.device, say: Say, placement: Placement | None, world: World) -> Any:
    """The base model, with its values; those of a sharded one are the first process's alone.

    Raises ModelError where processes hold live models of other weights.
    """
    run = prepared.run
    if isinstance(run.model, LiveModel):
        model, moved = run.model.held.take(device, prepared.chat.tokenizer)
        if moved:
            say(f"the model is moved to {device} and stays there (train.device)")
        of_ranks = world.gather(run.model.held.record)
        if any(record != of_ranks[0] for record in of_ranks):
            raise ModelError("model: the processes hold live models of other weights; load the same one in each")
        return model
    sharded = placement is not None and placement.strategy != "replicate"
    return load_model(
        run.model.path,
        dtype=run.model.dtype,
        device=("cpu" if world.is_first else "meta") if sharded else "cpu" if run.model.quantization else device,
        init=run.model.init,
        seed=run.train.seed,
        revision=run.model.revision,
        trust_remote_code=run.model.trust_remote_code,
    )


def _spread(
    model: Any, engine: config.EngineMode, device: torch.device, placement: Placement | None, world: World
) -> Any:
    """The model with its optimisations, on all processes."""
    if placement is None:
        install(model, engine)
        return model
    mesh = device_mesh(placement.strategy, device.type, world.size, placement.num_parts)
    if placement.strategy != "replicate":
        return shard_from_first(model, engine, mesh, placement.regathers, device)
    install(model, engine)
    shard_model(Engine(model), mesh)
    return model


def _untrained_tokens(model: Any, prepared: Prepared, say: Say) -> dict[str, int]:
    """The tokens of the run that its base never saw, besides those that are new to the tokenizer.

    Of a stream those that may come: all that the base never saw.
    """
    chat = prepared.chat
    used = prepared.train.token_ids | set(chat.stop_token_ids)
    if prepared.stream is not None:
        used |= set(chat.tokenizer.added_tokens_decoder)
    found = never_trained(model, chat.tokenizer, used)
    found = {token: id_ for token, id_ in found.items() if token not in chat.added}
    if found:
        how = "beside the adapter" if prepared.run.adapter is not None else "with all others"
        names = ", ".join(list(found)[:_NAMED_TOKENS]) + (", ..." if len(found) > _NAMED_TOKENS else "")
        exist = (
            "exists but was never trained: its row gets"
            if len(found) == 1
            else "exist but were never trained: rows get"
        )
        say(f"{names} {exist} a first value and {'is' if len(found) == 1 else 'are'} trained {how}")
    return found


def optimizer_of(run: config.Run, model: Any) -> torch.optim.Optimizer:
    own = run.optimizer
    assert own.name != "adafactor" or not is_sharded(Engine.of(model)), "no run shards it"
    if run.train.batch_size > 1:
        accumulate_in_float32(model)
    factors = dict(own.lr_factors)
    for pattern, factor in lr_factors(run.adapter).items():
        factors[pattern] = factors.get(pattern, 1.0) * factor
    offload = own.offload and model.device.type != "cpu"
    return build_optimizer(
        model, own.weight_decay, own.betas, own.name, own.momentum, own.rounding, factors, run.train.seed, offload
    )


def saved_dtype(model: config.Model) -> torch.dtype | None:
    """In which type the tuned model's weights are saved: as asked for, else as the base model's files have them."""
    if model.save_dtype is not None:
        return getattr(torch, model.save_dtype)
    return stored_dtype(model.place, model.trust_remote_code, model.revision)


def predicted_bytes(prepared: Prepared, model: Any, loader: Loader | StreamLoader) -> int | None:
    num_new_tokens = num_token_rows(model) or len(prepared.chat.added)
    return predict_peak_bytes(prepared.run, model, loader.largest_sequences()[0], num_new_tokens, model.device.type)
