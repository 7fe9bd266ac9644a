"""Runs on a quantized base: losses compared before the start, resume, and an adapter of the unquantized one."""

import json
import re

import numpy as np
import pytest
import torch
from children import killed_at_step
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from preceptor.data.dataset import Dataset
from preceptor.data.loader import Loader
from preceptor.report.curves import PREDICTED
from preceptor.train.quantized import quantize_base
from tiny import branching, chain, tiny_model

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra `quantized`)")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_losses_are_compared_on_the_shortest_conversations_each_chain_of_a_branching_one_alone():
    rng, lines = np.random.default_rng(0), []
    loader = Loader(Dataset.of([chain(rng, (700, 600)), branching(rng), chain(rng, (20, 9))]), 2048, 1, 0)
    quantize_base(tiny_model("llama"), "int8", False, loader, "float32", torch.device("cpu"), lines.append)
    assert "loss of the base (2 conversations of this run, 63 tokens): quantized" in lines[-1]


def test_a_run_from_the_check_to_the_saved_model(run_file, base_folder, tmp_path, preceptor, decompositions):
    file = run_file(optimizer__learning_rate=1e-2, eval__every=None)
    adapter = "adapter={rank: 2, kind: dora, init: pissa}"
    words = ("train", file, "model.quantization=nf4", adapter, "checkpoint.every=1 steps")
    code, shown, error = preceptor(*words, f"out={tmp_path}/a")
    assert code == 0, error
    assert len(decompositions) == 1, "the unquantized model gets the trained values"
    shown = " ".join(shown.split())
    assert "quantized to nf4: 14 linear layers" in shown
    found = re.search(
        r"loss of the base \(\d+ conversations of this run, [\d,]+ tokens\): quantized ([\d.]+), unquantized ([\d.]+), "
        r"difference ([+-][\d.]+)",
        shown,
    )
    quantized, unquantized, difference = map(float, found.groups())
    assert quantized - unquantized == pytest.approx(difference, abs=2e-4) and quantized != unquantized
    _require_merged_into_the_unquantized_base(tmp_path / "a" / "model", base_folder)
    assert json.loads((tmp_path / "a" / "environment.json").read_text())["versions"]["bitsandbytes"]

    with killed_at_step(2):
        preceptor(*words, f"out={tmp_path}/b")
    assert preceptor(*words, f"out={tmp_path}/b")[0] == 0
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(tmp_path / run / "model" / name) for run in "ab")
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _require_merged_into_the_unquantized_base(folder, base_folder):
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base_folder)
    base, whole = (AutoModelForCausalLM.from_pretrained(place) for place in (base_folder, folder))
    base.resize_token_embeddings(len(whole.get_input_embeddings().weight), mean_resizing=False)
    merged = PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload()
    found = dict(merged.named_parameters())
    for name, p in whole.named_parameters():
        if "proj" in name:
            torch.testing.assert_close(p, found[name], rtol=1e-5, atol=1e-6)


def test_its_adapter_alone_is_trained_on_and_planned(run_file, tmp_path, preceptor, with_prediction):
    words = ("train", run_file(), "model.quantization=int8", "train.duration=1 steps", "eval.every=null")
    adapter = "adapter={rank: 2, save: adapter}"
    code, _, error = preceptor(*words, adapter, f"out={tmp_path}/a")
    assert code == 0, error
    assert not (tmp_path / "a" / "model" / "config.json").exists()
    code, shown, error = preceptor(*words, "--from", tmp_path / "a", adapter, f"out={tmp_path}/b")
    assert code == 0 and "trains on the adapter of" in shown, error
    code, shown, error = preceptor("plan", tmp_path / "b" / "config.yaml", "--json")
    assert code == 0, error
    assert json.loads(shown)["run"]["quantization"] == "int8"
    assert all(json.loads((tmp_path / run / "data.json").read_text())[PREDICTED] for run in "ab")
