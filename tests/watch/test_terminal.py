"""What `preceptor watch` shows in a terminal and in a log file, and the command itself."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from preceptor.console import TerminalConsole
from preceptor.watch.status import LiveRun, status_of
from preceptor.watch.terminal import Curve, News, plot, screen
from runs import looks, sample, steps, write_run

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def growing(folder, num_steps=30, **files):
    files = {"metrics": steps([2.0 * 0.97**n for n in range(num_steps)]), "summary": None, **files}
    return write_run(folder, **files)


def shown(folders, width=100, height=40):
    console = TerminalConsole(width=width, height=height, color_system=None, force_terminal=True)
    with console.capture() as captured:
        console.print(screen([LiveRun(folder).look() for folder in folders], console))
    return ESCAPES.sub("", captured.get())


def test_all_that_is_known_is_on_the_screen(tmp_path):
    lines = looks((0, 3.0), (20, 1.5))
    lines[1]["loss_interval"] = [1.42, 1.61]
    rejections = [{"source": f"a:{n}", "code": "too_long", "message": "m"} for n in range(7)]
    text = shown([growing(tmp_path / "first", eval=lines, rejections=rejections)])
    for part in (
        "first",
        "step 30 of 60",
        "1.5000 (1.4200 to 1.6100)",
        "200 tokens/s",
        "400.0 MB",
        "7 of 100",
        "too_long",
    ):
        assert part in text, (part, text)
    assert "1?" in text and "One." in text, "a sample"
    assert "training" in text and "held out" in text, "the legend of the plot"


@pytest.mark.parametrize(("width", "height"), [(40, 12), (60, 20), (80, 24), (100, 50), (200, 60)])
@pytest.mark.parametrize("num_runs", [1, 2, 4])
def test_it_never_overflows_the_window(tmp_path, width, height, num_runs):
    (tmp_path / "waiting").mkdir()
    answers = [sample(30, f"{n}? " + "long " * 40, "line\n" * 30) for n in range(9)]
    runs = [growing(tmp_path / f"run-with-a-long-name-{n}", samples=answers) for n in range(num_runs)]
    lines = shown([*runs, tmp_path / "waiting"], width, height).splitlines()
    assert len(lines) <= max(height, 3 * (num_runs + 1)) and max(map(len, lines)) <= width


def test_several_runs_stand_beside_one_another(tmp_path):
    text = shown([growing(tmp_path / "a"), growing(tmp_path / "b")], width=220)
    assert any("a" in line and "b" in line and line.count("╭") == 2 for line in text.splitlines())


def test_control_characters_of_a_sample_reach_no_terminal(tmp_path):
    text = shown([growing(tmp_path / "a", samples=[sample(30, "Q\x1b[31m", "A\x07\x9b2J")])])
    assert "\x1b" not in text and "\x07" not in text and "\x9b" not in text and "\\x1b" in text


def test_a_plot_has_its_ends_in_words_and_its_curves_in_shapes():
    falling = Curve("training", [float(n) for n in range(1, 101)], [3.0 - 0.02 * n for n in range(100)])
    marks = Curve("held out", [1.0, 50.0, 100.0], [3.0, 2.0, 1.0], marks=True)
    lines = [line.plain for line in plot([falling, marks], 60, 10)]
    assert len(lines) == 10 and all(len(line) <= 60 for line in lines)
    assert "3.00" in lines[0] and "1.00" in lines[-2] and lines[-1].split()[0] == "1" and "step 100" in lines[-1]
    assert sum(line.count("●") for line in lines) == 3
    first, last = (next(line for line in order if re.search("[⠁-⣿]", line)) for order in (lines, lines[::-1]))
    assert re.search("[⠁-⣿]", first).start() < re.search("[⠁-⣿]", last).start(), "it falls from left to right"
    plain = [line.plain for line in plot([falling, marks], 60, 10, unicode=False)]
    assert all(line.isascii() for line in plain) and sum(line.count("o") for line in plain[:-1]) == 3
    assert plot([Curve("training", [], [])], 60, 10) == []
    assert plot([Curve("training", [1.0], [2.0])], 60, 10), "one step"


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "preceptor", "watch", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, **options,
    )  # fmt: skip


def test_once_prints_and_ends(tmp_path):
    done = command(growing(tmp_path / "a"), tmp_path / "none", "--once")
    assert done.returncode == 0 and "step 30 of 60" in done.stdout and "waiting for" in done.stdout, done
    assert "\x1b" not in done.stdout and done.stderr == ""


def test_as_json(tmp_path):
    done = command(growing(tmp_path / "a"), tmp_path / "none", "--once", "--json")
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["state"], first["step"], second["state"]) == ("stopped", 30, "waiting")


def test_a_finished_run_ends_it_with_result_and_report(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "report.html").write_text("x")
    done = command(folder)
    assert (
        done.returncode == 0 and str(folder / "report.html") in done.stdout and "finished after step 20" in done.stdout
    )


def test_elsewhere_than_a_terminal_there_are_lines_of_what_is_new(tmp_path):
    folder = tmp_path / "a"
    words = [sys.executable, "-m", "preceptor", "watch", str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert "waiting" in process.stdout.readline()
        growing(folder, 6)
        assert "step 6 of 60" in process.stdout.readline()
        write_run(folder, summary={"num_steps": 20, "seconds": 12.0})
        rest = process.communicate(timeout=30)[0]
    finally:
        process.kill()
    assert "finished after step 20" in rest and process.returncode == 0


def test_an_evaluation_of_tasks_alone_is_news(tmp_path):
    tasks = [
        {"task": name, "figures": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}} for name in ("first", "second")
    ]
    news = News()
    lines = []
    for evaluations in ([], [{"step": 0, "tasks": tasks}], [{"step": 0, "tasks": tasks}, {"step": 5, "tasks": tasks}]):
        status = status_of(LiveRun(growing(tmp_path / "a", 5, eval=evaluations)).look())
        lines += [news.line(status), news.line(status)]
    assert [line is None for line in lines] == [False, True] * 3
    assert "first: accuracy 0.500 (0.400 to 0.600); second: accuracy" in lines[2] and "first" not in lines[0]


def test_a_terminal_shows_it_live_and_ctrl_c_ends_it(tmp_path):
    folder = growing(tmp_path / "a", 5)
    pid, terminal = pty.fork()
    if not pid:
        os.environ |= {"COLUMNS": "100", "LINES": "30", "TERM": "xterm"}
        os.execv(sys.executable, [sys.executable, "-m", "preceptor", "watch", str(folder)])
    seen = ""

    def until(holds):
        nonlocal seen
        end = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < end, ESCAPES.sub("", seen)[-3000:]
            if select.select([terminal], [], [], 0.2)[0]:
                try:
                    seen += os.read(terminal, 1 << 16).decode(errors="replace")
                except OSError:  # Linux, where the other end is closed
                    return

    try:
        until(lambda: "step 5 of 60" in ESCAPES.sub("", seen))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps([1.5] * 25)))
        until(lambda: "step 25 of 60" in ESCAPES.sub("", seen))
        os.kill(pid, signal.SIGINT)
        until(lambda: False)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if sys.exc_info()[0] else 0)
        ended = os.waitpid(pid, 0)[1]
        os.close(terminal)
    assert os.waitstatus_to_exitcode(ended) == 0 and "Traceback" not in seen
    assert seen.count("\x1b[?25h"), "the cursor is shown again"


def test_it_starts_without_torch(tmp_path):
    folder = growing(tmp_path / "a")
    script = f"""
import sys
sys.argv = ["preceptor", "watch", {str(folder)!r}, "--once"]
from preceptor.cli import app
try:
    app()
finally:
    print(sorted({{"torch", "transformers", "matplotlib", "datasets"}} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]", done.stderr
