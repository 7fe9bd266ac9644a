"""Scripts and notebooks of TRL and Unsloth, in the style of their published ones: read, not run."""

import json

import pytest

from preceptor import config
from preceptor.config.convert import convert_file
from preceptor.config.convert import settings_of as flat_settings
from preceptor.config.peer_script import read_script
from preceptor.errors import ConfigError

UNSLOTH = """!pip install unsloth
%cd work
from unsloth import FastLanguageModel, is_bfloat16_supported
from unsloth.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only
from trl import SFTTrainer, SFTConfig
max_seq_length = 2048
dtype = None  # None for auto detection
load_in_4bit = True

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = "unsloth/Llama-3.2-3B-Instruct-bnb-4bit",
    max_seq_length = max_seq_length,
    dtype = dtype,
    load_in_4bit = load_in_4bit,
    token = "hf_secret",
)
model = FastLanguageModel.get_peft_model(
    model,
    r = 16,
    target_modules = ["q_proj", "k_proj", "v_proj", "o_proj"],
    lora_alpha = 2 * 16,
    lora_dropout = 0.05,
    bias = "none",
    use_gradient_checkpointing = "unsloth",
    random_state = 3407,
    use_rslora = True,
    loftq_config = None,
)
tokenizer = get_chat_template(tokenizer, chat_template = "llama-3.1")

def formatting_prompts_func(examples):
    texts = [tokenizer.apply_chat_template(convo, tokenize = False) for convo in examples["conversations"]]
    return { "text" : texts, }

dataset = load_dataset("mlabonne/FineTome-100k", split = "train")
dataset = standardize_sharegpt(dataset)
dataset = dataset.map(formatting_prompts_func, batched = True,)

trainer = SFTTrainer(
    model = model,
    tokenizer = tokenizer,
    train_dataset = dataset,
    dataset_text_field = "text",
    max_seq_length = max_seq_length,
    data_collator = DataCollatorForSeq2Seq(tokenizer = tokenizer),
    dataset_num_proc = 2,
    packing = False,
    args = SFTConfig(
        per_device_train_batch_size = 2,
        gradient_accumulation_steps = 4,
        warmup_steps = 5,
        max_steps = 60,
        learning_rate = 2e-4,
        fp16 = not is_bfloat16_supported(),
        bf16 = is_bfloat16_supported(),
        logging_steps = 1,
        optim = "adamw_8bit",
        weight_decay = 0.01,
        lr_scheduler_type = "linear",
        seed = 3407,
        output_dir = "outputs",
        report_to = "none",
    ),
)
trainer = train_on_responses_only(
    trainer,
    instruction_part = "<|im_start|>user\\n",
    response_part = "<|im_start|>assistant\\n",
)
trainer_stats = trainer.train()
if False:
    model, tokenizer = FastLanguageModel.from_pretrained(model_name = "lora_model", load_in_4bit = False)
"""


def converted(folder, text, name="train.py"):
    (folder / name).write_text(text)
    return convert_file(folder / name)


def unready(found):
    """The notes that ask for something."""
    return {key: why for key, why in found.notes if not why.endswith(("nothing to set", "remove the key"))}


def test_a_script_of_unsloth(tmp_path):
    found = converted(tmp_path, UNSLOTH)
    assert (found.peer, found.missing) == ("Unsloth", [])
    assert found.tree["model"] == {
        "path": "unsloth/Llama-3.2-3B-Instruct",
        "dtype": "bfloat16",
        "quantization": "nf4",
        "double_quantization": True,
    }
    layers = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapter = {"kind": "lora", "rank": 16, "alpha": 32.0, "dropout": 0.05, "use_rslora": True, "target_modules": layers}
    assert found.tree["adapter"] == adapter
    assert found.tree["memory"] == {"activation_checkpointing": "all"}
    assert found.tree["data"] == {
        "train": [{"path": "mlabonne/FineTome-100k", "split": "train"}],
        "allow_rejected": ["too_long"],
        "max_length": 2048,
    }
    assert found.tree["train"] == {"duration": "60 steps", "batch_size": 8, "seed": 3407}
    optimizer = found.tree["optimizer"]
    assert (optimizer["name"], optimizer["learning_rate"], optimizer["warmup"]) == ("adamw_8bit", 2e-4, "5 steps")
    assert unready(found).keys() == {"max_length", "batch size", "chat_template", "data_collator"}
    notes = dict(found.notes)
    assert "unsloth/Llama-3.2-3B-Instruct-bnb-4bit are quantized" in notes["model_name"]
    assert "the chat template renders the conversations" in notes["train_dataset"]
    assert "hf_secret" not in found.text("train.py") and "HF_TOKEN" in notes["token"]
    config.build(found.tree, "converted")


def test_what_such_a_script_leaves_out_is_as_unsloth_has_it(tmp_path):
    loaded = 'model, tok = FastLanguageModel.from_pretrained("some/base", 1024{more})\n'
    adapted = "model = FastLanguageModel.get_peft_model(model{more})\n"
    trained = 'SFTTrainer(model=model, args=SFTConfig("out", max_seq_length=512), train_dataset=load_dataset("d"))\n'
    found = converted(tmp_path, loaded.format(more="") + adapted.format(more="") + trained)
    assert found.tree["model"]["path"] == "some/base" and found.tree["model"]["quantization"] == "nf4"
    assert found.tree["data"]["max_length"] == 512 and found.tree["out"] == "out"
    assert found.tree["train"] == {"duration": "3 epochs", "batch_size": 8, "seed": 3407}
    assert (found.tree["optimizer"]["learning_rate"], found.tree["optimizer"]["weight_decay"]) == (5e-5, 0.001)
    assert (found.tree["optimizer"]["name"], found.tree["optimizer"]["warmup"]) == ("adamw_8bit", "10 %")
    assert found.tree["adapter"] == {"kind": "lora", "rank": 16, "alpha": 16.0}

    whole = converted(tmp_path, loaded.format(more=", full_finetuning=True") + trained)
    assert whole.tree["model"] == {"path": "some/base", "dtype": "bfloat16"} and "adapter" not in whole.tree
    wide = converted(tmp_path, loaded.format(more=", full_finetuning=True, float32_mixed_precision=True") + trained)
    assert wide.tree["model"] == {"path": "some/base"}
    half = converted(tmp_path, loaded.format(more=", load_in_16bit=True") + adapted.format(more="") + trained)
    assert half.tree["model"] == {"path": "some/base", "dtype": "bfloat16"}

    more = ", target_modules=['q_proj', 'embed_tokens', 'lm_head'], finetune_mlp_modules=False"
    more += ", finetune_vision_layers=False"
    found = converted(tmp_path, loaded.format(more="") + adapted.format(more=more) + trained)
    assert found.tree["adapter"]["target_modules"] == ["q_proj"]
    assert found.tree["adapter"]["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert "adapter.target_modules" in unready(found)["finetune_mlp_modules"]
    assert "finetune_vision_layers" not in dict(found.notes)


def test_a_notebook_is_read_as_its_cells(tmp_path):
    first, rest = UNSLOTH.split("max_seq_length = 2048\n")
    cells = [
        {"cell_type": "markdown", "source": ["# Train\n"]},
        {"cell_type": "code", "source": first.splitlines(keepends=True)},
        {"cell_type": "code", "source": ["%%bash\n", "ls -l && echo 'ready'\n"]},
        {"cell_type": "code", "source": [f"max_seq_length = 2048\n{rest}"]},
    ]
    found = converted(tmp_path, json.dumps({"cells": cells}), "train.ipynb")
    assert (found.peer, found.tree) == ("Unsloth", converted(tmp_path, UNSLOTH).tree)
    with pytest.raises(ConfigError, match="is no notebook"):
        converted(tmp_path, "[1]", "train.ipynb")


def test_the_parts_that_unsloth_trains_on_are_known_to_the_comparison(tmp_path):
    (tmp_path / "train.py").write_text(UNSLOTH)
    parts = flat_settings(tmp_path / "train.py")["train_on_responses_only"]
    assert parts == {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}


TRL = """import torch
from trl import SFTConfig, SFTTrainer
model_id: str = "some/base"
rank = 8
bnb_config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(
    model_id, quantization_config=bnb_config, torch_dtype=torch.bfloat16 if torch.cuda.is_bf16_supported() else None)
model = prepare_model_for_kbit_training(model)
peft_config = LoraConfig(r=rank, lora_alpha=rank * 2, task_type=TaskType.CAUSAL_LM, bias="none")
model = get_peft_model(model, peft_config)
dataset = load_dataset("json", data_files={"train": ["a.jsonl", "b.jsonl"], "test": "c.jsonl"})
train, test = dataset["train"], dataset["test"]
arguments = dict(learning_rate=1e-4, max_steps=10)
args = TrainingArguments("out", **arguments, bf16=True)
trainer = SFTTrainer(model, args=args, train_dataset=train, eval_dataset=test)
"""


def test_a_script_of_trl_is_read_as_it_is_written(tmp_path):
    found = converted(tmp_path, TRL)
    assert found.tree["model"] == {
        "path": "some/base",
        "dtype": "bfloat16",
        "quantization": "nf4",
        "double_quantization": True,
    }
    assert found.tree["data"]["train"] == [{"path": "a.jsonl"}, {"path": "b.jsonl"}]
    assert found.tree["data"]["eval"] == [{"path": "c.jsonl"}]
    assert (found.tree["adapter"]["rank"], found.tree["adapter"]["alpha"]) == (8, 16.0)
    assert found.tree["train"]["duration"] == "10 steps" and found.tree["train"]["precision"] == "bfloat16"
    assert found.tree["out"] == "out" and found.tree["optimizer"]["learning_rate"] == 1e-4
    assert unready(found).keys() == {"max_length", "batch size", "assistant_only_loss", "lora_target_modules"}


@pytest.mark.parametrize(
    ("call", "rate", "memory", "batch"),
    [
        ("TrainingArguments('o')", 5e-5, None, 8),
        ("TrainingArguments('o', learning_rate=1e-4, activation_checkpointing=True)", 1e-4, "all", 8),
        ("TrainingArguments('o', learning_rate=rate)", None, None, 8),
        ("SFTConfig('o')", 2e-5, "all", 8),
        ("SFTConfig('o', activation_checkpointing=False)", 2e-5, None, 8),
        ("UnslothTrainingArguments('o')", 2e-5, "all", 8),
    ],
)
def test_absent_arguments_have_the_values_of_their_class(tmp_path, call, rate, memory, batch):
    found = converted(tmp_path, f"args = {call}\nSFTTrainer('m', args=args, train_dataset=load_dataset('a/b'))\n")
    assert found.tree.get("memory", {}).get("activation_checkpointing") == memory
    assert (found.tree["optimizer"].get("learning_rate"), found.tree["train"]["batch_size"]) == (rate, batch)
    assert not {"logging_steps", "optim"} & dict(found.notes).keys()


@pytest.mark.parametrize(
    ("call", "precision"),
    [
        ("TrainingArguments('o')", "float32"),
        ("TrainingArguments('o', bf16=True)", "bfloat16"),
        ("TrainingArguments('o', fp16=True)", "bfloat16"),
        ("TrainingArguments('o', bf16=asked())", None),
        ("SFTConfig('o')", None),
    ],
)
def test_the_precision_that_is_absent_is_that_of_its_class(tmp_path, call, precision):
    found = converted(tmp_path, f"SFTTrainer('m', args={call}, train_dataset=load_dataset('a/b'))\n")
    assert found.tree["train"].get("precision") == precision


def test_unsloths_values_are_not_those_of_training_arguments(tmp_path):
    text = UNSLOTH.replace("args = SFTConfig", "args = TrainingArguments").replace('optim = "adamw_8bit",', "")
    found = converted(tmp_path, text.replace("weight_decay = 0.01,", "").replace("warmup_steps = 5,", ""))
    optimizer = found.tree["optimizer"]
    assert (optimizer.get("name"), optimizer["weight_decay"], optimizer["warmup"]) == (None, 0.0, "0 steps")


OWN = """class MyTrainer({base}):
    def compute_loss(self, model, inputs): return 0
MyTrainer(model="m", args=SFTConfig("o", learning_rate=1e-4), train_dataset=load_dataset("a/b"))
"""


@pytest.mark.parametrize("base", ["SFTTrainer", "trl.SFTTrainer", "UnslothTrainer"])
def test_a_class_of_the_scripts_own_on_a_trainer_of_sft_is_one(tmp_path, base):
    found = converted(tmp_path, OWN.format(base=base))
    assert found.tree["data"]["train"] == [{"path": "a/b", "split": "train"}] and found.tree["model"]["path"] == "m"
    assert "a class of its own on" in dict(found.notes)["MyTrainer"]
    without = OWN.format(base=base).replace("SFTConfig", "Other")
    assert converted(tmp_path, without).tree["model"]["path"] == "m"
    with pytest.raises(ConfigError, match="MyTrainer: it is another trainer"):
        converted(tmp_path, without.replace(f"({base})", "(DPOTrainer)"))


KWARGS = """config = SFTConfig(output_dir="out", model_init_kwargs={
    "quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.bfloat16})
SFTTrainer("some/base", args=config, train_dataset=load_dataset("d"), peft_config=LoraConfig(r=4))
"""


def test_a_quantization_config_among_the_arguments_of_loading(tmp_path):
    found = converted(tmp_path, KWARGS)
    quantized = {"quantization": "nf4", "double_quantization": False, "dtype": "bfloat16"}
    assert found.tree["model"] == {"path": "some/base", **quantized}
    assert unready(found)["bnb_4bit_quant_type"] == "'fp4' is not offered: nf4"  # the default of BitsAndBytesConfig
    found = converted(tmp_path, KWARGS.replace("load_in_4bit", "load_in_8bit"))
    assert found.tree["model"]["quantization"] == "int8" and "bnb_4bit_quant_type" not in dict(found.notes)


@pytest.mark.parametrize(("given", "share"), [("test_size=0.1", 0.1), ("0.2", 0.2), ("test_size=50", None), ("", None)])
def test_held_out_data_that_is_split_off_is_no_file_of_its_own(tmp_path, given, share):
    text = f'data = load_dataset("json", data_files="a.jsonl", split="train").train_test_split({given})\n'
    text += 'SFTTrainer("m", train_dataset=data["train"], eval_dataset=data["test"])\n'
    found = converted(tmp_path, text)
    assert found.tree["data"]["train"] == [{"path": "a.jsonl"}] and "eval" not in found.tree["data"]
    assert found.tree["data"].get("eval_size") == share
    if share is None:
        assert "set it, or name files in data.eval" in unready(found)["eval_dataset"]
    else:
        assert "eval_dataset" not in unready(found)


@pytest.mark.parametrize(
    ("train", "evaluated", "share"),
    [
        ("train[:90%]", "train[90%:]", 0.1),
        ("train[5%:]", "train[:5%]", 0.05),
        ("train[:90%]", "train[80%:]", None),
        ("train[:90%]", "test[90%:]", None),
        ("train[:100]", "train[100:]", None),
    ],
)
def test_two_parts_of_a_file_are_a_share_that_is_held_out(tmp_path, train, evaluated, share):
    data = 'load_dataset("json", data_files="a.jsonl", split="{}")'
    text = f'SFTTrainer("m", train_dataset={data.format(train)}, eval_dataset={data.format(evaluated)})\n'
    found = converted(tmp_path, text)
    assert found.tree["data"].get("eval_size") == share and found.tree["data"]["train"] == [{"path": "a.jsonl"}]
    assert ("data.train split" in unready(found)) == ("eval" in found.tree["data"]) == (share is None)


@pytest.mark.parametrize(
    ("train", "evaluated"),
    [
        ('load_dataset("a")["train"]', 'load_dataset("b").train_test_split(test_size=0.9)["train"]'),
        ('load_dataset("a")["train"]', 'load_dataset("a")["test"].train_test_split(test_size=0.5)["test"]'),
        ('split["test"]', 'split["train"]'),
        ("load_dataset('a').train_test_split(test_size=args.share)['train']", "None"),
    ],
)
def test_no_other_split_holds_training_data_out(tmp_path, train, evaluated):
    text = 'split = load_dataset("a").train_test_split(test_size=0.9)\n'
    text += f'SFTTrainer("m", train_dataset={train}, eval_dataset={evaluated})\n'
    found = converted(tmp_path, text)
    assert found.tree["data"]["train"][0]["path"] == "a" and "eval_size" not in found.tree["data"]
    assert unready(found).keys() & {"train_dataset", "eval_dataset"}


QLORA = """bnb = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained("own/base"{more})
tokenizer = AutoTokenizer.from_pretrained("own/base")
{template}
SFTTrainer(model=model, args=SFTConfig("o"), train_dataset=load_dataset("d"), peft_config=LoraConfig(r=4))
"""


@pytest.mark.parametrize(
    "call",
    [
        "model, tokenizer = setup_chat_format(model=model, tokenizer=tokenizer)",
        "model, tokenizer = setup_chat_format(model, tokenizer)",
        "model, tokenizer = setup_chat_format(tokenizer=tokenizer, model=model.to(device))",
    ],
)
def test_a_model_is_followed_through_the_chat_format(tmp_path, call):
    found = converted(tmp_path, QLORA.format(more=", quantization_config=bnb", template=call))
    quantized = {"quantization": "nf4", "dtype": "bfloat16", "double_quantization": True}
    assert found.tree["model"] == {"path": "own/base", **quantized}
    assert found.tree["data"]["chat_template"] == "chatml" and "model" not in unready(found)


def test_how_a_model_is_loaded_counts_where_its_name_is_not_known(tmp_path):
    text = QLORA.format(more=", quantization_config=bnb", template="")
    text = text.replace("model = Auto", "def load():\n    return Auto").replace("model=model", "model=load()")
    found = converted(tmp_path, text)
    assert found.tree["model"]["quantization"] == "nf4" and found.missing == ["model.path"]


def test_a_tokenizer_and_a_template_of_another_model_are_named(tmp_path):
    own = "tokenizer.chat_template = \"{% for m in messages %}{{ m['content'] }}{% endfor %}\""
    text = QLORA.format(more=", dtype='float32'", template="")
    assert not {"chat_template", "processing_class", "dtype"} & unready(converted(tmp_path, text)).keys()
    found = converted(tmp_path, QLORA.format(more="", template=own))
    assert ".jinja" in unready(found)["chat_template"] and "processing_class" not in unready(found)
    assert "transformers 5 loads the type of the files" in unready(found)["dtype"]
    found = converted(
        tmp_path, text.replace('AutoTokenizer.from_pretrained("own/base")', 'AutoTokenizer.from_pretrained("a/b")')
    )
    assert unready(found)["processing_class"].startswith("the tokenizer of a/b there; here that of own/base")
    assert "chat_template" not in unready(
        converted(tmp_path, QLORA.format(more="", template="tokenizer.chat_template = None"))
    )


SET = """tokenizer = AutoTokenizer.from_pretrained("own/base")
{template}
SFTTrainer(model="own/base", args=SFTConfig("o"), train_dataset=load_dataset("d"), processing_class=tokenizer)
"""


@pytest.mark.parametrize(
    ("template", "known", "said"),
    [
        ('tokenizer.chat_template = "llama3"', "llama3", ""),
        ('tokenizer.chat_template, tokenizer.padding_side = "llama3", "left"', "llama3", ""),
        ('class Net:\n    def go(self):\n        self.chat_template = "chatml"', None, "of no tokenizer"),
        (
            'class Net:\n    def go(self):\n        self.chat_template = "chatml"\ntokenizer.chat_template = "llama3"',
            "llama3",
            "",
        ),
        (
            'if llama:\n    tokenizer.chat_template = "llama3"\nelse:\n    tokenizer.chat_template = "chatml"',
            None,
            "one of several",
        ),
        (
            'judge = AutoTokenizer.from_pretrained("a/judge")\njudge.chat_template = "chatml"',
            None,
            "of no tokenizer",
        ),
        (
            "tokenizer = made()\ndef made():\n    own = AutoTokenizer.from_pretrained('own/base')\n"
            "    own.chat_template = 'llama3'\n    return own",
            "llama3",
            "",
        ),
    ],
)
def test_a_template_counts_that_is_set_on_the_tokenizer_of_the_trainer(tmp_path, template, known, said):
    found = settings_of(tmp_path, SET.format(template=template))
    assert found.settings.get("chat_template") == known
    notes = [why for why in found.unread if why.startswith("chat_template: ")]
    assert all(said in why for why in notes) and bool(notes) == bool(said)


def test_a_tokenizer_beside_that_of_the_trainer_is_not_named(tmp_path):
    judge = 'judge = AutoTokenizer.from_pretrained("a/judge")'
    assert not settings_of(tmp_path, SET.format(template=judge)).unread
    found = settings_of(tmp_path, SET.format(template=judge).replace("tokenizer)", "judge)"))
    assert [why.partition(" there")[0] for why in found.unread] == ["processing_class: the tokenizer of a/judge"]


@pytest.mark.parametrize(
    ("loaded", "moves", "dtype"),
    [
        ("", ".to(torch.bfloat16)", "bfloat16"),
        ("", ".to('cuda', torch.bfloat16)", "bfloat16"),
        ("", ".to(device='cuda', dtype=torch.half).eval()", "float16"),
        ("", ".bfloat16().cuda()", "bfloat16"),
        ("", ".half()", "float16"),
        (", torch_dtype=torch.bfloat16", ".to(torch.float32)", "float32"),
        (", dtype=torch.bfloat16", ".half().float()", "float32"),
        (", dtype=torch.bfloat16", ".to('cuda')", "bfloat16"),
        (", dtype=torch.bfloat16", "\nmodel.to(torch.float)", "float32"),
        ("", "\nmodel = get_peft_model(model, LoraConfig(r=4))\nmodel = model.to(torch.bfloat16)", "bfloat16"),
        ("", "\nother = AutoModelForCausalLM.from_pretrained('a/b').half()", None),
    ],
)
def test_the_type_that_a_model_gets_last_counts(tmp_path, loaded, moves, dtype):
    text = (
        f'model = AutoModelForCausalLM.from_pretrained("own/base"{loaded}){moves}\nSFTTrainer(model, SFTConfig("o"))\n'
    )
    found = settings_of(tmp_path, text)
    settings = found.settings
    assert settings["model_name_or_path"] == "own/base" and settings.get("dtype", settings.get("torch_dtype")) == dtype
    assert bool([why for why in found.unread if why.startswith("dtype: absent")]) == (dtype is None)


def test_a_type_that_is_that_of_the_files_or_cannot_be_told_is_named(tmp_path):
    text = 'model = AutoModel.from_pretrained("own/base", torch_dtype="auto")\nSFTTrainer(model, SFTConfig("o"))\n'
    assert "here float32" in dict(converted(tmp_path, text).notes)["dtype"]
    found = settings_of(tmp_path, text.replace(")\nSFT", ").to(dtype=asked())\nSFT"))
    assert found.unread[0].startswith("dtype: asked() (line 1)") and "torch_dtype" not in found.settings


@pytest.mark.parametrize("owner", ["FastLanguageModel", "unsloth.FastLanguageModel", "FastGemmaModel"])
@pytest.mark.parametrize("by_unsloth", [True, False])
def test_an_adapter_of_unsloth_is_on_four_bits(tmp_path, owner, by_unsloth):
    text = f"model, tok = {owner}.from_pretrained('some/base', 1024, load_in_4bit=True)\n"
    text += f"model = {owner}.get_peft_model(model, r=4)\n" if by_unsloth else ""
    given = "" if by_unsloth else ", peft_config=LoraConfig(r=4)"
    found = converted(tmp_path, text + f"SFTTrainer(model=model, train_dataset=load_dataset('d'){given})\n")
    assert found.peer == "Unsloth" and found.tree["adapter"]["rank"] == 4
    assert (found.tree["model"]["quantization"], found.tree["model"]["dtype"]) == ("nf4", "bfloat16")


@pytest.mark.parametrize(
    "text",
    [
        'if big:\n    name = "a"\nelse:\n    name = "b"\nSFTTrainer(name, args=SFTConfig("out"))',  # which of them
        'for name in names:\n    SFTTrainer(name, args=SFTConfig("out"))',
        'name = other(name)\nSFTTrainer(name, args=SFTConfig("out"))',
    ],
)
def test_a_name_that_cannot_be_told_is_said(tmp_path, text):
    found = converted(tmp_path, text)
    assert "model.path" in found.missing and "not a path that is written out" in dict(found.notes)["model"]


def test_a_name_is_what_was_assigned_last(tmp_path):
    text = 'name = "a"\nname = "b"\nSFTTrainer(name, args=SFTConfig("out"))\nname = "c"\n'
    assert converted(tmp_path, text).tree["model"]["path"] == "b"
    text = 'def main():\n    SFTTrainer(NAME, args=SFTConfig("out"))\nNAME = "later"\nmain()\n'
    assert converted(tmp_path, text).tree["model"]["path"] == "later"


def settings_of(tmp_path, text, suffix=".py"):
    file = tmp_path / f"script{suffix}"
    file.write_text(text)
    return read_script(file, text)


def test_operators_at_the_start_of_a_line_are_python(tmp_path):
    found = settings_of(
        tmp_path, 'x = (5\n  % 3)\ny = (x\n != 2)\nSFTConfig(learning_rate=1e-4, run_name="""\n!a\n""")\n'
    )
    assert found.settings["learning_rate"] == 1e-4 and found.settings["run_name"] == "\n!a\n"


def test_cells_for_a_shell_are_passed_over(tmp_path):
    cells = [
        "!pip install \\\n    unsloth \\\n    trl\n%cd x\nimport trl",
        "%%html\n<b>",
        "files = !ls",
        "%%capture\nlr = 2e-4",
        "SFTConfig(learning_rate=lr)",
    ]
    book = {"cells": [{"cell_type": "code", "source": [cell]} for cell in cells]}
    found = settings_of(tmp_path, json.dumps(book), ".ipynb")
    assert found.settings == {"learning_rate": 2e-4}
    assert found.unread == ["cell 3: not Python: passed over"]


def test_a_cell_of_marimo_takes_names_of_other_cells(tmp_path):
    text = "@app.cell\ndef _():\n    length = 256\n    return (length,)\n\n"
    text += "@app.cell(hide_code=True)\ndef _(length):\n    SFTConfig('o', max_length=length)\n"
    assert settings_of(tmp_path, text).settings["max_length"] == 256
    plain = settings_of(tmp_path, text.replace("@app.cell(hide_code=True)", "").replace("@app.cell", ""))
    assert "max_length" not in plain.settings


@pytest.mark.parametrize(
    "text",
    [
        "lr = 1e-5\ndef main(lr=3e-4):\n    SFTConfig(max_steps=1, learning_rate=lr)",
        "lr = 1e-5\nfor lr in (1e-4,):\n    pass\nSFTConfig(max_steps=1, learning_rate=lr)",
        "lr = 3\nlr += 2\nSFTConfig(max_steps=1, learning_rate=lr)",
        "lr = 1e-5\nlr = c = 2e-3\nSFTConfig(max_steps=1, learning_rate=lr)",
        "def h():\n    lr = 9\nSFTConfig(max_steps=1, learning_rate=lr)",
        "c = {}\nc['x'] = 1\nSFTConfig(max_steps=1, learning_rate=c)",
        "c = {}\nc.update(x=1)\nSFTConfig(max_steps=1, learning_rate=c)",
        "a = [b]\nb = [a]\nSFTConfig(max_steps=1, learning_rate=a)",
        "lr = 2e-5\nfor lr in (1e-5, 5e-5):\n    SFTConfig(max_steps=1, learning_rate=lr)",
        "lr = 2e-5\nwith asked() as lr:\n    SFTConfig(max_steps=1, learning_rate=lr)",
        "lr = 2e-5\nif (lr := asked()):\n    SFTConfig(max_steps=1, learning_rate=lr)",
        "lr = 2e-5\ndef h():\n    global lr\n    lr = 1e-3\nh()\nSFTConfig(max_steps=1, learning_rate=lr)",
        "lr = 2e-5\ndef main():\n    SFTConfig(max_steps=1, learning_rate=lr)\nlr = 5e-5\nmain()",
        "def main():\n    lr = 2e-5\n    def h():\n        SFTConfig(max_steps=1, learning_rate=lr)\n    lr = 3",
        "SFTConfig(max_steps=1, learning_rate=100 // 0)",
        "SFTConfig(max_steps=1, learning_rate='a' * 10**17)",
        "SFTConfig(max_steps=1, learning_rate='a' * 100)",
        f"SFTConfig(max_steps=1, learning_rate={' * '.join(['10'] * 40)})",
    ],
)
def test_what_has_no_single_value_is_named(tmp_path, text):
    found = settings_of(tmp_path, text)
    assert found.settings == {"max_steps": 1}
    assert len(found.unread) == 1 and found.unread[0].startswith("learning_rate: ")


def test_what_is_set_of_a_config_later_counts(tmp_path):
    found = settings_of(tmp_path, "args = SFTConfig(learning_rate=2e-5)\nargs.learning_rate = 5e-4\n")
    assert found.settings == {"learning_rate": 5e-4}


def test_of_several_configs_it_is_said(tmp_path):
    found = settings_of(tmp_path, "SFTConfig(max_steps=1)\nSFTConfig(max_steps=2)\n")
    assert found.settings == {"max_steps": 2} and "2 calls" in found.unread[0]


@pytest.mark.parametrize(
    "text",
    [
        'd = load_dataset("a/b", token="hf_x1").with_format("torch")\nSFTTrainer("m", train_dataset=d)',
        'd = load_dataset("a/b", use_auth_token="hf_x1")\nSFTTrainer("m", train_dataset=d)',
        'm = AutoModel.from_pretrained(pretrained_model_name_or_path="m", token="hf_x1")\nSFTTrainer(m)',
        'SFTConfig(max_steps=1, wandb_api_key="hf_x1", hub_token="hf_x1", **{"token": "hf_x1", "x": y})',
        'SFTConfig(max_steps=1, model_init_kwargs={"token": "hf_x1", "dtype": "bfloat16"})',
    ],
)
def test_tokens_of_services_are_never_copied(tmp_path, text):
    found = settings_of(tmp_path, text)
    assert "hf_x1" not in repr(found)
    if "from_pretrained" in text:
        assert found.settings["model_name_or_path"] == "m"


def test_arguments_by_their_place(tmp_path):
    unsloth = (
        'm, t = FastLanguageModel.from_pretrained("m", 512)\nm = FastLanguageModel.get_peft_model(m, 8, ["q_proj"], 32)'
    )
    found = settings_of(tmp_path, f'{unsloth}\nt = get_chat_template(t, "chatml")\nSFTTrainer(m)\n').settings
    assert found["from_pretrained"] == {"model_name": "m", "max_seq_length": 512}
    assert found["get_peft_model"] == {"r": 8, "target_modules": ["q_proj"], "lora_alpha": 32}
    assert found["chat_template"] == "chatml"
    found = settings_of(tmp_path, 'SFTTrainer("m", args, None, load_dataset("a/b"))\n').settings
    assert found == {"model_name_or_path": "m", "train_dataset": {"path": "a/b"}}
    found = settings_of(tmp_path, 't = dict(model="m")\nSFTTrainer(**t)\n')
    assert found.settings == {"model_name_or_path": "m"} and not found.unread
    assert "write their names" in settings_of(tmp_path, 'SFTTrainer("m", peft_config=LoraConfig(16))\n').unread[0]


def test_what_could_not_be_read_gets_no_default_of_the_trainer(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(
        'a = SFTConfig(learning_rate=1e-4 if big else 2e-4)\nSFTTrainer("m", a, train_dataset=load_dataset("a/b"))\n'
    )
    assert "learning_rate" not in convert_file(file).tree.get("optimizer", {})


def test_texts_that_are_too_deep_are_no_bug_of_ours(tmp_path):
    for text, suffix in (("x = " + "-" * 100_000 + "1", ".py"), ("[" * 100_000, ".ipynb")):
        with pytest.raises(ConfigError):
            settings_of(tmp_path, text, suffix)


@pytest.mark.parametrize(
    ("argument", "key"), [("report_to=3", "report_to"), ("per_device_train_batch_size=1e400", "batch size")]
)
def test_values_that_no_setting_takes_are_noted(tmp_path, argument, key):
    found = converted(tmp_path, f'SFTTrainer("m", SFTConfig({argument}), train_dataset=load_dataset("a/b"))\n')
    assert key in dict(found.notes)


def adapted(folder, text):
    """The adapter of the run file, and what is said of one that cannot be told."""
    found = converted(folder, f"args = SFTConfig('o')\ndata = load_dataset('a/b')\n{text}\n")
    assert dict(found.unoffered).keys() <= {"peft_config"}
    return found.tree.get("adapter"), dict(found.unoffered).get("peft_config", "")


TRAINS = "SFTTrainer({}, args, train_dataset=data)"
LOADS = "model = AutoModelForCausalLM.from_pretrained('m', dtype='float32')\n"
LORA = "own = LoraConfig(r=4, target_modules=['q_proj'])\n"


@pytest.mark.parametrize(
    "text",
    [
        LORA + "SFTTrainer('m', args, train_dataset=data, peft_config=own)",
        LORA + "other = LoraConfig(r=2, use_dora=True)\nSFTTrainer('m', args, train_dataset=data, peft_config=own)",
        f"def made():\n    {LORA}    return own\nSFTTrainer('m', args, train_dataset=data, peft_config=made())",
        LORA + LOADS + "model = get_peft_model(model, own)\n" + TRAINS.format("model"),
        LORA + LOADS + "model = get_peft_model(peft_config=own, model=model)\n" + TRAINS.format("model.to('cuda')"),
        LORA + LOADS + "model.add_adapter(own, 'default')\n" + TRAINS.format("model"),
        f"def made():\n    {LOADS}    {LORA}    return get_peft_model(model, own)\n" + TRAINS.format("made()"),
        LORA
        + LOADS
        + "model = get_peft_model(model, own)\nSFTTrainer(model, args, train_dataset=data, peft_config=own)",
        f"class T:\n    def __init__(self):\n        {LORA}        self.lora = own\n    def run(self):\n"
        "        SFTTrainer('m', args, train_dataset=data, peft_config=self.lora)",
        f"def train(name, lora):\n    t = SFTTrainer(name, args, train_dataset=data, peft_config=lora)\n    t.train()\n"
        f"{LORA}train('m', own)",
        f"{LORA}def train():\n    global own\n    SFTTrainer('m', args, train_dataset=data, peft_config=own)",
    ],
)
def test_an_adapter_is_the_one_that_the_trainer_gets(tmp_path, text):
    adapter, said = adapted(tmp_path, text)
    assert adapter == {"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["q_proj"]}
    assert not said


@pytest.mark.parametrize(
    "text",
    [
        LORA + TRAINS.format("'m'"),
        LORA + "SFTTrainer('m', args, train_dataset=data, peft_config=None)",
        LORA + LOADS + "other = get_peft_model(made(), own)\n" + TRAINS.format("model"),
    ],
)
def test_an_adapter_that_the_trainer_does_not_get_is_none(tmp_path, text):
    assert adapted(tmp_path, text) == (None, "")
    notes = dict(converted(tmp_path, text.replace("args,", "")).notes)
    assert notes["LoraConfig (line 1)"] == "left out, as the trainer does not get it: nothing to set"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("SFTTrainer('m', args, train_dataset=data, peft_config=IA3Config())", "IA3Config() (line 3)"),
        (
            f"{LOADS}model = get_peft_model(model, AdaLoraConfig())\n" + TRAINS.format("model"),
            "AdaLoraConfig() (line 4)",
        ),
        (f"{LOADS}model = PeftModel.from_pretrained(model, 'a/b')\n" + TRAINS.format("model"), "'a/b') (line 4)"),
        ("model = AutoPeftModelForCausalLM.from_pretrained('m')\n" + TRAINS.format("model"), "('m') (line 3)"),
        ("from own import lora\nSFTTrainer('m', args, train_dataset=data, peft_config=lora)", "lora (line 4)"),
        (
            f"if big:\n    {LORA}else:\n    own = None\nSFTTrainer('m', args, train_dataset=data, peft_config=own)",
            "own (line 7)",
        ),
        (
            f"if big:\n    {LORA}else:\n    own = LoraConfig(use_dora=True)\n"
            "SFTTrainer('m', args, train_dataset=data, peft_config=own)",
            "own (line 7)",
        ),
        (
            LORA + LOADS + "if big:\n    model = get_peft_model(model, own)\n" + TRAINS.format("model"),
            "get_peft_model(model, own) (line 6)",
        ),
        (
            LORA + LOADS + "if big:\n    model.add_adapter(own)\n" + TRAINS.format("model"),
            "model.add_adapter(own) (line 6)",
        ),
    ],
)
def test_an_adapter_that_cannot_be_told_is_not_offered(tmp_path, text, named):
    adapter, said = adapted(tmp_path, text)
    assert adapter is None and named in said and "set the section `adapter` by hand" in said


@pytest.mark.parametrize(("given", "rank"), [("r=asked()", None), ("**asked()", None), ("r=4, **asked()", 4), ("", 8)])
def test_what_of_an_adapter_cannot_be_read_has_no_default(tmp_path, given, rank):
    found = converted(
        tmp_path, f"SFTTrainer('m', peft_config=LoraConfig({given}), train_dataset=load_dataset('a/b'))\n"
    )
    assert found.tree["adapter"].get("rank") == rank
    assert found.tree["adapter"].get("dropout") == (None if "**" in given else 0.0)
    assert bool(unready(found).keys() & {"r", "**asked() (line 1)"}) == ("asked" in given)


@pytest.mark.parametrize(
    ("args", "rate"),
    [
        ("first", 1e-4),
        ("made(1e-3)", None),
        ("SFTConfig('o')", 2e-5),
        ("None", 2e-5),
        ("replace(first, learning_rate=3e-4)", 3e-4),
        ("replace(first, weight_decay=0.1)", 1e-4),
    ],
)
def test_arguments_are_those_that_the_trainer_gets(tmp_path, args, rate):
    text = "first = SFTConfig('o', learning_rate=1e-4)\nsecond = SFTConfig('o', max_steps=9, learning_rate=1.0)\n"
    text += "def made(rate):\n    return SFTConfig('o', learning_rate=rate)\n"
    found = converted(tmp_path, f"{text}SFTTrainer('m', args={args}, train_dataset=load_dataset('a/b'))\n")
    assert found.tree["optimizer"].get("learning_rate") == rate and not found.unoffered
    assert found.tree["train"]["duration"] == "3 epochs"  # of no other arguments
    assert found.tree["optimizer"]["weight_decay"] == (0.1 if "0.1" in args else 0.0)


ASKED = "first = SFTConfig('o', per_device_train_batch_size=2)\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("SFTTrainer('m', args=own, {})", "args"),
        (ASKED + "SFTTrainer('m', args=changed(first), {})", "args"),
        (ASKED + "SFTTrainer('m', {}, **rest)", "**rest (line 2)"),
        ("args = SFTConfig(per_device_train_batch_size=2, **rest)\nSFTTrainer('m', args, {})", "**rest (line 1)"),
        (ASKED + ASKED.replace("2", "4") + "args = asked()\nSFTTrainer('m', args, {})", "args"),
    ],
)
def test_where_arguments_cannot_be_read_no_default_is_written(tmp_path, text, said):
    found = converted(tmp_path, text.format("train_dataset=load_dataset('a/b')") + "\n")
    assert (said in dict(found.notes)) and (said in dict(found.unoffered)) == (said == "args")
    assert found.tree.keys() - {"out", "checkpoint", "train"} == {"model", "data"}
    assert found.tree["data"].keys() == {"train"}
    assert found.tree.get("train", {}).keys() <= {"batch_size"}
    assert not dict(found.notes).keys() & {"max_length", "num_train_epochs", "lr_scheduler_type", "adam_beta1"}


def test_several_trainers_are_refused(tmp_path):
    text = "SFTTrainer('m', train_dataset=load_dataset('a/b'))\n"
    with pytest.raises(ConfigError, match=r"several trainers \(lines 1, 2\): write"):
        converted(tmp_path, text * 2)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("AutoModelForSequenceClassification", "scores or classifies"),
        ("BertForTokenClassification", "scores or classifies"),
        ("AutoModelForMaskedLM", "a masked language model"),
        ("AutoModelForSeq2SeqLM", "an encoder and a decoder"),
        ("T5ForConditionalGeneration", "an encoder and a decoder"),
        ("AutoModelForObjectDetection", "another model than a causal language model"),
        ("AutoModelForCausalLM", ""),
        ("AutoLigerKernelForCausalLM", ""),
        ("AutoModelForImageTextToText", ""),
        ("Qwen2VLForConditionalGeneration", ""),
        ("AutoModel", ""),
    ],
)
@pytest.mark.parametrize(
    "text",
    [
        "model = {}.from_pretrained('m').to('cuda')\nTrainer(model=model, {})",
        "def made(name):\n    return {}.from_pretrained(name)\nTrainer(model=made('m'), {})",
        "def made():\n    return {}.from_pretrained('m')\nTrainer(model_init=made, {})",
    ],
)
def test_models_that_are_no_causal_ones_are_refused(tmp_path, text, model, why):
    text = text.format(model, "args=TrainingArguments('o'), train_dataset=load_dataset('a/b')")
    if why:
        with pytest.raises(ConfigError, match=f"{model}: it trains {'a model that ' if 'scores' in why else ''}{why}"):
            converted(tmp_path, text)
    else:
        assert converted(tmp_path, text).tree["data"]["train"][0]["path"] == "a/b"


def test_another_model_than_the_trainers_refuses_nothing(tmp_path):
    text = "judge = AutoModelForSequenceClassification.from_pretrained('j')\n"
    text += "model = AutoModelForCausalLM.from_pretrained('m')\nSFTTrainer({}, train_dataset=load_dataset('a/b'))"
    assert converted(tmp_path, text.format("model")).tree["model"]["path"] == "m"
    assert converted(tmp_path, text.format("'m'")).tree["model"]["path"] == "m"
    assert converted(tmp_path, text.format("asked()")).missing == ["model.path", "out"]


CHANGED = """args = SFTConfig("o", learning_rate=1e-4)
{}
trainer = SFTTrainer("m", args, train_dataset=load_dataset("a/b"))
{}
trainer.train()
"""


@pytest.mark.parametrize("change", ["args.learning_rate = 1e-3", "setattr(args, 'learning_rate', 1e-3)"])
def test_a_value_that_is_set_before_the_trainer_is_made_counts(tmp_path, change):
    found = converted(tmp_path, CHANGED.format(change, ""))
    assert found.tree["optimizer"]["learning_rate"] == 1e-3 and "learning_rate" not in dict(found.notes)


@pytest.mark.parametrize("key", ["learning_rate", "weight_decay"])  # that is written out, and that is a default
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("args.{} *= 2", ""),
        ("args.{}, x = 1.0, 2", ""),
        ("args.{} = other.x = 1.0", ""),
        ("args.{} = asked()", ""),
        ("if big:\n    args.{} = 1.0", ""),
        ("if big:\n    setattr(args, '{}', 1.0)", ""),
        ("", "trainer.args.{} = 1.0"),
        ("", "args.{} = 1.0"),
        ("", "setattr(trainer.args, '{}', 1.0)"),
    ],
)
def test_a_value_that_is_changed_otherwise_is_named_and_not_taken(tmp_path, before, after, key):
    found = converted(tmp_path, CHANGED.format(before.format(key), after.format(key)))
    assert key not in found.tree["optimizer"]
    assert "no value that is written out" in dict(found.notes)[key] and "(line " in dict(found.notes)[key]


def test_a_value_of_which_the_name_is_not_known_leaves_no_default(tmp_path):
    found = converted(tmp_path, CHANGED.format("for key in more:\n    setattr(args, key, more[key])", ""))
    assert "**setattr(args, key, more[key]) (line 3)" in dict(found.notes)
    assert found.tree["optimizer"] == {"learning_rate": 1e-4}


OF_MODEL = (
    LOADS
    + """judge = AutoModelForCausalLM.from_pretrained("j")
tokenizer = AutoTokenizer.from_pretrained("m")
{}
SFTTrainer(model, SFTConfig("o"), train_dataset=load_dataset("a/b"), processing_class=tokenizer)
"""
)


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("model.requires_grad_(False)", "requires_grad", 4),
        ("model.model.embed_tokens.requires_grad_(False)", "requires_grad", 4),
        ("for p in model.parameters():\n    p.requires_grad = False", "requires_grad", 5),
        ("for p in model.parameters():\n    setattr(p, 'requires_grad', False)", "requires_grad", 5),
        ("judge.requires_grad_(False)", None, 0),
        ("def hook(module, input, output):\n    output.requires_grad_(True)", None, 0),
        ("tokenizer.add_tokens(['<x>'])", "add_tokens", 4),
        ("tokenizer.add_tokens(new_tokens=['<x>'])", "add_tokens", 4),
        ("tokenizer.add_special_tokens({'additional_special_tokens': ['<x>']})", "add_special_tokens", 4),
        ("tokenizer.add_special_tokens(more)", "add_special_tokens", 4),
        ("add_new_tokens(model, tokenizer, new_tokens=['<x>'])", "add_new_tokens", 4),
        ("tokenizer.add_special_tokens({'pad_token': '<pad>'})", None, 0),
    ],
)
def test_weights_and_tokens_that_a_script_changes_are_not_offered(tmp_path, text, key, line):
    found = converted(tmp_path, OF_MODEL.format(text))
    assert [name for name, _ in found.unoffered] == ([key] if key else [])
    for _, why in found.unoffered:
        assert f"line {line}" in why and ("model.train_only" if key == "requires_grad" else "model's folder") in why


def test_places_of_frozen_weights_are_named_once(tmp_path):
    text = "model.requires_grad_(False)\nfor p in model.lm_head.parameters():\n    p.requires_grad = True"
    assert [why[:18] for _, why in converted(tmp_path, OF_MODEL.format(text)).unoffered] == ["set in line 4, 6: "]


def test_a_trainer_in_a_loop_is_said(tmp_path):
    text = "SFTTrainer('m', train_dataset=load_dataset('a/b'))\n"
    assert "one of its runs" in dict(converted(tmp_path, f"for seed in (1, 2):\n    {text}").notes)["SFTTrainer"]
    assert "SFTTrainer" not in dict(converted(tmp_path, f"for seed in (1, 2):\n    pass\n{text}").notes)
