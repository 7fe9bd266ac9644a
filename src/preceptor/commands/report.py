"""The command `report`: one HTML page about runs."""

from pathlib import Path
from typing import Annotated

import typer

from preceptor.console import say


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="The file to write. Default: RUN/report.html.")
    ] = None,
) -> None:
    """Write an HTML page about one or several runs. Reads their folders only."""
    from preceptor.report.page import write_report

    say(f"{write_report(runs, out)}: open it in a browser")
