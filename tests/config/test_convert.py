"""`preceptor convert`: files of other trainers, in the style of their published examples, key by key."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from preceptor import config
from preceptor.config.convert import convert, convert_file, settings_of
from preceptor.config.peer_defaults import DEFAULTS
from preceptor.config.peer_files import PeerFile
from preceptor.config.peer_names import COUNTERPARTS
from preceptor.config.peer_without import NO_COUNTERPART
from preceptor.config.run import all_keys
from preceptor.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("file", "peer"),
    [
        ("from_trl/train.py", "TRL"),
        ("from_axolotl/lora.yml", "Axolotl"),
        ("from_llamafactory/sft.yaml", "LLaMA-Factory"),
    ],
)
def test_the_examples_are_what_convert_makes(file, peer, monkeypatch):
    place = EXAMPLES / file
    monkeypatch.chdir(place.parent)
    found = convert_file(Path(place.name))
    assert (found.peer, found.missing) == (peer, [])
    assert Path("run.yaml").read_text(encoding="utf-8") == found.text(place.name), f"convert examples/{file} again"
    config.load("run.yaml")


def converted(tmp_path, text, name="config.yaml"):
    (tmp_path / name).write_text(text)
    return convert_file(tmp_path / name)


def notes_of(found):
    return dict(found.notes)


AXOLOTL = """base_model: some/Base-8B
load_in_4bit: true
adapter: qlora
datasets:
  - path: some/alpaca-set
    type: alpaca
  - path: own.jsonl
    type: chat_template
    field_messages: dialogue
    message_field_training: train
val_set_size: 0.05
output_dir: ./out
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: true
fp16:
warmup_steps: 10
saves_per_epoch: 2
roles_to_train: [assistant, tool]
chat_template: gemma
lora_fan_in_fan_out:
loss_watchdog_threshold: 5.0
"""


PUBLISHED = """base_model: some/base
datasets:
  - path: own.jsonl
    type: chat_template
    roles_to_train: ["assistant"]
    train_on_eos: turn
val_set_size: 0.05
loss_watchdog_threshold: 5.0
loss_watchdog_patience: 3
evals_per_epoch: 4
"""


def test_what_axolotls_examples_say_of_their_data_is_known(tmp_path):
    """Roles that are the default; evaluations of a part that is split off there."""
    found = converted(tmp_path, PUBLISHED)
    assert found.tree["eval"] == {"every": "0.25 epochs"}
    assert not {"data.train roles_to_train", "evals_per_epoch"} & notes_of(found).keys()
    assert not [why for _, why in found.notes if "not known" in why]
    found = converted(tmp_path, PUBLISHED.replace('["assistant"]', "[tool]"))
    assert "only assistant turns" in notes_of(found)["data.train roles_to_train"]


@pytest.mark.parametrize(
    ("line", "data", "key"),
    [
        ("pretraining_dataset: own/texts", {"train": [{"path": "own/texts", "split": "train"}], "streaming": True}, ""),
        (
            "pretraining_dataset: {path: own/texts, field: body}",
            {"train": [{"path": "own/texts", "split": "train", "columns": {"text": "body"}}], "streaming": True},
            "",
        ),
        (
            "datasets: [{path: own/chats, type: chat_template}]\npretraining_dataset: own/texts",
            {"train": [{"path": "own/chats", "split": "train"}]},
            "pretraining_dataset",
        ),
        (
            "datasets: [{path: own.jsonl, ds_type: json, split: train, type: chat_template}]",
            {"train": [{"path": "own.jsonl"}]},
            "",
        ),
        (
            "datasets: [{path: own.jsonl, ds_type: json, split: 'train[:9]', type: chat_template}]",
            {"train": [{"path": "own.jsonl"}]},
            "data.train split",
        ),
        ("chat_template: jinja\nchat_template_jinja: own.jinja", {"chat_template": "own.jinja"}, ""),
        ("adapter: ''", {}, ""),
    ],
)
def test_axolotls_data_and_templates(tmp_path, line, data, key):
    found = converted(tmp_path, f"base_model: m\n{line}\n")
    assert {name: found.tree["data"].get(name) for name in data} == data
    assert ("streaming" in found.tree["data"]) == ("streaming" in data)
    unready = {
        key
        for key in notes_of(found)
        if key not in ("max_length", "batch size", "warmup_steps", "streaming", "data", "bf16")
    }
    assert unready == ({key} if key else set()) and not found.unoffered


LONG = [
    ("TRL", {}, {"allow_rejected": ["too_long"]}, "max_length", "cuts longer examples; here they are left out"),
    (
        "TRL",
        {"packing": True},
        {"allow_rejected": ["too_long"]},
        "max_length",
        "cuts longer examples; here they are left out",
    ),
    ("TRL", {"packing": True, "packing_strategy": "wrapped"}, {"overflow": "split"}, "packing_strategy", "pieces"),
    ("TRL", {"truncation_mode": "keep_end"}, {"overflow": "truncate_context"}, "truncation_mode", "its beginning"),
    ("TRL", {"max_length": None}, {}, "max_length", None),
    ("Unsloth", {"max_seq_length": 64}, {"allow_rejected": ["too_long"]}, "max_length", "cuts longer"),
    (
        "LLaMA-Factory",
        {},
        {"allow_rejected": ["too_long"]},
        "max_length",
        "cuts longer examples; here they are left out",
    ),
    (
        "LLaMA-Factory",
        {"packing": True},
        {"allow_rejected": ["too_long"]},
        "max_length",
        "leaves longer examples out; here they are left out",
    ),
    (
        "Axolotl",
        {},
        {"allow_rejected": ["too_long"]},
        "max_length",
        "leaves longer examples out; here they are left out",
    ),
    ("Axolotl", {"excess_length_strategy": "truncate"}, {"allow_rejected": ["too_long"]}, "max_length", "cuts longer"),
    ("Axolotl", {"excess_length_strategy": "raise"}, {}, "excess_length_strategy", "data.max_rejected"),
]


@pytest.mark.parametrize(("peer", "given", "ours", "key", "said"), LONG)
def test_what_is_too_long_ends_no_run_that_it_did_not_end_there(peer, given, ours, key, said):
    found = convert(PeerFile(peer, {"model_name_or_path": "m", "output_dir": "out", **given}), Path())
    data = found.tree.get("data", {})
    assert {name: data.get(name) for name in ("allow_rejected", "overflow") if name in ours} == ours
    assert said is None or said in notes_of(found)[key]
    assert ("allow_rejected" in data) == bool(ours)


@pytest.mark.parametrize(
    ("peer", "given", "every"),
    [
        ("TRL", {}, "10 steps"),
        ("TRL", {"logging_steps": 25}, "25 steps"),
        ("LLaMA-Factory", {}, "500 steps"),
        ("Axolotl", {"logging_steps": 5}, "5 steps"),
        ("Axolotl", {}, None),
    ],
)
def test_evaluations_by_steps_without_a_number_are_as_often_as_transformers_has_them(peer, given, every):
    found = convert(PeerFile(peer, {"eval_strategy": "steps", **given}), Path())
    assert found.tree.get("eval", {}).get("every") == every
    assert ("logging_steps" if every else "set eval.every") in notes_of(found)["eval_strategy"]


@pytest.mark.parametrize(
    ("line", "share", "said"),
    [
        ("val_set_size: 0.1", 0.1, None),
        ("val_set_size: 0.0", None, None),
        ("val_set_size: 200", None, "data.eval_size is a share, such as 0.05; or name held-out files in data.eval"),
        ("val_set_size: 0.1\nstreaming: true", None, "a stream has no end to choose from"),
    ],
)
def test_a_share_that_is_held_out(tmp_path, line, share, said):
    found = converted(tmp_path, PUBLISHED.replace("val_set_size: 0.05", line))
    assert found.tree["data"].get("eval_size") == share
    assert (notes_of(found).get("val_set_size") or "").startswith(said or "") and (
        "val_set_size" in notes_of(found)
    ) == bool(said)


def test_axolotl(tmp_path):
    found = converted(tmp_path, AXOLOTL)
    tree, notes = found.tree, notes_of(found)
    assert (found.peer, found.missing) == ("Axolotl", [])
    quantized = {"quantization": "nf4", "double_quantization": True}
    assert tree["model"] == {"dtype": "bfloat16", "path": "some/Base-8B", **quantized}
    assert tree["data"] == {
        "train": [
            {"path": "some/alpaca-set", "split": "train"},
            {"path": "own.jsonl", "columns": {"messages": "dialogue"}},
        ],
        "eval_size": 0.05,
        "allow_rejected": ["too_long"],
        "max_length": 2048,
    }
    assert tree["train"] == {"duration": "2 epochs", "batch_size": 8, "precision": "bfloat16", "seed": 42}
    assert tree["optimizer"]["learning_rate"] == 2e-4 and tree["optimizer"]["warmup"] == "10 steps"
    assert tree["checkpoint"] == {"every": "0.5 epochs"}
    assert tree["adapter"] == {"kind": "lora", "rank": 32, "alpha": 16.0, "target_modules": ["q_proj", "v_proj"]}
    assert "writes its own prompt there" in notes["data.train type"]
    assert notes.keys() >= {
        "roles_to_train",
        "chat_template",
        "batch size",
    }
    assert notes.keys() >= {"data.train message_field_training", "loss_watchdog_threshold"}
    assert not notes.keys() & {"fp16", "lora_fan_in_fan_out", "base_model"}
    config.build(tree, "converted")


LLAMA_FACTORY = """model_name_or_path: some/Base
stage: sft
finetuning_type: lora
lora_target: all
dataset: mine, other
eval_dataset: mine
template: llama3
cutoff_len: 1024
max_samples: 500
train_on_prompt: true
output_dir: saves/x
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
max_steps: 300
learning_rate: 1.0e-4
eval_strategy: steps
eval_steps: 0.1
"""


def test_llama_factory(tmp_path):
    (tmp_path / "data").mkdir()
    entry = {"file_name": "mine.json", "formatting": "sharegpt", "columns": {"messages": "turns"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    found = converted(tmp_path, LLAMA_FACTORY)
    source = {"path": f"{tmp_path}/data/mine.json", "columns": {"messages": "turns"}}
    assert found.tree["data"] == {
        "train": [source],
        "eval": [source],
        "chat_template": "llama3",
        "train_on": "all",
        "allow_rejected": ["too_long"],
        "max_length": 1024,
    }
    assert found.tree["train"] == {"duration": "300 steps", "batch_size": 8, "seed": 42}
    assert found.tree["eval"] == {"every": "10 %"}
    assert found.tree["adapter"] == {"kind": "lora", "rank": 8, "alpha": 16.0}
    assert "'other' is an entry of dataset_info.json" in notes_of(found)["dataset"]
    assert "max_samples" in notes_of(found)
    config.build(found.tree, "converted")


TORCHTUNE = """output_dir: /tmp/torchtune/lora
model:
  _component_: torchtune.models.llama3_1.lora_llama3_1_8b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  lora_rank: 8
  lora_alpha: 16
  use_dora: True
  quantize_base: True
  attn_dropout: 0.1
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: /m/tokenizer.model, max_seq_len: 2048}
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: /m/}
dataset: {_component_: torchtune.datasets.chat_dataset, source: json, data_files: own.json, packed: True,
  conversation_column: dialogue, conversation_style: openai, new_system_prompt: Be brief.}
seed: null
shuffle: True
batch_size: 2
optimizer: {_component_: torch.optim.AdamW, fused: True, weight_decay: 0.1, lr: 3e-4, eps: 1e-6}
lr_scheduler: {_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, num_warmup_steps: 100,
  num_cycles: 2}
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
epochs: 1
gradient_accumulation_steps: 8
clip_grad_norm: null
compile: False
metric_logger: {_component_: torchtune.training.metric_logging.DiskLogger, log_dir: "${output_dir}/logs"}
device: cuda
dtype: bf16
enable_activation_checkpointing: True
"""


def test_torchtune(tmp_path):
    found = converted(tmp_path, TORCHTUNE)
    tree, notes = found.tree, notes_of(found)
    assert (found.peer, found.missing) == ("torchtune", [])
    quantized = {"quantization": "nf4", "double_quantization": True}
    assert tree["model"] == {"dtype": "bfloat16", "path": "/m", **quantized}
    assert tree["adapter"]["kind"] == "dora"
    source = {"path": "own.json", "columns": {"messages": "dialogue"}}
    assert tree["data"] == {"train": [source], "allow_rejected": ["too_long"], "max_length": 2048}
    assert tree["train"]["batch_size"] == 16 and tree["train"]["duration"] == "1 epochs"
    assert (tree["optimizer"]["lr_scheduler"], tree["optimizer"]["warmup"]) == ("cosine", "100 steps")
    assert (tree["optimizer"]["learning_rate"], tree["optimizer"]["weight_decay"]) == (3e-4, 0.1)
    assert tree["adapter"]["target_modules"] == ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert tree["memory"] == {"activation_checkpointing": "all"} and tree["out"] == "/tmp/torchtune/lora"
    assert notes.keys() >= {"metric_logger", "dataset.new_system_prompt", "shuffle"}
    unknown = "not known here; look whether it matters"
    assert notes["model.attn_dropout"] == f"0.1: {unknown}" and notes["optimizer.eps"] == f"1e-06: {unknown}"
    assert notes["lr_scheduler.num_cycles"] == f"2: {unknown}" and not {"optimizer.fused", "model.use_dora"} & set(
        notes
    )
    config.build(tree, "converted")


def test_what_says_how_a_trainer_reads_its_data(tmp_path):
    """For the emulation of its labels: torchtune's sections, the formatting of LLaMA-Factory's data set."""
    (tmp_path / "tune.yaml").write_text(TORCHTUNE)
    assert settings_of(tmp_path / "tune.yaml")["torchtune"]["dataset"]["new_system_prompt"] == "Be brief."
    (tmp_path / "data").mkdir()
    entry = {"file_name": "mine.json", "formatting": "openai"}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps({"mine": entry}))
    (tmp_path / "sft.yaml").write_text(LLAMA_FACTORY)
    assert settings_of(tmp_path / "sft.yaml")["formatting"] == "openai"


@pytest.mark.parametrize(("more", "trained"), [("", "all"), (", train_on_input: False", None)])
def test_torchtunes_alpaca_data_sets_train_the_prompt_unless_told(tmp_path, more, trained):
    start, rest = TORCHTUNE.split("dataset: {")
    text = f"{start}dataset: {{_component_: torchtune.datasets.alpaca_dataset{more}}}{rest.partition('}')[2]}"
    assert converted(tmp_path, text).tree["data"].get("train_on") == trained


SCRIPT = """from trl import SFTConfig, SFTTrainer
NAME = "some/Base"
model = AutoModelForCausalLM.from_pretrained(NAME, torch_dtype="bfloat16", device_map=where())
data = load_dataset("json", data_files="own.jsonl", split="train").map(to_chat)
config = SFTConfig(output_dir="out", learning_rate=args.lr, max_steps=100, max_length=None, **more)
trainer = SFTTrainer(model=model, args=config, train_dataset=data, callbacks=[Log()], peft_config=LoraConfig())
"""


def test_a_trl_script_is_read_and_what_cannot_be_read_is_named(tmp_path):
    found = converted(tmp_path, SCRIPT, "train.py")
    tree, notes = found.tree, notes_of(found)
    assert tree["model"] == {"dtype": "bfloat16", "path": "some/Base"}
    assert tree["data"] == {"train": [{"path": "own.jsonl"}]}
    assert tree["train"]["duration"] == "100 steps"
    assert tree["adapter"] == {"kind": "lora", "rank": 8, "alpha": 8.0, "dropout": 0.0}  # peft's own
    assert "args.lr (line 5)" in notes["learning_rate"] and "more (line 5)" in " ".join(notes)
    assert ".map(...) (line 4)" in notes["train_dataset"]
    assert notes.keys() >= {"callbacks", "device_map", "assistant_only_loss", "lora_target_modules"}


COMMAND = """# full training
python trl/scripts/sft.py \\
    --model_name_or_path some/Base --dataset_name some/set \\
    --learning_rate 2.0e-5 --packing --eos_token '<|im_end|>' \\
    --eval_strategy steps --eval_steps=100 --output_dir $HERE/out --push_to_hub --assistant_only_loss
"""


def test_a_trl_command(tmp_path):
    found = converted(tmp_path, COMMAND, "sft.sh")
    assert found.tree["data"]["train"] == [{"path": "some/set", "split": "train"}]
    assert found.tree["data"]["eval"] == [{"path": "some/set", "split": "test"}]
    assert found.tree["optimizer"]["learning_rate"] == 2e-5 and found.tree["eval"] == {"every": "100 steps"}
    assert found.missing == ["out"] and "variable of the shell" in notes_of(found)["output_dir"]
    assert notes_of(found).keys() >= {"eos_token", "push_to_hub"}
    assert "# To be filled in: out" in found.text("sft.sh")


def test_every_key_of_an_adapter_is_carried_over():
    given = {
        "use_peft": True,
        "lora_r": 32,
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"down_proj": 8},
        "alpha_pattern": {"q_proj": 4.0},
        "lora_modules_to_save": ["lm_head"],
        "init_lora_weights": "pissa_niter_4",
        "loraplus_lr_ratio": 16,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "use_bnb_nested_quant": False,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    found = convert(PeerFile("TRL", given), Path())
    assert found.tree["adapter"] | {"rank": 32, "alpha": 32.0} == {
        "kind": "dora",
        "rank": 32,
        "alpha": 32.0,
        "dropout": 0.05,
        "use_rslora": True,
        "rank_pattern": {"down_proj": 8},
        "alpha_pattern": {"q_proj": 4.0},
        "modules_to_save": ["lm_head"],
        "init": "pissa_fast",
        "lr_ratio": 16.0,
    }
    assert found.tree["model"] == {"quantization": "nf4", "dtype": "bfloat16", "double_quantization": False}
    assert found.tree["train"]["precision"] == "bfloat16"
    assert "not offered: nf4" in notes_of(found)["bnb_4bit_quant_type"]


@pytest.mark.parametrize(
    ("more", "init"), [({}, "pissa_fast"), ({"pissa_iter": 4}, "pissa_fast"), ({"pissa_iter": -1}, "pissa")]
)
def test_llama_factorys_pissa_is_the_fast_one_unless_it_is_switched_off(more, init):
    found = convert(PeerFile("LLaMA-Factory", {"pissa_init": True, "quantization_bit": 8, **more}), Path())
    assert found.tree["adapter"]["init"] == init and found.tree["model"]["quantization"] == "int8"


@pytest.mark.parametrize(("kind", "is_lora"), [(None, True), ("lora", True), ("full", False), ("freeze", False)])
def test_llama_factory_trains_an_adapter_unless_it_is_told_otherwise(kind, is_lora):
    given = {"stage": "sft"} if kind is None else {"finetuning_type": kind}
    found = convert(PeerFile("LLaMA-Factory", given), Path())
    assert ("adapter" in found.tree) == is_lora and ("adapter" in notes_of(found)) == (kind == "freeze")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pissa_iter", "abc"),
        ("rank_pattern", "x"),
        ("alpha_pattern", [1]),
        ("lora_modules_to_save", 5),
        ("lora_r", "x"),
    ],
)
def test_a_value_that_is_none_of_its_key_is_named(key, value):
    found = convert(PeerFile("LLaMA-Factory", {"pissa_init": True, key: value}), Path())
    assert "is not a value that can be carried over" in notes_of(found)[key]


def test_where_a_model_is_loaded_is_chosen_by_itself():
    found = convert(PeerFile("TRL", {"device_map": "auto", "eval_strategy": "epoch"}), Path())
    assert "device_map" not in notes_of(found) and found.tree["eval"] == {"every": "1 epochs"}
    assert "train.device" in notes_of(convert(PeerFile("TRL", {"device_map": {"a": 1}}), Path()))["device_map"]


@pytest.mark.parametrize(("name", "is_of_hub"), [("owner/Data-v1.5", True), ("data/train.jsonl", False)])
def test_a_name_of_the_hub_may_have_dots(name, is_of_hub):
    found = convert(PeerFile("TRL", {"dataset_name": name, "dataset_streaming": True}), Path())
    assert ("streaming" in notes_of(found)) == is_of_hub


STREAMED = {
    "LLaMA-Factory": ({"streaming": True, "buffer_size": 500}, {"streaming": True, "window": 500}),
    "TRL": ({"dataset_streaming": True}, {"streaming": True}),
    "Axolotl": (
        {"streaming_multipack_buffer_size": 700, "pretraining_dataset": [{"path": "a.jsonl", "text_column": "body"}]},
        {
            "streaming": True,
            "window": 700,
            "train": [{"path": "a.jsonl", "columns": {"text": "body"}}],
            "overflow": "split",
        },
    ),
}


@pytest.mark.parametrize(("peer", "given", "ours"), [(peer, *pair) for peer, pair in STREAMED.items()])
def test_streams(peer, given, ours):
    found = convert(PeerFile(peer, {"model_name_or_path": "m", "max_steps": 9, **given}), Path())
    assert ours.items() <= found.tree["data"].items()
    found.tree["data"]["train"] = [{"path": "a.jsonl"}]
    config.build({**found.tree, "model": {"path": "m"}, "out": "b"}, "converted")
    assert "streaming" not in notes_of(found)
    of_hub = convert(PeerFile("TRL", {"dataset_name": "owner/name", "streaming": True}), Path())
    assert "hf://datasets/owner/name" in notes_of(of_hub)["streaming"]
    off = convert(
        PeerFile(peer, {**given, **dict.fromkeys(("streaming", "dataset_streaming", "pretraining_dataset"))}), Path()
    )
    assert not {"streaming", "window"} & off.tree.get("data", {}).keys()


def test_how_trl_loads_its_model():
    arguments = {"dtype": "bfloat16", "revision": "v1", "attn_implementation": "sdpa", "trust_remote_code": True}
    found = convert(PeerFile("TRL", {"use_peft": True, "model_init_kwargs": arguments}), Path())
    assert found.tree["model"] == {"dtype": "bfloat16", "revision": "v1", "trust_remote_code": True}
    assert "attn_implementation" in notes_of(found) and "model_init_kwargs" not in notes_of(found)


def test_every_argument_of_an_installed_peer_is_known():
    """Of peft's LoraConfig and TRL's ModelConfig: a counterpart, or a documented no."""
    peft = pytest.importorskip("peft")
    trl = pytest.importorskip("trl", reason="TRL is not installed: its arguments are not compared")
    named = {field.name for kind in (peft.LoraConfig, trl.ModelConfig) for field in fields(kind)}
    ours = {key.rpartition(".")[2] for key in all_keys()}
    assert sorted(named - COUNTERPARTS.keys() - NO_COUNTERPART.keys() - ours - {"revision"}) == []


def test_defaults_of_trl_are_those_of_the_installed_one():
    trl = pytest.importorskip("trl", reason="TRL is not installed: its defaults are not compared")
    found = {field.name: field.default for kind in (trl.SFTConfig, trl.ModelConfig) for field in fields(kind)}
    for key, value in DEFAULTS["TRL"].items():
        assert found[key] == value, key


def test_defaults_count_only_where_no_other_name_of_the_key_is_given():
    found = convert(PeerFile("Axolotl", {"num_epochs": 2, "lr": 1e-3, "warmup_ratio": 0.1}), Path())
    assert found.tree["train"]["duration"] == "2 epochs"
    assert (found.tree["optimizer"]["learning_rate"], found.tree["optimizer"]["warmup"]) == (1e-3, "10 %")


EVERY = sorted({*COUNTERPARTS, *(key for key in NO_COUNTERPART if "." not in key)})


@pytest.mark.parametrize("peer", ["TRL", "Axolotl", "LLaMA-Factory"])
def test_no_key_of_another_trainer_is_dropped_in_silence(peer):
    """A value that is no default changes the run, or is named."""
    values = {"lora_target_linear": True, "datasets": ["a.jsonl"], "r": 77, "max_steps": 77}
    dropped = []
    for key in EVERY:
        base = {} if key == "use_peft" else {"use_peft": True}
        with_key = {**base, key: values.get(key, "odd")}
        before, after = (convert(PeerFile(peer, settings), Path()) for settings in (base, with_key))
        if before.tree == after.tree and before.notes == after.notes:
            dropped.append(key)
    assert len(EVERY) > 100 and dropped == []


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "a: [", "not valid YAML or JSON"),
        ("a.yaml", "- 1", "holds list"),
        ("a.yaml", "colour: red", "not known as a file of TRL, Axolotl, LLaMA-Factory or torchtune"),
        ("a.py", "def f(:", "a.py:1: not valid Python"),
        ("a.py", "print(1)", "calls neither SFTConfig nor SFTTrainer"),
        ("a.sh", "x --a 'b", "not a shell command"),
    ],
)
def test_what_is_no_file_of_a_trainer_is_refused(tmp_path, name, text, says):
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, text, name)
    assert says in str(caught.value)


def test_the_command(preceptor, tmp_path):
    file = tmp_path / "axolotl.yml"
    file.write_text(AXOLOTL)
    code, out, _ = preceptor("convert", file)
    assert code == 0 and out.startswith("# Made by `preceptor convert` from axolotl.yml (Axolotl).")
    code, printed, _ = preceptor("convert", file, "--json")
    assert set(json.loads(printed)) == {"peer", "run", "notes", "unoffered", "missing"}
    code, said, _ = preceptor("convert", file, tmp_path / "run.yaml")
    assert code == 0 and "loss_watchdog_threshold: " in said and "Next: preceptor check" in said
    assert (tmp_path / "run.yaml").read_text() == out
    assert config.load(tmp_path / "run.yaml").adapter.rank == 32
    code, _, err = preceptor("convert", file, tmp_path / "run.yaml")
    assert code == 2 and "exists already" in err
    code, _, _ = preceptor("convert", file, tmp_path / "new.yaml", "--data", tmp_path / "none.jsonl")
    assert code != 0 and not (tmp_path / "new.yaml").exists()  # so that the same command may follow
    code, _, err = preceptor("convert", tmp_path / "none.yml")
    assert code == 2 and "cannot be read" in err


@pytest.mark.parametrize(
    ("peer", "key", "value", "name"),
    [
        ("TRL", "optim", "adamw_torch_fused", None),
        ("TRL", "optim", "paged_adamw_32bit", None),
        ("TRL", "optim", "adamw_bnb_8bit", "adamw_8bit"),
        ("TRL", "optim", "paged_adamw_8bit", "adamw_8bit"),
        ("TRL", "optim", "adafactor", "adafactor"),
        ("TRL", "optim", "sgd", "sgd"),
        ("LLaMA-Factory", "use_muon", True, "muon"),
        ("Axolotl", "optimizer", "adamw_torch_8bit", "adamw_8bit"),
        ("Axolotl", "optimizer", "muon", "muon"),
        ("TRL", "optim", "adamw_torch_4bit", "adamw_8bit"),
        ("Axolotl", "optimizer", "ao_adamw_4bit", "adamw_8bit"),
        ("Axolotl", "optimizer", "ao_adamw_fp8", "adamw_8bit"),
        ("Axolotl", "optimizer", "ao_adamw_8bit", "adamw_8bit"),
        ("Axolotl", "optimizer", "optimi_adamw", None),
        ("TRL", "optim", "lion_32bit", None),
        ("TRL", "optim", "galore_adamw", None),
    ],
)
def test_optimizers_by_name(peer, key, value, name):
    found = convert(PeerFile(peer, {"model_name_or_path": "m", key: value}), Path())
    assert found.tree["optimizer"].get("name") == name
    is_named = value in ("lion_32bit", "galore_adamw")
    assert (key in notes_of(found)) == (is_named or "4bit" in str(value)) and bool(found.unoffered) == is_named
    assert "4bit" not in str(value) or notes_of(found)[key].endswith("4 bits there, 8 bits here: adamw_8bit")
    if name == "sgd":
        assert found.tree["optimizer"]["momentum"] == 0.0, "theirs has none, ours 0.9 by default"
    if name in ("sgd", "adafactor"):
        assert "betas" not in found.tree["optimizer"]
    is_absolute = name != "adafactor"  # transformers builds it with scale_parameter=False
    assert ("learning_rate" in found.tree["optimizer"], "learning_rate" in notes_of(found)) == (
        is_absolute,
        not is_absolute,
    )
    config.build({**found.tree, "data": {"train": [{"path": "a.jsonl"}]}, "out": "b"}, "converted")


def test_torchtune_optimizers(tmp_path):
    text = TORCHTUNE.replace("torch.optim.AdamW, fused: True", "torchao.optim.AdamW8bit")
    assert converted(tmp_path, text).tree["optimizer"]["name"] == "adamw_8bit"


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "SGD", "Muon"])
def test_torchtune_takes_torchs_own_defaults_of_an_optimizer(tmp_path, name):
    whole = {
        "fused: True, weight_decay: 0.1, lr: 3e-4, eps: 1e-6": "fused: False",
        "torch.optim.AdamW": f"torch.optim.{name}",
    }
    text = TORCHTUNE
    for old, new in whole.items():
        text = text.replace(old, new)
    defaults = getattr(torch.optim, name)([torch.nn.Parameter(torch.zeros(2, 2))]).defaults
    found = converted(tmp_path, text).tree["optimizer"]
    assert (found["learning_rate"], found["weight_decay"]) == (defaults["lr"], defaults["weight_decay"])
    given = converted(tmp_path, text.replace("fused: False", "weight_decay: 0.3, lr: 7e-4")).tree["optimizer"]
    assert (given["learning_rate"], given["weight_decay"]) == (7e-4, 0.3), "torchtune's Adafactor is torch's, as here"


def test_a_rate_that_is_constant_has_no_last_share(tmp_path):
    settings = {"base_model": "m", "lr_scheduler": "constant", "cosine_min_lr_ratio": 0.3}
    found = convert(PeerFile("Axolotl", settings), Path())
    assert "min_lr_ratio" not in found.tree["optimizer"]
    assert "nothing to set" in notes_of(found)["cosine_min_lr_ratio"]


def test_noise_wsd_and_weights_of_bfloat16(tmp_path):
    settings = {
        "model_name_or_path": "m",
        "dtype": "bfloat16",
        "neftune_noise_alpha": 5,
        "output_dir": "b",
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": 10,
        "lr_scheduler_kwargs": {"num_decay_steps": 30, "min_lr_ratio": 0.1, "decay_type": "linear"},
    }
    found = convert(PeerFile("TRL", settings), Path())
    assert found.tree["train"]["neftune_alpha"] == 5.0
    wanted = {"lr_scheduler": "wsd", "decay": "30 steps", "min_lr_ratio": 0.1, "warmup": "10 steps"}
    assert wanted.items() <= found.tree["optimizer"].items()
    assert found.tree["model"]["dtype"] == "bfloat16" and "optimizer.rounding" in notes_of(found)["dtype"]
    assert not notes_of(found).keys() & {"neftune_noise_alpha", "lr_scheduler_kwargs", "lr_scheduler_type"}
    config.build({**found.tree, "data": {"train": [{"path": "a.jsonl"}]}}, "converted")


@pytest.mark.parametrize(
    ("peer", "settings", "coef"),
    [
        ("TRL", {"router_aux_loss_coef": 0.02}, 0.02),
        ("TRL", {"router_aux_loss_coef": 0.0}, 0.0),
        ("TRL", {"model_init_kwargs": {"output_router_logits": True, "router_aux_loss_coef": 0.01}}, 0.01),
        ("Axolotl", {"overrides_of_model_config": {"output_router_logits": True, "router_aux_loss_coef": 0.3}}, 0.3),
        ("LLaMA-Factory", {"moe_aux_loss_coef": 0.05}, 0.05),
        ("TRL", {}, None),
    ],
)
def test_the_load_balancing_loss_of_routers(peer, settings, coef):
    found = convert(PeerFile(peer, {"model_name_or_path": "m", **settings}), Path())
    assert found.tree.get("loss", {}).get("router_aux_coef") == coef
    assert not notes_of(found).keys() & {"output_router_logits", "router_aux_loss_coef", "moe_aux_loss_coef"}


def test_router_logits_without_a_coefficient_are_named():
    found = convert(PeerFile("Axolotl", {"overrides_of_model_config": {"output_router_logits": True}}), Path())
    assert "here loss.router_aux_coef: the coefficient" in notes_of(found)["output_router_logits"]


@pytest.mark.parametrize(("arguments", "named"), [({}, "cosine"), ({"decay_type": "1-sqrt"}, "1-sqrt")])
def test_a_wsd_that_falls_otherwise_is_named(arguments, named):
    given = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 30, **arguments}}
    found = convert(PeerFile("TRL", given), Path())
    assert notes_of(found)["lr_scheduler_type"] == f"at the end the rate falls by {named} there, linearly here"
    assert "lr_scheduler_kwargs" not in notes_of(found)


def test_keys_that_are_carried_over_exist():
    from preceptor.config.peer_defaults import DIRECT

    assert {ours for ours, _ in DIRECT.values()} <= set(all_keys())


def test_with_data_the_tokens_that_both_train_are_shown(preceptor, tmp_path, base_folder, write_jsonl):
    rows = [
        {"messages": [{"role": "user", "content": "the user"}, {"role": "assistant", "content": "The message"}]}
    ] * 4
    data, file = write_jsonl(rows), tmp_path / "args.yaml"
    file.write_text("output_dir: a\nmax_length: 64\n")
    code, out, err = preceptor("convert", file, "--data", data, "--model", base_folder)
    assert code == 0, err
    assert "What TRL's documented rule trains: all tokens of `messages`" in out and "⟦The message<|im_end|>⟧" in out
    assert "4 examples: TRL trains" in out and "only TRL trains: " in out
    code, out, _ = preceptor("convert", file, "--data", data, "--model", base_folder, "--json")
    found = json.loads(out)["tokens"]
    counts = found["counts"]
    assert code == 0 and counts["examples"] == 4 and counts["only_ours"] == 0
    assert counts["only_theirs"] == counts["theirs"] - counts["ours"] > 0
    assert "the user" in next(iter(counts["pieces_only_theirs"]))
    assert len(found["examples"]) == 3 and found["examples"][0]["ours"]["ids"]
    code, _, err = preceptor("convert", file, "--data", data)
    assert code == 2 and "names no model" in err


def test_an_end_token_that_the_other_trainer_leaves_untrained_is_seen(preceptor, tmp_path, write_jsonl):
    """The scholar's eos is not the end of a turn in ChatML: Axolotl trains no end there unless it is told."""
    messages = [{"role": "user", "content": "the user"}, {"role": "assistant", "content": "The message"}]
    file = tmp_path / "a.yml"
    file.write_text("base_model: scholar\nmicro_batch_size: 1\nsequence_len: 64\nchat_template: chatml\n")
    code, out, err = preceptor("convert", file, "--data", write_jsonl([{"messages": messages}]), "--json")
    counts = json.loads(out)["tokens"]["counts"]
    assert code == 0 and counts["pieces_only_ours"] == {"<|im_end|>": 1} and counts["only_theirs"] == 0, err
    file.write_text(file.read_text() + "special_tokens: {eos_token: <|im_end|>}\n")
    code, out, _ = preceptor("convert", file, "--data", write_jsonl([{"messages": messages}]), "--json")
    assert json.loads(out)["tokens"]["counts"]["only_ours"] == 0


def test_the_data_is_read_by_the_columns_that_the_file_names(preceptor, tmp_path, write_jsonl):
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"mine": {"file_name": "m.json", "columns": {"prompt": "asked", "response": "said"}}})
    )
    text = f"model_name_or_path: scholar\nstage: sft\ntemplate: qwen\ndataset: mine\ndataset_dir: {tmp_path}\n"
    (tmp_path / "sft.yaml").write_text(text)
    data = write_jsonl([{"asked": "the user", "said": "The message", "system": "of no column"}] * 2)
    code, out, err = preceptor("convert", tmp_path / "sft.yaml", "--data", data, "--json")
    assert code == 0, err
    found = json.loads(out)["tokens"]
    assert found["counts"]["examples_not_ours"] == found["counts"]["examples_not_theirs"] == 0
    assert found["counts"]["theirs"] > 0 and found["counts"]["ours"] > 0
    (tmp_path / "axolotl.yml").write_text(
        "base_model: scholar\nchat_template: chatml\nmicro_batch_size: 1\nsequence_len: 64\n"
        "datasets:\n- path: mine.jsonl\n  type: chat_template\n  field_messages: dialog\n"
    )
    dialog = [{"role": "user", "content": "the user"}, {"role": "assistant", "content": "The message"}]
    code, out, err = preceptor(
        "convert", tmp_path / "axolotl.yml", "--data", write_jsonl([{"dialog": dialog}]), "--json"
    )
    assert code == 0 and json.loads(out)["tokens"]["counts"]["theirs"] > 0, err


def test_what_dataset_info_says_of_the_columns_is_known(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "m.json"}, "own": {"columns": {}}}))
    text = f"model_name_or_path: m\nstage: sft\nfinetuning_type: full\ndataset_dir: {tmp_path}\n"
    alpaca = {"prompt": "instruction", "query": "input", "response": "output"}
    for name, columns in (("mine", alpaca), ("own", {}), ("other", None)):
        (tmp_path / "sft.yaml").write_text(f"{text}dataset: {name}\n")
        assert settings_of(tmp_path / "sft.yaml")["columns"] == columns


@pytest.mark.parametrize("named", ["mine", "mine, other", "[mine]"])
def test_the_formatting_of_the_first_data_set_is_known(tmp_path, named):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "m.json", "formatting": "openai"}}))
    text = f"model_name_or_path: m\nstage: sft\nfinetuning_type: full\ndataset: {named}\ndataset_dir: {tmp_path}\n"
    (tmp_path / "sft.yaml").write_text(text)
    assert settings_of(tmp_path / "sft.yaml")["formatting"] == "openai"
