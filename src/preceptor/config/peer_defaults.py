"""What other trainers take where a key is absent, and what their keys and values become in a run file."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from preceptor.config.peer_without import table

Peer = Literal["TRL", "Unsloth", "Axolotl", "LLaMA-Factory", "torchtune"]

OFF: tuple[Any, ...] = (None, False, "", "no", "none", "null", [], {}, 0)
"""Values that say no more than an absent key, but for those of SPEAKS."""
SPEAKS = table("""
shuffle=false shuffle_merged_datasets=false disable_shuffling=true train_sampling_strategy=sequential: the order of the
    file there; here it is always drawn, for each epoch
enable_thinking=false: reasoning is removed from the answers there; here it is trained: take it out of the data
average_tokens_across_devices=false: on each device the mean over its own tokens there; here a step's loss is divided
    by its trained tokens, over all devices
""")
"""Values that change something, though the key otherwise says nothing, or though `false` does for other keys: what."""

TRAINER: Mapping[str, Any] = {  # of transformers' TrainingArguments
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "max_grad_norm": 1.0,
    "seed": 42,
    "logging_steps": 500,
}
ARGUMENTS = {**TRAINER, "gradient_checkpointing": False, "optim": "adamw_torch", "bf16": False}
"""Values of TrainingArguments where a script makes those, and no SFTConfig."""
DEFAULTS: Mapping[Peer, Mapping[str, Any]] = {
    "TRL": {
        **TRAINER,
        "learning_rate": 2e-5,
        "max_length": 1024,
        "gradient_checkpointing": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "logging_steps": 10,
    },
    "Unsloth": {
        **TRAINER,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_8bit",
        "weight_decay": 0.001,
        "warmup_steps": 0.1,
        "seed": 3407,
        "lora_r": 16,
        "lora_alpha": 16,
    },
    "LLaMA-Factory": {
        **TRAINER,
        "finetuning_type": "lora",
        "gradient_checkpointing": True,
        "cutoff_len": 2048,
        "buffer_size": 16384,
        "lora_rank": 8,
        "pissa_iter": 16,
        "bf16": False,
    },
    "Axolotl": {
        **TRAINER,
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "sequence_len": 512,
    },
    "torchtune": {
        **TRAINER,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "max_grad_norm": 0,
        "save_strategy": "epoch",
        "lora_r": 8,
        "lora_alpha": 16,
    },
}
"""Values where the file has no key. A key counts as given where one of its other names (`NAMES`) is."""

NAMES: Mapping[str, str] = table("""
num_epochs epochs: num_train_epochs
micro_batch_size batch_size: per_device_train_batch_size
lr_scheduler: lr_scheduler_type
lr: learning_rate
warmup_ratio: warmup_steps
lora_rank r: lora_r
max_seq_length sequence_len cutoff_len: max_length
gradient_clipping: max_grad_norm
activation_checkpointing: gradient_checkpointing
""")
"""Other names of a key, for defaults."""


Direct = Mapping[str, tuple[str, Callable[[Any], Any]]]


def _by_type(rows: Mapping[Callable[[Any], Any], str]) -> Direct:
    return {theirs: (ours, cast) for cast, text in rows.items() for theirs, ours in table(text).items()}


DIRECT = _by_type(
    {
        str: """
model_name_or_path base_model: model.path
model_revision revision_of_model revision: model.revision
output_dir: out
""",
        bool: "trust_remote_code: model.trust_remote_code",
        int: """
max_length max_seq_length sequence_len cutoff_len: data.max_length
seed: train.seed
save_total_limit: checkpoint.keep
eval_max_new_tokens: eval.max_new_tokens
""",
        float: """
neftune_noise_alpha: train.neftune_alpha
learning_rate lr: optimizer.learning_rate
weight_decay: optimizer.weight_decay
max_grad_norm gradient_clipping: optimizer.max_grad_norm
cosine_min_lr_ratio: optimizer.min_lr_ratio
label_smoothing_factor: loss.label_smoothing
router_aux_loss_coef moe_aux_loss_coef: loss.router_aux_coef
""",
    }
)
OF_ADAPTERS = _by_type(
    {int: "r lora_r lora_rank: adapter.rank", float: "lora_alpha: adapter.alpha\nlora_dropout: adapter.dropout"}
)
"""Their keys whose values need no more than a type: the key here."""

SCHEDULERS = table("""
cosine cosine_with_min_lr get_cosine_schedule_with_warmup: cosine
linear: linear
constant constant_with_warmup: constant
warmup_stable_decay wsd: wsd
""")


def optimizer_name(theirs: str) -> str | None:
    """Our name of their optimizer; None where there is none like it."""
    name = re.sub(r"^(paged_?|ao_|optimi_)", "", theirs.lower().rpartition(".")[2])
    if name.startswith("adamw"):
        return "adamw_8bit" if re.search("[48]bit|fp8", name) else "adamw"
    return name if name in ("muon", "adafactor", "sgd") else None
