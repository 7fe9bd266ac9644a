"""The command line: registers the commands, catches errors and picks exit codes.

Exit codes: 0 done; 2 an error in the command line or run file; 3 in the data; 4 in the chat template; 5 in the model;
6 a file or folder cannot be written, or a run folder is broken; 130 interrupted. Any other error is a bug of this
program and shows a traceback.
"""

import os
import sys
from typing import Annotated

import typer

from preceptor import __version__, errors
from preceptor.commands import (
    chat,
    check,
    compare,
    demo,
    eval,
    merge,
    plan,
    report,
    select,
    show,
    template,
    train,
)

app = typer.Typer(
    name="preceptor",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Supervised fine-tuning of language models: turn a base model into an assistant.",
)

EXIT_CODES: dict[type[errors.PreceptorError], int] = {
    errors.ConfigError: 2,
    errors.DataError: 3,
    errors.TemplateError: 4,
    errors.ModelError: 5,
    errors.CheckpointError: 6,
}


def main() -> None:
    """Entry point: run a command, turn an error into its message and exit code."""
    # Waiting threads sleep instead of spinning. On a machine with anything else to do, spinning made small models 7 to
    # 40 times slower (docs/decisions/2026-11-22-waiting-threads.md). Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors in huge pages: first writes are faster
    try:
        app()
    except errors.PreceptorError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODES[type(error)])


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        print(__version__)
        raise typer.Exit


for command in (
    train.train,
    demo.demo,
    show.show,
    check.check,
    template.template,
    plan.plan,
    report.report,
    chat.chat,
    merge.merge,
    select.select,
    eval.eval,
    compare.compare,
):
    app.command()(command)
