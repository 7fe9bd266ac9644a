"""The command `watch`: runs, as they go on."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from preceptor.commands.options import AsJson
from preceptor.console import print_json, say, standard_console, table_console

if TYPE_CHECKING:
    from preceptor.watch.status import LiveRun, RunLook

_EVERY_SECONDS = 1.0
_SHARE = 10  # of the time is spent waiting, for each part that a look takes


def watch(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; they need not exist yet.")],
    browser: Annotated[bool, typer.Option("--browser", help="Show them on a page that this machine serves.")] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="With --browser: the port. Default: one that is free.")
    ] = 0,
    once: Annotated[bool, typer.Option("--once", help="Show them as they are now, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch runs as they go on.

    In the terminal until all are finished, with --browser until Ctrl-C.
    """
    from preceptor.errors import ConfigError
    from preceptor.watch.status import LiveRun

    if browser and (once or as_json):
        raise ConfigError("--browser goes with neither --once nor --json")
    live = [LiveRun(run) for run in runs]
    with _until_interrupted() as end:
        if browser:
            from preceptor.watch.server import serve

            serve(live, port, end)
        elif once:
            _print_once(live, as_json)
        elif as_json or not sys.stdout.isatty():
            _print_news(live, as_json, end)
        else:
            _show(live, end)


@contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets (or SIGTERM), the usual way to end this command; a second one ends it where it is."""
    end = threading.Event()

    def interrupt(*_: object) -> None:
        end.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield end
    except BrokenPipeError:  # `| head`
        sys.stderr.close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _until_finished(live: "list[LiveRun]", end: threading.Event, show: "Callable[[list[RunLook]], None]") -> None:
    """Look at the runs and show them, again and again, until all are finished."""
    from preceptor.watch.status import has_ended

    while not end.is_set():
        started = time.perf_counter()
        looks = [run.look() for run in live]
        show(looks)
        if all(map(has_ended, looks)):
            return
        end.wait(max(_EVERY_SECONDS, _SHARE * (time.perf_counter() - started)))


def _show(live: "list[LiveRun]", end: threading.Event) -> None:
    """On a terminal; what was seen last stays there."""
    from rich.live import Live

    from preceptor.watch.terminal import screen

    console = standard_console()
    with Live(console=console, screen=True, auto_refresh=False) as display:
        _until_finished(live, end, lambda looks: display.update(screen(looks, console), refresh=True))
    console.print(display.get_renderable())


def _print_once(live: "list[LiveRun]", as_json: bool) -> None:
    from preceptor.watch.status import status_of
    from preceptor.watch.terminal import screen

    looks = [run.look() for run in live]
    if as_json:
        for look in looks:
            print_json(status_of(look), indent=None)
    else:
        console = table_console()
        console.print(screen(looks, console, whole=True))


def _print_news(live: "list[LiveRun]", as_json: bool, end: threading.Event) -> None:
    """Lines of what is new; as JSON whenever anything has changed, but what changes while nothing happens."""
    from preceptor.watch.status import status_of
    from preceptor.watch.terminal import News

    news = [News() for _ in live]
    known: dict[int, dict[str, object]] = {}

    def show(looks: "list[RunLook]") -> None:
        for number, status in enumerate(map(status_of, looks)):
            lasting = {key: value for key, value in status.items() if key not in ("seconds_since_written", "says")}
            if as_json and lasting != known.get(number):
                known[number] = lasting
                print_json(status, indent=None)
            elif not as_json and (line := news[number].line(status)):
                say(line)
        sys.stdout.flush()

    _until_finished(live, end, show)
