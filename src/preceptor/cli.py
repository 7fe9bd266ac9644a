"""The command line: registers the commands, catches errors and picks exit codes.

Exit codes: 0 done; 2 an error in the command line or run file; 3 in the data; 4 in the chat template; 5 in the model;
6 a file or folder cannot be written, or a run folder is broken; 7 another process of the run was killed or cannot be
reached; 1 any other error, a bug of this program most likely, in one line with the file that holds its traceback; 75 a
run that was told to stop and has saved, to be started again (train/signals.py); 130 any other command that was
interrupted.
"""

import io
import os
import sys
import tempfile
import traceback
from importlib import import_module
from typing import Annotated

import typer

from preceptor import __version__, errors
from preceptor.commands import cache
from preceptor.console import say
from preceptor.errors import is_out_of_memory

_LONGEST_MESSAGE = 300  # characters
# In the order of `--help`: of each the function of its name in its file.
_COMMANDS = """train watch init demo show check template plan report chat merge export select eval compare schema doctor
    convert track""".split()  # noqa: SIM905

app = typer.Typer(
    name="preceptor",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Supervised fine-tuning of language models: turn a base model into an assistant.",
)

UNEXPECTED = errors.PreceptorError.exit_code


def main() -> None:
    """Entry point: run a command, turn an error into its message and exit code."""
    # Read when torch is imported.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors in huge pages: first writes are faster
    # sequences differ in length: else a GPU's memory falls into pieces of which none is large enough
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # which the newer name would overrule
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # No bars of libraries between our lines. Read when they are imported.
    for library in ("HF_HUB", "HF_DATASETS"):
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):  # what its encoding has not is spelled out, not an error
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except errors.PreceptorError as error:
        say(f"error: {error}", error=True)
        sys.exit(error.exit_code)
    except Exception as error:
        say(unexpected(error), error=True)
        sys.exit(UNEXPECTED)


def unexpected(error: Exception) -> str:
    """One line about an error that nobody expected. It names the file that its traceback is written to; where none can
    be written, the traceback follows."""
    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="preceptor-error-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(trace)
        details = file.name
    except OSError:
        details = f"what follows\n{trace}"
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))  # of several processes: which one
    what = str(error).strip().partition("\n")[0][:_LONGEST_MESSAGE] + notes
    if is_out_of_memory(error):
        what = what or type(error).__name__
        return f"error: memory ran out: {what}. Use a smaller model, batch or length. Details: {details}"
    if isinstance(error, OSError):  # of the machine: a name that is too long
        return f"error: {what or type(error).__name__}. Details: {details}"
    return (
        f"error: unexpected {type(error).__name__}{f': {what}' if what else ''}. This is a bug; please report it with "
        f"{details}"
    )


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        say(__version__)
        raise typer.Exit


for command in _COMMANDS:
    app.command()(getattr(import_module(f"preceptor.commands.{command}"), command))
app.add_typer(cache.cache, name="cache")
