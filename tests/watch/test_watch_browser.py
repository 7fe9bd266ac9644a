"""The page of `preceptor watch --browser` in a headless Chromium, and its server."""

import json
import re
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from browser import CHROMIUM, REASON, browser
from preceptor.errors import ConfigError
from preceptor.report.page import write_report
from preceptor.watch import server as watching
from preceptor.watch.server import WatchedRuns, WatchServer, parts_of, serve
from preceptor.watch.status import LiveRun
from runs import NASTY, looks, sample, steps, write_run

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=REASON)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def tab(chromium, served):
    """The browser; at the end, before the servers end, its page is left."""
    yield chromium
    chromium.send("Page.navigate", url="about:blank")


@pytest.fixture
def served(monkeypatch):
    """Serve run folders; the server, which ends with the test."""
    monkeypatch.setattr("preceptor.watch.server._LOOK_SECONDS", 0.05)
    monkeypatch.setattr("preceptor.watch.server._SHARE", 0)
    servers = []

    def start(*folders):
        server = WatchServer(WatchedRuns([LiveRun(folder) for folder in folders]), 0)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def growing(folder, num_steps=20, **files):
    return write_run(folder, **{"metrics": steps([2.0 * 0.97**n for n in range(num_steps)]), "summary": None, **files})


def get(url, host=None):
    request = urllib.request.Request(url, headers={} if host is None else {"Host": host})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode(), dict(answer.headers)


def test_it_serves_this_machine_and_its_own_address_alone(tmp_path, served):
    server = served(growing(tmp_path / "a"))
    assert server.server_address[0] == "127.0.0.1"
    page, headers = get(server.url)
    assert "step 20 of 60" in page and headers["Cache-Control"] == "no-store"
    root = server.url.replace(f"{server.key}/", "")
    for url, host, code in (
        (root, None, 404),
        (f"{root}state", None, 404),
        (f"{server.url}../../etc/passwd", None, 404),
        (f"{server.url}report/0", None, 404),  # none yet
        (f"{server.url}report/-1", None, 404),
        (f"{server.url}report/%C2%B2", None, 404),
        (server.url, "evil.example", 421),  # a name that was made to lead here
        (server.url, f"evil.example:{server.port}", 421),
        (server.url, "localhost", 421),  # that is port 80
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            get(url, host)
        error.value.close()
        assert error.value.code == code, url


def test_it_answers_to_its_names(tmp_path, served):
    server = served(growing(tmp_path / "a"))
    for host in (f"127.0.0.1:{server.port}", f"localhost:{server.port}"):
        assert "step 20 of 60" in get(server.url, host)[0]
    url, server.port = server.url, 80  # of which browsers name no port
    assert "step 20 of 60" in get(url, "localhost")[0]


def test_what_is_no_number_is_no_report(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "report.html").write_text("x")
    runs = WatchedRuns([LiveRun(folder)])
    assert runs.report("0") == folder / "report.html"
    assert [runs.report(number) for number in ("1", "-1", "", "²", "٠", "0x0")] == [None] * 6


def test_a_tab_that_is_closed_while_the_page_is_sent_is_no_error(served, capsys):
    server = served()
    for error in (BrokenPipeError(), ConnectionResetError(), ValueError("a fault")):
        try:
            raise error
        except type(error):
            server.handle_error(None, ("127.0.0.1", 1))
    err = capsys.readouterr().err
    assert err.count("Traceback") == 1 and "ValueError: a fault" in err


def test_only_parts_that_have_changed_are_sent(tmp_path, served):
    folder = growing(tmp_path / "a")
    server = served(folder)
    first = json.loads(get(f"{server.url}state?seen=")[0])
    assert first["parts"].keys() == {"runs", "course", "answers"}
    seen = ",".join(part["hash"] for part in first["parts"].values())
    assert json.loads(get(f"{server.url}state?seen={seen}")[0])["parts"] == {}
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps(sample(30, "1?", "Thirty.")) + "\n")
    time.sleep(0.1)
    assert json.loads(get(f"{server.url}state?seen={seen}")[0])["parts"].keys() == {"answers"}


def test_a_port_in_use_is_named(tmp_path, served):
    server = served(growing(tmp_path / "a"))
    with pytest.raises(ConfigError, match=f"--port {server.port}: .*leave it out"):
        serve([], server.port, threading.Event())


def test_serving_says_where_and_ends_when_told(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    (folder / "report.html").write_text("x")
    end = threading.Event()
    thread = threading.Thread(target=serve, args=([LiveRun(folder)], 0, end))
    thread.start()
    deadline, said = time.monotonic() + 20, ""
    while "finished after step 20" not in said:
        assert time.monotonic() < deadline
        said += capsys.readouterr().out
        time.sleep(0.02)
    assert "http://127.0.0.1:" in said and f"report: {folder / 'report.html'}" in said
    end.set()
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def desktop(monkeypatch):
    """What a browser is opened with, on a terminal with a display; then the server ends."""
    found, end, said = [], threading.Event(), []

    def open_browser(address):
        file = Path(urllib.request.url2pathname(address.removeprefix("file://")))
        found.append((address, file, file.stat().st_mode & 0o777, file.read_text()))
        end.set()

    monkeypatch.setattr("webbrowser.open", open_browser)
    monkeypatch.setattr(watching, "has_display", lambda: True)
    monkeypatch.setattr(watching, "sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
    monkeypatch.setattr(watching, "say", said.append)
    threading.Timer(5, end.set).start()
    return found, end, said


def test_a_browser_gets_the_key_in_a_file_of_this_user(tmp_path, monkeypatch, desktop):
    """Its command line is seen by every user of the machine."""
    found, end, said = desktop
    (tmp_path / "#1").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "#1"))
    serve([LiveRun(growing(tmp_path / "a"))], 0, end)
    url = re.search(r"http://\S+", said[0])[0]
    ((address, file, mode, text),) = found
    assert url.split("/")[3] not in address and f"url={url}" in text
    assert mode == 0o600 and not file.exists(), "it is removed at the end"


def test_without_room_for_that_file_the_runs_are_served(tmp_path, monkeypatch, desktop):
    found, end, said = desktop
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    end.set()
    serve([LiveRun(growing(tmp_path / "a"))], 0, end)
    assert found == [] and "no browser is opened: [Errno 2]" in said[2]


def test_only_the_state_is_found_out_while_nothing_changes(tmp_path, capsys, monkeypatch):
    live, end = LiveRun(growing(tmp_path / "a")), threading.Event()
    looks, waits, statuses = [], [], []
    find = watching.status_of

    def look():
        time.sleep(0.02)
        looks.append(LiveRun.look(live))
        if len(looks) == 5:
            end.set()
        return looks[-1]

    monkeypatch.setattr(live, "look", look)
    monkeypatch.setattr(end, "wait", waits.append)
    monkeypatch.setattr(watching, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(watching, "status_of", lambda look: statuses.append(look) or find(look))
    serve([live], 0, end)
    assert (len(looks), len(statuses)) == (5, 1) and "stopped after step 20" in capsys.readouterr().out
    assert min(waits) >= 10 * 0.02, "at most a tenth of the time is spent looking"


def test_an_answer_stands_under_the_name_of_its_run(tmp_path):
    asked = {"a": ("both?", "first?"), "b": ("both?", "second?")}
    runs = [growing(tmp_path / name, samples=[sample(20, own, f"of {name}") for own in asked[name]]) for name in asked]
    html = parts_of([LiveRun(run).look() for run in runs])["answers"]["html"]
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    assert "both? a, step 20 of a b, step 20 of b" in words
    assert "first? a, step 20 of a " in words and "second? b, step 20 of b " in words


def test_beside_the_answer_of_the_best_model_stand_all_others(tmp_path):
    samples = [sample(step, "1?", f"of {step}") for step in (0, 30, 60)]
    best = {"num_steps": 60, "seconds": 12.0, "model_step": 30, "best": {"metric": "loss", "value": 1.0, "step": 30}}
    other = "step 60 of 60 reference The reference. other answers before the first step of 0 step 30 of 30"
    for name, summary, expected in (
        ("best", best, "step 30 of 30 reference The reference. other answers before the first step of 0 step 60 of 60"),
        ("last", {"num_steps": 60, "seconds": 12.0}, other),
        ("going on", None, other),
    ):
        folder = write_run(tmp_path / name, samples=samples, summary=summary)
        html = parts_of([LiveRun(folder).look()])["answers"]["html"]
        assert expected in re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html)), name
        assert len(re.findall(r">of \d+<", html)) == 3


# In the browser ------------------------------------------------------------------------------------------------------


class Address:
    """What Browser.open takes for a file."""

    def __init__(self, url):
        self.url = url

    def as_uri(self):
        return self.url


def until(tab, script):
    deadline = time.monotonic() + 20
    while not (found := tab.run(script)):
        assert time.monotonic() < deadline, script
        time.sleep(0.05)
    return found


def opened(tab, server, **options):
    tab.open(Address(server.url), **options)
    tab.run("setInterval(update, 100)")


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1300, False), (1300, True), (390, True)])
def test_it_loads_quietly_and_fits(tab, tmp_path, served, width, dark):
    nasty = [sample(20, NASTY, NASTY + "x" * 300)]
    server = served(growing(tmp_path / "first", samples=nasty), growing(tmp_path / "second", 40), tmp_path / "none")
    opened(tab, server, width=width, dark=dark)
    until(tab, "performance.getEntriesByType('resource').length > 1")
    assert tab.console == []
    assert {url.removeprefix(server.url).partition("?")[0] for url in tab.requests} <= {"", "state"}
    assert tab.run("document.documentElement.scrollWidth") == width, "no scrolling sideways"
    paper = tab.run("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(21, 23, 27)" if dark else "rgb(251, 250, 247)")
    assert tab.run("document.querySelectorAll('.card').length") == 3
    assert tab.run("[...document.querySelectorAll('.state')].map(e => e.textContent)") == ["stopped"] * 2 + ["waiting"]


@needs_chromium
def test_it_follows_the_files_and_says_when_a_run_has_ended(tab, tmp_path, served):
    folder = tmp_path / "a"
    server = served(folder)
    opened(tab, server)
    text = "document.querySelector('main').innerText"
    assert "waiting for" in tab.run(text)
    growing(folder, 20)
    until(tab, f"{text}.includes('step 20 of 60')")
    assert tab.run("document.title") == "33% · a"
    assert tab.run("document.querySelector('progress').value") == 20
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in steps([1.0] * 30)[20:]))
    until(tab, f"{text}.includes('step 30 of 60')")
    write_run(folder)
    (folder / "report.html").write_text("<title>the report of a</title>")
    until(tab, f"{text}.includes('finished after step 20')")
    assert tab.run("document.getElementById('connection').textContent") == "All of it: the runs are finished."
    assert tab.run(f"fetch('{server.url}report/0').then(a => a.text())") == "<title>the report of a</title>"
    assert tab.run("document.querySelector('.card a').href") == f"{server.url}report/0"
    assert tab.console == []


@needs_chromium
def test_a_report_works_and_reaches_nothing(tab, tmp_path, served):
    """Its scripts run, in an origin of their own."""
    folder = write_run(tmp_path / "a", samples=[sample(20, f"{n}?", f"Answer {n}.") for n in range(3)])
    write_report([folder])
    server = served(folder)
    assert "sandbox" in get(f"{server.url}report/0")[1]["Content-Security-Policy"]
    tab.open(Address(f"{server.url}report/0"), dark=True)
    assert tab.console == [] and tab.requests == [f"{server.url}report/0"]
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"
    tab.run("document.querySelector('#course figure .legend button').click()")
    assert tab.run("document.querySelector('#course [id*=\"-series-\"]').style.display") == "none"
    assert tab.run("self.origin") == "null"
    assert tab.run(f"fetch('{server.url}state').then(() => 'read', () => 'refused')") == "refused"


@needs_chromium
def test_what_a_reader_has_chosen_stays(tab, tmp_path, served):
    folder = growing(tmp_path / "a", eval=looks((0, 3.0), (10, 1.5)))
    opened(tab, served(folder))
    tab.run("document.querySelectorAll('#course figure .legend button')[1].click()")
    tab.run("document.querySelector('#answers details').open = true")
    tab.run("document.querySelector('#course figure .canvas').focus()")
    press = "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))"
    tab.run(press)
    readout = "document.querySelector('#course figure .readout').textContent"
    assert tab.run(readout).startswith("step 1 ") and "held out" not in tab.run(readout)
    before = tab.run("[...document.querySelectorAll('main > section')].map(e => e.dataset.hash).join()")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in steps([1.0] * 30)[20:]))
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps(sample(30, "1?", "Thirty.")) + "\n")
    hashes = "[...document.querySelectorAll('main > section')].map(e => e.dataset.hash)"
    until(tab, f"{hashes}.every((hash, at) => hash !== {json.dumps(before.split(','))}[at])")
    assert tab.run("document.activeElement.className") == "canvas"
    assert tab.run(readout).startswith("step 1 ") and "held out" not in tab.run(readout)
    pressed = "[...document.querySelectorAll('#course figure:first-child .legend button')].map(e => e.ariaPressed)"
    assert tab.run(pressed) == ["true", "false"]
    assert tab.run("document.querySelector('#answers details').open") is True
    tab.run(press)
    assert tab.run(readout).startswith("step 2 ")


@needs_chromium
def test_it_can_be_paused_by_keyboard_and_says_when_its_server_has_ended(tab, tmp_path, served):
    folder = growing(tmp_path / "a")
    server = served(folder)
    opened(tab, server)
    tab.run("document.getElementById('pause').focus()")
    for kind in ("keyDown", "keyUp"):
        tab.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    says = "document.getElementById('connection').textContent"
    assert tab.run(says) == "Paused."
    growing(folder, 25)
    time.sleep(0.4)
    assert "step 20 of 60" in tab.run("document.querySelector('main').innerText")
    tab.run("document.getElementById('pause').click()")
    until(tab, "document.querySelector('main').innerText.includes('step 25 of 60')")
    server.shutdown()
    server.server_close()
    until(tab, f"{says}.startsWith('No longer updated since')")
