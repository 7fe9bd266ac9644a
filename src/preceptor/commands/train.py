"""The command `train`: fine-tune a model as described by a run file."""

import json
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from preceptor.commands.options import Overrides, Replace, RunFile, large_imports, load_run
from preceptor.hub import SCHOLAR
from preceptor.world import command_words

if TYPE_CHECKING:
    from rich.console import Console

    from preceptor.config import Run
    from preceptor.train.prepare import Prepared
    from preceptor.train.run_folder import RunFolder
    from preceptor.train.signals import Stopped, StopRequest
    from preceptor.world import World


def train(
    run_file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Only continue an unfinished run; begin none. (Without it: either.)")
    ] = False,
    replace: Replace = False,
    nproc: Annotated[
        str | None, typer.Option("--nproc", metavar="N", help="Processes to train in; `gpu`: one for each GPU.")
    ] = None,
    from_run: Annotated[
        str | None, typer.Option("--from", metavar="OUT", help="Start from the model or adapter of a finished run.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="All checks up to the first step, the preflight included; write nothing.")
    ] = False,
) -> None:
    """Fine-tune a model as described by a run file. The same command continues a run that was stopped."""
    from preceptor.console import lasting_streams
    from preceptor.train.signals import stop_on_signals
    from preceptor.world import World

    options = Options(resume, replace, dry_run)
    if from_run is not None:
        overrides = [*(overrides or []), f"model.from_run={json.dumps(from_run)}"]
    if nproc is not None:
        raise typer.Exit(_launch(nproc, run_file, overrides, options))
    with (
        lasting_streams(),
        stop_on_signals() as stop,
        World.launched() as world,
        world.quiet(),
        world.errors_told_once(),
    ):
        _train_or_stop(load_run(run_file, overrides), run_file, options, stop, world)


@dataclass(frozen=True)
class Options:
    """As on the command line."""

    resume: bool
    replace: bool
    dry_run: bool

    def words(self) -> list[str]:
        return [f"--{field.name.replace('_', '-')}" for field in fields(self) if getattr(self, field.name)]


def _launch(nproc: str, run_file: Path, overrides: list[str] | None, options: Options) -> int:
    from preceptor.commands.launch import launch

    load_run(run_file, overrides)  # so that a mistake is told at once, by this process alone
    return launch(nproc, ["train", *options.words(), "--", str(run_file), *(overrides or ())])


def _train_or_stop(run: "Run", run_file: Path, options: Options, stop: "StopRequest", world: "World") -> None:
    """Train, and say where the model is, or how to go on."""
    from preceptor.console import say, standard_console
    from preceptor.train.signals import EXIT_CODE, Stopped

    say(first_line(run))
    try:
        with claimed(run, run_file, options, world) as folder:
            seconds = _train(run, folder, standard_console(), stop, world, options.dry_run)
    except (Stopped, KeyboardInterrupt) as error:  # the latter where no signals are heard
        world.end_if_another_failed()
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        say(_how_to_go_on(stopped, run.out), error=True)
        raise SystemExit(EXIT_CODE) from None  # no error, as typer.Exit would be
    if seconds is None:
        say("dry run: everything is checked up to the first step, and nothing is written")
        return
    say(f"done in {seconds:.0f} s; the model is in {run.out}/model")
    say(f"talk to it: preceptor chat {run.out}/model")


@contextmanager
def claimed(run: "Run", run_file: Path, options: Options, world: "World") -> "Iterator[RunFolder]":
    """The run's folder, which the first process holds for all; the others see in it what that one has found."""
    from preceptor.train.run_folder import RunFolder, claim

    if not world.is_first:
        found = world.published("folder")
        folder = RunFolder(Path(found["path"]), record=found["record"], lengthens=found["lengthens"])
        folder.date = datetime.fromisoformat(found["date"])
        yield folder
        return
    with claim(run, run_file=run_file, resume=options.resume, replace=options.replace) as folder:
        found = {"path": str(folder.path), "record": folder.record, "lengthens": folder.lengthens}
        world.publish("folder", {**found, "date": folder.date.isoformat()})
        yield folder


def first_line(run: "Run") -> str:
    """What is trained on what, before torch is loaded, which takes seconds."""
    hub = "" if run.model.path == SCHOLAR or Path(run.model.path).is_dir() else " (from the Hub, or its cache)"
    return f"{run.model.path}{hub}, trained on {', '.join(source.path for source in run.data.train)} -> {run.out}"


def _train(
    run: "Run", folder: "RunFolder", console: "Console", stop: "StopRequest", world: "World", dry_run: bool
) -> float | None:
    """The seconds that it took; None for a dry run."""
    from preceptor.console import say
    from preceptor.trackers.follower import followed

    for note in folder.notes:
        say(note)
    if folder.has_model and not world.is_first:
        return 0.0
    if folder.has_model:
        from preceptor.train.finish import finish

        if dry_run:
            say(f"{run.out}: the model is saved already; the same command without --dry-run completes the record")
            return None
        say(f"{run.out}: the model is saved already; the record is completed")
        with followed(run.tracker, folder.path, say, begins=False):
            return float(finish(folder, say)["seconds"])
    if folder.goes_on:
        say(f"{run.out}: goes on with the run that began on {folder.date:%d %B %Y, %H:%M}")
    prepared = _prepare(run, folder, console, world)
    from preceptor.train.run import execute_in

    with followed([] if dry_run or not world.is_first else run.tracker, folder.path, say):
        summary = execute_in(folder, prepared, console, stop, world, dry_run=dry_run)
    return None if dry_run else float(summary.get("seconds", 0.0))


def _prepare(run: "Run", folder: "RunFolder", console: "Console", world: "World") -> "Prepared":
    from preceptor.inspect.check import format_line
    from preceptor.world import num_cores

    with large_imports():
        from preceptor.train.prepare import prepare

    num_processes = min(4, max(1, num_cores() // world.local_size))
    prepared = prepare(run, num_processes, folder.date, world)
    for name, formats in prepared.formats.items():
        console.print(format_line(name, formats), highlight=False, markup=False)
    return prepared


def _how_to_go_on(stopped: "Stopped", out: str) -> str:
    """What a run that was stopped has saved, and the command with which it goes on."""
    again = shlex.join(word for word in command_words() if word != "--replace")
    if stopped.step:
        return f"{stopped} after step {stopped.step}, which is saved in {out}/checkpoints; this goes on: {again}"
    return f"{stopped} before the first step; this begins again: {shlex.join(command_words())}"
