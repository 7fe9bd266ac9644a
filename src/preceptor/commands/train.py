"""The command `train`: fine-tune a model as described by a run file."""

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from preceptor.commands.options import Overrides, Replace, RunFile, large_imports, load_run, require_one_process
from preceptor.hub import SCHOLAR

if TYPE_CHECKING:
    from rich.console import Console

    from preceptor.config import Run
    from preceptor.train.prepare import Prepared
    from preceptor.train.run_folder import RunFolder
    from preceptor.train.signals import Stopped, StopRequest


def train(
    run_file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Only continue an unfinished run; begin none. (Without it: either.)")
    ] = False,
    replace: Replace = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="All checks up to the first step, the preflight included; write nothing.")
    ] = False,
) -> None:
    """Fine-tune a model as described by a run file. The same command continues a run that was stopped."""
    from preceptor.console import lasting_streams, say, standard_console
    from preceptor.train.run_folder import claim
    from preceptor.train.signals import Stopped, stop_on_signals

    require_one_process()
    with lasting_streams(), stop_on_signals() as stop:
        run = load_run(run_file, overrides)
        say(first_line(run))
        console = standard_console()
        try:
            with claim(run, run_file=run_file, resume=resume, replace=replace) as folder:
                seconds = _train(run, folder, console, stop, dry_run)
        except (Stopped, KeyboardInterrupt) as error:  # the latter where no signals are heard
            stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
            say(_how_to_go_on(stopped, run.out), error=True)
            raise typer.Exit(stopped.exit_code) from None
        if seconds is None:
            say("dry run: everything is checked up to the first step, and nothing is written")
            return
        say(f"done in {seconds:.0f} s; the model is in {run.out}/model")
        say(f"talk to it: preceptor chat {run.out}/model")


def first_line(run: "Run") -> str:
    """What is trained on what, before torch is loaded, which takes seconds."""
    hub = "" if run.model.path == SCHOLAR or Path(run.model.path).is_dir() else " (from the Hub, or its cache)"
    return f"{run.model.path}{hub}, trained on {', '.join(source.path for source in run.data.train)} -> {run.out}"


def _train(run: "Run", folder: "RunFolder", console: "Console", stop: "StopRequest", dry_run: bool) -> float | None:
    """The seconds that it took; None for a dry run."""
    from preceptor.console import say

    for note in folder.notes:
        say(note)
    if folder.has_model:
        from preceptor.train.finish import finish

        if dry_run:
            say(f"{run.out}: the model is saved already; the same command without --dry-run completes the record")
            return None
        say(f"{run.out}: the model is saved already; the record is completed")
        return float(finish(folder, say)["seconds"])
    if folder.goes_on:
        say(f"{run.out}: goes on with the run that began on {folder.date:%d %B %Y, %H:%M}")
    prepared = _prepare(run, folder, console)
    from preceptor.train.run import execute_in

    summary = execute_in(folder, prepared, console, stop, dry_run=dry_run)
    return None if dry_run else float(summary["seconds"])


def _prepare(run: "Run", folder: "RunFolder", console: "Console") -> "Prepared":
    from preceptor.inspect.check import format_line

    with large_imports():
        from preceptor.train.prepare import prepare

    prepared = prepare(run, num_processes=min(4, os.cpu_count() or 1), date=folder.date)
    for name, formats in prepared.formats.items():
        console.print(format_line(name, formats), highlight=False, markup=False)
    return prepared


def _how_to_go_on(stopped: "Stopped", out: str) -> str:
    """What a run that was stopped has saved, and the command with which it goes on."""
    again = shlex.join([Path(sys.argv[0]).name, *(word for word in sys.argv[1:] if word != "--replace")])
    if stopped.step:
        return f"{stopped} after step {stopped.step}, which is saved in {out}/checkpoints; this goes on: {again}"
    return f"{stopped} before the first step; this begins again: {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"
