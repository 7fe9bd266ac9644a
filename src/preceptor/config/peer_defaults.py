"""What other trainers take where a key is absent, and what their keys and values become in a run file."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

Peer = Literal["TRL", "Unsloth", "Axolotl", "LLaMA-Factory", "torchtune"]

OFF: tuple[Any, ...] = (None, False, "", "no", "none", "null", [], {}, 0)
"""Values that say no more than an absent key."""

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
DEFAULTS: Mapping[Peer, Mapping[str, Any]] = {
    "TRL": {
        **TRAINER,
        "learning_rate": 2e-5,
        "max_length": 1024,
        "gradient_checkpointing": True,
        "lora_r": 16,
        "lora_alpha": 32,
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
    },
}
"""Values where the file has no key. A key counts as given where one of its other names (`NAMES`) is."""

NAMES: Mapping[str, str] = {
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "lr_scheduler": "lr_scheduler_type",
    "lr": "learning_rate",
    "warmup_ratio": "warmup_steps",
    "lora_rank": "lora_r",
    "r": "lora_r",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "gradient_clipping": "max_grad_norm",
}
"""Other names of a key, for defaults."""

DIRECT: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "model_name_or_path": ("model.path", str),
    "base_model": ("model.path", str),
    "model_revision": ("model.revision", str),
    "revision_of_model": ("model.revision", str),
    "revision": ("model.revision", str),
    "trust_remote_code": ("model.trust_remote_code", bool),
    "max_length": ("data.max_length", int),
    "max_seq_length": ("data.max_length", int),
    "sequence_len": ("data.max_length", int),
    "cutoff_len": ("data.max_length", int),
    "output_dir": ("out", str),
    "seed": ("train.seed", int),
    "neftune_noise_alpha": ("train.neftune_alpha", float),
    "learning_rate": ("optimizer.learning_rate", float),
    "lr": ("optimizer.learning_rate", float),
    "weight_decay": ("optimizer.weight_decay", float),
    "max_grad_norm": ("optimizer.max_grad_norm", float),
    "gradient_clipping": ("optimizer.max_grad_norm", float),
    "cosine_min_lr_ratio": ("optimizer.min_lr_ratio", float),
    "label_smoothing_factor": ("loss.label_smoothing", float),
    "router_aux_loss_coef": ("loss.router_aux_coef", float),
    "moe_aux_loss_coef": ("loss.router_aux_coef", float),
    "save_total_limit": ("checkpoint.keep", int),
    "eval_max_new_tokens": ("eval.max_new_tokens", int),
}
OF_ADAPTERS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "r": ("rank", int),
    "lora_r": ("rank", int),
    "lora_rank": ("rank", int),
    "lora_alpha": ("alpha", float),
    "lora_dropout": ("dropout", float),
}
"""Their keys whose values need no more than a type: the key here, or in the section `adapter`."""

SCHEDULERS = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "warmup_stable_decay": "wsd",
    "wsd": "wsd",
    "get_cosine_schedule_with_warmup": "cosine",
}


def optimizer_name(theirs: str) -> str | None:
    """Our name of their optimizer; None where there is none like it."""
    name = theirs.lower().rpartition(".")[2].removeprefix("paged").removeprefix("_")
    if name.startswith("adamw"):
        return None if "4bit" in name else "adamw_8bit" if "8bit" in name else "adamw"
    return name if name in ("muon", "adafactor", "sgd") else None
