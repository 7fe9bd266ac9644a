"""The command `convert`: a run file from a file of another trainer."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from preceptor import errors
from preceptor.commands.options import AsJson


def convert(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="YAML of Axolotl, LLaMA-Factory, TRL, torchtune; TRL script or command."),
    ],
    run_file: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="The run file to write. Default: print it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a file of another trainer into a run file."""
    from preceptor.config.convert import convert_file
    from preceptor.console import print_json, say
    from preceptor.files import writing

    if run_file is not None and run_file.exists():
        raise errors.ConfigError(f"{run_file}: exists already and is left as it is; name another file")
    found = convert_file(file)
    if run_file is not None:
        with writing(run_file):
            run_file.write_text(found.text(file.name), encoding="utf-8")
    if as_json:
        notes = [{"key": key, "why": why} for key, why in found.notes]
        print_json({"peer": found.peer, "run": found.tree, "notes": notes, "missing": found.missing})
    elif run_file is None:
        say(found.text(file.name).rstrip("\n"))
    else:
        for key, why in found.notes:
            say(f"{key}: {why}")
        for key in found.missing:
            say(f"to be filled in: {key}")
        say(f"written to {run_file}. Next: preceptor check {shlex.quote(str(run_file))}")
