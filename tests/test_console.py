"""The bar of rows on a terminal, and streams that nobody reads any more."""

import os
import sys
import threading
from pathlib import Path

from rich.console import Console

from preceptor import console
from preceptor.data.sources import OpenSource


def test_the_bar_has_no_thread_so_that_processes_can_be_forked_while_it_is_shown(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n' * 50)
    monkeypatch.setattr(console, "TerminalConsole", lambda **_: Console(stderr=True, force_terminal=True))
    monkeypatch.setattr(console, "_SECONDS", 0)
    before = threading.active_count()
    with console.example_progress(OpenSource(str(file)).tables, "checking") as on_row:
        for _ in range(40):
            on_row()
        assert threading.active_count() == before
    assert "40/50" in capsys.readouterr().err


def test_streams_that_fail_end_nothing(monkeypatch):
    """A reader that is gone, a full disk, a stream that is closed; also what Python flushes when it ends."""
    reader, writer = os.pipe()
    os.close(reader)
    for stream in (os.fdopen(writer, "w"), Path("/dev/full").open("w")):  # noqa: SIM115
        monkeypatch.setattr(sys, "stdout", stream)
        with console.lasting_streams():
            shown = console.standard_console()
            for _ in range(3):
                shown.print("step 1/2")
                sys.stdout.flush()
            assert not shown.is_terminal
        assert sys.stdout is stream
        stream.close()  # nothing is left in its buffer that could fail
    monkeypatch.setattr(sys, "stdout", stream)
    with console.lasting_streams():
        print("to a closed stream")


def test_a_name_between_colons_is_no_emoji(capsys):
    console.standard_console().print("memory:train:row 2")
    console.standard_console().rule(":train:", align="left")
    assert "memory:train:row 2" in (shown := capsys.readouterr().out) and ":train: " in shown
