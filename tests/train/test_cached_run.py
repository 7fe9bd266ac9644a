"""A run over the cache trains and records what a run without one does."""

import json

from children import result_of

from conftest import conversations
from preceptor import config
from preceptor.console import standard_console
from preceptor.data import reading
from preceptor.train.prepare import prepare
from runs import execute


def test_losses_and_records_are_equal(run_file, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_SMALL_BYTES", 0)
    monkeypatch.setattr(reading, "_SMALL_CHARACTERS", 600)
    rows = [*conversations(20, turns=2), {"text": ""}]
    file = run_file(
        rows, conversations(2), data__max_length=256, data__max_rejected=0.5, loss__reduction="conversation"
    )
    results = []
    for name, cache in (("off", "off"), ("cold", tmp_path / "cache"), ("warm", tmp_path / "cache")):
        run = config.load(file, [f"data.cache={cache}", f"out={tmp_path / name}"])
        execute(prepare(run), standard_console())
        folder = tmp_path / name
        fingerprint = json.loads((folder / "environment.json").read_text())["trees_sha256"]
        data = json.loads((folder / "data.json").read_text())
        data = {key: value for key, value in data.items() if "seconds" not in key and "memory" not in key}
        results.append((fingerprint, data, result_of(folder)))
    assert results[0] == results[1] == results[2]
