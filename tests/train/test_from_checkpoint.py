"""A checkpoint of a run as a model: asked, evaluated, compared, exported; equal to the model that the run saves."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from processes import run_command
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from preceptor.errors import DataError, ModelError
from preceptor.evaluate.model import load_evaluated_model
from preceptor.hub import resolve_model_path
from preceptor.train.from_checkpoint import open_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork"),
]
SETTINGS = {
    "checkpoint": {"every": "2 steps", "keep": 2},
    "optimizer": {"learning_rate": 1e-2, "lr_scheduler": "constant"},  # may be lengthened: the last one is kept
    "eval": {"every": None},
}
KINDS = {
    "full": {},
    "lora": {"adapter": {"kind": "lora", "rank": 2}},
    "qlora": {"adapter": {"kind": "lora", "rank": 2, "init": "pissa"}, "model__quantization": "nf4"},
}
ASKED = [{"role": "user", "content": "a user"}]


def logits(evaluated):
    with torch.no_grad():
        return evaluated.model(torch.tensor([evaluated.chat.ids(evaluated.chat.prompt(ASKED))])).logits


@pytest.fixture
def trained(preceptor, run_file, tmp_path):
    def train(kind="full"):
        code, _, err = preceptor("train", run_file(**SETTINGS, **KINDS[kind]))
        assert code == 0, err
        return tmp_path / "run"

    return train


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_the_model_that_the_run_saves_of_it(kind, trained, preceptor, tmp_path):
    if kind == "qlora":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra `quantized`)")
    run = trained(kind)
    saved, last = load_evaluated_model(str(run), "float32", "cpu"), run / "checkpoints/step-00000004"
    earlier, found = (
        open_model(str(run / "checkpoints" / name), "float32", "cpu")
        for name in sorted(path.name for path in (run / "checkpoints").iterdir())
    )
    assert found.chat.prompt(ASKED) == saved.chat.prompt(ASKED)
    assert found.chat.stop_token_ids == saved.chat.stop_token_ids
    torch.testing.assert_close(logits(found), logits(saved), rtol=1e-5, atol=1e-5)
    assert (logits(earlier) - logits(saved)).abs().max() > 1e-3, "two more steps change it"
    code, out, err = preceptor("export", last, "--to", "hf")
    assert code == 0 and "are those of training, token for token" in out, err
    there = tmp_path / "run-step-00000004-hf"
    for name, tensor in load_file(run / "model/model.safetensors").items():
        assert torch.equal(load_file(there / "model.safetensors")[name], tensor), name
    AutoModelForCausalLM.from_pretrained(there)
    if kind == "lora":
        code, _, err = preceptor("export", last, "--to", "adapter", "--out", tmp_path / "adapter")
        assert code == 0, err
        one, other = (
            load_file(at / "adapter_model.safetensors") for at in (run / "model/adapter", tmp_path / "adapter")
        )
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_modules_that_are_trained_whole_have_the_type_of_the_others(dtype, preceptor, run_file, tmp_path):
    whole = {"kind": "lora", "rank": 2, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}
    code, _, err = preceptor("train", run_file(**SETTINGS, adapter=whole, model__dtype="bfloat16"))
    assert code == 0, err
    saved = load_evaluated_model(str(tmp_path / "run"), dtype, "cpu")
    found = open_model(str(tmp_path / "run/checkpoints/step-00000004"), dtype, "cpu")
    assert {p.dtype for p in found.model.parameters()} == {getattr(torch, dtype)}
    assert torch.equal(logits(found), logits(saved))


def test_the_commands_take_a_checkpoint(trained, preceptor, tmp_path):
    run = trained()
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps({"messages": ASKED, "accepted": ["b"]}) + "\n")
    step = run / "checkpoints/step-00000002"
    code, out, err = preceptor("chat", step, "--max-new-tokens", 2, "--dtype", "bfloat16", stdin=["a user"])
    assert code == 0 and out.strip(), err
    code, out, err = preceptor("eval", step, task, "--max-new-tokens", 2, "--json")
    assert code == 0 and json.loads(out)["model"] == str(step), err
    arguments = ("--tasks", task, "--max-new-tokens", 2, "--num-prompts", 1, "--json")
    code, out, err = preceptor("compare", step, run, *arguments)
    assert code == 0, err
    code, out, err = preceptor("export", step, "--to", "hf", "--out", tmp_path / "hf")
    assert code == 0, err
    card = (tmp_path / "hf/README.md").read_text()
    assert "# run-step-00000002" in card and "| steps | 2 of 2 sequences" in card
    with pytest.raises(ModelError, match=f"a checkpoint, .*`preceptor export .*; its run is finished: name {run}"):
        resolve_model_path(step)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"train\.jsonl"):
        open_model(str(step), "float32", "cpu")


def test_relative_paths_of_a_run_are_those_of_where_it_started(preceptor, run_file, tmp_path, monkeypatch):
    file = run_file(**SETTINGS, data__train=[{"path": "train.jsonl"}], out="run")
    monkeypatch.chdir(tmp_path)
    assert preceptor("train", file)[0] == 0
    monkeypatch.chdir(tmp_path / "run/checkpoints/step-00000002")
    open_model(".", "float32", "cpu")
    assert Path.cwd().name == "step-00000002"


def test_a_checkpoint_of_what_a_program_held_says_so(trained):
    run = trained()
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["train"] = [{"path": "memory:train"}]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ModelError, match="which a Python program held: finish the run and use its model"):
        open_model(str(run / "checkpoints/step-00000002"), "float32", "cpu")


def test_the_code_of_a_checkpoints_data_is_not_run_unasked(trained, tmp_path):
    run = trained()
    (tmp_path / "own.py").write_text("raise SystemExit('it was run')\n\ndef read(record): return record\n")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["train"][0]["code"] = f"{tmp_path}/own.py:read"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ModelError, match="--trust-remote-code runs it"):
        open_model(str(run / "checkpoints/step-00000002"), "float32", "cpu")


def test_a_checkpoint_of_two_processes_is_read_by_one(run_file, tmp_path):
    found = run_command(2, "train", run_file(**SETTINGS, parallel={"strategy": "shard"}))
    assert [process.code for process in found] == [0, 0]
    run = tmp_path / "run"
    assert len([*(run / "checkpoints/step-00000004").glob("*.distcp")]) == 2
    saved, restored = load_evaluated_model(str(run), "float32", "cpu"), None
    restored = open_model(str(run / "checkpoints/step-00000004"), "float32", "cpu")
    torch.testing.assert_close(logits(restored), logits(saved), rtol=1e-5, atol=1e-5)
