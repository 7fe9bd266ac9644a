"""`preceptor plan`: quick, without torch, and by a dry run; its figures are the trainer's; its advice is sound."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from children import TORTURE
from measured import ONE, sequence_of
from safetensors.torch import save_file
from test_docs import made_by
from transformers import AutoConfig

from conftest import conversations
from preceptor import config
from preceptor.commands.plan import measured_rate
from preceptor.errors import ConfigError, DataError, ModelError
from preceptor.model.parts import tower_parameters
from preceptor.plan.changes import find_change, find_plan
from preceptor.plan.devices import DeviceSpec, _read_gpu, find_device
from preceptor.plan.dry_run import dry_run_of
from preceptor.plan.model import read_model
from preceptor.plan.plan import make_case, make_plan, peak_of, place_on_ranks, would_fit
from preceptor.plan.sample import Sample, sample_data
from preceptor.plan.text import number, seconds, size, to_text
from preceptor.plan.work import Work, operations
from tiny import seeing_model, tiny_model

LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def run_of(model, of_model=None, **sections):
    tree = {"model": {"path": str(model), **(of_model or {})}, "data": {"train": [{"path": "rows.jsonl"}]}, "out": "-"}
    for section, keys in sections.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return config.build(tree, "test")


def folder_of(tmp_path, settings):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path


def plan_of(run, device="H100", rate=None, quick=False, dry_run=None):
    model = read_model(run.model)
    sample = sample_data(run, model.tokenizer_file)
    dry_run = None if quick else dry_run or dry_run_of(run.model)
    return make_plan(run, model, sample, find_device(device), rate, dry_run)


@pytest.mark.parametrize("quick", [True, False])
def test_towers_are_held_and_not_trained(tmp_path, quick):
    model = seeing_model("qwen3_vl")
    model.save_pretrained(tmp_path)
    total, towers = (sum(p.numel() for p in of) for of in (model.parameters(), tower_parameters(model)))
    plan = plan_of(run_of(tmp_path, data={"max_length": 64}), quick=quick)
    assert plan["parameters"]["total"] == total
    assert plan["parameters"]["base"]["towers"] == towers
    assert plan["parameters"]["trained_total"] == total - towers
    assert plan["memory"]["components"]["weights"] == 4 * total
    assert plan["memory"]["components"]["optimizer"] == 8 * (total - towers)


def test_a_tied_head_that_is_stored_too_is_no_tower(tmp_path):
    model = seeing_model("gemma3")
    model.save_pretrained(tmp_path)
    save_file({"lm_head.weight": torch.zeros(64, 32)}, tmp_path / "more.safetensors")
    towers = sum(p.numel() for p in tower_parameters(model))
    assert plan_of(run_of(tmp_path), quick=True)["parameters"]["base"]["towers"] == towers


@pytest.mark.parametrize("weights", [None, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"])
def test_towers_are_left_open_where_no_weight_files_are(tmp_path, weights):
    model = seeing_model("qwen3_vl")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if weights is not None:
        (tmp_path / "model.safetensors").write_bytes(weights)
    plan = plan_of(run_of(tmp_path), quick=True)
    of_text = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in tower_parameters(model))
    assert plan["parameters"]["total"] == of_text and plan["model"]["towers_open"]
    assert "text model only" in to_text(plan)


def test_quick_loads_no_torch(tmp_path):
    run_file = tmp_path / "run.yaml"
    run_file.write_text("{model: {path: scholar}, data: {train: [{path: 'scholar:conversations.jsonl'}]}, out: x}")
    code = (
        "import sys, time; from typer.testing import CliRunner; from preceptor.cli import app; "
        f"found = CliRunner().invoke(app, ['plan', {str(run_file)!r}, '--json', '--quick']); "
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules); "
        "sys.exit(repr((found.exception, heavy)) if found.exception or heavy else 0)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started < 10  # 0.6 s on an idle machine; a test machine may be far from idle


def test_the_scholars_plan_is_what_the_trainer_announces(tmp_path):
    """Parameters with the added tokens exactly; tokens and steps too, of messages between two marks and a role."""
    from preceptor.train.build import build_model, choose_device
    from preceptor.train.prepare import prepare

    run = run_of(
        "scholar",
        data={"train": [{"path": "scholar:conversations.jsonl"}], "chat_template": "chatml", "max_length": 512},
        adapter={"rank": 4},
    )
    plan = plan_of(run)
    prepared = prepare(run)
    model = build_model(prepared, choose_device("cpu"))
    assert plan["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert plan["parameters"]["trained_total"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = sum(tree.num_tokens for tree in prepared.train)
    assert plan["data"]["examples_per_epoch"] == len(prepared.train.lengths)
    assert plan["data"]["tokens_per_epoch"] == tokens
    assert plan["data"]["share_trained"] == pytest.approx(sum(t.num_trained for t in prepared.train) / tokens, rel=1e-6)
    assert plan["data"]["steps_per_epoch"] == pytest.approx(prepared.loader().steps_per_epoch, rel=0.02)


def test_what_is_replayed_counts_as_in_training(run_file, write_jsonl):
    from preceptor.train.prepare import prepare

    file = write_jsonl([{"text": f"Long ago, number {k} came home. " * (1 + k % 3)} for k in range(40)], "old.jsonl")
    replay = {"data": [{"path": file}], "share": 0.6}
    run = config.load(run_file(conversations(12), replay=replay, train__duration="1 epochs"))
    data, prepared = plan_of(run)["data"], prepare(run)
    assert data["examples_per_epoch"] == pytest.approx(prepared.examples_per_epoch, abs=1)
    assert data["tokens_per_epoch"] == pytest.approx(sum(tree.num_tokens for tree in prepared.train), rel=0.05)
    assert data["num_steps"] == prepared.loader().steps_per_epoch > 3  # 3 without what is replayed


@pytest.mark.parametrize("of_source", [({}, {}), ({"count": 300}, {"count": 6}), ({"weight": 0.1}, {"weight": 2})])
def test_each_source_counts_by_its_examples(run_file, write_jsonl, monkeypatch, of_source):
    from preceptor.train.prepare import prepare

    monkeypatch.setattr("preceptor.plan.sample.SAMPLE_EXAMPLES", 60)
    short, long = (
        [{"prompt": f"q {k} ", "completion": "a " * n} for k in range(100, 100 + m)] for n, m in ((4, 600), (60, 60))
    )
    files = write_jsonl(short, "short.jsonl"), write_jsonl(long, "long.jsonl")
    sources = [{"path": file, **keys} for file, keys in zip(files, of_source, strict=True)]
    run = config.load(run_file([], data__train=sources, train__duration="1 epochs"))
    data, prepared = plan_of(run)["data"], prepare(run)
    tokens = sum(tree.num_tokens for tree in prepared.train)
    assert data["examples_per_epoch"] == prepared.examples_per_epoch
    assert data["tokens_per_epoch"] == pytest.approx(tokens, rel=0.02)
    assert data["share_trained"] == pytest.approx(sum(t.num_trained for t in prepared.train) / tokens, rel=0.02)
    assert data["num_steps"] == pytest.approx(prepared.loader().steps_per_epoch, rel=0.05, abs=1)


def test_data_of_which_nothing_fits_is_refused_as_training_does(run_file):
    from preceptor.train.prepare import prepare

    run = config.load(run_file(conversations(3)), ["data.max_length=8"])
    for refuse in (prepare, plan_of):
        with pytest.raises(DataError, match=r"data\.max_length"):
            refuse(run)
    half = config.load(run_file([*conversations(3), {"text": "long " * 200}], data__allow_rejected=["too_long"]))
    data = plan_of(half)["data"]
    assert data["examples_per_epoch"] == 3 and data["tokens_per_epoch"] < 200, "what is rejected is not trained"
    long = config.load(run_file([{"text": "long " * 200}]))
    sample = Sample((((0, 1000),),), 9.0, False, 0, 512)
    plan = make_plan(long, read_model(long.model), sample, find_device("H100"), None, dry_run_of(long.model))
    assert "longer than data.max_length" in plan["data"]["open"]


def test_too_many_that_are_too_long_are_named_where_training_refuses_them(run_file, tmp_path):
    """Lengths are estimates, so a plan refuses nothing for them."""
    from preceptor.train.prepare import prepare

    size = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    AutoConfig.for_model("gpt2", **size, eos_token_id=0, bos_token_id=0).save_pretrained(tmp_path / "gpt2")
    base = Path(config.load(run_file()).model.path)
    for file in base.glob("token*"):
        shutil.copy(file, tmp_path / "gpt2")
    rows = [*({"text": f"{k} short"} for k in range(9)), {"text": "long " * 90}]
    learned = {"model__path": str(tmp_path / "gpt2"), "data__max_length": 256}
    for own, holds in (({"data__max_length": 64}, "a sequence holds 64"), (learned, "learned positions for 64")):
        run = config.load(run_file(rows, **own))
        with pytest.raises(DataError, match=f"(?s)10.0%; data.max_rejected allows 1.0%.*{holds}"):
            prepare(run)
        assert "too long (10.0%; data.max_rejected allows 1.0%, see" in to_text({**plan_of(run), "change": None})
        for keys in (["data.max_rejected=0.1"], ["data.allow_rejected=[too_long]"]):
            run = config.load(run_file(rows, **own), keys)
            plan = plan_of(run)
            assert plan["data"]["examples_per_epoch"] == prepare(run).examples_per_epoch == 9
            assert "about 1 of 10 examples too long (10.0%): " in (text := to_text({**plan, "change": None}))
            assert holds in text


def test_long_conversations_of_which_all_is_trained_are_planned_as_they_are_truncated(run_file):
    from preceptor.train.prepare import prepare

    own = {"data__train_on": "all", "data__max_length": 128, "train__batch_size": 1}
    run = config.load(run_file([talk(1 + 10 * (k % 2)) for k in range(10)], **own), ["data.overflow=truncate_context"])
    data, prepared = plan_of(run)["data"], prepare(run)
    assert data["examples_per_epoch"] == prepared.examples_per_epoch == 10 and not data["too_long"]
    assert data["steps_per_epoch"] == prepared.loader().steps_per_epoch


def talk(num_turns, text="of of of of "):
    turns = ({"role": role, "content": f"{k} {text}"} for k in range(num_turns) for role in ("user", "assistant"))
    return {"messages": list(turns)}


LONG = {
    "texts": lambda k: {"text": f"{k} " + "long " * 300},
    "conversations": lambda k: talk(12 + k),
    "completions": lambda k: {"prompt": "".join(str(n) for n in range(k, 200)), "completion": "end " * (k + 1)},
    "questions": lambda k: {"messages": [*talk(1, "1234567890" * 50)["messages"][:1], *talk(1)["messages"][1:]]},
}


@pytest.mark.parametrize(
    ("overflow", "kind"), [("split", k) for k in LONG] + [("truncate_context", k) for k in LONG if k != "texts"]
)
def test_what_is_too_long_is_planned_as_it_is_shortened(run_file, overflow, kind):
    from preceptor.train.prepare import prepare

    rows = [{"text": f"{k} short"} for k in range(4)] + [LONG[kind](k) for k in range(12)]
    run = config.load(run_file(rows, data__overflow=overflow, train__duration="1 epochs"))
    plan, prepared = plan_of(run), prepare(run)
    data, tokens = plan["data"], sum(tree.num_tokens for tree in prepared.train)
    assert data["examples_per_epoch"] == pytest.approx(prepared.examples_per_epoch, rel=0.1)
    assert data["tokens_per_epoch"] == pytest.approx(tokens, rel=0.1)
    assert data["share_trained"] == pytest.approx(sum(t.num_trained for t in prepared.train) / tokens, rel=0.1)
    assert data["sequences_per_epoch"] == pytest.approx(prepared.loader().sequences_per_epoch, rel=0.1)
    assert plan["sequence"]["num_tokens"] > 100


@pytest.mark.parametrize("row", [{"prompt": "one two three " * 5, "completion": "four"}, *conversations(1, turns=2)])
def test_with_all_prompts_are_trained_too(run_file, row):
    from preceptor.train.prepare import prepare

    run = config.load(run_file([row], data__train_on="all"))
    (tree,) = prepare(run).train
    assert plan_of(run)["data"]["share_trained"] == pytest.approx(tree.num_trained / tree.num_tokens, abs=0.005)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer.lr_factors={lm_hed: 2}"], r"lr_factors: 'lm_hed' matches no parameter that is trained.*lm_head"),
        (
            ["adapter={rank: 2}", "optimizer.lr_factors={'*.mlp.up_proj.weight': 2}"],
            "matches no parameter that is trained",
        ),
        (
            ["model.freeze=['lm_head', '*.embed_tokens']"],
            r"model\.freeze: .* is frozen, .*<\|im_end\|>.* to stop",
        ),
        (["model.train_only=['*.layers.0']"], r"model\.train_only: .* is frozen, .*<\|im_end\|>"),
    ],
)
def test_what_training_refuses_has_no_plan(run_file, overrides, said):
    from preceptor.train.build import build_model, choose_device, optimizer_of
    from preceptor.train.prepare import prepare

    run = config.load(run_file(conversations(3)), overrides)
    with pytest.raises(ModelError, match=said):
        plan_of(run)
    with pytest.raises(ModelError, match=said):
        optimizer_of(run, build_model(prepare(run), choose_device("cpu")))


def test_factors_of_what_is_trained_have_a_plan(run_file):
    factors = "optimizer.lr_factors={'*.layers.1.*.lora_B.*': 2}"
    run = config.load(run_file(conversations(3)), ["adapter={rank: 2}", factors])
    assert plan_of(run)["memory"]["fits"]


@pytest.fixture(scope="module")
def page():
    """What writes the page on plans."""
    return made_by("make_plan_page")


@pytest.fixture(scope="module")
def plan_of_70b(page):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preceptor.plan.plan.would_fit", would_fit)  # no other plan of the tests has it
        return page.plan_of_70b()


def test_the_page_on_plans_says_what_was_measured_and_planned(page, plan_of_70b):
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.MEASURED.search(text).group() == page.measured(), "run python docs/make_plan_page.py"
    assert page.PLANNED.search(text).group() == page.planned(plan_of_70b), "run python docs/make_plan_page.py"


def test_70b_on_one_device_by_component_and_what_would_fit(plan_of_70b):
    plan = plan_of_70b
    components = plan["memory"]["components"]
    assert components["weights"] + components["gradients"] + components["optimizer"] == 16 * 70_553_706_496 > 1e12
    assert not plan["memory"]["fits"]
    everything, half, lora, lora_half, _ = plan["would_fit"]
    assert half["states_bytes"] < 0.65 * everything["states_bytes"]  # 10.1 bytes a parameter against 16
    assert (
        everything["states_bytes"] > 3 * lora["states_bytes"] and lora["states_bytes"] > 1.9 * lora_half["states_bytes"]
    )
    assert [way["fits_on_checkpointed"] for way in plan["would_fit"]] == [
        [],
        [],
        [],
        ["B200"],
        ["A100 80", "H100", "H200", "B200"],
    ]
    text = to_text({**plan, "change": None})
    assert "No change of the run file makes it fit this device" in text
    assert "steps and tokens are not known" in text and "assumed: 3/4 of them context" in text
    assert "1.13 TB" in text and "in the backward pass" in text


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory):
    """The folder, and its dry run, whose results are kept."""
    settings = {**LLAMA_70B, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    folder = folder_of(tmp_path_factory.mktemp("8b"), {**settings, "num_hidden_layers": 32})
    return folder, dry_run_of(config.Model(path=str(folder)))


DEVICES = [("RTX 4090", 32768), ("A100 80", 2048), ("H200", 32768)]
if TORTURE:
    DEVICES += [("RTX 4090", 2048), ("A100 80", 32768), ("H200", 2048)]


@pytest.mark.parametrize(("device", "max_length"), DEVICES)
def test_the_change_that_is_proposed_makes_it_fit_and_is_one_that_the_run_file_takes(
    tmp_path, llama_8b, device, max_length
):
    folder, dry_run = llama_8b
    run_file = tmp_path / "run.yaml"
    tree = {"model": {"path": str(folder)}, "data": {"train": [{"path": "x"}], "max_length": max_length}}
    run_file.write_text(json.dumps({**tree, "out": "x"}))
    run = config.load(run_file)
    target = find_device(device)
    assert make_case(run, dry_run, "none", target).memory.peak_bytes > target.usable_bytes
    found = find_change(run, dry_run, "none", target)
    if found["change"] is None:
        assert device == "RTX 4090" and not any(change["fits"] for change in found["tried"])
        return
    assert not any(change["fits"] for change in found["tried"][:-1])
    changed = config.load(run_file, found["change"]["set"])
    case = make_case(changed, dry_run, "none", target)
    assert case.memory.peak_bytes == found["change"]["peak_bytes"] <= target.usable_bytes


OF_A_CHANGE = [
    {"model": {"freeze": ["*.embed_tokens*"]}},
    {"model": {"train_only": ["*.layers.1.*"]}},
    {"model": {"dtype": "bfloat16"}, "optimizer": {"rounding": "stochastic"}},
    {"optimizer": {"name": "sgd", "momentum": 0.5, "learning_rate": 0.01}},
    {"optimizer": {"name": "muon", "momentum": 0.95}},
    {"optimizer": {"lr_factors": {"*.embed_tokens*": 0.1}}},
]


@pytest.mark.parametrize("own", OF_A_CHANGE)
def test_every_change_is_one_that_the_run_file_and_the_model_take(tmp_path, own):
    tiny_model("llama", vocab_size=512).config.save_pretrained(tmp_path)
    tree = {"model": {"path": str(tmp_path)}, "data": {"train": [{"path": "x"}], "max_length": 2048}, "out": "x"}
    run_file = tmp_path / "run.yaml"
    tree |= {name: {**tree.get(name, {}), **keys} for name, keys in own.items()}
    run_file.write_text(json.dumps(tree))
    run = config.load(run_file)
    dry_run, tiny = dry_run_of(run.model), DeviceSpec("tiny", 1000, None, None)
    tried = find_change(run, dry_run, "none", tiny)["tried"]
    assert any(key.startswith(("adapter", "optimizer", "model")) for change in tried for key in change["set"])
    assert any("adapter.kind=lora" in change["set"] for change in tried) == ("lr_factors" not in str(own))
    for change in tried:
        assert peak_of(config.load(run_file, change["set"]), dry_run, "none", tiny, None)[0] == change["peak_bytes"]


def test_the_change_of_a_run_file_can_be_pasted(plan_of_70b):
    change = {"set": ["adapter.kind=lora", "model.freeze=[]"], "peak_bytes": 1}
    assert "add adapter.kind=lora 'model.freeze=[]' (peak" in to_text({**plan_of_70b, "change": change})


def test_what_is_left_out_as_too_long_does_not_keep_sequences_long(tmp_path):
    tiny_model("llama", vocab_size=512).config.save_pretrained(tmp_path)
    sample = Sample((((100, 50),), ((3000, 50),)), 200.0, False, 0, 512)
    run = run_of(tmp_path, data={"max_length": 2048})
    tried = find_change(run, dry_run_of(run.model), sample, DeviceSpec("tiny", 1000, None, None))["tried"]
    assert [change["set"] for change in tried if change["set"][0].startswith("data.")] == [
        ["data.max_length=1024"],
        ["data.max_length=512"],
    ]


def test_a_change_that_the_model_does_not_take_is_passed_over(tmp_path):
    tiny_model("lfm2", vocab_size=512, layer_types=["conv", "full_attention"]).config.save_pretrained(tmp_path)
    run = run_of(tmp_path, data={"max_length": 2048})
    dry_run = dry_run_of(run.model)
    peak = make_case(run, dry_run, "none", find_device("H100")).memory.peak_bytes
    small = DeviceSpec("small", peak, None, None, "cpu")
    tried = [change["set"] for change in find_change(run, dry_run, "none", small)["tried"]]
    assert tried[0] == ["memory.activation_checkpointing=all"] and not dry_run.reads_alone


def test_changes_that_keep_the_gradient_come_first(tmp_path):
    run = run_of(folder_of(tmp_path, {**LLAMA_70B, "num_hidden_layers": 4}), data={"max_length": 16384})
    found = find_change(run, dry_run_of(run.model), "none", find_device("H200"))
    tried = [change["set"] for change in found["tried"]]
    assert tried == [["memory.context_gradient=recompute"], ["memory.activation_checkpointing=all"]][: len(tried)]
    assert found["change"]["set"] == tried[-1]


def test_quick_counts_the_weight_files_of_a_model_type_without_a_shape(tmp_path):
    run = run_of(folder_of(tmp_path, {"model_type": "mamba"}))
    plan = plan_of(run, quick=True)
    assert plan["parameters"]["total"] is None and plan["memory"] is None
    assert "unknown: its weight files are not here" in to_text(plan)
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "model.safetensors")
    plan = plan_of(run, quick=True)
    assert plan["parameters"]["total"] == 22
    components = {name: count for name, count in plan["memory"]["components"].items() if count}
    assert components == {"weights": 88, "gradients": 88, "optimizer": 176}
    assert "without --quick" in to_text(plan)


def test_a_model_type_without_a_shape_has_a_whole_plan(tmp_path):
    tiny_model("olmoe", vocab_size=512).config.save_pretrained(tmp_path)
    plan = plan_of(run_of(tmp_path, data={"max_length": 256}))
    assert plan["memory"]["fits"] and plan["memory"]["components"]["activations"] > 0
    assert plan["parameters"]["active"] < plan["parameters"]["total"]
    text = to_text(plan)
    assert "experts" in text and "in the backward pass" in text and "It fits." in text


def test_a_model_that_reads_one_conversation_at_a_time_is_planned_so(tmp_path):
    tiny_model("nemotron", vocab_size=512).config.save_pretrained(tmp_path)
    sample = Sample((((10, 5),), ((20, 30),)), 2.0, True, 0, 512)
    run = run_of(tmp_path, data={"max_length": 256})
    case = make_case(run, dry_run_of(run.model), sample, find_device("H100"))
    assert case.work.alone and case.work.conversations == (((20, 30),),)
    work = make_plan(run, read_model(run.model), sample, find_device("H100"), None, dry_run_of(run.model))["work"]
    assert work["six_n_t"] == 6 * case.parameters.active * 65 * run.train.batch_size, "all of its conversations count"
    of_sequence = sum(operations(case.parameters, Work(sample.conversations)).values())
    assert work["operations_per_step"] == pytest.approx(of_sequence * run.train.batch_size)
    half = run_of(tmp_path, {"dtype": "bfloat16"}, train={"batch_size": 1}, data={"max_length": 256})
    case = make_case(half, dry_run_of(run.model), sample, find_device("H100"))
    assert case.memory.components["gradients"] == 4 * case.parameters.num_trained, "summed over the passes of a step"
    assert case.setup.sequences_per_step == 1


def test_what_is_frozen_counts_in_the_placement(tmp_path):
    tiny_model("llama", vocab_size=512).config.save_pretrained(tmp_path)
    found = []
    for keys in ({}, {"train_only": ["lm_head*"]}):
        run = run_of(tmp_path, keys)
        found.append(place_on_ranks(run, sequence_of(ONE), 0, 512, find_device("H100"), 2, 2).peak_bytes)
    assert found[1] < found[0] / 2


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(ConfigError, match="known are RTX 4090, A100 40"):
        find_device("A100")
    with pytest.raises(ModelError, match="no such folder"):
        read_model(config.Model(path="not/there/at/all"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        read_model(config.Model(path=str(tmp_path)))
    run = run_of(folder_of(tmp_path, LLAMA_70B), adapter={"target_modules": ["qproj"]})
    for quick in (True, False):
        with pytest.raises(ModelError, match="no linear layer named qproj"):
            plan_of(run, quick=quick)


def test_devices_by_name_and_by_driver():
    assert find_device("4090").name == "RTX 4090" and find_device("a100-80").name == "A100 80"
    assert find_device("rtx-4090").name == "RTX 4090" and find_device("H100").name == "H100"
    for part in ("H1", "H10", "00", "X 4", ""):
        with pytest.raises(ConfigError, match="not one known device"):
            find_device(part)
    assert find_device(None).memory_bytes > 2**28
    gpu = _read_gpu(["NVIDIA H100 80GB HBM3, 81559, 9.0"])
    assert gpu is not None and gpu.half_rate == 989e12 and gpu.memory_bytes == 81559 * 2**20
    assert _read_gpu(["NVIDIA GeForce RTX 4090, 24564"]).half_rate == 165.2e12
    assert _read_gpu(["some new thing, 1000"]).half_rate is None and _read_gpu([]) is None


def test_a_run_on_the_processor_is_planned_for_it(monkeypatch, run_file, preceptor):
    gpu = _read_gpu(["NVIDIA H100 80GB HBM3, 81559, 9.0"])
    monkeypatch.setattr("preceptor.plan.devices._gpu_by_driver", lambda: gpu)
    assert find_device(None) == find_device("this") == gpu != find_device(None, "cpu")
    for keys, name, precision in (
        ((), "this machine (NVIDIA H100 80GB HBM3)", "bfloat16"),
        (("train.device=cpu",), "this machine", "float32"),
        (("train.device=cpu", "--device=H200"), "H200", "bfloat16"),
    ):
        code, out, err = preceptor("plan", run_file(), "--quick", "--json", *keys)
        assert code == 0, err
        assert (json.loads(out)["device"]["name"], json.loads(out)["run"]["precision"]) == (name, precision)
    code, _, err = preceptor("plan", run_file(), "--device=H200", "--measure")
    assert code == 2 and "--measure: is of this machine, and --device names another (H200)" in err


def test_the_default_precision_is_that_of_the_device():
    old = _read_gpu(["Tesla T4, 15360, 7.5"])
    this_cpu = DeviceSpec("cpu", 1, None, None, device_type="cpu")
    assert [device.precision(None) for device in (find_device("H100"), old, this_cpu)] == [
        "bfloat16",
        "float32",
        "float32",
    ]
    assert find_device("H100").precision("float32") == "float32" and old.precision("bfloat16") == "bfloat16"


def test_the_plan_of_a_run_without_a_precision_follows_the_device(llama_8b):
    folder, dry_run = llama_8b
    run = run_of(folder)
    assert run.train.precision is None
    plan = plan_of(run, dry_run=dry_run)
    assert plan["run"]["precision"] == "bfloat16"
    assert plan["memory"] == plan_of(run_of(folder, train={"precision": "bfloat16"}), dry_run=dry_run)["memory"]


def test_sgd_without_momentum_is_planned_without_state(llama_8b):
    folder, dry_run = llama_8b
    found = [
        plan_of(run_of(folder, optimizer={"name": "sgd", **own}), dry_run=dry_run) for own in ({}, {"momentum": 0})
    ]
    states = [plan["memory"]["components"]["optimizer"] for plan in found]
    assert states == [4 * found[0]["parameters"]["trained_total"], 0]


def test_time_follows_from_the_rate(llama_8b):
    folder, dry_run = llama_8b
    run = run_of(folder, train={"precision": "bfloat16"})
    alone, measured = (plan_of(run, dry_run=dry_run, **how) for how in ({}, {"rate": 1e12}))
    total = alone["work"]["operations_per_step"]
    assert alone["work"]["seconds_per_step"] == pytest.approx(total / (0.4 * 989e12))
    assert measured["work"]["seconds_per_step"] == pytest.approx(total / 0.4e12)
    assert alone["work"]["seconds"] is None
    steps = plan_of(run_of(folder, train={"precision": "bfloat16", "duration": "500 steps"}), dry_run=dry_run)
    assert steps["work"]["seconds"] == 500 * alone["work"]["seconds_per_step"] and steps["data"]["num_steps"] == 500
    assert (
        "  tokens are not known: " in (text := to_text({**steps, "change": None})) and "500 steps are trained" in text
    )


def test_of_several_processes_each_computes_its_part(llama_8b):
    folder, dry_run = llama_8b
    run = run_of(folder, train={"batch_size": 20})
    model, h100 = read_model(run.model), find_device("H100")
    found = [find_plan(run, model, "none", h100, dry_run, 1e15, ranks) for ranks in ((1, 1), (8, 1), (8, 4))]
    alone, eight, more = (each["work"]["seconds_per_step"] for each in found)
    assert (eight, more) == pytest.approx((alone * 3 / 20, alone / 20))
    assert found[0]["work"]["operations_per_step"] == found[1]["work"]["operations_per_step"]
    assert [each["memory"]["fits"] for each in found] == [False, True, True] and found[1]["ranks"]["chosen"]["fits"]
    assert found[0]["change"] and not found[1]["tried"]
    text = to_text(found[1])
    assert "It fits on 8 processes." in text and "per step on 8 processes, without what they send" in text
    cpu = DeviceSpec("cpu", 10**12, None, None, "cpu")
    one, two = (make_plan(run, model, "none", cpu, 1e12, dry_run, ranks) for ranks in (None, (2, 1)))
    assert one["work"]["seconds"] == two["work"]["seconds"], "they share the cores"
    assert one["work"]["seconds_per_step"] == pytest.approx(two["work"]["seconds_per_step"])


def test_what_is_proposed_for_several_processes_fits_those(llama_8b):
    folder, dry_run = llama_8b
    run = run_of(folder, data={"max_length": 8192})
    model, small = read_model(run.model), DeviceSpec("small", 60 * 10**9, 1e15, 1e14)
    plan = find_plan(run, model, "none", small, dry_run, ranks=(8, 1))
    assert not plan["memory"]["fits"] and "It does not fit on 8 processes." in to_text(plan)
    changed = run_of(folder, data={"max_length": 8192}, memory={"activation_checkpointing": "all"})
    assert plan["change"]["set"] == ["memory.activation_checkpointing=all"]
    again = find_plan(changed, model, "none", small, dry_run, ranks=(8, 1))
    assert again["memory"]["fits"] and again["ranks"]["chosen"]["peak_bytes"] == plan["change"]["peak_bytes"]


def test_a_measured_rate_is_one():
    assert 1e7 < measured_rate(half=False, seconds=0.01) < 1e16


def test_numbers_for_the_eye():
    assert [size(count) for count in (1.128e12, 134.2e9, 5.21e6, 12)] == ["1.13 TB", "134 GB", "5.21 MB", "12 B"]
    assert number(7.02e15) == "7.02 P" and seconds(0.34) == "0.34 s" and seconds(7500) == "2.1 h"


def test_few_steps_are_said(tmp_path):
    tiny_model("llama", vocab_size=512).config.save_pretrained(tmp_path)
    sample = Sample((((10, 5),), ((20, 30),)), 46.0, False, 0, 512)
    run = run_of(tmp_path, data={"max_length": 256})
    plan = make_plan(run, read_model(run.model), sample, find_device("H100"), None, dry_run_of(run.model))
    said = "only 18 optimizer steps, too few to learn much (under 50): `train.batch_size: 1` with `data.max_length: 64`"
    one = {**plan["data"], "examples_per_epoch": 1, "num_steps": 1, "steps_per_epoch": 1, "sequences_per_epoch": 1}
    told = to_text({**plan, "data": one, "change": None})
    assert " in 1 example, " in told and "about 1 sequence and 1 step per epoch; 1 step in total" in told
    assert plan["data"]["few_steps"].startswith(said) and said in to_text({**plan, "change": None})
