"""Consoles and progress bars: results on standard output, progress on standard error, none where it is no terminal.

All output goes through here, and none of what comes from data, models and names reaches a terminal as a control
character, or as one that hides or turns text: `visible` shows `\\x1b` and `\\u202e`.
"""

import os
import struct
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, Self

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from preceptor.files import json_text

_FILE_WIDTH = 160  # characters of a table in a file
_EVERY_EXAMPLES = 20
_SECONDS = 0.1  # between two drawings

_JOINERS = "\u200c\u200d"  # which emoji, and Persian and Hindi words, are written with


class _Escapes(dict[int, str | int]):
    """For `str.translate`: control and format characters (Cc, Cf) as escapes, but for those that are kept."""

    def __init__(self, kept: str, spell: Callable[[str], str]) -> None:
        super().__init__()
        self._kept, self._spell = kept, spell

    def __missing__(self, code: int) -> str | int:
        character = chr(code)
        is_shown = unicodedata.category(character) not in ("Cc", "Cf") or character in self._kept
        self[code] = code if is_shown else self._spell(character)
        return self[code]


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def _json_escape(character: str) -> str:
    return "".join(f"\\u{unit:04x}" for (unit,) in struct.iter_unpack(">H", character.encode("utf-16-be")))


_HIDDEN = _Escapes("\n\t" + _JOINERS, _escape)
_ALL_HIDDEN = _Escapes("\n\t", _escape)
_HIDDEN_IN_JSON = _Escapes("\n" + _JOINERS, _json_escape)


def visible(text: str, joiners: bool = True) -> str:
    """The text with characters that control a terminal (C0, C1, DEL), or hide or turn text (Cf), spelled out.

    As they are: line ends, tabs and, with `joiners`, the zero-width joiner and non-joiner.
    """
    return text.translate(_HIDDEN if joiners else _ALL_HIDDEN)


def say(text: str, error: bool = False) -> None:
    """Print a text as it is, but for control characters."""
    print(visible(text), file=sys.stderr if error else sys.stdout, flush=True)


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print JSON as files hold it: NaN and infinity are null."""
    print(json_text(value, indent).translate(_HIDDEN_IN_JSON))


class TerminalConsole(Console):
    """A console that shows control characters instead of sending them, and takes no text for markup or emoji.

    In a notebook it writes plain text to its file: rich would show each print as an output of its own, and bars that a
    cell cannot redraw (a kernel sets FORCE_COLOR).
    """

    def __init__(self, **options: Any) -> None:
        if "ipykernel" in sys.modules:
            options = {"force_terminal": False, "soft_wrap": True, **options}
        super().__init__(markup=False, highlight=False, emoji=False, force_jupyter=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def has_display() -> bool:
    """Whether a window of a browser could open here."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def has_colour(console: Console) -> bool:
    """Whether colours alone may tell things apart: on a terminal that has them, and NO_COLOR is not set."""
    return console.is_terminal and console.color_system is not None and not console.no_color


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, transformers (and with it the Hub) draws no progress bars: they would stand between our lines."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


class Countable(Protocol):
    def num_rows(self) -> int | None: ...


class _LastingStream:
    """A stream whose reader may go away (`| head`, a closed terminal, a full disk): then nothing more is written.

    of_program: the stream is a program's own, which may write there again, unless nobody can read it any more.
    """

    def __init__(self, stream: Any, of_program: bool = False) -> None:
        self._stream, self._of_program = stream, of_program
        self._is_open = True

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., object], *given: str) -> None:
        if self._is_open:
            try:
                action(*given)
            except (OSError, ValueError) as error:  # ValueError: closed
                self._is_open = False
                if not self._of_program or isinstance(error, BrokenPipeError):
                    self._discard()

    def _discard(self) -> None:
        """So that what is still in the buffer fails no later flush, such as the one when Python ends."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Inside, no error of standard output or standard error ends the program: what is trained is worth more."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_LastingStream(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


def standard_console(quiet: bool = False, lasting: bool = False) -> Console:
    """Standard output, without wrapping where it is no terminal. quiet: nothing is shown. lasting: of a program whose
    run goes on where nobody reads this any more.
    """
    file: Any = _LastingStream(sys.stdout, of_program=True) if lasting else sys.stdout
    return TerminalConsole(file=file, soft_wrap=not file.isatty() or "ipykernel" in sys.modules, quiet=quiet)


def table_console() -> Console:
    """Standard output, wide enough for tables where it is no terminal."""
    console = standard_console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    return console


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """A line that says what is being done; call the result with each new text."""
    with TerminalConsole(stderr=True).status("loading") as status:
        yield lambda text: status.update(Text(visible(text)))


@contextmanager
def example_progress(tables: Sequence[Countable], what: str) -> Iterator[Callable[[], None]]:
    """A progress bar over the examples of `tables`; call the result after each example.

    The bar has no end where a table does not know its length. It is drawn by those calls and has no thread of its own,
    so that processes can be forked meanwhile (data/workers.py).
    """
    console = TerminalConsole(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("examples"), TimeElapsedColumn())
    progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, auto_refresh=False)
    examples, drawn = 0, time.perf_counter()

    def on_example() -> None:
        nonlocal examples, drawn
        examples += 1
        if examples % _EVERY_EXAMPLES == 0 and time.perf_counter() - drawn > _SECONDS:
            progress.update(task, completed=examples, refresh=True)
            drawn = time.perf_counter()

    with progress:
        numbers = [table.num_rows() for table in tables]
        task = progress.add_task(what, total=None if None in numbers else sum(filter(None, numbers)))
        yield on_example


class Display:
    """Progress of a training run: a bar on a terminal, elsewhere (a log file) a line for each tenth of the run."""

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

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, values: dict[str, Any]) -> None:
        if "skipped" in values:
            self.say(values["skipped"])
        tokens_per_second = values["num_tokens"] / values["seconds"]
        status = f"loss {values['loss']:.4f}  {tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, completed=values["step"], status=status)
        every = max(1, self._total // 10)
        if not self._console.is_terminal and (values["step"] % every == 0 or values["step"] == self._total):
            self._console.print(f"step {values['step']}/{self._total}  {status}", highlight=False)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)
