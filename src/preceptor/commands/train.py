"""The command `train`: fine-tune a model as described by a run file."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from preceptor.commands.options import Overrides, Replace, RunFile, large_imports, load_run, require_one_process
from preceptor.hub import SCHOLAR

if TYPE_CHECKING:
    from rich.console import Console

    from preceptor.config import Run
    from preceptor.train.prepare import Prepared


def train(
    run_file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint of the run.")] = False,
    replace: Replace = False,
) -> None:
    """Fine-tune a model as described by a run file."""
    from preceptor.console import say, standard_console

    require_one_process()
    run = load_run(run_file, overrides)
    say(first_line(run))
    from preceptor.train.run_folder import check_out

    if not resume:
        check_out(run.out, replace)
    console = standard_console()
    prepared = _prepare(run, console)
    from preceptor.train.run import execute

    try:
        summary = execute(prepared, console, resume=resume, replace=replace)
    except KeyboardInterrupt:
        hint = "; --resume continues from the newest checkpoint" if run.checkpoint.every else ""
        say(f"interrupted{hint}", error=True)
        raise typer.Exit(130) from None
    console.print(f"done in {summary['seconds']:.0f} s; the model is in {run.out}/model", highlight=False)
    console.print(f"talk to it: preceptor chat {run.out}/model", highlight=False)


def first_line(run: "Run") -> str:
    """What is trained on what, before torch is loaded, which takes seconds."""
    hub = "" if run.model.path == SCHOLAR or Path(run.model.path).is_dir() else " (from the Hub, or its cache)"
    return f"{run.model.path}{hub}, trained on {', '.join(source.path for source in run.data.train)} -> {run.out}"


def _prepare(run: "Run", console: "Console") -> "Prepared":
    from preceptor.inspect.check import format_line

    with large_imports():
        from preceptor.train.prepare import prepare

    prepared = prepare(run, num_processes=min(4, os.cpu_count() or 1))
    for name, formats in prepared.formats.items():
        console.print(format_line(name, formats), highlight=False, markup=False)
    return prepared
