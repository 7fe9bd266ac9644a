"""`train` and `demo`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from preceptor.commands.arguments import Overrides, Replace, RunFile
from preceptor.commands.importing import large_imports


def train(
    run_file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    replace: Replace = False,
) -> None:
    """Fine-tune a model as a run file says."""
    from preceptor import config
    from preceptor.console import standard_console
    from preceptor.train.run_folder import check_out

    run = config.load(run_file, overrides or [])
    if not resume:
        check_out(run.out, replace)
    console = standard_console()
    prepared = _prepare(run, console)
    from preceptor.train.run import execute

    try:
        summary = execute(prepared, console, resume=resume, replace=replace)
    except KeyboardInterrupt:
        hint = "; --resume goes on from the newest checkpoint" if run.checkpoint.every else ""
        print(f"interrupted{hint}", file=sys.stderr)
        raise typer.Exit(130) from None
    console.print(f"done in {summary['seconds']:.0f} s; the model is in {run.out}/model", highlight=False)
    console.print(f"talk to it: preceptor chat {run.out}/model", highlight=False)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    questions: Annotated[int, typer.Option(min=1, help="Held-out questions to ask.")] = 300,
    replace: Replace = False,
) -> None:
    """Make an assistant of the scholar, the base model that ships with the package, and show the difference."""
    from preceptor.console import standard_console
    from preceptor.train.run_folder import check_out

    check_out(str(out), replace)
    with large_imports():
        from preceptor.demo import run_demo

    run_demo(out, questions, standard_console(), replace=replace)


def _prepare(run: Any, console: Any) -> Any:
    from preceptor.inspect.check_text import format_line

    with large_imports():
        from preceptor.train.prepare import prepare

    prepared = prepare(run, num_processes=min(4, os.cpu_count() or 1))
    for name, formats in prepared.formats.items():
        console.print(format_line(name, formats), highlight=False, markup=False)
    return prepared
