"""What a run writes of itself when it starts: examples that spell its trees, hashes, lengths; and its report."""

import hashlib
import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from conftest import conversations
from preceptor import config
from preceptor.chat.tokenise import special_ids
from preceptor.data.dataset import Dataset
from preceptor.data.forest import has_branches
from preceptor.train import provenance
from preceptor.train.prepare import prepare
from runs import execute
from tiny import branching, chain, tiny_tokenizer


def test_a_run_records_what_it_is_made_of_and_writes_its_report(run_file, tmp_path, with_pictures, with_prediction):
    prepared = prepare(config.load(run_file(eval_rows=conversations(2)), ["data.max_length=256"]))
    execute(prepared, Console(file=io.StringIO()))
    folder = Path(prepared.run.out)
    environment = json.loads((folder / "environment.json").read_text())
    assert [(file["use"], file["name"]) for file in environment["data"]] == [
        ("train", str(tmp_path / "train.jsonl")),
        ("held out", str(tmp_path / "eval.jsonl")),
    ]
    content = (tmp_path / "train.jsonl").read_bytes()
    assert environment["data"][0]["sha256"] == hashlib.sha256(content).hexdigest()
    assert environment["data"][0]["num_bytes"] == len(content)
    assert environment["model"]["config_sha256"] and environment["model"]["weights"][0]["num_bytes"] > 0
    assert environment["template"]["name"] == "chatml" and environment["versions"]["torch"] == torch.__version__
    assert environment["engine"]["mode"] == "auto"
    assert {"norms", "glu", "last_layer"} < set(environment["engine"]["optimisations"])
    data = json.loads((folder / "data.json").read_text())
    assert (data["num_examples"], data["examples_per_epoch"], data["num_steps"]) == (14, 12, 4)
    assert data["held_out"] == {"num_examples": 2, "num_rejected": 0}
    assert data["tokens"]["computed"] > 0
    assert sum(data["lengths"]["trees"]["counts"]) == 12 == sum(data["lengths"]["targets"]["counts"])
    lines = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    by_source = {tree.source: tree for tree in prepared.train}
    for line in lines:
        tree = by_source[line["source"]]
        assert [
            (own["parent"], own["kind"], "".join(piece["text"] for piece in own["pieces"])) for own in line["segments"]
        ] == [(own.parent, own.kind, prepared.chat.tokenizer.decode(own.ids)) for own in tree.segments]
        ids = [[id_ for piece in own["pieces"] for id_ in piece["ids"]] for own in line["segments"]]
        assert ids == [list(own.ids) for own in tree.segments]
    assert {why for line in lines for why in line["why"]} == {
        "the first",
        "of median length",
        "the shortest",
        "the longest",
    }
    page = (folder / "report.html").read_text()
    assert "held-out loss" in page and "token by token" in page
    assert page.count("<svg") > 3 and " MB for tensors, " in page


def test_a_plain_run_has_the_same_losses_and_says_so(run_file, tmp_path):
    losses, console = {}, Console(file=io.StringIO(), width=200)
    for mode in ("auto", "plain"):
        out = tmp_path / mode
        execute(prepare(config.load(run_file(), [f"engine={mode}", f"out={out}", "train.duration=4 steps"])), console)
        losses[mode] = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses["plain"] == pytest.approx(losses["auto"], rel=1e-5)
    environment = json.loads((tmp_path / "plain" / "environment.json").read_text())
    assert environment["engine"] == {"mode": "plain", "optimisations": []}
    assert "engine: attention, " in console.file.getvalue() and "engine: plain" in console.file.getvalue()


def test_a_report_that_fails_does_not_fail_the_run(run_file, monkeypatch):
    def fail(folders):
        raise ZeroDivisionError("no axes")

    monkeypatch.setattr("preceptor.train.finish.write_report", fail)
    prepared = prepare(config.load(run_file()))
    shown = io.StringIO()
    summary = execute(prepared, Console(file=shown))
    folder = Path(prepared.run.out)
    assert json.loads((folder / "summary.json").read_text()) == summary and (folder / "model").is_dir()
    assert "could not be written (ZeroDivisionError: no axes)" in shown.getvalue().replace("\n", " ")


def test_the_files_of_replay_are_on_record(run_file, write_jsonl):
    texts = write_jsonl([{"text": "The start of a message."}] * 3, "texts.jsonl")
    prepared = prepare(config.load(run_file(replay={"data": [{"path": texts}]})))
    found = {file["use"]: file for file in provenance.origins(prepared)["data"]}
    assert list(found) == ["train", "replay"] and found["replay"]["name"] == texts
    assert found["replay"]["sha256"] == hashlib.sha256(Path(texts).read_bytes()).hexdigest()


def test_long_examples_have_gaps_that_add_up(monkeypatch):
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(provenance, "EXAMPLE_TOKENS", 12)
    monkeypatch.setattr(provenance, "EXAMPLE_SEGMENTS", 3)
    tree = chain(np.random.default_rng(0), (30, 5, 4, 3), vocab_size=200)
    found = provenance.example(tree, tokenizer, special_ids(tokenizer))
    assert found["num_segments_left_out"] == 1 and found["num_tokens"] == 42
    for segment, own in zip(found["segments"], tree.segments, strict=False):
        pieces = segment["pieces"]
        gap = segment["gap"] or {"after": len(pieces), "num_tokens": 0}
        before, after = (
            [id_ for piece in part for id_ in piece["ids"]] for part in (pieces[: gap["after"]], pieces[gap["after"] :])
        )
        assert len(before) + len(after) + gap["num_tokens"] == len(own.ids)
        assert tuple(before) == own.ids[: len(before)] and tuple(after) == own.ids[len(own.ids) - len(after) :]
        assert len(before) + len(after) == min(4, len(own.ids))


def test_a_branching_tree_is_among_the_examples():
    rng, tokenizer = np.random.default_rng(0), tiny_tokenizer()
    trees = [chain(rng, (length, 4)) for length in (9, 8, 20, 7)] + [branching(rng), chain(rng, (50, 2))]
    assert [has_branches(tree) for tree in trees] == [False] * 4 + [True, False]
    found = {line["number"]: line["why"] for line in provenance.examples(Dataset.of(trees), tokenizer)}
    assert found == {
        1: ["the first"],
        3: ["of median length"],
        4: ["the shortest"],
        6: ["the longest"],
        5: ["the first that branches"],
    }


def test_histograms_count_every_length():
    for lengths in ([5], [1, 2, 2, 9], list(range(1, 1000, 7))):
        found = provenance.histogram(np.array(lengths))
        expected = [sum(low <= length < high for length in lengths) for low, high in pairwise(found["edges"])]
        assert found["counts"] == expected and sum(expected) == len(lengths) and len(expected) <= provenance.NUM_BINS
