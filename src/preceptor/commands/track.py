"""The command `track`: the record of a run, sent to a tracker."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from preceptor import errors
from preceptor.console import say
from preceptor.files import read_run_file

NOT_SENT = 6  # exit code, as for files that cannot be written


TrackerName = StrEnum("TrackerName", "tensorboard trackio mlflow wandb")  # those of config, which is imported late


def track(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    to: Annotated[
        list[TrackerName] | None, typer.Option(help="The tracker; repeatable. Default: those of the run file.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until standard input ends.")] = False,
    since: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Send the record of a run to a tracker."""
    from preceptor.trackers import follower
    from preceptor.trackers.sink import require_installed

    names = [name.value for name in to or ()]
    if not names and (run / "config.yaml").is_file():
        names = list(read_run_file(run)[0].get("tracker") or ())
    if not names:
        raise errors.ConfigError(f"{run}: its run file names no tracker; name one with --to")
    require_installed(names)
    if follow:
        done = follower.follow(run, names, since, sys.stdin, lambda line: say(line, error=True))
    elif (run / "environment.json").is_file():
        done = follower.send_all(run, names, say)
    else:
        raise errors.CheckpointError(f"{run}: is not the folder of a run")
    if not done:
        raise typer.Exit(NOT_SENT)
