"""The demo, cut to a few steps: what it prints and writes. (Its figures are benchmarks/first_run.py's to show.)"""

import io
import json

import pytest
from rich.console import Console

from preceptor import demo
from preceptor.errors import CheckpointError
from preceptor.evaluate.run import ItemResult
from preceptor.evaluate.tasks import TaskItem, TaskPrompt
from preceptor.scholar import MODEL_DIR


def test_the_demo_shows_both_and_records_everything(tmp_path):
    console = Console(record=True, width=120, file=io.StringIO())
    out = tmp_path / "demo"
    summary = demo.run_demo(out, 12, console, replace=False, overrides=["train.duration=3 steps"])
    shown = console.export_text()
    for words in ("question", "base", "tuned", "answers exactly", "stops by itself", "preceptor chat"):
        assert words in shown
    assert json.loads((out / "summary.json").read_text()) == summary
    for key in ("base_exact_match", "intern_exact_match", "stop_rate", "base_continues_with_question", "seconds"):
        assert summary[key] >= 0
    assert summary["examples_per_epoch"] <= 1000 and summary["num_questions"] == 12
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12 and all({"prompt", "base", "answer", "reference", "exact"} <= set(s) for s in samples)
    assert {"config.yaml", "metrics.jsonl", "rejections.jsonl", "model"} <= {path.name for path in out.iterdir()}
    assert summary["base_exact_match"] <= 0.1 and summary["base_continues_with_question"] >= 0.5
    with pytest.raises(CheckpointError, match="this run is finished") as error:
        demo.run_demo(out, 12, console, replace=False, overrides=["train.duration=3 steps"])
    assert "--out" in str(error.value) and "--from" not in str(error.value) and "`out`" not in str(error.value)
    with pytest.raises(CheckpointError, match="holds another run") as error:
        demo.run_demo(out, 12, console, replace=False, overrides=["train.duration=4 steps"])
    assert "--out" in str(error.value) and "--from" not in str(error.value) and "`out`" not in str(error.value)


def test_a_demo_that_was_stopped_while_it_asked_goes_on_with_the_questions(tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    def run(**given):
        console = Console(record=True, width=120, file=io.StringIO())
        overrides = ["train.duration=2 steps"]
        return demo.run_demo(out, 3, console, overrides=overrides, **({"replace": False} | given)), console

    out = tmp_path / "demo"
    with monkeypatch.context() as patched:
        patched.setattr(demo, "answer", stopped)
        with pytest.raises(KeyboardInterrupt):
            run()
    weights = (out / "model" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(CheckpointError, match="holds another run"):
        demo.run_demo(out, 3, Console(file=io.StringIO()), replace=False, overrides=["train.duration=3 steps"])
    with monkeypatch.context() as patched:  # stopped again, when the answers were written
        patched.setattr(demo, "write_json", stopped)
        with pytest.raises(KeyboardInterrupt):
            run()
    summary, console = run()
    shown = " ".join(console.export_text().split())  # wrapped where the path is long
    assert "only the questions are left" in shown and "answers exactly" in shown and "step 1/2" not in shown
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == weights
    assert summary["num_questions"] == 3 and summary["num_steps"] == 2
    assert summary["seconds"] > summary["training_seconds"] > 0
    assert json.loads((out / "summary.json").read_text()) == summary
    assert len((out / "samples.jsonl").read_text().splitlines()) == 3
    with pytest.raises(CheckpointError, match="this run is finished"):
        run()


def test_the_folder_of_the_demo_is_an_option_and_no_key(preceptor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = preceptor("demo", "out=elsewhere")
    assert code == 2 and "--out" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "begins"), [("\nWhich one is it?\nNo", 1), ("It is so.\nIs it?", 0), ("", 0), ("Is it", 0)]
)
def test_shares_of_answers_by_group(text, begins):
    def result(answer, right, stopped, wording):
        item = TaskItem("t:1", TaskPrompt(text="x"), groups={"wording": wording})
        return ItemResult(item, {"right": right, "stop_token": stopped}, {"answer": answer})

    results = [result(text, 0.0, 1.0, "new"), result("y", 1.0, 0.0, "seen"), result("z", 0.0, 0.0, "new")]
    everything = {"num": 3, "exact_match": 1 / 3, "stop_rate": 1 / 3, "continues_with_question": begins / 3}
    assert demo.shares(results) == everything
    by_wording = demo.shares_by("wording", results)
    assert list(by_wording) == ["new", "seen"] and by_wording["seen"]["exact_match"] == 1.0
    assert by_wording["new"] == {
        "num": 2,
        "exact_match": 0.0,
        "stop_rate": 0.5,
        "continues_with_question": begins / 2,
    }


def test_the_scholar_is_a_true_base_model():
    assert not (MODEL_DIR / "chat_template.jinja").exists()
    assert "chat_template" not in json.loads((MODEL_DIR / "tokenizer_config.json").read_text())
    assert "<|im_start|>" not in (MODEL_DIR / "tokenizer.json").read_text()
    assert (MODEL_DIR / "model.safetensors").stat().st_size < 12_000_000


def test_the_demo_trains_on_the_conversations_that_ship(tmp_path):
    run = demo.demo_run(tmp_path / "x")
    assert [source.path for source in run.data.train] == ["scholar:conversations.jsonl"]
    assert run.out == str(tmp_path / "x")
