"""What happened, as JSON lines that are on disk when the step is over, and as a progress display."""

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def append_line(file: Path, values: dict[str, Any]) -> None:
    """Add one JSON object as a line, flushed: whoever reads while the run goes on sees whole steps."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(values, ensure_ascii=False) + "\n")


def drop_lines_after(file: Path, step: int) -> None:
    """Keep the lines of steps up to `step`: what a killed run wrote after its last checkpoint will be written anew."""
    if file.exists():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        partial = file.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(file)


class Display:
    """A progress bar on a terminal; where there is none (a log file), a line about every tenth of the run."""

    def __init__(self, console: Console, total_steps: int, start_step: int = 0) -> None:
        self._console = console
        self._total = total_steps
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=total_steps, completed=start_step, status="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, values: dict[str, Any]) -> None:
        tokens_per_second = values["num_tokens"] / values["seconds"]
        status = f"loss {values['loss']:.4f}  {tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, completed=values["step"], status=status)
        every = max(1, self._total // 10)
        if not self._console.is_terminal and (values["step"] % every == 0 or values["step"] == self._total):
            self._console.print(f"step {values['step']}/{self._total}  {status}", highlight=False)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)


def standard_console() -> Console:
    """The console of the commands: standard output, without wrapping where it is no terminal."""
    return Console(file=sys.stdout, soft_wrap=not sys.stdout.isatty())
