"""A run from its prepared data to a trained model in its folder (run_folder.py lists what is in it)."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from preceptor import config
from preceptor.chat.left_out import left_out_lines
from preceptor.chat.thinking import arguments_lines, spelled
from preceptor.console import Display
from preceptor.data.loader import Loader, few_steps
from preceptor.errors import CheckpointError, ConfigError
from preceptor.files import write_json
from preceptor.model.embeddings import align_model, never_trained, num_token_rows, resize_embeddings
from preceptor.model.forward import Engine
from preceptor.model.load import load_model, save_model, stored_dtype, unusable_settings
from preceptor.model.optimisations import install
from preceptor.model.parts import freeze_towers, tower_parameters
from preceptor.plan.plan import predict_peak_bytes
from preceptor.report.page import write_report
from preceptor.train import checkpoint, loop
from preceptor.train.checkpoint import State
from preceptor.train.evaluations import build_evaluations
from preceptor.train.loop import peak_memory_bytes
from preceptor.train.objective import Objective
from preceptor.train.optimizer import build_optimizer
from preceptor.train.precision import cpu_bfloat16_feature, resolve_precision
from preceptor.train.preflight import preflight
from preceptor.train.prepare import Prepared
from preceptor.train.run_folder import resume_run, start_run

_NAMED_TOKENS = 8


def choose_device(device: str) -> torch.device:
    """Raises ConfigError where `cuda` is asked for and not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device: cuda, but torch sees no GPU here; use `auto` or `cpu`")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _with_precision(prepared: Prepared, device: torch.device, say: Callable[[str], None]) -> Prepared:
    """The run with `train.precision` written out; says so where the default is not the fastest on this CPU."""
    train = prepared.run.train
    if train.precision is None and device.type == "cpu" and (feature := cpu_bfloat16_feature()):
        say(f"precision: float32; this CPU has {feature}: `train.precision: bfloat16` would be faster")
    train = train.model_copy(update={"precision": resolve_precision(train.precision, device)})
    return replace(prepared, run=prepared.run.model_copy(update={"train": train}))


def build_model(prepared: Prepared, device: torch.device, say: Callable[[str], None] = lambda _: None) -> Any:
    """The model as it is before the first step: loaded, resized, aligned with the tokenizer, adapted, optimised.

    `say` gets a line for each token that the base has and never saw.
    """
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
    freeze_towers(model)
    untrained = {} if run.model.init == "random" else _untrained_tokens(model, prepared, say)
    resize_embeddings(model, chat.tokenizer, chat.added, run.train.seed, untrained)
    align_model(model, chat.tokenizer, chat.stop_token_ids)
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
    """Train to the end and save; return the summary.

    The folder is made when the model is loaded and has passed the preflight, so that what cannot work leaves nothing
    behind.
    """
    started = time.perf_counter()
    device = choose_device(prepared.run.train.device)
    prepared = _with_precision(prepared, device, _saying(console))
    run, folder = prepared.run, Path(prepared.run.out)
    assert run.train.precision is not None, "resolved above"
    memory_before_bytes = peak_memory_bytes(device)
    torch.manual_seed(run.train.seed)
    model = build_model(prepared, device, _saying(console))
    objective = Objective.of(run.loss, run.memory, model, prepared.chat.num_base_tokens)
    passed = preflight(model, prepared.loader(), run.train.precision, _saying(console), objective)
    loader = passed.loader
    predicted_memory_bytes = predict_peak_bytes(
        run, model, loader.largest_sequences()[0], num_token_rows(model) or len(prepared.chat.added), device.type
    )
    torch.manual_seed(run.train.seed)  # what the proofs drew does not count
    num_steps = run.train.duration.steps(loader.steps_per_epoch)
    state = State(model, build_optimizer(model, run.optimizer.weight_decay, run.optimizer.betas))
    if resume:
        _resume(state, prepared, folder)
    else:
        start_run(folder, prepared, loader, num_steps, device, state.engine.state.optimisations, replace)
    _announce(console, prepared, state.engine, num_steps, loader)
    with Display(console, num_steps, state.step) as display:
        evaluations = build_evaluations(prepared, folder, display.say, loader.alone)
        loop.train(run, objective, state, loader, evaluations, display, folder, prepared.fingerprint)
    save_model(model, prepared.chat.tokenizer, folder / "model", dtype=saved_dtype(run.model))
    summary = {
        "examples_per_epoch": prepared.examples_per_epoch,
        "num_rejected": len(prepared.rejections),
        "shortened": asdict(prepared.shortened),
        "tokens": asdict(prepared.tokens),
        "fill": loader.fill,
        "each_conversation_alone": loader.alone,
        "preflight_seconds": passed.seconds,
        "num_steps": state.step,
        "held_out": evaluations.last,
        "memory_before_bytes": memory_before_bytes,
        **({} if predicted_memory_bytes is None else {"predicted_memory_bytes": predicted_memory_bytes}),
        "seconds": time.perf_counter() - started,
    }
    write_json(folder / "summary.json", summary)
    _write_report(folder, console)
    return summary


def _write_report(folder: Path, console: Console) -> None:
    """The run is complete without its report, so no error of the report may fail it."""
    try:
        write_report([folder])
    except Exception as error:
        console.print(
            f"the report could not be written ({type(error).__name__}: {error}); the run itself is complete. "
            f"Try `preceptor report {folder}`",
            style="yellow",
            markup=False,
        )


def _resume(state: State, prepared: Prepared, folder: Path) -> None:
    """Bring model, optimizer and the run's files to its newest checkpoint. Raises CheckpointError."""
    if (folder / "model").exists():
        raise CheckpointError(f"{folder}: this run is finished; its model is in {folder / 'model'}")
    checkpoint.restore(state, folder / "checkpoints", prepared.fingerprint)
    resume_run(folder, state.step, state.model.device)


def _saying(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, highlight=False, markup=False)


def _announce(console: Console, prepared: Prepared, engine: Engine, num_steps: int, loader: Loader) -> None:
    run, model = prepared.run, engine.model
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
    lines += _saved_lines(run.model, model)
    for line in filter(None, lines):
        console.print(line, highlight=False, markup=False)
    few = few_steps(num_steps, tokens.computed, int(prepared.train.lengths.max()))
    if few:
        console.print(few, style="yellow", highlight=False, markup=False)
    if prepared.chat.added:
        console.print(f"new tokens: {' '.join(prepared.chat.added)}", highlight=False, markup=False)
    if prepared.rejections:
        num = len(prepared.rejections)
        console.print(
            f"{num} example{'s' * (num != 1)} rejected, see {prepared.run.out}/rejections.jsonl", style="yellow"
        )


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
