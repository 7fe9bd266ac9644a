"""`report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Where the page goes. Absent: RUN/report.html.")
    ] = None,
) -> None:
    """Write one HTML page on a run, or on several beside one another, from their folders alone."""
    from preceptor.report.report import write_report

    print(f"{write_report(runs, out)}: open it in a browser")
