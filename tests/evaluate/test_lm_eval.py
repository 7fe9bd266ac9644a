"""The lm-eval harness on a saved model, by the command that docs/evaluate.md gives, on a local task.

Skipped where the optional package is not installed: pip install 'preceptor[lm-eval]'.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import conversations
from preceptor import config

PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"
TASK = """
task: local_words
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""


def test_the_documented_command_is_the_tested_one():
    assert (
        "lm_eval run --model hf --model_args pretrained=" in PAGE.read_text()
        and "--apply_chat_template" in PAGE.read_text()
    )


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval, an optional extra, is not installed")
def test_the_harness_runs_on_a_saved_model_through_its_chat_template(run_file, tmp_path, write_jsonl):
    from rich.console import Console

    from preceptor.train.prepare import prepare
    from runs import execute

    execute(prepare(config.load(run_file(conversations(6)))), Console(quiet=True))
    rows = [{"question": f"the user {n}", "choices": ["the message", "and then"]} for n in range(4)]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.replace("FILE", write_jsonl(rows, "words.jsonl")))
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf"),
        *("--model_args", f"pretrained={tmp_path / 'run' / 'model'},dtype=float32", "--device", "cpu"),
        *("--tasks", "local_words", "--include_path", str(tmp_path / "tasks"), "--apply_chat_template"),
        *("--output_path", str(tmp_path / "results"), "--log_samples"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "results").rglob("results_*.json")
    found = json.loads(results.read_text())
    assert 0 <= found["results"]["local_words"]["acc,none"] <= 1
    (samples,) = (tmp_path / "results").rglob("samples_*.jsonl")
    first = json.loads(samples.read_text().splitlines()[0])
    assert "<|im_start|>user\nthe user 0<|im_end|>\n<|im_start|>assistant\n" in json.dumps(
        first["arguments"], ensure_ascii=False
    ).replace("\\n", "\n")
