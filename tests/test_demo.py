"""The demo, cut to a few steps: what it prints and writes. (Its figures are benchmarks/first_run.py's to show.)"""

import io
import json

import pytest
from rich.console import Console

from preceptor import demo
from preceptor.config.durations import Duration
from preceptor.errors import CheckpointError
from preceptor.scholar import MODEL_DIR


@pytest.fixture
def short(monkeypatch):
    """Three steps instead of hundreds."""
    whole = demo.demo_run

    def cut(out):
        run = whole(out)
        return run.model_copy(update={"train": run.train.model_copy(update={"duration": Duration(3, "steps")})})

    monkeypatch.setattr(demo, "demo_run", cut)


def test_the_demo_shows_both_and_records_everything(short, tmp_path):
    console = Console(record=True, width=120, file=io.StringIO())
    out = tmp_path / "demo"
    summary = demo.run_demo(out, 12, console, replace=False)
    shown = console.export_text()
    for words in ("asked", "base", "intern", "answers exactly", "stops by itself", "preceptor chat"):
        assert words in shown
    assert json.loads((out / "summary.json").read_text()) == summary
    for key in ("base_exact_match", "intern_exact_match", "stop_rate", "base_continues_with_question", "seconds"):
        assert summary[key] >= 0
    assert summary["examples_per_epoch"] <= 1000 and summary["num_questions"] == 12
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12 and all({"prompt", "base", "answer", "reference", "exact"} <= set(s) for s in samples)
    assert {"config.yaml", "metrics.jsonl", "rejections.jsonl", "model"} <= {path.name for path in out.iterdir()}
    assert summary["base_exact_match"] <= 0.1 and summary["base_continues_with_question"] >= 0.5
    with pytest.raises(CheckpointError, match="exists already"):
        demo.run_demo(out, 12, console, replace=False)


def test_the_scholar_is_a_true_base_model():
    assert not (MODEL_DIR / "chat_template.jinja").exists()
    assert "chat_template" not in json.loads((MODEL_DIR / "tokenizer_config.json").read_text())
    assert "<|im_start|>" not in (MODEL_DIR / "tokenizer.json").read_text()
    assert (MODEL_DIR / "model.safetensors").stat().st_size < 12_000_000


def test_the_demo_trains_on_the_conversations_that_ship(tmp_path):
    run = demo.demo_run(tmp_path / "x")
    assert [source.path for source in run.data.train] == ["scholar:conversations.jsonl"]
    assert run.out == str(tmp_path / "x")
