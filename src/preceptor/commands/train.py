"""The command `train`: fine-tune a model as described by a run file."""

import json
import logging
import os
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preceptor.commands.options import Overrides, Replace, RunFile, large_imports, load_run
from preceptor.console import lasting_streams, say, standard_console
from preceptor.errors import ConfigError, ProcessError, command
from preceptor.hub import SCHOLAR
from preceptor.world import COMMAND, World, command_words, num_cores

if TYPE_CHECKING:
    from preceptor.config import Run
    from preceptor.train.signals import Stopped, StopRequest

_SHUTDOWN_SECONDS = "600"  # to finish a step and save, before a process that was told to stop is killed


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
    from preceptor.train.signals import stop_on_signals

    options: dict[str, Any] = {"resume": resume, "replace": replace, "dry_run": dry_run}
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


def _launch(nproc: str, run_file: Path, overrides: list[str] | None, options: dict[str, Any]) -> int:
    """In several processes, started and watched by torch's own launcher. Raises ConfigError, and as `launch`."""
    from preceptor.train.run_folder import claim

    if nproc != "gpu" and (not nproc.isdecimal() or int(nproc) < 1):
        raise ConfigError(f"--nproc {shlex.quote(nproc)}: neither a number of processes nor `gpu`")
    run = load_run(run_file, overrides)  # so that a mistake is told at once, by this process alone
    say(first_line(run))
    with claim(run, run_file=run_file, resume=options["resume"], replace=options["replace"]):
        pass  # a folder that cannot be used is refused here; the first of the processes claims it again
    words = [f"--{name.replace('_', '-')}" for name, is_on in options.items() if is_on]
    return launch(nproc, ["train", *words, "--", str(run_file), *(overrides or ())])


def launch(nproc: str, arguments: Sequence[str]) -> int:
    """Run `preceptor ARGUMENTS` in so many processes (`gpu`: one for each GPU); the exit code of the run.

    What torchrun does, in this process: it hands signals on, and ends all processes where one ends with an error, whose
    exit code is returned. Raises ConfigError where there is no GPU, ProcessError where a process was killed.
    """
    import torch

    from preceptor.train.signals import EXIT_CODE

    num = torch.cuda.device_count() if nproc == "gpu" else int(nproc)
    if num < 1:
        raise ConfigError("--nproc gpu: torch sees no GPU here")
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[COMMAND] = shlex.join(command_words())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_SECONDS)
    logging.disable(logging.CRITICAL)  # of the launcher: the processes say themselves what went wrong
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(num)]
    options += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    try:
        torchrun.run(torchrun.parse_args([*options, "-m", "preceptor", *arguments]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        return _exit_code(error)
    except SignalException:  # the processes have saved, or the same command goes on from the checkpoint before
        return EXIT_CODE
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _exit_code(error: "Exception") -> int:
    """Of the processes that ended with an error; a killed one is named where no other says more.

    The launcher itself ends by SIGTERM what still runs: what such a process says of being stopped is no error.
    """
    from preceptor.train.signals import EXIT_CODE

    failures = error.failures  # type: ignore[attr-defined]
    codes = [failure.exitcode for failure in failures.values() if failure.exitcode > 0]
    errors = [code for code in codes if code != EXIT_CODE]
    ended = {rank: failure.exitcode for rank, failure in failures.items() if failure.exitcode < 0}
    killed = {
        rank: code
        for rank, code in ended.items()
        if code != -signal.SIGTERM and set(errors) <= {ProcessError.exit_code}
    }
    if killed:
        names = ", ".join(f"process {rank} by {signal.Signals(-code).name}" for rank, code in sorted(killed.items()))
        why = " (SIGKILL: memory may have run out)" if -signal.SIGKILL in killed.values() else ""
        say(f"killed: {names}{why}", error=True)
    if errors or killed or not codes:
        return errors[0] if errors else ProcessError.exit_code
    return EXIT_CODE


def _train_or_stop(run: "Run", run_file: Path, options: dict[str, Any], stop: "StopRequest", world: "World") -> None:
    """Train, and say where the model is, or how to go on."""
    from preceptor.train.session import Session
    from preceptor.train.signals import EXIT_CODE, Stopped

    session = Session(
        run,
        standard_console(),
        stop,
        world,
        run_file,
        **options,
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
    if options["dry_run"]:
        if session.training is not None:
            say("dry run: everything is checked up to the first step, and nothing is written")
        return
    say(f"done in {session.summary.get('seconds', 0.0):.0f} s; the model is in {run.out}/model")
    if (Path(run.out) / "report.html").is_file():
        say(f"what it did, on one page: {run.out}/report.html")
    say(f"talk to it: {command('chat', f'{run.out}/model')}")


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
