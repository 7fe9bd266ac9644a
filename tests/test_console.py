"""The bar of rows on a terminal, and streams that nobody reads any more."""

import io
import json
import os
import sys
import threading
from pathlib import Path

import pytest
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


def test_in_a_notebook_text_goes_to_its_file(monkeypatch):
    """rich would display it, whatever file it was given: `run.show()` had no text there, and two outputs."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    text = io.StringIO()
    text.isatty = lambda: True  # as the kernel's streams say
    own = console.TerminalConsole(file=text)
    own.print("a line")
    assert text.getvalue() == "a line\n" and not own.is_terminal


WORDS = (
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f468\u200d\U0001f469\u200d\U0001f467 caf\xe9\u3000\xa0\n\t"
)


def test_what_hides_or_turns_text_is_spelled_out():
    """As the pages do with the tokens of an example; elsewhere Persian, Hindi and emoji keep their joiners."""
    assert console.visible(WORDS) == WORDS
    assert console.visible(WORDS, joiners=False) == WORDS.replace("\u200c", r"\u200c").replace("\u200d", r"\u200d")
    hidden = "\x1b\r\x85\xad\u200b\u200e\u202e\u2069\ufeff\U000e0041"
    spelled = r"\x1b\x0d\x85\xad\u200b\u200e\u202e\u2069\ufeff\U000e0041"
    assert console.visible(hidden) == console.visible(hidden, joiners=False) == spelled


def test_json_spells_it_out_as_json_does(capsys):
    found = {"text": f"{WORDS}\x7f\x85\u202e\U000e0041"}
    for indent in (None, 2):
        console.print_json(found, indent)
        out = capsys.readouterr().out
        assert json.loads(out) == found and r"\u007f\u0085\u202e\udb40\udc41" in out and "\u200d" in out


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


def test_no_bar_of_a_library_stands_between_our_lines(run_file, capfd):
    """Also from Python, where no environment variable was set; and the caller's setting is as before."""
    from transformers.utils import logging

    from conftest import conversations
    from preceptor import config
    from preceptor.train.prepare import prepare
    from runs import execute

    run = config.load(run_file(conversations(4), adapter={"rank": 2}))
    capfd.readouterr()
    logging.enable_progress_bar()
    execute(prepare(run), Console(quiet=True))
    assert capfd.readouterr().err == ""
    assert logging.is_progress_bar_enabled()


def test_colour_is_known_to_be_there_or_not():
    for no_colour in (True, False):
        shown = Console(force_terminal=True, no_color=no_colour, color_system="standard")
        assert console.has_colour(shown) is not no_colour
    assert not console.has_colour(Console(force_terminal=True, color_system=None)), "a terminal without colours"
    assert not console.has_colour(Console(file=io.StringIO()))


def test_show_uses_brackets_under_no_color(run_file):
    from conftest import conversations
    from preceptor import config
    from preceptor.chat.format import load_chat_format
    from preceptor.data.sources import OpenSource
    from preceptor.data.truncation import Fitter
    from preceptor.inspect.show import fitted, show_examples

    run = config.load(run_file(conversations(1)))
    sources = [OpenSource(source) for source in run.data.train]
    renderer = load_chat_format(run.model, run.data, sources).renderer(run.data)
    for no_colour in (True, False):
        shown = Console(file=io.StringIO(), force_terminal=True, no_color=no_colour, color_system="standard", width=200)
        examples = fitted(sources[0].examples(), Fitter(renderer, 2048, "reject"), None)
        show_examples(examples, renderer, None, False, shown)
        text = shown.file.getvalue()
        assert ("⟦" in text) is no_colour and ("shades show" in text) is not no_colour


def test_what_is_printed_as_json_is_json(capsys):
    value = {"low": float("nan"), "high": [float("inf"), -1.5], "text": "ü"}
    for indent in (2, None):
        console.print_json(value, indent)
        printed = capsys.readouterr().out
        assert json.loads(printed, parse_constant=pytest.fail) == {"low": None, "high": [None, -1.5], "text": "ü"}
        assert ("\n  " in printed) == (indent == 2) and "ü" in printed
