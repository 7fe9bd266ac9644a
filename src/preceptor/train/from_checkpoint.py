"""A checkpoint of a run as a model: asked and evaluated, or saved as the run would save it."""

from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from preceptor import config
from preceptor.chat.format import trained_format
from preceptor.errors import ModelError
from preceptor.evaluate.likelihood import must_read_alone
from preceptor.evaluate.model import EvaluatedModel, default_dtype, device_named, load_evaluated_model
from preceptor.files import LIVE, MEMORY
from preceptor.hub import checkpoint_at
from preceptor.model.held import leave_plain
from preceptor.model.load import save_model
from preceptor.train.build import build_model, saved_dtype
from preceptor.train.checkpoint import Checkpoints, State
from preceptor.train.earlier_run import require_trusted, where_it_started
from preceptor.train.prepare import Prepared, prepare
from preceptor.train.run_folder import RUN_FILE, record_of


def open_model(
    path: str, dtype: str, device: str, template: str | None = None, trust_remote_code: bool = False
) -> EvaluatedModel:
    """As `load_evaluated_model`, of a checkpoint too, whose weights are rounded as the run would save them."""
    checkpoint = checkpoint_at(path)
    if checkpoint is None:
        return load_evaluated_model(path, dtype, device, template, trust_remote_code)
    place = device_named(device)
    with where_it_started(checkpoint.parent.parent):
        model, prepared = restored(checkpoint, place, trust_remote_code)
        saved = saved_dtype(prepared.run.model)
    if hasattr(model, "peft_config"):
        from preceptor.model.adapters.lora import merge

        model = merge(model)
    dtype = default_dtype(saved, place) if dtype == "auto" else dtype
    saved = saved or model.dtype
    for parameter in model.parameters():  # not what is no weight, such as rotary frequencies
        parameter.data = parameter.data.to(saved).to(getattr(torch, dtype))
    model.eval()
    stops = model.generation_config.eos_token_id
    own = stops if isinstance(stops, list) else [stops] if stops is not None else []
    chat = trained_format(path, prepared.chat.tokenizer, own, template)
    return EvaluatedModel(path, model, chat, must_read_alone(model))


def save_checkpoint(checkpoint: Path, folder: Path, trust_remote_code: bool = False) -> None:
    """Write the model of a checkpoint to a folder, as its run would save it: with an adapter, both."""
    folder = folder.absolute()
    with where_it_started(checkpoint.parent.parent):
        model, prepared = restored(checkpoint, torch.device("cpu"), trust_remote_code)
        save_model(model, prepared.chat.tokenizer, folder, dtype=saved_dtype(prepared.run.model))


def restored(checkpoint: Path, device: torch.device, trust_remote_code: bool) -> tuple[Any, Prepared]:
    """The model of a run with the weights of a checkpoint, its adapter on the unquantized base; and the run, prepared.

    The run's data must be there, as it was named: chat format and new tokens follow from it. Raises as `prepare` does,
    CheckpointError for what is damaged, ModelError for a model or data that a program held, and for Python code that
    the run file names where that is not trusted.
    """
    folder = checkpoint.parent.parent
    record = record_of(folder)
    run = _run_of(folder / RUN_FILE, trust_remote_code)
    prepared = prepare(run, date=datetime.fromisoformat(record["date"]))
    with prepared.streaming():
        model = build_model(prepared, device, first_values=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    state = State(model, torch.optim.SGD(trained))  # whose state is not read
    checkpoints = Checkpoints(checkpoint.parent, record["run"], keep=1)
    checkpoints.restore_weights(state, int(checkpoint.name.removeprefix("step-")))
    leave_plain(model)
    return model, prepared


def _run_of(file: Path, trust_remote_code: bool) -> config.Run:
    """The run of a checkpoint, without what is not needed to build its model: quantization, evaluation, own loss,
    optimisations. Its file does not decide whether Python code is run: who opens the checkpoint does.
    """
    run = config.load(file, [])
    sources = [*run.data.train, *run.data.eval, *(run.replay.data if run.replay else ())]
    named = [run.model.path, *(source.path for source in sources), *(source.code or "" for source in sources)]
    if any(name.startswith((LIVE, MEMORY)) for name in named):
        raise ModelError(
            f"{file}: a checkpoint is opened with its run's data and model, which a Python program held: finish the "
            "run and use its model"
        )
    require_trusted(sources, file, trust_remote_code)
    unquantized = {"quantization": None, "double_quantization": None}
    model = run.model.model_copy(update={"trust_remote_code": trust_remote_code, **unquantized})
    evaluation = run.eval.model_copy(update={"tasks": [], "code": None})
    loss = run.loss.model_copy(update={"code": None})
    return run.model_copy(update={"model": model, "eval": evaluation, "loss": loss, "engine": "plain"})
