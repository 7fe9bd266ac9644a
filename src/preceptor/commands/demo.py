"""The command `demo`: the first run, before and after fine-tuning."""

from pathlib import Path
from typing import Annotated

import typer

from preceptor.commands.options import Overrides, Replace, large_imports, require_one_process
from preceptor.console import standard_console


def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    questions: Annotated[int, typer.Option(min=1, help="Number of held-out questions.")] = 300,
    replace: Replace = False,
) -> None:
    """Fine-tune the shipped base model as a demonstration. Shows its answers before and after."""
    require_one_process()

    with large_imports():
        from preceptor.demo import run_demo

    run_demo(out, questions, standard_console(), replace=replace, overrides=overrides or ())
