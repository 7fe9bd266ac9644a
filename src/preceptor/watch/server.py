"""The page of watched runs, in parts that are drawn again when they change, and its server on this machine alone.

It listens on loopback, reads run folders and writes nothing into them.
"""

import json
import secrets
import sys
import threading
import time
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from hashlib import sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from urllib.parse import parse_qs, urlsplit

from markupsafe import Markup

from preceptor.console import has_display, say
from preceptor.errors import ConfigError
from preceptor.report import curves
from preceptor.report.page import distinct_names, draw_all
from preceptor.report.plots import NUM_COLOURS
from preceptor.report.skeleton import style_and_script, templates
from preceptor.watch.status import (
    LiveRun,
    RunLook,
    figures,
    has_ended,
    left_in_words,
    state_of,
    status_of,
    step_in_words,
)
from preceptor.watch.terminal import News

MOST_PROMPTS = 20
_LEVELS = {"training": "good", "finished": "good", "stopped": "error", "unknown": "warning"}


PageParts = Mapping[str, Mapping[str, str]]  # `html` and `hash` of each


def parts_of(looks: Sequence[RunLook]) -> PageParts:
    """`runs`, `course` and `answers` of the page."""
    runs = [look.record for look in looks]
    names = distinct_names(runs)
    plots = draw_all(curves.panels(runs, names if len(runs) > 1 else [""]), "c")
    return {
        "runs": _part("runs", runs=[_card(number, look, names[number]) for number, look in enumerate(looks)]),
        "course": _part("course", plots=plots),
        "answers": _part("answers", names=names, **_answers(looks)),
    }


def page_of(parts: PageParts, title: str, says: str) -> str:
    """The whole page. says: whether it is up to date."""
    own = {
        f"watch_{kind}": Markup((files("preceptor.watch") / f"watch.{kind}").read_text(encoding="utf-8"))
        for kind in ("css", "js")
    }
    template = templates("preceptor.watch").get_template("watch.html")
    return template.render(title=title, says=says, watched=parts, **own, **style_and_script())


def title_of(looks: Sequence[RunLook]) -> str:
    """What the browser's tab says: how far the runs are."""
    names = distinct_names([look.record for look in looks])
    done = [status["step"] / status["num_steps"] for look in looks if (status := status_of(look))["num_steps"]]
    share = f"{min(done):.0%} · " if done and len(done) == len(looks) else ""
    return share + (names[0] if len(names) == 1 else f"{len(names)} runs")


def _part(name: str, **values: Any) -> Mapping[str, str]:
    html = templates("preceptor.watch").get_template(f"watch_{name}.html").render(**values)
    return {"html": html, "hash": sha256(html.encode()).hexdigest()[:16]}


def _card(number: int, look: RunLook, name: str) -> dict[str, Any]:
    status = status_of(look)
    left = status["seconds_left"]
    return {
        "number": number,
        "name": name,
        "status": status,
        "level": _LEVELS.get(status["state"], "note"),
        "colour": 1 + number % NUM_COLOURS,
        "steps": step_in_words(status),
        "left": "" if left is None else left_in_words(left),
        "figures": figures(status),
        "findings": [each for each in status["findings"] if each["level"] in ("error", "warning")],
    }


def _answers(looks: Sequence[RunLook]) -> dict[str, Any]:
    samples = [{(each.source, each.prompt): each for each in look.record.prompts} for look in looks]
    prompts = list(dict.fromkeys(key for own in samples for key in own))
    shown = [(key[1], [own.get(key) for own in samples]) for key in prompts[:MOST_PROMPTS]]
    return {"prompts": shown, "num": len(prompts)}


HOST = "127.0.0.1"
_LOOK_SECONDS = 1.0
_SHARE = 10  # of the time at most one such part is spent drawing
_OF_REPORTS = (  # files from elsewhere: in an origin of their own, without the key of this page
    "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
)


class WatchedRuns:
    """The runs and their page, drawn again when it is asked for, and not too often."""

    def __init__(self, runs: Sequence[LiveRun]) -> None:
        self._runs = runs
        self._lock = threading.Lock()
        self._page: tuple[PageParts, str, str] = ({}, "", "")
        self._next = 0.0  # when it may be drawn again

    def look(self) -> list[RunLook]:
        with self._lock:
            return [run.look() for run in self._runs]

    def parts(self) -> tuple[PageParts, str, str]:
        """The parts of the page, its title, and what it says of being up to date."""
        with self._lock:
            started = time.monotonic()
            if started >= self._next:
                looks = [run.look() for run in self._runs]
                ended = all(map(has_ended, looks))
                says = "All of it: the runs are finished." if ended else "Updated as the runs go on."
                self._page = parts_of(looks), title_of(looks), says
                now = time.monotonic()
                self._next = now + max(_LOOK_SECONDS, _SHARE * (now - started))
            return self._page

    def report(self, number: str) -> Path | None:
        """The report of a run, by its place; None where there is none."""
        places = {str(place): run.folder / "report.html" for place, run in enumerate(self._runs)}
        return file if (file := places.get(number)) and file.is_file() else None


class WatchServer(ThreadingHTTPServer):
    """key: part of the address, so that other users of this machine cannot read the runs by guessing it."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, runs: WatchedRuns, port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.runs, self.key = runs, secrets.token_urlsafe(9)
        self.port = int(self.server_address[1])
        self.url = f"http://{HOST}:{self.port}/{self.key}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A tab that is closed while the page is sent is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        start = f"/{self.server.key}/"
        host, _, port = str(self.headers.get("Host")).partition(":")
        if host not in (HOST, "localhost") or (port or "80") != str(self.server.port):
            self._send(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", "this address is for this machine alone")
        elif not address.path.startswith(start):
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "not here; `preceptor watch` prints the whole address")
        else:
            self._answer(address.path.removeprefix(start), parse_qs(address.query))

    def _answer(self, name: str, query: dict[str, list[str]]) -> None:
        runs = self.server.runs
        if name == "":
            self._send(HTTPStatus.OK, "text/html", page_of(*runs.parts()))
        elif name == "state":
            parts, title, says = runs.parts()
            seen = "".join(query.get("seen", [])).split(",")
            new = {name: part for name, part in parts.items() if part["hash"] not in seen}
            self._send(HTTPStatus.OK, "application/json", json.dumps({"title": title, "says": says, "parts": new}))
        elif name.startswith("report/") and (file := runs.report(name.removeprefix("report/"))):
            self._send(HTTPStatus.OK, "text/html", file.read_bytes(), _OF_REPORTS)
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "not here")

    def _send(self, status: HTTPStatus, kind: str, content: str | bytes, policy: str | None = None) -> None:
        content = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            **({} if policy is None else {"Content-Security-Policy": policy}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are nothing to tell of."""


def serve(live: Sequence[LiveRun], port: int, end: threading.Event) -> None:
    """Serve the page until `end`, and say what becomes of the runs. Raises ConfigError for a port that is in use."""
    runs = WatchedRuns(live)
    try:
        server = WatchServer(runs, port)
    except OSError as error:
        raise ConfigError(f"--port {port}: {error.strerror or error}; leave it out for one that is free") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    say(f"the runs are shown at {server.url} until Ctrl-C")
    say(f"from another machine: ssh -L {server.port}:{HOST}:{server.port} THIS_MACHINE, then the same address there")
    with opened(server.url) if sys.stdout.isatty() and has_display() else nullcontext():
        known = [News() for _ in live]
        while not end.is_set():
            started = time.monotonic()
            for news, look in zip(known, runs.look(), strict=True):
                if state_of(look) != news.state and (line := news.line(status_of(look))):
                    say(line)
            end.wait(max(_LOOK_SECONDS, _SHARE * (time.monotonic() - started)))
    server.shutdown()
    server.server_close()


@contextmanager
def opened(url: str) -> Iterator[None]:
    """A browser at the address, by a file of this user's own that leads there and is removed at the end.

    Every user of this machine sees a browser's command line, which would name the key.
    """
    with ExitStack() as files_of_it:
        try:
            file = files_of_it.enter_context(NamedTemporaryFile("w", prefix="preceptor-watch-", suffix=".html"))
            file.write(f'<!DOCTYPE html><meta http-equiv="refresh" content="0; url={url}"><a href="{url}">the runs</a>')
            file.flush()
        except OSError as error:
            say(f"no browser is opened: {error}")
        else:
            webbrowser.open(Path(file.name).as_uri())
        yield
