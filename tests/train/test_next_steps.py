"""Hand-over to the next steps of post-training: saved models and adapters go through TRL's other trainers."""

from unittest import mock

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import conversations

trl = pytest.importorskip("trl", reason="TRL is a development dependency")

pytestmark = pytest.mark.filterwarnings("default")  # those of TRL are its own
ASK = [{"role": "user", "content": "a user?"}]
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("the user", "the end"))
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


@pytest.fixture(scope="module", params=["full", "adapter"])
def saved(request, tmp_path_factory, base_folder):
    """(how it was trained, the folder of the saved model, its base)."""
    import json

    import yaml
    from rich.console import Console

    from preceptor import config
    from preceptor.train.prepare import prepare
    from preceptor.train.run import execute

    folder = tmp_path_factory.mktemp(request.param)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations(4)))
    tree = {
        "model": {"path": str(base_folder)},
        "data": {"train": [{"path": str(folder / "train.jsonl")}], "chat_template": "chatml", "max_length": 128},
        "train": {"duration": "2 steps", "batch_size": 1},
        "eval": {"every": None},
        "out": str(folder / "run"),
    }
    if request.param == "adapter":
        tree["adapter"] = {"rank": 2}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    with mock.patch("preceptor.train.finish.write_report"):
        execute(prepare(config.load(folder / "run.yaml", [])), Console(quiet=True))
    return request.param, folder / "run/model", base_folder


def loaded(saved):
    """The model to go on with: the whole one, or the base with the adapter, which is trained on."""
    kind, folder, base = saved
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind == "full":
        return AutoModelForCausalLM.from_pretrained(folder), tokenizer
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
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
        peft_config=LoraConfig(r=2, task_type="SEQ_CLS") if saved[0] == "adapter" else None,
    )
    assert moved(trainer, trainer.model)
