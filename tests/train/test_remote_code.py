"""Models whose code comes with them: used where their run, or the caller, trusts it."""

import json
import shutil

import pytest
import yaml

from conftest import conversations
from tiny import tiny_model, tiny_tokenizer

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
pytestmark = pytest.mark.usefixtures("empty_report", "unpredicted")


def write_base(folder):
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "architectures": ["OwnModel"]}
    settings["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(CODE)
    return folder


def test_a_model_with_code_is_asked_evaluated_compared_and_exported(run_file, tmp_path, preceptor):
    base, task = write_base(tmp_path / "base"), tmp_path / "task.jsonl"
    task.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}], "accepted": ["b"]}) + "\n")
    model, adapter = {"path": str(base), "trust_remote_code": True}, {"kind": "lora", "rank": 2}
    code, _, err = preceptor("train", run_file(model=model, adapter=adapter, rows=conversations(8), eval__every=None))
    assert code == 0, err
    run, moved = tmp_path / "run", shutil.copytree(tmp_path / "run/model", tmp_path / "moved")
    commands = [
        ("eval", [task, "--max-new-tokens", 2]),
        ("compare", [run, "--tasks", task, "--max-new-tokens", 2, "--num-prompts", 0]),
        ("export", ["--to", "hf", "--out", tmp_path / "hf"]),
        ("chat", ["--max-new-tokens", 2]),
    ]
    for name, options in commands:
        if name != "export":  # a whole model is copied, without its code being run
            code, _, err = preceptor(name, moved, *options, stdin=["a user"])
            assert code == 5 and "--trust-remote-code" in err, (name, err)
        assert preceptor(name, moved, *options, "--trust-remote-code", stdin=["a user"])[0] == 0, name
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        code, _, err = preceptor(name, run, *options, stdin=["a user"])
        assert code == 0, (name, err)
    code, _, err = preceptor("export", run / "model/adapter", "--to", "hf", "--out", tmp_path / "merged")
    assert code == 0, err
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(
        yaml.safe_dump({**settings, "model": {**settings["model"], "trust_remote_code": False}})
    )
    assert preceptor("chat", run, stdin=["a user"])[0] == 5
