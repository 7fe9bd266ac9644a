"""A prepared run -> a trained model in its folder (train/folder.py lists what is in it)."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from preceptor.data.loader import Loader
from preceptor.data.prefix_sharing import chains_of
from preceptor.errors import CheckpointError, ConfigError
from preceptor.model.load import load_model, resolve_model_path, save_model
from preceptor.model.peak import peak_memory_bytes
from preceptor.model.towers import freeze_towers, tower_parameters
from preceptor.model.vocabulary import align_model, resize_embeddings
from preceptor.plan.plan import predict_peak_bytes
from preceptor.train import checkpoint, loop
from preceptor.train.checkpoint import State
from preceptor.train.evaluations import build_evaluations
from preceptor.train.folder import open_folder, write_summary
from preceptor.train.metrics import Display, drop_lines_after
from preceptor.train.objective import Objective
from preceptor.train.optimizer import build_optimizer
from preceptor.train.precision import cpu_bfloat16_feature, resolve_precision
from preceptor.train.preflight import preflight
from preceptor.train.prepare import Prepared
from preceptor.train.record import record_resume, record_start


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


def build_model(prepared: Prepared, device: torch.device) -> Any:
    """The model as it is before the first step: loaded, resized, aligned with the tokenizer, adapted."""
    run, voice = prepared.run, prepared.voice
    model = load_model(
        resolve_model_path(run.model.path),
        dtype=run.model.dtype,
        device=device,
        init=run.model.init,
        seed=run.train.seed,
        revision=run.model.revision,
        trust_remote_code=run.model.trust_remote_code,
    )
    freeze_towers(model)
    resize_embeddings(model, voice.tokenizer, voice.tokens, seed=run.train.seed)
    align_model(model, voice.tokenizer, voice.stop_token_ids)
    if run.adapter is not None:
        from preceptor.model.adapters.lora import add_adapter

        assert run.adapter.alpha is not None, "a resolved run has an alpha"
        model = add_adapter(
            model,
            rank=run.adapter.rank,
            alpha=run.adapter.alpha,
            dropout=run.adapter.dropout,
            target_modules=run.adapter.target_modules,
            new_token_ids=voice.tokens.new_ids,
            seed=run.train.seed,
        )
    return model


def execute(prepared: Prepared, console: Console, *, resume: bool = False, replace: bool = False) -> dict[str, Any]:
    """Train to the end and save; return the summary.

    The folder comes into being when the model is loaded and has passed the preflight, so that what cannot work leaves
    nothing behind.
    """
    started = time.perf_counter()
    device = choose_device(prepared.run.train.device)
    prepared = _with_precision(prepared, device, _saying(console))
    run = prepared.run
    folder = Path(run.out)
    torch.manual_seed(run.train.seed)
    before_bytes = peak_memory_bytes(device)
    model = build_model(prepared, device)
    objective = Objective.of(run.loss, run.memory, model, prepared.voice.num_base_tokens)
    assert run.train.precision is not None, "resolved above"
    passed = preflight(model, prepared.loader(), run.train.precision, _saying(console), objective)
    loader = passed.loader
    torch.manual_seed(run.train.seed)  # what the proofs drew does not count
    state = State(model, build_optimizer(model, run.optimizer.weight_decay, run.optimizer.betas))
    if resume:
        if (folder / "model").exists():
            raise CheckpointError(f"{folder}: this run is finished; its model is in {folder / 'model'}")
        checkpoint.restore(state, folder / "checkpoints", prepared.fingerprint)
        for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
            drop_lines_after(folder / name, state.step)
    else:
        open_folder(folder, run, prepared.rejections, replace)
    num_steps = run.train.duration.steps(loader.steps_per_epoch)
    if resume:
        record_resume(folder, device, state.step)
    else:
        record_start(folder, prepared, loader, num_steps, device)
    _announce(console, prepared, model, num_steps, loader)
    with Display(console, num_steps, state.step) as display:
        watch = build_evaluations(prepared, folder, display.say, loader.alone)
        loop.train(run, objective, state, loader, watch, display, folder, prepared.fingerprint)
    save_model(model, prepared.voice.tokenizer, folder / "model")
    summary = {
        "examples_per_epoch": prepared.examples_per_epoch,
        "num_rejected": len(prepared.rejections),
        "shortened": asdict(prepared.shortened),
        "tokens": asdict(prepared.tokens),
        "fill": loader.fill,
        "each_conversation_alone": loader.alone,
        "preflight_seconds": passed.seconds,
        "num_steps": state.step,
        "held_out": watch.last,
        "memory_before_bytes": before_bytes,
        **_predicted(prepared, loader, device),
        "seconds": time.perf_counter() - started,
    }
    write_summary(folder, summary)
    from preceptor.report.page import write_report

    write_report([folder])
    return summary


def _predicted(prepared: Prepared, loader: Loader, device: torch.device) -> dict[str, int]:
    """`predicted_memory_bytes` of the largest row of the first epoch; nothing where the plan knows no prediction."""
    rows = [loader.trees(planned) for planned in loader.plan(0)]
    if loader.alone:
        rows = [[chain] for row in rows for tree in row for chain in chains_of(tree)]
    largest = max(rows, key=lambda row: sum(tree.num_tokens for tree in row))
    voice = prepared.voice
    found = predict_peak_bytes(
        prepared.run, largest, len(voice.tokens.added), len(voice.tokenizer), cpu=device.type == "cpu"
    )
    return {} if found is None else {"predicted_memory_bytes": found}


def _saying(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, highlight=False, markup=False)


def _announce(console: Console, prepared: Prepared, model: Any, num_steps: int, loader: Loader) -> None:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    tokens = prepared.tokens
    console.print(
        f"{prepared.examples_per_epoch:,} examples, {tokens.computed:,} tokens, {tokens.trained:,} of them trained "
        f"({tokens.trained / tokens.computed:.0%}); rows {loader.fill:.0%} full; {num_steps:,} steps\n"
        f"{total:,} parameters, {trained:,} trained ({trained / total:.1%}), on {model.device}",
        highlight=False,
    )
    towers = sum(p.numel() for p in tower_parameters(model))
    of_towers = f"{towers:,} parameters are of towers that no text goes through: saved as they are" if towers else ""
    for line in filter(None, (of_towers, str(tokens), str(prepared.shortened))):
        console.print(line, highlight=False, markup=False)
    if prepared.voice.tokens.added:
        console.print(f"new tokens: {' '.join(prepared.voice.tokens.added)}", highlight=False, markup=False)
    if prepared.rejections:
        num = len(prepared.rejections)
        console.print(f"{num} row{'s' * (num != 1)} rejected, see {prepared.run.out}/rejections.jsonl", style="yellow")
