"""The flat example and the trainer: the same losses, step for step."""

import json
from pathlib import Path

import pytest
from children import program
from rich.console import Console
from transformers import AutoModelForCausalLM

from conftest import conversations
from preceptor import config
from preceptor.train.prepare import prepare
from runs import execute

EXAMPLE = Path(__file__).parents[1] / "examples" / "minimal.py"


def test_the_flat_example_takes_the_same_steps(run_file, tmp_path, write_jsonl):
    first = config.load(run_file(), ["train.duration=1 steps", f"out={tmp_path / 'first'}"])
    execute(prepare(first), Console(quiet=True))
    model = tmp_path / "first" / "model"  # has a chat template, which the flat example needs

    rows = conversations(6, turns=2)
    file = run_file(rows, model__path=str(model), data__chat_template="tokenizer", train__batch_size=100)
    run = config.load(file, ["train.duration=5 steps", "optimizer.warmup=1 steps"])
    execute(prepare(run), Console(quiet=True))
    lines = (Path(run.out) / "metrics.jsonl").read_text().splitlines()

    options = ("--steps", "5", "--warmup-steps", "1", "--learning-rate", "1e-3")
    given = (model, run.data.train[0].path, tmp_path / "flat")
    code, shown, error = program(EXAMPLE, *given, *options)
    assert code == 0, error
    losses = [json.loads(line)["loss"] for line in shown.splitlines()]
    assert losses == pytest.approx([json.loads(line)["loss"] for line in lines], rel=1e-5)

    ours = AutoModelForCausalLM.from_pretrained(Path(run.out) / "model").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "flat").state_dict().items():
        assert (tensor - ours[name]).abs().max() < 2e-5, name
