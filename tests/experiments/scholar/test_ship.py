"""What is shipped is a bfloat16 base model with its history; what cannot be shipped is rejected."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from preceptor.errors import ModelError
from scholar.ship import ship, thin


@pytest.fixture
def run(tmp_path, base_folder):
    folder = tmp_path / "run"
    shutil.copytree(base_folder, folder / "model")
    (folder / "config.yaml").write_text("out: here\n")
    (folder / "summary.json").write_text("{}")
    lines = [json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in range(1, 101)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_weights_are_bfloat16_and_the_history_comes_along(run, tmp_path):
    ship(run, tmp_path / "shipped")
    weights = load_file(tmp_path / "shipped" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "shipped", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    for shipped, kept in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(shipped, kept.to(torch.bfloat16).float())
    assert AutoTokenizer.from_pretrained(tmp_path / "shipped").chat_template is None
    history = (tmp_path / "shipped" / "history" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(history[-1])["step"] == 100


def test_thinning_is_even_keeps_the_last_line_and_the_limit():
    lines = [f"{number:03}\n" for number in range(100)]
    assert thin(lines, 400) == lines
    kept = [int(line) for line in thin(lines, 100)]
    assert kept[-1] == 99 and len(kept) * 4 <= 100
    assert len({b - a for a, b in itertools.pairwise(kept)}) == 1


def test_an_unfinished_run_is_rejected(run, tmp_path):
    (run / "summary.json").unlink()
    with pytest.raises(ModelError, match="not the folder of a finished run"):
        ship(run, tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()


def test_a_model_that_chats_is_no_base_model(run, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(run / "model")
    with pytest.raises(ModelError, match="has a chat template"):
        ship(run, tmp_path / "shipped")
