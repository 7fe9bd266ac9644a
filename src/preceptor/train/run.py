"""A run from its prepared data to a trained model in its folder (run_folder.py lists what is in it)."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from uuid import uuid4

import torch
from rich.console import Console

from preceptor import config
from preceptor.chat.left_out import left_out_lines
from preceptor.chat.thinking import arguments_lines, spelled
from preceptor.console import Display
from preceptor.data.loader import Loader, few_steps
from preceptor.errors import CheckpointError, ConfigError, DataError, ModelError
from preceptor.model.compiled import compile_seconds
from preceptor.model.embeddings import align_model, never_trained, num_token_rows, resize_embeddings
from preceptor.model.finite import first_not_finite
from preceptor.model.forward import Engine
from preceptor.model.load import load_model, save_model, saved_bytes, stored_dtype, unusable_settings
from preceptor.model.optimisations import install
from preceptor.model.parts import causal_lm, freeze_towers, has_experts, tower_parameters
from preceptor.model.sharding import device_mesh, is_sharded, shard_from_first, shard_model
from preceptor.model.trained import choose_trained
from preceptor.plan.devices import DeviceSpec, this_machine_bytes
from preceptor.plan.plan import place_on_ranks, predict_peak_bytes
from preceptor.plan.ranks import Placement, in_words
from preceptor.train import loop
from preceptor.train.checkpoint import Checkpoints, State, checkpoint_bytes, require_finite
from preceptor.train.differences import (
    base_differences,
    changed_keys,
    content_differences,
    evaluation_differences,
    may_be_lengthened,
    rounding_differences,
)
from preceptor.train.evaluations import build_evaluations
from preceptor.train.finish import Say, finish, require_room, save_at_the_end
from preceptor.train.from_run import adapter_to_continue
from preceptor.train.improvement import outcome, outcome_lines
from preceptor.train.loop import peak_memory_bytes
from preceptor.train.objective import Objective
from preceptor.train.optimizer import (
    accumulate_in_float32,
    build_optimizer,
    expected_state_bytes,
    optimizer_lines,
)
from preceptor.train.precision import cpu_bfloat16_feature, resolve_precision
from preceptor.train.preflight import PreflightResult, preflight
from preceptor.train.prepare import Prepared
from preceptor.train.provenance import amounts, origins, session, trees_hashes, write_start
from preceptor.train.run_folder import RunFolder, claim, longer
from preceptor.train.signals import StopRequest
from preceptor.world import ONE, World, num_cores

_NAMED_TOKENS = 8


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


def _with_precision(
    prepared: Prepared, device: torch.device, folder: RunFolder, say: Callable[[str], None]
) -> Prepared:
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


def _placement(prepared: Prepared, device: torch.device, world: World, say: Callable[[str], None]) -> Placement | None:
    """How the model is spread over the processes, of which `say` gets a line; None for one process."""
    asked = prepared.run.parallel.strategy
    if world.size == 1:
        if asked != "auto":
            say(f"parallel.strategy: {asked} means nothing to one process")
        return None
    if world.is_first:
        found = place_on_ranks(
            prepared.run,
            prepared.loader().largest_sequences()[0],
            len(prepared.chat.added),
            len(prepared.chat.tokenizer),
            process_device(device, world),
            world.size,
            world.local_size,
        )
        world.publish("placement", found.to_json())
    found = Placement(**world.published("placement"))
    say(f"{world.size} processes: {in_words(found, asked)}")
    return found


def process_device(device: torch.device, world: World) -> DeviceSpec:
    """What one process has: its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
    else:
        memory_bytes = this_machine_bytes() // world.local_size
    return DeviceSpec("the run's own", memory_bytes, None, None, device.type)


def build_model(prepared: Prepared, device: torch.device) -> Any:
    """The model as it is before the first step: loaded, resized, aligned with the tokenizer, adapted, optimised."""
    return _build(prepared, device, lambda _: None)[0]


def _build(
    prepared: Prepared,
    device: torch.device,
    say: Callable[[str], None],
    placement: Placement | None = None,
    world: World = ONE,
) -> tuple[Any, list[int]]:
    """As `build_model`, and the tokens that the base has and never saw, of which `say` gets a line.

    placement: how the model is spread over the processes; where it is sharded, the first reads it for all.
    """
    run, chat = prepared.run, prepared.chat
    sharded = placement is not None and placement.strategy != "replicate"
    model = load_model(
        run.model.path,
        dtype=run.model.dtype,
        device=("cpu" if world.is_first else "meta") if sharded else device,
        init=run.model.init,
        seed=run.train.seed,
        revision=run.model.revision,
        trust_remote_code=run.model.trust_remote_code,
    )
    has_values = model.device.type != "meta"
    if has_values and (found := first_not_finite(model.named_parameters())):
        raise ModelError(f"{run.model.path}: {found}; the checkpoint is damaged: download or merge it again")
    freeze_towers(model)
    asked = has_values and run.model.init != "random"
    untrained = world.gather(_untrained_tokens(model, prepared, say) if asked else {})[0]
    resize_embeddings(model, chat.tokenizer, chat.added, run.train.seed, untrained)
    align_model(model, chat.tokenizer, chat.stop_token_ids)
    if frozen := choose_trained(model, run.model.freeze, run.model.train_only):
        say(frozen)
        new = [*chat.added, *untrained]
        if new and not model.get_input_embeddings().weight.requires_grad:
            say(f"the embedding is not trained, so these tokens stay at their first values: {' '.join(new)}")
    if run.adapter is not None:
        from preceptor.model.adapters.lora import add_adapter, load_adapter

        assert run.adapter.alpha is not None, "a resolved run has an alpha"
        model = add_adapter(
            model,
            rank=run.adapter.rank,
            alpha=run.adapter.alpha,
            dropout=run.adapter.dropout,
            target_modules=run.adapter.target_modules,
            new_token_ids=sorted({*chat.added.values(), *untrained.values()}),
            seed=run.train.seed,
        )
        start = adapter_to_continue(run)
        if start is not None and has_values:
            load_adapter(model, start)
            say(f"trains on the adapter of {run.model.from_run}")
    return _spread(model, run.engine, device, placement, world), sorted(untrained.values())


def _spread(
    model: Any, engine: config.EngineMode, device: torch.device, placement: Placement | None, world: World
) -> Any:
    """The model with its optimisations, on all processes."""
    if placement is None:
        install(model, engine)
        return model
    mesh = device_mesh(placement.strategy, device.type, world.size, world.local_size)
    if placement.strategy != "replicate":
        return shard_from_first(model, engine, mesh, placement.regathers, device)
    install(model, engine)
    shard_model(Engine(model), mesh)
    return model


def _untrained_tokens(model: Any, prepared: Prepared, say: Callable[[str], None]) -> dict[str, int]:
    """The tokens of the run that its base never saw, besides those that are new to the tokenizer."""
    chat = prepared.chat
    used = prepared.train.token_ids | set(chat.stop_token_ids)
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


def saved_dtype(model: config.Model) -> torch.dtype | None:
    """In which type the tuned model's weights are saved: as asked for, else as the base model's files have them."""
    if model.save_dtype is not None:
        asked: torch.dtype = getattr(torch, model.save_dtype)
        return asked
    return stored_dtype(model.path, model.trust_remote_code, model.revision)


def execute(prepared: Prepared, console: Console, *, resume: bool = False, replace: bool = False) -> dict[str, Any]:
    """As `execute_in`, in the folder that the run file names. resume, replace: as `claim`."""
    with claim(prepared.run, resume=resume, replace=replace) as folder:
        return execute_in(folder, prepared, console)


def execute_in(
    folder: RunFolder,
    prepared: Prepared,
    console: Console,
    stop: StopRequest | None = None,
    world: World = ONE,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train to the end and save; return the summary. A run in the folder goes on from its newest checkpoint.

    What makes the folder a run's is written when the model is loaded and has passed the preflight, so that what cannot
    work leaves nothing behind. stop: signals that stop the run (by default none are heard). world: not connected yet;
    its first process alone writes in the folder, but for checkpoints and model, and has the summary. dry_run: stop
    there, with nothing written, and return an empty summary.
    """
    started, say = time.perf_counter(), _saying(console)
    if folder.has_model:
        return finish(folder, say) if world.is_first else {}
    stop = stop or StopRequest()
    device = _connected(prepared, world)
    prepared = _with_precision(prepared, device, folder, say)
    run = prepared.run
    assert run.train.precision is not None, "resolved above"
    memory_before_bytes = peak_memory_bytes(device)
    torch.manual_seed(run.train.seed)
    placement = _placement(prepared, device, world, say)
    model, untrained = _build(prepared, device, say, placement, world)
    record = _record_of_first(folder, prepared, model, device, world, say)
    objective = Objective.of(run.loss, run.memory, model, prepared.chat.num_base_tokens, untrained, run.train)
    state = State(model, _optimizer(run, model))
    checkpoints = _checkpoints(folder, run, record, world)
    _require_room(run, state, checkpoints)
    state_bytes = expected_state_bytes(state.optimizer)
    passed = preflight(model, prepared.loader(), run.train.precision, say, objective, state_bytes)
    loader = passed.loader
    predicted = _predicted_bytes(prepared, model, loader, device) if placement is None else placement.peak_bytes
    num_steps = run.train.duration.steps(loader.steps_per_epoch)
    if dry_run:
        _announce(console, prepared, state, num_steps, loader, "`preceptor check` counts them")
        return {}
    if folder.goes_on:
        _go_on(folder, run, state, checkpoints, num_steps, world, say)
    elif world.is_first:
        counts = amounts(prepared, loader, num_steps) | {
            "each_conversation_alone": loader.alone,
            **_preparations(passed, memory_before_bytes, predicted),
        }
        record = {**record, "engine": _engine_record(run, state)}  # the proofs may have changed it
        folder.begin(record, config.dump(run), lambda place: write_start(place, prepared, counts))
    _announce(console, prepared, state, num_steps, loader, f"see {run.out}/rejections.jsonl")
    with stop.while_training(folder.path, world):
        with checkpoints, Display(console, num_steps, state.step) as display:
            evaluations = build_evaluations(prepared, folder.path, display.say, loader.alone, world)
            loop.train(run, objective, state, loader, evaluations, display, folder, checkpoints, stop, world)
        require_finite(state)
        loop.require_finite_loss(state, loader.batch(state.step - 1)[0], run.train.precision, objective)
        _end(state, run, folder, checkpoints, num_steps, world, say)
        save_at_the_end(lambda: _save(state, prepared, folder), state, checkpoints, stop, say)
        return finish(folder, say, time.perf_counter() - started) if world.is_first else {}


def _preparations(passed: PreflightResult, memory_before_bytes: int, predicted: int | None) -> dict[str, Any]:
    return {
        "preflight_seconds": passed.seconds,
        **({"compile_seconds": compile_seconds()} if compile_seconds() else {}),
        "memory_before_bytes": memory_before_bytes,
        **({} if predicted is None else {"predicted_memory_bytes": predicted}),
    }


def _engine_record(run: config.Run, state: State) -> dict[str, Any]:
    engine = state.engine.state
    why = {} if engine.not_compiled is None else {"not_compiled": engine.not_compiled}
    return {"mode": run.engine, "optimisations": sorted(engine.optimisations), **why}


def _predicted_bytes(prepared: Prepared, model: Any, loader: Loader, device: torch.device) -> int | None:
    num_new_tokens = num_token_rows(model) or len(prepared.chat.added)
    return predict_peak_bytes(prepared.run, model, loader.largest_sequences()[0], num_new_tokens, device.type)


def _connected(prepared: Prepared, world: World) -> torch.device:
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


def _checkpoints(folder: RunFolder, run: config.Run, record: Mapping[str, Any], world: World) -> Checkpoints:
    about = {"versions": record["versions"], "config": run.model_dump(mode="json")}
    place, settings, best = folder.path / "checkpoints", run.checkpoint, world.first(lambda: folder.best_step(run))
    own = world.with_own_group()  # a thread may write while training goes on
    return Checkpoints(place, record["run"], settings.keep, settings.async_save, about, own, best)


def _go_on(
    folder: RunFolder,
    run: config.Run,
    state: State,
    checkpoints: Checkpoints,
    num_steps: int,
    world: World,
    say: Say,
) -> None:
    """Bring `state` and the logs to the newest checkpoint. Raises CheckpointError where a longer run has none."""
    checkpoints.restore(state, say)
    if folder.lengthens:
        if not state.step:
            raise CheckpointError(f"{run.out}: has no checkpoint to train on from{longer(run.out)}")
        world.first(lambda: folder.lengthen(config.dump(run), num_steps))
        say(f"lengthened to {num_steps:,} steps; goes on after step {state.step:,}")
    world.first(lambda: folder.go_on(state.step, session(state.model.device, world.size), say))
    checkpoints.best = world.first(lambda: folder.best_step(run))  # of the evaluations up to there


def _end(
    state: State,
    run: config.Run,
    folder: RunFolder,
    checkpoints: Checkpoints,
    num_steps: int,
    world: World,
    say: Say,
) -> None:
    """Record how the training ended; give the model the weights that are to be saved, where they are not the last.

    A checkpoint of the last step is kept where the model is of another one, or where the run may be lengthened.
    """
    lines, step = world.first(lambda: folder.evaluations), state.step
    found = outcome(lines, run, step, num_steps)
    best = found["model_step"]
    if best != step and not checkpoints.has(best):
        say(f"the checkpoint of step {best}, the best by {run.checkpoint.best}, is not there: the last is saved")
        found = {**found, "model_step": step}
    may_go_on = run.checkpoint.every is not None and may_be_lengthened(run)
    if found["model_step"] != step or may_go_on:
        checkpoints.save(state)
        checkpoints.wait()
    world.first(lambda: folder.record_outcome(found))
    for line in outcome_lines(found, step, run.out):
        say(line)
    if found["model_step"] != step:
        checkpoints.restore_weights(state, found["model_step"])


def _optimizer(run: config.Run, model: Any) -> torch.optim.Optimizer:
    """Raises ConfigError for Adafactor of a sharded model."""
    own = run.optimizer
    if own.name == "adafactor" and is_sharded(Engine.of(model)):
        raise ConfigError(
            "optimizer.name: adafactor scales an update by its whole matrix, which no process has where weights are "
            "sharded. Set optimizer.name: adamw_8bit, or parallel.strategy: replicate"
        )
    if run.train.batch_size > 1:
        accumulate_in_float32(model)
    return build_optimizer(
        model, own.weight_decay, own.betas, own.name, own.momentum, own.rounding, own.lr_factors, run.train.seed
    )


def _save(state: State, prepared: Prepared, folder: RunFolder) -> None:
    dtype, adapter = saved_dtype(prepared.run.model), _saved_adapter(prepared.run)
    save_model(state.model, prepared.chat.tokenizer, folder.path / "model", dtype=dtype, adapter=adapter)


def _saved_adapter(run: config.Run) -> Any:
    return "both" if run.adapter is None else run.adapter.save


def _record_of_first(
    folder: RunFolder,
    prepared: Prepared,
    model: Any,
    device: torch.device,
    world: World,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """As `_record`, which the first process finds out for all: it reads the weights of the base model."""
    if not world.is_first:
        return dict(world.published("record"))
    record = _record(folder, prepared, model, device, world, say)
    world.publish("record", record)
    return record


def _record(
    folder: RunFolder,
    prepared: Prepared,
    model: Any,
    device: torch.device,
    world: World,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """What is recorded of a run that begins; of one that goes on, what was recorded when it began.

    Raises CheckpointError where that run was made from something else, and says what does not stop it.
    """
    run = prepared.run
    now = {**session(device, world.size), **origins(prepared, folder.record)}
    if reasons := base_differences(str(run.model.from_run), now["from_run"], now["model"]):
        raise ModelError("\n".join(reasons))
    if not folder.goes_on:
        return {
            "run": uuid4().hex,
            **now,
            "date": folder.date.isoformat(timespec="seconds"),
            "resumed": [],
        }
    changed = changed_keys(folder.run_file, run, f"{run.out}/config.yaml")
    reasons = [*changed.weights, *content_differences(folder.record, now)]
    if reasons:
        raise CheckpointError(
            f"{run.out}: holds a run that was made from something else; go on with the same, or replace that run with "
            "--replace:\n" + "\n".join(f"  {line}" for line in [*reasons, *changed.by_content])
        )
    rounding = [*changed.rounding, *rounding_differences(folder.record, now)]
    if rounding:
        say(f"no longer equal to the bit to an uninterrupted run, but up to rounding: {'; '.join(rounding)}")
    for measured in evaluation_differences(folder.record, now):
        say(f"{measured} are not those of the run so far: figures before and after cannot be compared")
    return folder.record


def _require_room(run: config.Run, state: State, checkpoints: Checkpoints) -> None:
    """Raises CheckpointError where the disk has no room for the model and the checkpoints of this run."""
    model_bytes = saved_bytes(state.model, _saved_adapter(run))
    num = (
        0
        if run.checkpoint.every is None
        else max(1, run.checkpoint.keep + 1 + (run.checkpoint.best is not None) - len(checkpoints.found()))
    )
    require_room(checkpoints.folder.parent, model_bytes, checkpoint_bytes(state), num)


def _saying(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, highlight=False, markup=False)


def _announce(
    console: Console, prepared: Prepared, state: State, num_steps: int, loader: Loader, where_rejected: str
) -> None:
    run, model, engine = prepared.run, state.model, state.engine
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    tokens = prepared.tokens
    console.print(
        f"{prepared.examples_per_epoch:,} examples, {tokens.computed:,} tokens, {tokens.trained:,} of them trained "
        f"({tokens.trained / tokens.computed:.0%}); sequences {loader.fill:.0%} full; {num_steps:,} steps\n"
        f"{total:,} parameters, {trained:,} trained ({trained / total:.1%}), on {model.device}",
        highlight=False,
    )
    towers = sum(p.numel() for p in tower_parameters(model))
    of_towers = f"{towers:,} parameters are of towers that no text goes through: saved as they are" if towers else ""
    optimisations = f"engine: {', '.join(sorted(engine.state.optimisations)) or 'plain'}"
    lines = [of_towers, optimisations, str(tokens), str(prepared.shortened)]
    lines += arguments_lines(prepared.arguments.to_json(), prepared.arguments.defaults())
    lines += left_out_lines(prepared.left_out.to_json())
    clocks = prepared.chat.template.clock.values() if prepared.chat.template else ()
    lines += [f"the chat template writes the date: {clock.date:%d %B %Y} in all of this run" for clock in clocks]
    lines += [*prepared.chat.doubts, *_model_lines(prepared, model)]
    lines += [*optimizer_lines(state.optimizer), *_saved_lines(run.model, model)]
    for line in filter(None, lines):
        console.print(line, highlight=False, markup=False)
    few = few_steps(num_steps, tokens.computed, int(prepared.train.lengths.max()))
    if few:
        console.print(few, style="yellow", highlight=False, markup=False)
    if prepared.chat.added:
        console.print(f"new tokens: {' '.join(prepared.chat.added)}", highlight=False, markup=False)
    if prepared.rejections:
        num = len(prepared.rejections)
        console.print(f"{num} example{'s' * (num != 1)} rejected, {where_rejected}", style="yellow")


def _model_lines(prepared: Prepared, model: Any) -> Iterator[str]:
    """What the model's kind makes of the run."""
    limits = prepared.chat.limits
    longest = int(prepared.train.lengths.max())
    if limits is not None and limits.num_positions is not None and longest > limits.num_positions:
        yield f"the longest example has {longest:,} tokens; the base was made for {limits.num_positions:,}"
    if not has_experts(model):
        return
    if prepared.run.adapter is not None:
        covered = any(".experts." in name for name, weight in model.named_parameters() if weight.requires_grad)
        yield "the adapter trains the experts too" if covered else "the experts have no adapter: they stay as they are"
    settings = causal_lm(model).config.get_text_config(decoder=True)
    if getattr(settings, "output_router_logits", False) and getattr(settings, "router_aux_loss_coef", 0):
        yield "the loss that balances experts (router_aux_loss_coef in the config) is not part of this run's"


def _saved_lines(settings: config.Model, model: Any) -> Iterator[str]:
    """In what the saved model will differ from the one that is held, and from the base."""
    dtype = saved_dtype(settings)
    if dtype not in (None, model.dtype):
        why = "model.save_dtype" if settings.save_dtype else "as the base model's files have them"
        yield f"weights are held in {_name(model.dtype)} and saved in {_name(dtype)} ({why})"
    unusable = unusable_settings(model.generation_config)
    if unusable:
        yield f"generation config: {spelled(unusable)} does not validate in the base model's and is left out"


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
