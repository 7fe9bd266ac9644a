"""An Unsloth script as the flat settings that convert.py takes: FastLanguageModel's arguments by TRL's names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from preceptor.config.peer_settings import PeerFile
from preceptor.errors import short

_TABLES = ("embed_tokens", "lm_head")  # named among the layers there, and trained whole
_QUANTIZED_NAMES = ("-unsloth-bnb-4bit", "-bnb-4bit")
_CHOICES = ("finetune_language_layers", "finetune_attention_modules", "finetune_mlp_modules")
_LOADED_AS = {"load_in_4bit": True, "load_in_8bit": False}


def flattened(file: PeerFile) -> PeerFile:
    """Its own defaults are written out: 4 bits, 2,048 tokens, checkpointing, all linear layers."""
    found = replace(file, settings=dict(file.settings), unread=list(file.unread))
    loaded: dict[str, Any] = dict(found.settings.pop("from_pretrained", {}))
    adapted: Mapping[str, Any] | None = found.settings.pop("get_peft_model", None)
    length = loaded.pop("max_seq_length", None) or 2048
    if not isinstance(length, int):
        found.unread.append(f"max_seq_length: {short(length)} is no number of tokens: set data.max_length")
        length = 2048
    _model(loaded, adapted is not None or bool(found.settings.get("use_peft")), found)
    _length(length, found)
    if adapted is not None:
        _adapter(adapted, found)
    if "train_on_responses_only" in found.settings:
        found.settings["assistant_only_loss"] = True
    return found


def _model(loaded: dict[str, Any], is_adapted: bool, found: PeerFile) -> None:
    name = str(loaded.pop("model_name", None) or "")
    ending = next((ending for ending in _QUANTIZED_NAMES if name.lower().endswith(ending)), "")
    if ending:
        name = name[: -len(ending)]
        found.unread.append(
            f"model_name: the files of {name}{ending} are quantized; model.quantization quantizes those of {name}, of "
            "which they were made, when they are loaded: nothing to set"
        )
    if name:
        found.settings["model_name_or_path"] = name
    whole, wide = loaded.pop("full_finetuning", False), loaded.pop("float32_mixed_precision", False)
    otherwise = [whole, loaded.pop("load_in_16bit", False), loaded.get("load_in_8bit")]
    otherwise += [sentence.startswith("load_in_4bit:") for sentence in found.unread]
    quantized = {key: loaded.pop(key, default and not any(otherwise)) for key, default in _LOADED_AS.items()}
    found.settings |= {key: True for key, value in quantized.items() if value and is_adapted}
    if loaded.pop("dtype", None) is None and (is_adapted or (whole and not wide)):  # detected there
        loaded["dtype"] = "bfloat16"
    found.settings["gradient_checkpointing"] = bool(loaded.pop("use_gradient_checkpointing", True))
    for key, value in loaded.items():
        found.settings.setdefault(key, value)


def _length(of_model: int, found: PeerFile) -> None:
    """The model's length counts; a shorter one of SFTConfig instead, by its older name."""
    asked = found.settings.pop("max_seq_length", None)
    found.settings.pop("max_length", None)
    found.settings["max_length"] = min(of_model, asked) if isinstance(asked, int) and asked > 0 else of_model


def _adapter(adapted: Mapping[str, Any], found: PeerFile) -> None:
    given = {**adapted}
    layers = given.pop("target_modules", None)
    given.pop("finetune_vision_layers", None)  # other towers are not trained here either
    for key in _CHOICES:
        if given.pop(key, True) is False:
            found.unread.append(f"{key}: False: name the layers to adapt in adapter.target_modules")
    if isinstance(layers, list):
        if whole := [name for name in layers if name in _TABLES]:
            given["modules_to_save"] = [*(given.get("modules_to_save") or []), *whole]
        layers = [name for name in layers if name not in _TABLES]
    found.settings["gradient_checkpointing"] = bool(given.pop("use_gradient_checkpointing", True))
    given.pop("max_seq_length", None)  # of the model, whose length is known
    found.settings |= {"use_peft": True, "target_modules": layers or "all-linear"}
    found.settings |= given
