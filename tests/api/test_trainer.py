"""`SFTTrainer` with TRL's constructor: its own example runs, every argument is carried over, named or refused."""

import copy
import dataclasses
import inspect
import json
import re
import shutil
import warnings
from pathlib import Path

import datasets
import pytest
import torch
import trl
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPTQConfig,
    SchedulerType,
    TrainingArguments,
)

from conftest import conversations
from preceptor import SFTConfig, SFTTrainer
from preceptor.chat.format import load_tokenizer
from preceptor.config.convert import convert, known_settings
from preceptor.config.peer_files import PeerFile
from preceptor.errors import CheckpointError, ConfigError

ROWS = datasets.Dataset.from_list(conversations(8))
FAST = {"max_steps": 2, "learning_rate": 1e-3, "max_length": 128, "per_device_train_batch_size": 2, "use_cpu": True}


def test_the_example_of_trl_runs_with_only_its_import_changed(base_folder, tmp_path, monkeypatch, capsys):
    """As it stands in the docstring of TRL's SFTTrainer; the Hub's model and data set are replaced by local ones."""
    (code,) = re.findall(r"Example:\s+```python\n(.*?)```", trl.SFTTrainer.__doc__, re.DOTALL)
    code = "\n".join(line.strip()[4:] for line in code.splitlines())
    assert "from trl import SFTTrainer" in code and "trainer.train()" in code
    code = code.replace("from trl import", "from preceptor import")
    code = re.sub(r'model="[^"]+"', f'model="{base_folder}"', code)
    texts = datasets.Dataset.from_list(
        [{"text": f"Once upon a time there were {number} users."} for number in range(6)]
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: texts)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "trl", "exec"), names)
    folder = tmp_path / f"{base_folder.name}-SFT"
    assert AutoModelForCausalLM.from_pretrained(folder / "model") is not None
    assert names["trainer"].model is not None and "assistant_only_loss" in capsys.readouterr().out


CAPYBARA = (
    conversations(20)
    + [
        {
            "messages": [
                {"role": "user", "content": "a user? " * 80},
                {"role": "assistant", "content": "an assistant."},
            ]
        }
    ]
    * 4
)


@pytest.mark.parametrize(
    ("given", "overflow"),
    [
        ({}, "reject"),
        ({"packing": True}, "reject"),
        ({"packing": True, "packing_strategy": "bfd_split"}, "split"),
        ({"truncation_mode": "keep_end"}, "truncate_context"),
    ],
)
def test_the_quick_start_of_trl_runs_where_conversations_are_longer_than_max_length(
    base_folder, tmp_path, monkeypatch, capsys, given, overflow
):
    """As TRL documents it, with its import changed; a sixth of the conversations are cut there."""
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(CAPYBARA))
    code = f"""
from preceptor import SFTConfig, SFTTrainer
from datasets import load_dataset

trainer = SFTTrainer(
    model={str(base_folder)!r},
    args=SFTConfig(**{ {"output_dir": str(tmp_path / "run"), **FAST, **given} }),
    train_dataset=load_dataset("trl-lib/Capybara", split="train"),
)
trainer.train()
"""
    names = {}
    exec(compile(code, "quick start", "exec"), names)
    config = names["trainer"].run.config.data
    assert (config.overflow, config.allow_rejected) == (overflow, ["too_long"])
    rejected = (tmp_path / "run/rejections.jsonl").read_text().splitlines()
    assert len(rejected) == (4 if overflow == "reject" else 0)
    assert re.search(r"from TRL: (max_length|packing_strategy|truncation_mode): .*data\.", capsys.readouterr().out)


@pytest.mark.parametrize("of_trl", [True, False])
def test_the_arguments_of_a_config_are_those_that_convert_carries_over(base_folder, tmp_path, of_trl):
    """TRL's own class, of which what is set counts, or ours."""
    given = {"output_dir": str(tmp_path / "run"), "max_steps": 7, "learning_rate": 3e-4, "warmup_steps": 2}
    given |= {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 4, "max_length": 64, "seed": 3}
    given |= {"eval_strategy": "steps", "eval_steps": 3, "report_to": "none", "packing": True}
    args = trl.SFTConfig(**given, bf16=False, use_cpu=True) if of_trl else SFTConfig(**given, use_cpu=True)
    trainer = SFTTrainer(str(base_folder), args, train_dataset=ROWS, eval_dataset=ROWS.select([0]))
    found = trainer.run.config
    assert (str(found.train.duration), found.train.batch_size, found.data.max_length) == ("7 steps", 32, 64)
    assert (found.optimizer.learning_rate, found.optimizer.lr_scheduler, found.train.seed) == (3e-4, "cosine", 3)
    assert str(found.optimizer.warmup) == "2 steps" and str(found.eval.every) == "3 steps"
    assert found.out == str(tmp_path / "run") and found.tracker == []
    settings = {"model_name_or_path": str(base_folder), "train_dataset": "d", "eval_dataset": "d", **given}
    converted = convert(PeerFile("TRL", settings), tmp_path).tree
    for section in ("train", "optimizer"):
        for key, value in converted[section].items():
            assert str(getattr(getattr(found, section), key)) == str(value), key
    assert any(key == "batch size" for key, _ in trainer.notes)


@pytest.mark.parametrize(
    ("kind", "given", "rate", "memory"),
    [
        (TrainingArguments, {}, 5e-5, None),
        (TrainingArguments, {"learning_rate": 5e-5, "gradient_checkpointing": False}, 5e-5, None),
        (TrainingArguments, {"learning_rate": 2e-5, "activation_checkpointing": True}, 2e-5, "all"),
        (trl.SFTConfig, {}, 2e-5, "all"),
        (trl.SFTConfig, {"learning_rate": 5e-5, "activation_checkpointing": False}, 5e-5, None),
        (SFTConfig, {}, 2e-5, "all"),
        (SFTConfig, {"activation_checkpointing": False}, 2e-5, None),
        (SFTConfig, {"optim": "adafactor", "learning_rate": 5e-5}, 1e-3, "all"),  # theirs is absolute
        (TrainingArguments, {"optim": "adafactor"}, 1e-3, None),
    ],
)
def test_absent_arguments_have_the_values_of_their_class(base_folder, tmp_path, kind, given, rate, memory):
    half = {} if kind is SFTConfig else {"bf16": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of gradient_checkpointing
        args = kind(str(tmp_path / "run"), use_cpu=True, **half, **given)
        found = SFTTrainer(str(base_folder), args, train_dataset=ROWS).run.config
    unset = type(found.memory)().activation_checkpointing
    assert (found.optimizer.learning_rate, found.memory.activation_checkpointing) == (rate, memory or unset)


def test_a_live_model_with_keywords_is_trained_and_saved(base_folder, tmp_path, capsys, monkeypatch):
    model, tokenizer = (each.from_pretrained(base_folder) for each in (AutoModelForCausalLM, AutoTokenizer))
    before = model.lm_head.weight[:5].clone()
    trainer = SFTTrainer(
        model, output_dir=str(tmp_path / "run"), train_dataset=ROWS, processing_class=tokenizer, logging_steps=1, **FAST
    )
    result = trainer.train()
    assert result.num_steps == 2 and not torch.equal(model.lm_head.weight[:5], before)
    with monkeypatch.context() as of_another:
        of_another.setenv("WORLD_SIZE", "2")
        of_another.setenv("RANK", "1")
        trainer.save_model(str(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()
    trainer.save_model(str(tmp_path / "copy"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "copy").state_dict()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").eos_token == trainer.processing_class.eos_token
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert trainer.train_step("user", " message", optimizer) > 0  # the textbook's step goes on from there


def test_an_adapter_by_its_peft_config(base_folder, tmp_path):
    targets = ["q_proj", "v_proj"]
    peft_config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, use_dora=True, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        str(base_folder), SFTConfig(str(tmp_path / "run"), **FAST), train_dataset=ROWS, peft_config=peft_config
    )
    adapter = trainer.run.config.adapter
    assert (adapter.rank, adapter.alpha, sorted(adapter.target_modules)) == (4, 16.0, ["q_proj", "v_proj"])
    trainer.train()
    saved = json.loads((tmp_path / "run/model/adapter/adapter_config.json").read_text())
    assert saved["r"] == 4 and saved["use_dora"]


def test_how_the_model_is_loaded(base_folder, tmp_path):
    args = trl.SFTConfig(str(tmp_path / "run"), model_init_kwargs={"dtype": "bfloat16"}, use_cpu=True, bf16=False)
    trainer = SFTTrainer(str(base_folder), args, train_dataset=ROWS)
    assert trainer.run.config.model.dtype == "bfloat16"


FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize("kind", [lambda: BitsAndBytesConfig(**FOUR_BITS), lambda: dict(FOUR_BITS)])
@pytest.mark.parametrize("of_trl", [True, False])
@pytest.mark.parametrize("is_argument", [True, False, "and there too"])
def test_a_quantization_config_is_carried_over(base_folder, tmp_path, kind, of_trl, is_argument):
    """In the arguments with which the model is loaded, or beside them."""
    loading = {"dtype": "bfloat16"} if is_argument is True else {"dtype": "bfloat16", "quantization_config": kind()}
    own = {"quantization_config": kind()} if is_argument else {}
    args = (trl.SFTConfig if of_trl else SFTConfig)(str(tmp_path), model_init_kwargs=loading, use_cpu=True, bf16=False)
    trainer = SFTTrainer(str(base_folder), args, train_dataset=ROWS, peft_config=LoraConfig(r=2), **own)
    found = trainer.run.config.model
    assert (found.quantization, found.double_quantization, found.dtype) == ("nf4", True, "bfloat16")
    assert not {"quantization_config", "bnb_4bit_quant_type", "model_init_kwargs"} & dict(trainer.notes).keys()


def test_arguments_of_loading_that_are_no_dict_are_refused(base_folder, tmp_path):
    with pytest.raises(ConfigError, match="model_init_kwargs: must be a dict"):
        SFTTrainer(str(base_folder), SFTConfig(str(tmp_path), model_init_kwargs="{}"), train_dataset=ROWS)


def test_a_formatting_function_makes_the_text(base_folder, tmp_path):
    rows = [{"q": "1?", "a": "2."}, {"q": "3?", "a": "4."}]
    trainer = SFTTrainer(
        str(base_folder),
        SFTConfig(str(tmp_path / "run"), **FAST),
        train_dataset=datasets.Dataset.from_list(rows),
        formatting_func=lambda row: f"{row['q']} {row['a']}",
    )
    assert "1⟦? 2." in str(trainer.run.show(1))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"callbacks": [print]}, r"callbacks: .*for step in run\.steps\(\)"),
        ({"data_collator": print}, "data_collator: .*conversations are packed"),
        ({"compute_loss_func": print}, "compute_loss_func: "),
        ({"compute_metrics": print}, r"compute_metrics: .*`eval=\{'code': function\}` of preceptor\.Run"),
        ({"preprocess_logits_for_metrics": print}, r"preprocess_logits_for_metrics: .*`eval=\{'code': function\}`"),
        ({"optimizers": (1, 2)}, r"optimizers: .*optimizer"),
        ({"quantization_config": 1}, "quantization_config: .*'quantization': 'nf4'"),
        ({"quantization_config": GPTQConfig(bits=4)}, "quantization_config: GPTQConfig.*BitsAndBytesConfig"),
        ({"peft_config": LoraConfig(bias="all")}, "peft_config.bias: an adapter trains no biases"),
        (
            {"optim": "lion_32bit"},
            r"optim: 'lion_32bit' is not offered\. Choose adamw, adamw_8bit, muon, adafactor or sgd$",
        ),
        ({"optim_target_modules": ["q"]}, "optim_target_modules: low-rank gradients"),
        ({"unfrozen_parameters": ["lm_head"]}, "unfrozen_parameters: .*: here model.train_only: .*set it by hand"),
        ({"early_stopping_patience": 3}, "early_stopping_patience: 3: here train.patience"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type: 'polynomial' is not offered: constant, .*cosine, "),
        ({"loss_type": "hinge"}, "loss_type: 'hinge' is not offered: nll or dft"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' is not a value"),
        (
            {"load_in_4bit": True},
            r"quantization: a quantized model can only be trained with an adapter: give peft_config=Lora",
        ),
        ({"model_init_kwargs": {"dtype": "float16"}}, "dtype: float16 is not offered: bfloat16 or float32"),
        ({"peft_config": LoraConfig(init_lora_weights="olora")}, "init_lora_weights: 'olora' is not offered"),
        ({"lerning_rate": 1}, "lerning_rate: unknown argument; did you mean 'learning_rate'"),
        ({"adam_epsilon": 1e-4}, "adam_epsilon: 0.0001 is not offered: AdamW's epsilon is 1e-08"),
        ({"args": SFTConfig(adam_epsilon=1e-4)}, "adam_epsilon: "),
        ({"peft_config": LoraConfig(target_modules=r".*\.(q|v)_proj")}, "regular expression.*give the names of layers"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs: num_cycles"),
        ({"load_best_model_at_end": True, "metric_for_best_model": "eval_f1"}, "metric_for_best_model: 'f1' is not"),
        (
            {"train_dataset": [{"text": "a"}], "dataset_text_field": "body"},
            "dataset_text_field: train_dataset has no column 'body'",
        ),
        ({"train_dataset": datasets.DatasetDict(train=ROWS), "formatting_func": str}, "train_dataset: a dict"),
        ({"train_dataset": None}, "train_dataset: needed"),
        ({"args": 7}, "args: 7 is no SFTConfig"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_what_to_do(base_folder, tmp_path, given, says):
    with pytest.raises(ConfigError, match=says):
        SFTTrainer(str(base_folder), **{"output_dir": str(tmp_path), "train_dataset": ROWS, **given}).train()


def test_a_member_of_an_enumeration_is_its_value(base_folder, tmp_path):
    given = {"train_dataset": ROWS, "output_dir": str(tmp_path / "run")}
    config = SFTConfig(lr_scheduler_type=SchedulerType.COSINE)
    for trainer in (
        SFTTrainer(str(base_folder), args=config, **given),
        SFTTrainer(str(base_folder), lr_scheduler_type=SchedulerType.COSINE, **given),
    ):
        assert trainer.run.config.optimizer.lr_scheduler == "cosine"
    with pytest.raises(CheckpointError, match=r"nothing is trained yet: call train\(\) first"):
        trainer.save_model()


def test_a_tokenizer_beside_a_name_is_the_models_own(base_folder, tmp_path):
    """As most scripts have it; a pad token of its own changes nothing."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.pad_token = tokenizer.eos_token
    given = {"train_dataset": ROWS, "output_dir": str(tmp_path / "run")}
    assert SFTTrainer(str(base_folder), processing_class=tokenizer, **given).run is not None
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ConfigError, match="its chat template are not those of"):
        SFTTrainer(str(base_folder), processing_class=tokenizer, **given)


def test_a_tokenizer_is_compared_with_that_of_the_revision_whose_code_is_trusted(base_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(base_folder, tmp_path / "model")
    (folder / "own.py").write_text("from transformers import PreTrainedTokenizerFast as Fast\nclass Own(Fast): pass\n")
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    asked = []

    def load(*given):
        asked.append(given)
        return load_tokenizer(*given)

    monkeypatch.setattr("preceptor.api.trainer.load_tokenizer", load)
    loading = {
        "model_init_kwargs": {"trust_remote_code": True, "revision": "v1"}
    }  # which a folder has not, and ignores
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    given = {"processing_class": tokenizer, "train_dataset": ROWS, "output_dir": str(tmp_path / "run")}
    assert SFTTrainer(str(folder), **given, **loading).run is not None
    assert asked == [(str(folder), True, "v1")]


def test_how_a_model_is_loaded_is_refused_beside_a_live_one(base_folder, tmp_path):
    model, tokenizer = (each.from_pretrained(base_folder) for each in (AutoModelForCausalLM, AutoTokenizer))
    given = {"processing_class": tokenizer, "train_dataset": ROWS, "output_dir": str(tmp_path), "use_cpu": True}
    with pytest.raises(ConfigError, match=r"model\.quantization: says how a model is loaded, and this one is"):
        SFTTrainer(model, **given, peft_config=LoraConfig(r=2), load_in_4bit=True)
    with pytest.raises(ConfigError, match=r"train_step: needs the model itself: .*from_pretrained\('some/name'\)"):
        SFTTrainer("some/name", tokenizer).train_step("a", "b", None)
    with pytest.raises(ConfigError, match="train_step: needs a tokenizer"):
        SFTTrainer(model).train_step("a", "b", None)


@pytest.mark.parametrize(("rank", "said"), [("0", True), ("1", False)])
def test_notes_are_printed_by_the_first_process(base_folder, tmp_path, monkeypatch, capsys, rank, said):
    trainer = SFTTrainer(str(base_folder), train_dataset=ROWS, output_dir=str(tmp_path))
    trainer.notes = [("key", "why")]
    monkeypatch.setattr(trainer.run, "train", lambda **_: None)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", rank)):
        monkeypatch.setenv(name, value)
    trainer.train()
    assert ("from TRL: key: why" in capsys.readouterr().out) == said


def test_every_argument_of_trl_is_known():
    assert sorted({field.name for field in dataclasses.fields(trl.SFTConfig)} - known_settings()) == []


# As a script of TRL goes on ------------------------------------------------------------------------------------------


def test_an_argument_may_be_set_later_and_is_read_with_trls_default(base_folder, tmp_path):
    args = SFTConfig(str(tmp_path / "run"), use_cpu=True)
    args.max_steps, args.lr_scheduler_type, args.learning_rate = 7, SchedulerType.COSINE, 3e-4
    assert (args.max_steps, args.lr_scheduler_type, args.learning_rate) == (7, "cosine", 3e-4)
    found = SFTTrainer(str(base_folder), args, train_dataset=ROWS).run.config
    assert (str(found.train.duration), found.optimizer.learning_rate) == ("7 steps", 3e-4)
    for name in ("num_train_epochs", "max_length", "lora_r", "seed", "per_device_train_batch_size", "warmup_steps"):
        theirs = getattr(trl.SFTConfig(use_cpu=True), name, getattr(trl.ModelConfig(), name, None))
        assert getattr(SFTConfig(), name) == theirs, name
    assert SFTConfig().hub_model_id is None and not hasattr(SFTConfig(), "lerning_rate")
    theirs = trl.SFTConfig(use_cpu=True)
    for name in known_settings() - {"accelerator_config", "output_dir", "use_cpu"}:
        if hasattr(theirs, name):
            value = getattr(theirs, name)
            assert getattr(SFTConfig(), name) == getattr(value, "value", value), name
    with pytest.raises(ConfigError, match="lerning_rate: unknown argument; did you mean 'learning_rate'"):
        args.lerning_rate = 1
    assert copy.deepcopy(args).arguments == args.arguments


def test_the_arguments_have_the_places_of_trl():
    ours, theirs = (list(inspect.signature(each.__init__).parameters) for each in (SFTTrainer, trl.SFTTrainer))
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (["a", "b"], r"formatting_func: gave \['a', 'b'\] for example 1; .*It gets one example, not a batch"),
        ([{"role": "user", "content": "a"}], "one string.*not a batch of them. Messages need no function"),
        ({"text": "a"}, "formatting_func: gave .* it must give one string"),
        (None, "formatting_func: gave None for example 1"),
    ],
)
@pytest.mark.parametrize("key", ["train_dataset", "eval_dataset"])
def test_a_formatting_function_gives_one_string(base_folder, tmp_path, made, says, key):
    given = {"train_dataset": [{"text": "a"}], key: ROWS, "output_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=says):
        SFTTrainer(str(base_folder), **given, formatting_func=lambda row: made if "messages" in row else "text")


@pytest.mark.parametrize(
    ("rows", "field", "trained", "note"),
    [
        ([{"body": "Some text."}], "body", "S⟦ome text.", None),
        ([{"body": "Some text.", "text": "Other text."}], "body", "S⟦ome text.", None),
        ([{"text": "Some text."}], "text", "S⟦ome text.", None),
        ([{"text": "Some text.", "instruction": "a", "output": "b"}], "text", "S⟦ome text.", None),
        ([{"text": "Some text.", "instruction": "a", "output": "b"}], None, "S⟦ome text.", None),
        ([{"body": "a", **conversations(1)[0]}], "body", "start 0?<|im_end|>", "'body' is not read: `messages`"),
        ([{"body": "a", "prompt": "b", "completion": "c"}], "body", "⟦c", "'body' is not read: `prompt`"),
    ],
)
@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_the_text_that_trl_would_train(base_folder, tmp_path, rows, field, trained, note, kind):
    given = {} if field is None else {"dataset_text_field": field}
    args = SFTConfig(str(tmp_path), max_length=128, use_cpu=True, **given)
    trainer = SFTTrainer(str(base_folder), args, train_dataset=kind(rows))
    assert trained in str(trainer.run.show(1)) and "⟦" in str(trainer.run.show(1))
    found = [why for key, why in trainer.notes if key == "dataset_text_field"]
    assert len(found) == (note is not None) and all(note in why for why in found)


def test_data_whose_columns_are_not_known_asks_for_the_name_of_its_text(base_folder, tmp_path):
    args = SFTConfig(str(tmp_path), dataset_text_field="body")
    notes = dict(SFTTrainer(str(base_folder), args, train_dataset=(row for row in [{"text": "a"}])).notes)
    assert "'columns': {'text': 'body'}" in notes["dataset_text_field"]


@pytest.mark.parametrize("kind", [dict, datasets.DatasetDict])
def test_held_out_sets_by_name_are_one(base_folder, tmp_path, kind):
    held_out = kind(first=ROWS.select([0, 1]), second=ROWS.select([2]))
    trainer = SFTTrainer(str(base_folder), SFTConfig(str(tmp_path)), train_dataset=ROWS, eval_dataset=held_out)
    assert len(trainer.run.config.data.eval) == 2 and trainer.run.check().num_examples == len(ROWS) + 3
    assert "first, second are one held-out set" in dict(trainer.notes)["eval_dataset"]


@pytest.mark.parametrize(
    ("kind", "given", "live", "precision"),
    [
        (SFTConfig, {}, None, None),
        (SFTConfig, {"bf16": True}, None, "bfloat16"),
        (SFTConfig, {"bf16": False}, None, "float32"),
        (SFTConfig, {"bf16": False, "fp16": True}, None, "bfloat16"),
        (SFTConfig, {"bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}}, None, "bfloat16"),
        (SFTConfig, {"bf16": False}, torch.float32, "float32"),
        (SFTConfig, {"bf16": False}, torch.bfloat16, None),
        (TrainingArguments, {}, None, "float32"),
        (TrainingArguments, {"bf16": True}, None, "bfloat16"),
        (trl.SFTConfig, {}, None, None),
        (trl.SFTConfig, {"bf16": False}, None, "float32"),
    ],
)
def test_bfloat16_that_is_off_is_not_on(base_folder, tmp_path, kind, given, live, precision):
    model = str(base_folder) if live is None else AutoModelForCausalLM.from_pretrained(base_folder, dtype=live)
    args = kind(str(tmp_path), use_cpu=True, **given)
    assert SFTTrainer(model, args, train_dataset=ROWS).run.config.train.precision == precision


@pytest.mark.parametrize("of_trl", [True, False])
def test_what_changes_the_training_is_carried_over(base_folder, tmp_path, of_trl):
    given = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}, "learning_rate": 1e-4}
    given |= {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "adam_epsilon": 1e-8,
    }
    given |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "use_cpu": True}
    args = (trl.SFTConfig if of_trl else SFTConfig)(str(tmp_path), **given)
    trainer = SFTTrainer(str(base_folder), args, train_dataset=ROWS, eval_dataset=ROWS.select([0]))
    found = trainer.run.config
    assert (found.optimizer.min_lr_ratio, found.checkpoint.best) == (pytest.approx(0.1), "loss")
    assert not {"lr_scheduler_kwargs", "load_best_model_at_end", "metric_for_best_model"} & dict(trainer.notes).keys()
    del given["learning_rate"]
    found = SFTTrainer(str(base_folder), SFTConfig(str(tmp_path), **given), train_dataset=ROWS, eval_dataset=ROWS).run
    assert found.config.optimizer.min_lr_ratio == pytest.approx(1e-5 / 2e-5)


@pytest.fixture(scope="module")
def finished(base_folder, tmp_path_factory):
    """A trainer after its two steps, and what train() gave."""
    args = SFTConfig(str(tmp_path_factory.mktemp("finished") / "run"), **FAST)
    trainer = SFTTrainer(str(base_folder), args, train_dataset=ROWS, eval_dataset=ROWS.select([0, 1]))
    return trainer, trainer.train()


def test_what_scripts_of_trl_ask_after_the_training(finished, capsys):
    trainer, result = finished
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2] == [1, trainer.state.global_step]
    assert [entry["loss"] for entry in history if "loss" in entry] == list(result.losses)
    held_out = [entry for entry in history if "eval_loss" in entry]
    last = result.evaluations[-1]
    figures = {"eval_loss": last.loss, "eval_mean_token_accuracy": last.token_accuracy}
    assert trainer.evaluate() == figures == {key: held_out[-1][key] for key in figures} and held_out[0]["step"] == 0
    assert result.metrics["train_loss"] == result.training_loss == pytest.approx(sum(result.losses) / 2)
    assert (result.global_step, trainer.args.max_steps, trainer.args.output_dir) == (2, 2, trainer.run.config.out)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.accelerator.print("done")
    assert trainer.accelerator.is_main_process and trainer.is_world_process_zero()
    out = capsys.readouterr().out
    assert "train: train_loss" in out and "done" in out
    with pytest.raises(ConfigError, match=r"SFTTrainer\(eval_dataset=\.\.\.\)"):
        trainer.evaluate(ROWS)


def test_what_a_trainer_of_trl_has_and_this_one_has_not_says_what_to_do(finished, base_folder):
    trainer, _ = finished
    for name in {*dir(trl.SFTTrainer)} - {*dir(SFTTrainer)}:
        if not name.startswith("_"):
            assert not hasattr(trainer, name)
            with pytest.raises(AttributeError, match=f"SFTTrainer has no {name}: .*(python.md|preceptor|README)"):
                getattr(trainer, name)
    with pytest.raises(AttributeError, match=r"`preceptor export .*/run --to hub --repo OWNER/NAME`"):
        trainer.push_to_hub()
    unmade = SFTTrainer.__new__(SFTTrainer)
    assert not hasattr(unmade, "run") and not hasattr(copy.copy(trainer), "control")


def test_a_model_is_saved_whole_and_nowhere_else(finished, tmp_path, monkeypatch, capsys):
    trainer, _ = finished
    out = Path(trainer.run.config.out)
    before = sorted(out.rglob("*"))
    (tmp_path / "link").symlink_to(out)
    for place in (None, str(out), out / "model", tmp_path / "link", f"{out}/"):
        trainer.save_model(place)
        assert f"the model is saved in {out}/model" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"lies in the model; it is saved in .*/model\. Name another folder"):
        trainer.save_model(out / "model" / "deeper")
    assert sorted(out.rglob("*")) == before
    names = {path.name for path in (out / "model").iterdir()}
    for place in ("new", "deep/er", "new"):  # a second time too, over what an earlier script saved
        trainer.save_model(str(tmp_path / place))
        assert {path.name for path in (tmp_path / place).iterdir()} == names
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"old: holds adapter_config\.json, which the saved model has not"):
        trainer.save_model(str(tmp_path / "old"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: holds file, which"):
        trainer.save_model(str(tmp_path / "file"))

    def interrupted(source, place, **_):
        place.mkdir()
        (place / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copytree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_model(str(tmp_path / "half"))
    assert not (tmp_path / "half").exists() and [path.name for path in (tmp_path / "old").iterdir()] == [
        "adapter_config.json"
    ]


def test_a_training_that_was_stopped_is_not_called_none(base_folder, tmp_path):
    trainer = SFTTrainer(str(base_folder), SFTConfig(str(tmp_path / "run"), **FAST), train_dataset=ROWS)
    assert trainer.state.log_history == []
    for _ in trainer.run.steps():
        assert trainer.state.global_step == 1
        break
    for ask in (trainer.save_model, trainer.evaluate):
        with pytest.raises(CheckpointError, match=r"this run is not finished: train\(\) begins it, or goes on with it"):
            ask()
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint: '.*checkpoint-1': a run goes on by itself"):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert trainer.train().num_steps == 2
    with pytest.raises(ConfigError, match=r"nothing is held out: SFTTrainer\(eval_dataset"):
        trainer.evaluate()
