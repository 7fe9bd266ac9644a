"""The report of a run: its folder -> one HTML page. It reads files only; neither torch nor a model is loaded."""

from collections.abc import Sequence
from pathlib import Path

from preceptor.errors import ConfigError
from preceptor.files import write_atomically
from preceptor.report.reading import read_run

REPORT = "report.html"


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run, or of several beside one another; returns where.

    out: absent, the folder of the only run. Raises ConfigError for several runs without `out` and for an `out` that
    is no HTML file; CheckpointError for a folder that is no run's, holds a broken file, or cannot be written.
    """
    from preceptor.report.page import page_of_run, page_of_runs

    if out is None:
        if len(folders) > 1:
            raise ConfigError("several runs have no folder in common; say where the page goes: --out FILE.html")
        out = folders[0] / REPORT
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: the page is written there; give a name that ends in .html")
    runs = [read_run(folder) for folder in folders]
    text = page_of_run(runs[0]) if len(runs) == 1 else page_of_runs(runs)
    write_atomically(out, text)
    return out
