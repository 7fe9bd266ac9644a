"""The command `init`: a first run file for some data."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from preceptor import errors
from preceptor.commands.options import TemplateName, large_imports
from preceptor.console import say
from preceptor.files import write_json, writing
from preceptor.hub import SCHOLAR, fetch_optional

_SCHEMA = ".preceptor-schema.json"  # hidden, so that it is no data where the run file lies in a folder of data


def init(
    run_file: Annotated[Path, typer.Argument(metavar="[RUN.yaml]", help="The run file to write.")] = Path("run.yaml"),
    model: Annotated[str | None, typer.Option(help="The base model: a folder, Hub id or `scholar`.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="A data file, folder or Hub id; repeatable.")
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option("--eval", metavar="PATH", help="A file of held-out examples; repeatable.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the run. Default: runs/NAME of the run file.")] = None,
    chat_template: TemplateName = None,
    method: Annotated[
        Literal["auto", "full", "lora"], typer.Option(help="`auto`: all weights where that fits, else LoRA.")
    ] = "auto",
    device: Annotated[str | None, typer.Option(help="A device such as `H100`. Default: this machine.")] = None,
) -> None:
    """Write a run file that suits your data and device."""
    from preceptor.config.run import json_schema

    if run_file.exists():
        raise errors.ConfigError(f"{run_file}: exists already and is left as it is; name another file")
    run = _named_run(run_file, model, data or [], held_out or [], out, chat_template)
    text, plan, rejected = _suggested(run, run_file, method, device)
    with writing(run_file):
        run_file.parent.mkdir(parents=True, exist_ok=True)
        with run_file.open("x", encoding="utf-8") as file:
            file.write(text)
    write_json(run_file.parent / _SCHEMA, json_schema())
    check, train = (errors.command(name, run_file) for name in ("check", "train"))
    say(f"{text}\n{plan}\n{rejected}\nwritten to {run_file}. Next: {check}, then {train}")


def _named_run(
    run_file: Path, model: str | None, data: list[str], held_out: list[str], out: str | None, template: str | None
) -> Any:
    """The run that the options name, or the answers on a terminal; all of its files exist."""
    from preceptor import config

    asks = sys.stdin.isatty() and (model is None or not data)
    if model is None and asks:
        model = typer.prompt("Base model (a folder, Hub id or `scholar`)", default=SCHOLAR)
    if not data and asks:
        data = [typer.prompt("Data (a file, folder or Hub id)")]
    if model is None or not data:
        raise errors.ConfigError("--model and --data are needed where nobody can be asked, such as --data train.jsonl")
    default = f"runs/{run_file.stem}"
    if out is None:
        out = typer.prompt("Folder of the run", default=default) if asks else default
    tree = {
        "model": {"path": model},
        "data": {
            "train": [_source(path) for path in data],
            "eval": [{"path": path} for path in held_out],
            "chat_template": template,
        },
        "out": out,
    }
    from preceptor.train.session import check_names

    return check_names(config.build(tree, "init"))


def _source(path: str) -> dict[str, str]:
    """A source; of a folder with several splits, the one that is for training."""
    from preceptor.config import Source
    from preceptor.data.formats.tables import find_tables

    try:
        find_tables(Source(path=path))
    except errors.DataError:
        for split in ("train", "train_sft"):
            try:
                find_tables(Source(path=path, split=split))
            except errors.PreceptorError:
                continue
            return {"path": path, "split": split}
    return {"path": path}


def _suggested(
    run: Any, run_file: Path, method: Literal["auto", "full", "lora"], device_name: str | None
) -> tuple[str, str, str]:
    """The run file's text, what `plan` says of it, and what to do about examples that cannot be trained."""
    from preceptor.plan.devices import find_device
    from preceptor.plan.model import read_model

    device = find_device(device_name)
    model = read_model(run.model)
    if model.tokenizer_file is None and not Path(model.path).is_dir():
        fetch_optional(model.path, ("tokenizer.json", "tokenizer_config.json"))
        model = read_model(run.model)
    with large_imports():
        from preceptor.inspect.suggestion import hold_out, read_lengths, rejected_line, suggest
        from preceptor.plan.dry_run import DryRun, dry_run_of

    run, lengths = hold_out(run, read_lengths(run))
    from preceptor.plan.sample import sample_data

    sample = sample_data(run, model.tokenizer_file)
    dry_run: DryRun | str
    try:
        dry_run = dry_run_of(run.model)
    except errors.ModelError as error:
        dry_run = str(error)
    found = suggest(run, lengths, model, sample, device, dry_run, method)
    text = found.text(_SCHEMA, errors.command("train", run_file))
    rejected = ""
    if lengths.rejections.num_rejected:
        rejected = (
            f"\n{rejected_line(lengths)}:\n{lengths.rejections}\n"
            f"Fix the data; or take away the # before allow_rejected in {run_file}, and such examples are left out.\n"
        )
    if isinstance(dry_run, str):
        return text, f"no plan: {dry_run}", rejected
    from preceptor.plan.changes import find_plan
    from preceptor.plan.text import to_text

    try:
        plan = to_text(find_plan(found.run, model, sample, device, dry_run))
    except errors.DataError as error:
        plan = f"no plan: {error}"
    return text, plan, rejected
