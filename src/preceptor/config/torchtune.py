"""A torchtune config as the flat settings that convert.py takes."""

import re
from collections.abc import Mapping
from typing import Any

from preceptor.config.peer_defaults import optimizer_name
from preceptor.config.peer_settings import PeerFile
from preceptor.config.peer_without import OF_IMAGES, table
from preceptor.config.python_source import public
from preceptor.errors import short

_DEPTH, _LONGEST = 5, 1000  # of `${key}` within the value of another key
_MODULES = {"output_proj": "o_proj"}
_OF_MLP = ["gate_proj", "up_proj", "down_proj"]
_DATA = {"alpaca_dataset": "tatsu-lab/alpaca", "alpaca_cleaned_dataset": "yahma/alpaca-cleaned"}
# Of single sections: handled below, or about nothing that trains.
_READ = "model tokenizer checkpointer dataset dataset_val optimizer lr_scheduler loss device name".split()  # noqa: SIM905
_OF_NO_EFFECT = ("_component_", "fused", "foreach", "maximize", "capturable")
_SECTIONS = ("model", "tokenizer", "checkpointer", "optimizer", "lr_scheduler")
# Of torch's optimizers, where a config says nothing: learning rate and weight decay.
_OPTIMIZERS = {"adamw": (1e-3, 0.01), "adafactor": (1e-2, 0.0), "sgd": (1e-3, 0.0), "muon": (1e-3, 0.1)}
_TRACKERS = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard"}
_SETTINGS = table("""
epochs: num_train_epochs
batch_size: per_device_train_batch_size
enable_activation_checkpointing: gradient_checkpointing
enable_activation_offloading: activation_offloading
compile: torch_compile
run_val_every_n_steps: eval_steps
save_every_n_steps: save_steps
clip_grad_norm: max_grad_norm
""")


def flattened(file: PeerFile) -> PeerFile:
    """Sections become the keys of other trainers; `${key}` is replaced by the value of that key."""
    tree: dict[str, Any] = _filled(file.settings, file.settings)
    tree = {key: value for key, value in tree.items() if key not in _SECTIONS or isinstance(value, Mapping)}
    found = PeerFile(file.peer, {}, list(file.unread))
    for key, value in tree.items():
        if key not in _READ:
            own = value if not isinstance(value, Mapping) else _name(value) or value
            found.settings[_SETTINGS.get(key, key)] = own
    if (most := found.settings.pop("max_steps_per_epoch", None)) is not None:
        found.unread.append(f"max_steps_per_epoch: at most {short(most)} steps an epoch there; set train.duration")
    if (tracker := _TRACKERS.get(str(found.settings.get("metric_logger")))) is not None:
        found.settings["report_to"] = tracker
    if tree.get("device") == "cpu":
        found.settings["use_cpu"] = True
    if "save_steps" in found.settings:
        found.settings["save_strategy"] = "steps"
    _model(tree, found)
    _data(tree, found)
    _optimizer(tree, found)
    return found


def _filled(value: Any, root: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(inner, root) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, root) for inner in value]
    if isinstance(value, str):
        for _ in range(_DEPTH):
            if len(value) > _LONGEST:
                break
            value = re.sub(r"\$\{(\w+)\}", lambda match: str(root.get(match[1], match[0])), value)
    return value


def _name(section: Mapping[str, Any]) -> str | None:
    """The last part of a section's component."""
    component = section.get("_component_")
    return None if component is None else str(component).rpartition(".")[2]


def _model(tree: Mapping[str, Any], found: PeerFile) -> None:
    model, checkpointer = dict(tree.get("model") or {}), tree.get("checkpointer") or {}
    name = _name(model) or ""
    if "keep_last_n_checkpoints" in checkpointer:
        found.settings["save_total_limit"] = checkpointer["keep_last_n_checkpoints"]
    if "checkpoint_dir" in checkpointer:
        found.settings["model_name_or_path"] = str(checkpointer["checkpoint_dir"]).rstrip("/")
    if name.startswith(("lora", "qlora")):
        found.settings["use_peft"] = True
        adapter = ("lora_rank", "lora_alpha", "lora_dropout", "use_dora")
        found.settings |= {key: model.pop(key) for key in adapter if key in model}
        named = model.pop("lora_attn_modules", None)
        targets = [_MODULES.get(str(each), str(each)) for each in named] if isinstance(named, list) else []
        targets += _OF_MLP if model.pop("apply_lora_to_mlp", False) else []
        if targets:
            found.settings["target_modules"] = targets
        else:
            found.unread.append("lora_attn_modules: names no layer; here all linear layers get an adapter")
        if model.pop("apply_lora_to_output", False):
            found.unread.append("apply_lora_to_output: the output head gets no adapter here")
        if model.pop("quantize_base", False) or name.startswith("qlora"):
            found.settings["load_in_4bit"] = True
    if "vision" in name:
        found.unread.append(f"model: {name}: {OF_IMAGES}")
        if model.pop("decoder_trainable", None) == "frozen":
            found.unread.append("model.decoder_trainable: frozen there; here it is all that is trained")
        towers = ("image_size", "encoder_trainable", "fusion_trainable")
        model = {key: value for key, value in model.items() if key not in towers}
    _name_rest("model", model, found)


def _optimizer(tree: Mapping[str, Any], found: PeerFile) -> None:
    optimizer, scheduler = dict(tree.get("optimizer") or {}), dict(tree.get("lr_scheduler") or {})
    if (name := _name(optimizer)) is not None:
        found.settings["optimizer"] = name
        rate, decay = _OPTIMIZERS.get(optimizer_name(name) or "", _OPTIMIZERS["adamw"])
        found.defaults = {"learning_rate": rate, "weight_decay": decay}
    found.settings |= {key: optimizer.pop(key) for key in ("lr", "weight_decay") if key in optimizer}
    betas = optimizer.get("betas")
    if isinstance(betas, list) and len(betas) == 2:
        found.settings |= {"adam_beta1": betas[0], "adam_beta2": betas[1]}
        del optimizer["betas"]
    _name_rest("optimizer", optimizer, found)
    if (name := _name(scheduler)) is not None:
        found.settings["lr_scheduler"] = name
        found.settings["warmup_steps"] = scheduler.pop("num_warmup_steps", 0)
    _name_rest("lr_scheduler", scheduler, found)


def _name_rest(section: str, values: Mapping[str, Any], found: PeerFile) -> None:
    """Keys that nothing has read, but those that change nothing."""
    for key, value in values.items():
        if key not in _OF_NO_EFFECT and value not in (None, False):
            found.unread.append(f"{section}.{key}: {public(key, value)}: not known here; look whether it matters")


def _data(tree: Mapping[str, Any], found: PeerFile) -> None:
    tokenizer = tree.get("tokenizer") or {}
    if length := tokenizer.get("max_seq_len"):
        found.settings["max_length"] = length
    if tokenizer.get("prompt_template"):
        found.unread.append("tokenizer.prompt_template: the chat template writes the prompt here: data.chat_template")
    for key, section in (("train_dataset", "dataset"), ("eval_dataset", "dataset_val")):
        given = tree.get(section)
        each = given if isinstance(given, list) else [given]
        if key == "eval_dataset" and given and not tree.get("run_val_every_n_steps"):
            found.unread.append("dataset_val: not evaluated there without run_val_every_n_steps: nothing to set")
            return
        named = [_source(dict(one), found, key == "train_dataset") for one in each if isinstance(one, Mapping)]
        entries = [entry for entry in named if entry is not None]
        prompts = [entry.pop("train_on_input") for entry in entries]
        if entries:
            found.settings[key] = entries
        if key == "train_dataset" and any(prompts):
            if all(prompts):
                found.settings["train_on_inputs"] = True
            else:
                also = ", ".join(short(entry["path"]) for entry, own in zip(entries, prompts, strict=True) if own)
                found.unread.append(f"train_on_input: of {also} alone; here data.train_on holds for every data set")


def _source(data: dict[str, Any], found: PeerFile, is_trained: bool) -> dict[str, Any] | None:
    name = _name(data)
    data.pop("_component_", None)
    if data.pop("packed", False) and is_trained:
        found.settings["packing"] = True
    prompt = bool(data.pop("train_on_input", name in _DATA))  # its Alpaca data sets do unless they are told not to
    source = data.pop("source", None) or _DATA.get(str(name))
    files = data.get("data_files")
    if source is None and files is None:
        found.unread.append(f"dataset: {name}: which data that is, is part of torchtune: name its file or Hub id")
        return None
    entry = {
        "path": source,
        "split": data.pop("split", None),
        "name": data.pop("name", None),
        "train_on_input": prompt,
    }
    if "column" in data:  # of texts
        entry |= {"type": "completion", "text_column": data.pop("column")}
    if files is not None:
        entry["data_files"] = data.pop("data_files")
    if "conversation_column" in data:
        entry["field_messages"] = data.pop("conversation_column")
    data.pop("conversation_style", None)
    if name in _DATA:
        found.unread.append(f"dataset: {name} writes Alpaca's own prompt; here it becomes a conversation")
    _name_rest("dataset", data, found)
    return entry
