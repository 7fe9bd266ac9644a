"""Hand-over to the next steps of post-training: saved models and adapters go through TRL's other trainers."""

from unittest import mock

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import conversations

trl = pytest.importorskip("trl", reason="TRL is a development dependency")

pytestmark = pytest.mark.filterwarnings("default")  # those of TRL are its own
ASK = [{"role": "user", "content": "a user?"}]
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("the user", "the end"))
NO_NEW_TOKENS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}"
)
SETTINGS = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module", params=["full", "adapter", "adapter, new tokens"])
def saved(request, tmp_path_factory, base_folder):
    """(how it was trained, the folder of the saved model, its base). ChatML's tokens are new to the base."""
    import json

    import yaml
    from rich.console import Console

    from preceptor import config
    from preceptor.train.prepare import prepare
    from runs import execute

    folder = tmp_path_factory.mktemp("saved")
    (folder / "plain.jinja").write_text(NO_NEW_TOKENS)
    template = str(folder / "plain.jinja") if request.param == "adapter" else "chatml"
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations(4)))
    tree = {
        "model": {"path": str(base_folder)},
        "data": {"train": [{"path": str(folder / "train.jsonl")}], "chat_template": template, "max_length": 128},
        "train": {"duration": "2 steps", "batch_size": 1},
        "eval": {"every": None},
        "out": str(folder / "run"),
    }
    if request.param != "full":
        tree["adapter"] = {"rank": 2}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    with mock.patch("preceptor.train.finish.write_report"):
        execute(prepare(config.load(folder / "run.yaml", [])), Console(quiet=True))
    return request.param, folder / "run/model", base_folder


def loaded(saved):
    """The model to go on with: the whole one, or the base with the adapter, which is trained on.

    TRL reads the head's weight and bias by itself, which peft's trained rows of new tokens do not have: such an adapter
    is handed on merged, with a new one on top.
    """
    kind, folder, base = saved
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind == "full":
        return AutoModelForCausalLM.from_pretrained(folder), tokenizer
    if kind == "adapter, new tokens":
        merged = AutoModelForCausalLM.from_pretrained(folder)
        return get_peft_model(merged, LoraConfig(r=2, target_modules="all-linear")), tokenizer
    model = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True), tokenizer


def moved(trainer, model):
    """Whether one step changes what is trained."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(model.named_parameters())
    return bool(before) and any(not torch.equal(after[name], p) for name, p in before.items())


def test_dpo(saved, tmp_path):
    model, tokenizer = loaded(saved)
    data = Dataset.from_list([{"prompt": ASK, "chosen": GOOD, "rejected": BAD}] * 2)
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=data,
        processing_class=tokenizer,
    )
    assert moved(trainer, model)
    (prompt,) = {tuple(row["prompt_ids"]) for row in trainer.train_dataset}
    rendered = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False)
    assert list(prompt) == list(rendered)


def test_grpo(saved, tmp_path):
    model, tokenizer = loaded(saved)
    settings = {**SETTINGS, "num_generations": 2, "max_completion_length": 4, "beta": 0.0}
    lengths = iter(range(100))
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(next(lengths)) for _ in completions],
        args=trl.GRPOConfig(output_dir=str(tmp_path), **settings),
        train_dataset=Dataset.from_list([{"prompt": ASK}] * 2),
        processing_class=tokenizer,
    )
    assert moved(trainer, model)


def test_a_reward_model(saved, tmp_path):
    """From the merged model; its head is new."""
    _, folder, _ = saved
    data = Dataset.from_list([{"chosen": [*ASK, *GOOD], "rejected": [*ASK, *BAD]}] * 2)
    trainer = trl.RewardTrainer(
        model=str(folder),
        args=trl.RewardConfig(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=2, task_type="SEQ_CLS") if saved[0] != "full" else None,
    )
    assert moved(trainer, trainer.model)
