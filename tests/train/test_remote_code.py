"""Models whose code comes with them: run where the run file that is trained, or the caller, trusts it."""

import json
import shutil

from conftest import conversations
from tiny import tiny_model, tiny_tokenizer

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


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
    often = {"checkpoint": {"every": "2 steps", "keep": 1}, "optimizer": {"lr_scheduler": "constant"}}
    file = run_file(model=model, adapter=adapter, rows=conversations(8), eval__every=None, **often)
    code, _, err = preceptor("train", file)
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
            code, _, err = preceptor(name, run, *options, stdin=["a user"])
            assert code == 5 and "--trust-remote-code" in err, f"{name}: a run's folder decides nothing: {err}"
        assert preceptor(name, moved, *options, "--trust-remote-code", stdin=["a user"])[0] == 0, name
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
    code, out, err = preceptor("export", run, "--to", "hf")
    assert code == 0 and "the data of the run cannot be read here" in out, f"a run's folder decides nothing: {err}"
    assert ", trust_remote_code=True)" in (run / "model/adapter/README.md").read_text()
    merged = ("export", run / "model/adapter", "--to", "hf", "--out", tmp_path / "merged")
    assert preceptor(*merged)[0] == 5
    code, _, err = preceptor(*merged, "--trust-remote-code")
    assert code == 0 and ", trust_remote_code=True)" in (tmp_path / "merged/README.md").read_text(), err
    (step,) = (run / "checkpoints").iterdir()
    code, _, err = preceptor("chat", step, "--max-new-tokens", 2, stdin=["a user"])
    assert code == 5 and "--trust-remote-code" in err, err
    code, _, err = preceptor("chat", step, "--max-new-tokens", 2, "--trust-remote-code", stdin=["a user"])
    assert code == 0, err
