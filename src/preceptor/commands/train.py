"""The command `train`: fine-tune a model as described by a run file."""

import json
import os
import shlex
import signal
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from preceptor.commands.options import Overrides, Replace, RunFile, large_imports, load_run
from preceptor.hub import SCHOLAR
from preceptor.world import COMMAND, command_words

if TYPE_CHECKING:
    from preceptor.config import Run
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
    from preceptor.commands.launch import launch, require_number
    from preceptor.console import say
    from preceptor.train.run_folder import claim

    require_number(nproc)
    run = load_run(run_file, overrides)  # so that a mistake is told at once, by this process alone
    say(first_line(run))
    with claim(run, run_file=run_file, resume=options.resume, replace=options.replace):
        pass  # a folder that cannot be used is refused here; the first of the processes claims it again
    return launch(nproc, ["train", *options.words(), "--", str(run_file), *(overrides or ())])


def _train_or_stop(run: "Run", run_file: Path, options: Options, stop: "StopRequest", world: "World") -> None:
    """Train, and say where the model is, or how to go on."""
    from preceptor.console import say, standard_console
    from preceptor.train.session import Session
    from preceptor.train.signals import EXIT_CODE, Stopped

    session = Session(
        run,
        standard_console(),
        stop,
        world,
        run_file,
        **asdict(options),
        importing=large_imports,
        first_line=None if COMMAND in os.environ else first_line(run),
    )  # where there is a launcher, it has said the first line
    try:
        session.train()
    except (Stopped, KeyboardInterrupt) as error:  # the latter where no signals are heard
        world.end_if_another_failed()
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        say(_how_to_go_on(stopped, run.out), error=True)
        raise SystemExit(EXIT_CODE) from None  # no error, as typer.Exit would be
    if options.dry_run:
        if session.training is not None:
            say("dry run: everything is checked up to the first step, and nothing is written")
        return
    say(f"done in {session.summary.get('seconds', 0.0):.0f} s; the model is in {run.out}/model")
    if (Path(run.out) / "report.html").is_file():
        say(f"what it did, on one page: {run.out}/report.html")
    say(f"talk to it: preceptor chat {run.out}/model")


def first_line(run: "Run") -> str:
    """What is trained on what, before torch is loaded, which takes seconds."""
    hub = "" if run.model.path == SCHOLAR or Path(run.model.path).is_dir() else " (from the Hub, or its cache)"
    return f"{run.model.path}{hub}, trained on {', '.join(source.path for source in run.data.train)} -> {run.out}"


def _how_to_go_on(stopped: "Stopped", out: str) -> str:
    """What a run that was stopped has saved, and the command with which it goes on."""
    again = shlex.join(word for word in command_words() if word not in ("--replace", "--restart"))
    if stopped.step:
        return f"{stopped} after step {stopped.step}, which is saved in {out}/checkpoints; this goes on: {again}"
    return f"{stopped} before the first step; this begins again: {shlex.join(command_words())}"
