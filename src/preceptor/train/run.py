"""A run from its prepared data to a trained model in its folder (run_folder.py lists what is in it)."""

import time
from collections.abc import Callable, Iterator
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
from preceptor.errors import CheckpointError, ConfigError, ModelError
from preceptor.model.embeddings import align_model, never_trained, num_token_rows, resize_embeddings
from preceptor.model.finite import first_not_finite
from preceptor.model.forward import Engine
from preceptor.model.load import load_model, save_model, stored_dtype, unusable_settings
from preceptor.model.optimisations import install
from preceptor.model.parts import causal_lm, freeze_towers, has_experts, tower_parameters
from preceptor.model.trained import choose_trained
from preceptor.plan.plan import predict_peak_bytes
from preceptor.train import loop
from preceptor.train.checkpoint import Checkpoints, State, checkpoint_bytes, require_finite
from preceptor.train.differences import (
    changed_keys,
    content_differences,
    evaluation_differences,
    rounding_differences,
)
from preceptor.train.evaluations import build_evaluations
from preceptor.train.finish import finish, require_room, save_at_the_end
from preceptor.train.loop import peak_memory_bytes
from preceptor.train.objective import Objective
from preceptor.train.optimizer import (
    accumulate_in_float32,
    build_optimizer,
    expected_state_bytes,
    optimizer_lines,
)
from preceptor.train.precision import cpu_bfloat16_feature, resolve_precision
from preceptor.train.preflight import preflight
from preceptor.train.prepare import Prepared
from preceptor.train.provenance import amounts, origins, session, write_start
from preceptor.train.run_folder import RunFolder, claim
from preceptor.train.signals import StopRequest

_NAMED_TOKENS = 8


def choose_device(device: str) -> torch.device:
    """Raises ConfigError where `cuda` is asked for and not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device: cuda, but torch sees no GPU here; use `auto` or `cpu`")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


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


def build_model(prepared: Prepared, device: torch.device) -> Any:
    """The model as it is before the first step: loaded, resized, aligned with the tokenizer, adapted, optimised."""
    return _build(prepared, device, lambda _: None)[0]


def _build(prepared: Prepared, device: torch.device, say: Callable[[str], None]) -> tuple[Any, list[int]]:
    """As `build_model`, and the tokens that the base has and never saw, of which `say` gets a line."""
    run, chat = prepared.run, prepared.chat
    model = load_model(
        run.model.path,
        dtype=run.model.dtype,
        device=device,
        init=run.model.init,
        seed=run.train.seed,
        revision=run.model.revision,
        trust_remote_code=run.model.trust_remote_code,
    )
    if found := first_not_finite(model.named_parameters()):
        raise ModelError(f"{run.model.path}: {found}; the checkpoint is damaged: download or merge it again")
    freeze_towers(model)
    untrained = {} if run.model.init == "random" else _untrained_tokens(model, prepared, say)
    resize_embeddings(model, chat.tokenizer, chat.added, run.train.seed, untrained)
    align_model(model, chat.tokenizer, chat.stop_token_ids)
    if frozen := choose_trained(model, run.model.freeze, run.model.train_only):
        say(frozen)
        new = [*chat.added, *untrained]
        if new and not model.get_input_embeddings().weight.requires_grad:
            say(f"the embedding is not trained, so these tokens stay at their first values: {' '.join(new)}")
    if run.adapter is not None:
        from preceptor.model.adapters.lora import add_adapter

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
    install(model, run.engine)
    return model, sorted(untrained.values())


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
    folder: RunFolder, prepared: Prepared, console: Console, stop: StopRequest | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Train to the end and save; return the summary. A run in the folder goes on from its newest checkpoint.

    What makes the folder a run's is written when the model is loaded and has passed the preflight, so that what cannot
    work leaves nothing behind. stop: signals that stop the run (by default none are heard). dry_run: stop there, with
    nothing written, and return an empty summary.
    """
    started, say = time.perf_counter(), _saying(console)
    if folder.has_model:
        return finish(folder, say)
    stop = stop or StopRequest()
    device = choose_device(prepared.run.train.device)
    prepared = _with_precision(prepared, device, folder, say)
    run = prepared.run
    assert run.train.precision is not None, "resolved above"
    memory_before_bytes = peak_memory_bytes(device)
    torch.manual_seed(run.train.seed)
    model, untrained = _build(prepared, device, say)
    record = _record(folder, prepared, model, device, say)
    objective = Objective.of(run.loss, run.memory, model, prepared.chat.num_base_tokens, untrained, run.train)
    state = State(model, _optimizer(run, model))
    checkpoints = Checkpoints(folder.path / "checkpoints", record["run"], run.checkpoint.keep)
    _require_room(run, state, checkpoints)
    passed = preflight(
        model, prepared.loader(), run.train.precision, say, objective, expected_state_bytes(state.optimizer)
    )
    loader = passed.loader
    predicted = predict_peak_bytes(
        run, model, loader.largest_sequences()[0], num_token_rows(model) or len(prepared.chat.added), device.type
    )
    torch.manual_seed(run.train.seed)  # what the proofs drew does not count
    num_steps = run.train.duration.steps(loader.steps_per_epoch)
    if dry_run:
        _announce(console, prepared, state, num_steps, loader, "`preceptor check` counts them")
        return {}
    if folder.goes_on:
        checkpoints.restore(state, say)
        folder.go_on(state.step, session(device), say)
    else:
        counts = amounts(prepared, loader, num_steps) | {
            "each_conversation_alone": loader.alone,
            "preflight_seconds": passed.seconds,
            "memory_before_bytes": memory_before_bytes,
            **({} if predicted is None else {"predicted_memory_bytes": predicted}),
        }
        folder.begin(record, config.dump(run), lambda place: write_start(place, prepared, counts))
    _announce(console, prepared, state, num_steps, loader, f"see {run.out}/rejections.jsonl")
    with stop.after_step():
        with Display(console, num_steps, state.step) as display:
            evaluations = build_evaluations(prepared, folder.path, display.say, loader.alone)
            loop.train(run, objective, state, loader, evaluations, display, folder, checkpoints, stop)
        require_finite(state)
        loop.require_finite_loss(state, loader.batch(num_steps - 1)[0], run.train.precision, objective)
        save_at_the_end(lambda: _save(state, prepared, folder), state, checkpoints, stop, say)
        return finish(folder, say, time.perf_counter() - started)


def _optimizer(run: config.Run, model: Any) -> torch.optim.Optimizer:
    own = run.optimizer
    if run.train.batch_size > 1:
        accumulate_in_float32(model)
    return build_optimizer(
        model, own.weight_decay, own.betas, own.name, own.momentum, own.rounding, own.lr_factors, run.train.seed
    )


def _save(state: State, prepared: Prepared, folder: RunFolder) -> None:
    dtype = saved_dtype(prepared.run.model)
    save_model(state.model, prepared.chat.tokenizer, folder.path / "model", dtype=dtype)


def _record(
    folder: RunFolder, prepared: Prepared, model: Any, device: torch.device, say: Callable[[str], None]
) -> dict[str, Any]:
    """What is recorded of a run that begins; of one that goes on, what was recorded when it began.

    Raises CheckpointError where that run was made from something else, and says what does not stop it.
    """
    run = prepared.run
    now = {**session(device), **origins(prepared, folder.record)}
    if not folder.goes_on:
        engine = {"mode": run.engine, "optimisations": sorted(Engine(model).state.optimisations)}
        return {
            "run": uuid4().hex,
            **now,
            "date": folder.date.isoformat(timespec="seconds"),
            "engine": engine,
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
    parameters = list(state.model.parameters())
    model_bytes = sum(p.numel() * p.element_size() for p in parameters)
    num = 0 if run.checkpoint.every is None else max(1, run.checkpoint.keep + 1 - len(checkpoints.found()))
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
