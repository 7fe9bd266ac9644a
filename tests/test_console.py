"""The bar of rows on a terminal."""

import threading

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
