"""Which parameters are trained, their learning rates and optimizers, through a run; and resuming each to the bit."""

import io
import json
from pathlib import Path

import pytest
import torch
from children import killed_at_step
from rich.console import Console
from safetensors.torch import load_file

from preceptor import config
from preceptor.errors import ConfigError, ModelError
from preceptor.model.parts import choose_trained, matches
from preceptor.plan.dry_run import dry_run_like
from preceptor.plan.memory import EVERYTHING
from preceptor.train.prepare import prepare
from preceptor.train.run_folder import claim
from runs import execute, execute_in
from tiny import tiny_model


def run_of(file, *overrides):
    shown = Console(file=io.StringIO(), width=400)
    run = config.load(file, overrides)
    execute(prepare(run), shown)
    return load_file(f"{run.out}/model/model.safetensors"), shown.file.getvalue()


def test_a_pattern_is_a_whole_name_or_a_module():
    name = "model.layers.1.mlp.up_proj.weight"
    for pattern in (name, "model.layers.1", "*.mlp.*", "*.layers.[0-3]", "*up_proj*", "model.layers.1.mlp"):
        assert matches(pattern, name), pattern
    for pattern in ("layers.1", "model.layers.1.ml", "mlp", "*.layers.[2-3]"):
        assert not matches(pattern, name), pattern


def test_freeze_and_train_only_are_each_others_opposite_and_a_tied_weight_has_both_names():
    def left(**choice):
        model = tiny_model("qwen3")
        said = choose_trained(model, choice.get("freeze", []), choice.get("train_only", []))
        return {name for name, p in model.named_parameters() if p.requires_grad}, said

    everything = {name for name, _ in tiny_model("qwen3").named_parameters()}
    frozen, said = left(freeze=["lm_head", "*.layers.0.*"])
    assert "model.embed_tokens.weight" not in frozen and not any(".layers.0." in name for name in frozen)
    assert said.startswith("model.freeze: ") and " tensors (" in said
    assert left(train_only=["lm_head", "*.layers.0.*"])[0] == everything - frozen
    assert left() == (everything, "")


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ((["*.mlq.*"], []), r"model\.freeze: '\*\.mlq\.\*' matches no parameter of this model; near it: .*mlp"),
        (([], ["model.embed_tokns"]), r"model\.train_only: .*near it: .*embed_tokens"),
        ((["*"], []), r"model\.freeze: \* leaves nothing to train"),
    ],
)
def test_a_vain_pattern_is_an_error(choice, words):
    with pytest.raises(ModelError, match=words):
        choose_trained(tiny_model("llama"), *choice)


@pytest.mark.parametrize("context", ["full", "recompute", "detach"])
def test_what_is_frozen_stays_and_the_rest_learns(run_file, base_folder, context):
    after, said = run_of(
        run_file(),
        "model.freeze=['*.layers.0']",
        f"memory.context_gradient={context}",
        "model.dtype=bfloat16",
        "train.neftune_alpha=5",
    )
    before = load_file(base_folder / "model.safetensors")
    for name, weight in after.items():
        if name in before and before[name].shape == weight.shape:
            same = torch.equal(weight.float(), before[name].to(torch.bfloat16).float())
            assert same == (".layers.0." in name), name
    assert "model.freeze: " in said and "optimizer: adamw" in said


def test_new_tokens_in_a_frozen_embedding_are_said(run_file):
    _, said = run_of(run_file(), "model.freeze=['model.embed_tokens']")
    assert "stay at their first values" in said


@pytest.mark.parametrize("choice", ["model.train_only=['*.layers.*']", "model.freeze=[lm_head]"])
def test_a_stop_token_that_could_not_be_learned_is_refused(run_file, choice):
    with pytest.raises(ModelError, match=r"lm_head\.weight is frozen, and .*<\|im_end\|>.* never learn to stop"):
        run_of(run_file(), choice)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter.rank=2", "model.freeze=[lm_head]"], r"model\.freeze: an adapter trains nothing of the base"),
        (["model.freeze=[a]", "model.train_only=[b]"], "give one of them"),
        (["optimizer.momentum=0.9"], r"optimizer\.momentum: of muon and sgd; adamw has none"),
        (["optimizer.rounding=exact"], r"optimizer\.rounding: of trained weights in bfloat16"),
        (["model.dtype=bfloat16", "adapter.rank=2", "optimizer.rounding=exact"], r"optimizer\.rounding"),
        (["optimizer.decay=10 %"], r"optimizer\.decay: only `lr_scheduler: wsd`"),
    ],
)
def test_a_key_without_effect_is_an_error(run_file, overrides, words):
    with pytest.raises(ConfigError, match=words):
        config.load(run_file(), overrides)


def test_defaults_that_follow_from_other_keys_are_written_out(run_file):
    run = config.load(run_file(), ["optimizer.name=muon", "model.dtype=bfloat16", "optimizer.lr_scheduler=wsd"])
    assert (run.optimizer.momentum, run.optimizer.rounding, str(run.optimizer.decay)) == (0.95, "exact", "20 %")
    assert config.build(run.model_dump(mode="json"), "again") == run


def test_the_plan_counts_what_is_trained():
    model = tiny_model("llama")
    choice = (("model.embed_tokens", "*.layers.0"), ())
    found = dry_run_like(model).parameters(choice=choice)
    choose_trained(model, *choice)
    assert found.num_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.num_base == dry_run_like(model).parameters(choice=EVERYTHING).num_trained
    assert found.num_added == 0


RUNS = [
    ("adamw", "float32", None),
    ("adamw_8bit", "float32", None),
    ("muon", "float32", None),
    ("adafactor", "float32", None),
    ("sgd", "float32", None),
    ("adamw", "bfloat16", "exact"),
    ("adamw", "bfloat16", "stochastic"),
    ("adamw_8bit", "bfloat16", "stochastic"),
]


@pytest.mark.parametrize(("name", "dtype", "rounding"), RUNS)
def test_a_killed_run_goes_on_to_the_same_bits(run_file, tmp_path, name, dtype, rounding):
    settings = [f"optimizer.name={name}", f"model.dtype={dtype}", f"optimizer.rounding={rounding or 'null'}"]
    settings += ["train.neftune_alpha=5", "optimizer.lr_factors={'*.mlp.*': 2}", "eval.every=null"]
    file = run_file(checkpoint__every="2 steps")

    def go(out):
        run = config.load(file, [*settings, f"out={tmp_path / out}"])
        with claim(run) as folder:
            execute_in(folder, prepare(run, date=folder.date), Console(quiet=True))
        return run.out

    whole = go("whole")
    with killed_at_step(3):
        go("parts")
    parts = go("parts")
    weights = [load_file(f"{out}/model/model.safetensors") for out in (whole, parts)]
    assert all(torch.equal(weight, weights[1][key]) for key, weight in weights[0].items())
    logs = [Path(out, "metrics.jsonl").read_text().splitlines() for out in (whole, parts)]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1]
