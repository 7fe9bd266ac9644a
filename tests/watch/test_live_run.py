"""Run folders that grow: read line by line, and whether the process that trains in them is alive."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from preceptor.report.run_record import read_run
from preceptor.train.lock import LOCK, lock_holder
from preceptor.watch.status import LiveRun, figures, status_of
from runs import DATA, ENVIRONMENT, looks, sample, steps, write_run

HOST = socket.gethostname()
HOLD = """
import sys, time
from pathlib import Path
from preceptor.train.lock import locked
folder = Path(sys.argv[1])
with locked(folder, str(folder)):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held():
    """Hold the lock of a folder in another process; ends with the test."""
    processes = []

    def hold(folder):
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def growing(folder, num_steps=10, **files):
    """A run of 60 steps that is not finished."""
    return write_run(folder, metrics=steps([2.0 - 0.05 * n for n in range(num_steps)]), summary=None, **files)


def add(file, *lines):
    with file.open("a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


def test_the_lock_is_looked_at_and_not_taken(tmp_path, held):
    assert lock_holder(tmp_path) is None
    process = held(tmp_path)
    found = lock_holder(tmp_path)
    assert (found.is_alive, found.pid, found.host) == (True, process.pid, HOST)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / LOCK).exists() and lock_holder(tmp_path).is_alive is False
    assert lock_holder(tmp_path).is_alive is False
    held(tmp_path)  # nobody who looked holds it


def test_of_another_machine_without_locks_nothing_is_known(tmp_path):
    (tmp_path / LOCK).write_text("process 12 on some-other-host\n")
    found = lock_holder(tmp_path)
    assert (found.is_alive, found.pid, found.host) == (None, 12, "some-other-host")
    growing(tmp_path)
    status = status_of(LiveRun(tmp_path).look())
    assert status["state"] == "unknown" and "some-other-host" in status["says"]
    assert status["seconds_since_written"] >= 0


def test_states_from_no_folder_to_the_end(tmp_path, held):
    folder = tmp_path / "run"
    live = LiveRun(folder)
    assert status_of(live.look())["state"] == "waiting"
    process = held(folder)
    assert status_of(live.look())["state"] == "starting"
    growing(folder)
    status = status_of(live.look())
    assert status["state"] == "training" and status["process"] == {"alive": True, "pid": process.pid, "host": HOST}
    assert (status["step"], status["num_steps"]) == (10, 60)
    assert status["seconds_left"] == pytest.approx(25.0), "50 steps of half a second"
    process.kill()
    process.wait()
    status = status_of(live.look())
    assert status["state"] == "stopped" and status["seconds_left"] is None
    assert ENVIRONMENT["command"] in status["says"], "the command that continues it"
    process = held(folder)
    status = status_of(live.look())
    assert status["state"] == "starting" and "data and model" in status["says"], "it goes on when they are read"
    assert status["seconds_left"] is None
    write_run(folder)
    status = status_of(live.look())
    assert status["state"] == "training" and "report" in status["says"], "not finished before its report is there"
    (folder / "report.html").write_text("x")
    assert status_of(live.look())["state"] == "starting", "--replace: what is there is of the run before"
    process.kill()
    process.wait()
    status = status_of(live.look())
    assert status["state"] == "finished" and status["report"] == str(folder / "report.html")
    assert status["verdict"]["headline"]


def test_how_a_run_ended_is_said(tmp_path):
    for key, how in (("stopped_early", ", stopped early"), ("ended_by_program", ", ended by the program"), ("x", "")):
        value = {"step": 20, "num_evaluations": 2, "on_step": 10} if key == "stopped_early" else 20
        folder = write_run(tmp_path / key, summary={"num_steps": 20, "seconds": 12.0, key: value})
        assert status_of(LiveRun(folder).look())["says"] == f"finished after step 20 in 12 s{how}"


def test_a_saved_model_that_only_lacks_its_report_is_not_starting(tmp_path, held):
    (growing(tmp_path / "run") / "model").mkdir()
    held(tmp_path / "run")
    assert status_of(LiveRun(tmp_path / "run").look())["state"] == "training"


def test_the_command_that_continues_a_run_is_typed_where_it_was_typed_last(tmp_path):
    again = {"step": 5, "command": "preceptor train ../b/run.yaml", "directory": "/home/me/b", "date": "2026-11-23"}
    folder = growing(tmp_path / "run", environment=ENVIRONMENT | {"resumed": [again]})
    says = status_of(LiveRun(folder).look())["says"]
    assert says == "stopped after step 10; this continues it in /home/me/b: preceptor train ../b/run.yaml"


def test_lines_are_read_as_they_come_and_a_torn_one_waits(tmp_path):
    live = LiveRun(growing(tmp_path / "run"))
    assert live.look().record.num_steps == 10
    metrics = tmp_path / "run" / "metrics.jsonl"
    line = json.dumps(steps([1.0] * 11)[-1])
    with metrics.open("a") as stream:
        stream.write(line[:20])
    assert live.look().record.num_steps == 10
    with metrics.open("a") as stream:
        stream.write(line[20:] + "\n")
    assert live.look().record.num_steps == 11
    add(tmp_path / "run" / "samples.jsonl", sample(30, "1?", "Thirty."))
    latest = status_of(live.look())["samples"]
    assert [(each["step"], each["answer"]) for each in latest] == [(30, "Thirty.")], "before its evaluation is done"


def test_it_reads_what_the_report_reads(tmp_path):
    folder = write_run(tmp_path / "run")
    assert {**vars(LiveRun(folder).look().record), "examples": 0} == {**vars(read_run(folder)), "examples": 0}


def test_a_run_that_goes_on_or_is_replaced_is_read_anew(tmp_path):
    folder = growing(tmp_path / "run", 40, eval=looks((0, 3.0), (20, 2.0), (40, 1.0)))
    live = LiveRun(folder)
    assert live.look().record.num_steps == 40
    for name, content in (("metrics", steps([2.0] * 20)), ("eval", looks((0, 3.0), (20, 2.0)))):
        new = folder / "new"
        new.write_text("".join(json.dumps(line) + "\n" for line in content))
        new.replace(folder / f"{name}.jsonl")
    record = live.look().record
    assert record.num_steps == 20 and [line["step"] for line in record.evaluations] == [0, 20]
    (folder / "metrics.jsonl").write_text(json.dumps(steps([2.0])[0]) + "\n")  # shortened in place
    assert live.look().record.num_steps == 1
    shutil.rmtree(folder)
    assert status_of(live.look())["state"] == "waiting"
    growing(folder, 3)
    assert live.look().record.num_steps == 3


def test_what_cannot_be_read_for_a_moment_keeps_its_last_value(tmp_path):
    folder = growing(tmp_path / "run")
    live = LiveRun(folder)
    live.look()
    (folder / "data.json").write_text('{"num_steps": 6')
    os.utime(folder / "data.json", (1, 1))
    assert live.look().record.data == DATA


def test_figures(tmp_path):
    task = {"task": "scholar:heldout", "kind": "generation", "num_items": 9, "counts": {}, "groups": {}}
    task["figures"] = {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "num": 9}}
    lines = looks((0, 3.0), (10, 1.5))
    lines[1] |= {"loss_interval": [1.4, 1.6], "tasks": [task]}
    rejection = {"source": "a:1", "code": "too_long", "message": "is too long"}
    folder = growing(tmp_path / "run", 12, eval=lines, rejections=[rejection, rejection])
    status = status_of(LiveRun(folder).look())
    assert status["held_out"] == {"step": 10, "loss": 1.5, "low": 1.4, "high": 1.6, "first": 3.0, "token_accuracy": 0.5}
    assert status["tasks"] == [{"task": "scholar:heldout", "figure": "accuracy", "value": 0.5, "low": 0.4, "high": 0.6}]
    assert status["rejected"] == {"num": 2, "num_examples": 100, "codes": {"too_long": 2}}
    assert status["tokens_per_second"] == 200 and status["memory_bytes"] == 400_000_000
    assert status["evaluated"] == 10
    assert status["loss"] == pytest.approx(1.675), "mean of the last ten steps"


def test_figures_that_are_not_finite_are_said(tmp_path):
    task = {"task": "t", "num_items": 9, "figures": {"bits_per_byte": {"value": None, "low": None, "high": None}}}
    not_finite = {"step": 10, "loss": None, "token_accuracy": 0.0, "tasks": [task]}
    folder = growing(tmp_path / "run", 2, eval=[*looks((0, 3.0)), not_finite])
    status = status_of(LiveRun(folder).look())
    shown = figures(status)
    assert shown["held out"] == "not finite after step 10; 3.0000 at first"
    assert shown["tasks"] == "t: bits_per_byte not finite"
    errors = [each["seen"] for each in status["findings"] if each["level"] == "error"]
    assert errors == ["The held-out loss is not finite after step 10."], "at once, however few steps were taken"


def test_warnings_are_said_while_it_trains(tmp_path):
    folder = growing(tmp_path / "run")
    add(folder / "metrics.jsonl", {**steps([1.0] * 11)[-1], "skipped": "step 11: loss nan", "examples": ["a:7"]})
    found = status_of(LiveRun(folder).look())["findings"]
    assert [each["level"] for each in found] == ["warning"] and "skipped" in found[0]["seen"], found
