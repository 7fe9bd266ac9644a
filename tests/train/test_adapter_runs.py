"""Runs with an adapter of every kind: what is said of it, what moved, resume and `--from`, and what is saved."""

import json
import math

import pytest
import torch
from children import killed_at_step
from safetensors.torch import load_file

from preceptor import config
from preceptor.errors import ConfigError
from preceptor.model.adapters.folder import FirstUpdate, table_lines, without_gradient
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.options import LoraOptions
from preceptor.train import loop
from preceptor.train.build import optimizer_of
from preceptor.train.step import NotFiniteError
from tiny import tiny_model

SETTINGS = {
    "dora": "{kind: dora, rank: 2, init: pissa, lr_ratio: 4}",
    "whole": "{rank: 2, use_rslora: true, rank_pattern: {v_proj: 3}, modules_to_save: [embed_tokens, lm_head, norm]}",
}


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors") | load_file(
        folder / "model" / "adapter" / "adapter_model.safetensors"
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_resumed_to_the_bit_and_trained_on(name, run_file, tmp_path, preceptor, decompositions):
    file = run_file()
    words = ("train", file, f"adapter={SETTINGS[name]}", "checkpoint.every=1 steps", "eval.every=null")
    code, shown, error = preceptor(*words, f"out={tmp_path}/a")
    assert code == 0, error
    assert "adapted" in shown and "down_proj" in shown and "no gradient" not in shown
    assert ("learning rate times 4" in shown) == (name == "dora")
    assert len(decompositions) == (name == "dora")

    with killed_at_step(2):
        preceptor(*words, f"out={tmp_path}/b")
    decompositions.clear()  # the values come from a checkpoint, and then from a saved adapter
    code, shown, error = preceptor(*words, f"out={tmp_path}/b")
    assert code == 0 and len(metrics(tmp_path / "b")) == 4, error
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    again = ("--from", tmp_path / "a", "train.duration=1 steps", f"out={tmp_path}/c")
    code, shown, error = preceptor(*words, *again)
    assert code == 0, error
    assert f"trains on the adapter of {tmp_path}/a" in shown and not decompositions


def test_factors_of_the_learning_rate_multiply():
    tree = {"model": {"path": "m"}, "data": {"train": [{"path": "d"}]}, "out": "o"}
    sections = {"adapter": {"lr_ratio": 4}, "optimizer": {"lr_factors": {"*.lora_B.*": 2}}}
    model = add_adapter(tiny_model("llama"), 2, 4.0, 0.0, None, [], seed=0)
    groups = optimizer_of(config.build(tree | sections, "run.yaml"), model).param_groups
    assert {group["lr_factor"] for group in groups} == {1.0, 8.0}


@pytest.mark.parametrize("num_skipped", [0, 1])
def test_an_adapter_without_a_gradient_is_named(run_file, tmp_path, preceptor, monkeypatch, num_skipped):
    """A layer whose output nothing reads: after the first step whose update was applied."""
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaMLP.forward

    def cut(self, x):
        with torch.no_grad():
            return forward(self, x)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", cut)
    take_step = loop.take_step

    def broken(state, *arguments):
        if state.step < num_skipped:
            raise NotFiniteError(1, math.nan, math.nan, [])
        return take_step(state, *arguments)

    monkeypatch.setattr(loop, "take_step", broken)
    overrides = ("adapter={rank: 2}", "engine=plain", "train.max_skipped=1", f"out={tmp_path}/a")
    code, shown, error = preceptor("train", run_file(), *overrides)
    assert code == 0, error
    skipped, (first, *rest) = metrics(tmp_path / "a")[:num_skipped], metrics(tmp_path / "a")[num_skipped:]
    assert all(line["skipped"] for line in skipped)
    assert len(first["without_gradient"]) == 6 and all(".mlp." in layer for layer in first["without_gradient"])
    assert not any("without_gradient" in line for line in rest)
    assert "no gradient reached the adapter on model.layers.0.mlp.gate_proj" in " ".join(shown.split())


def test_what_has_moved_is_seen_by_layer():
    model = add_adapter(tiny_model("llama"), 4, 8.0, 0.0, ["q_proj"], [5], seed=0)
    first = FirstUpdate(model)
    assert len(first.unmoved(model)) == 2, "not the row of a token, which no context may hold"
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layers.0" in name and "lora_B" in name:
                p[0, 0] = 1e-30
    assert first.unmoved(model) == ["model.layers.1.self_attn.q_proj"]
    assert "2 of the adapted experts" in without_gradient(["a.experts.0.up", "a.experts.1.up"])
    assert "and 3 more" in without_gradient([f"layers.{n}.indexer" for n in range(7)]) and without_gradient([]) == ""


def test_the_table_of_what_is_adapted_names_every_trained_parameter_once():
    options = LoraOptions(dora=True, rank_pattern=(("layers.0", 2),), modules_to_save=("norm",))
    model = add_adapter(tiny_model("llama"), 4, 8.0, 0.0, None, [3, 4], seed=0, options=options)
    lines = list(table_lines(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines[1:]) == trained
    assert any("q_proj" in line and "rank 2, scale 4" in line for line in lines)
    assert len(lines) == 1 + 2 * 7 + 1 + 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": {"init": "pissa"}, "optimizer": {"weight_decay": 0.1}}, "weight_decay: with adapter.init: pissa"),
        ({"model": {"path": "m", "quantization": "nf4"}}, "quantized weights cannot be trained; add the section"),
        ({"model": {"path": "m", "double_quantization": True}}, "of `quantization: nf4` alone"),
        (
            {"adapter": {}, "model": {"path": "m", "quantization": "int8"}, "parallel": {"strategy": "shard"}},
            "quantized weights cannot be sharded",
        ),
    ],
)
def test_keys_that_do_not_go_together(changes, words):
    tree = {"model": {"path": "m"}, "data": {"train": [{"path": "d"}]}, "out": "o"}
    with pytest.raises(ConfigError, match=words):
        config.build(tree | changes, "run.yaml")


def test_alpha_follows_the_rank():
    tree = {"model": {"path": "m"}, "data": {"train": [{"path": "d"}]}, "out": "o"}
    for adapter, alpha in (({"rank": 4}, 8.0), ({"rank": 64, "use_rslora": True}, 8.0), ({"alpha": 3}, 3.0)):
        assert config.build(tree | {"adapter": adapter}, "run.yaml").adapter.alpha == alpha
