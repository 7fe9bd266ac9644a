"""The adapter of another trainer's file -> the section `adapter` of a run file."""

import re
from typing import Any

from preceptor.config.peer_defaults import OF_ADAPTERS
from preceptor.config.peer_settings import PeerSettings
from preceptor.errors import short

_PATTERN = re.compile(r"[\\*+(\[|^$]")  # of a regular expression, in no name of a layer


def trains_adapter(given: PeerSettings) -> bool:
    for key, values in (("finetuning_type", ("lora",)), ("adapter", ("lora", "qlora"))):
        if given.settings.get(key, given.defaults.get(key)) in values:
            given.used.add(key)
            return True
    return given.on("use_peft", "peft_type") is not None


def adapter_section(given: PeerSettings) -> dict[str, Any]:
    """{} where all weights are trained."""
    if not trains_adapter(given):
        kind = given.on("finetuning_type", "adapter")
        if kind == "freeze":
            given.not_offered("adapter", "freeze: name what is trained in model.train_only")
        elif kind not in (None, "full"):
            given.not_offered("adapter", f"{short(kind)} is not offered: LoRA, or all weights")
        for key in [key for key in given.settings if key.startswith("lora_")]:
            given.note(key, "no adapter is asked for, so all weights are trained: nothing to set")
            given.used.add(key)
        return {}
    section: dict[str, Any] = {}
    for key, (name, cast) in OF_ADAPTERS.items():
        if (value := given.value(key)) is not None:
            section.setdefault(name, given.cast(key, value, cast))
    section |= _kind_of_adapter(given)
    targets = given.on("lora_target_modules", "target_modules", "lora_target")
    if given.peer == "Axolotl" and given.on("lora_target_linear"):  # beside names: those as well
        targets = "all-linear"
    if isinstance(targets, str) and _PATTERN.search(targets):
        why = f"{short(targets)} is a regular expression; absent here: all linear layers of the decoder"
        given.note("lora_target_modules", f"{why}; adapter.target_modules takes names")
    elif isinstance(targets, str) and targets not in ("all", "all-linear"):
        targets = [name.strip() for name in targets.split(",")]
    if isinstance(targets, list):
        section["target_modules"] = list(dict.fromkeys(map(str, targets)))
    elif targets is None and given.peer in ("TRL", "Unsloth", "Axolotl"):
        given.note("lora_target_modules", "absent: peft's choice for the model there; here all linear layers")
    dora = given.on("use_dora", "peft_use_dora") is not None
    return {"kind": "dora" if dora else "lora"} | {key: value for key, value in section.items() if value is not None}


def _kind_of_adapter(given: PeerSettings) -> dict[str, Any]:
    found: dict[str, Any] = {"use_rslora": True if given.on("use_rslora", "peft_use_rslora") else None}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = given.on(key)
        found[key] = None if patterns is None else given.cast(key, patterns, dict)
        if found[key] is not None:
            given.note(key, "a regular expression there, a pattern of names here")
    for key in ("modules_to_save", "lora_modules_to_save", "additional_target"):
        if found.get("modules_to_save") is None and (whole := given.on(key)) is not None:
            names = whole.split(",") if isinstance(whole, str) else whole
            found["modules_to_save"] = given.cast(key, names, list)
    found["init"] = _first_values(given)
    if (ratio := given.on("loraplus_lr_ratio")) is not None:
        found["lr_ratio"] = given.number("loraplus_lr_ratio", ratio)
    return found


def _first_values(given: PeerSettings) -> str | None:
    first = given.on("init_lora_weights", "peft_init_lora_weights")
    if given.on("pissa_init"):
        steps = given.cast("pissa_iter", given.value("pissa_iter"), int)
        return "pissa" if steps == -1 else "pissa_fast"
    name = str(first)
    if name in ("pissa", "gaussian"):
        return name
    if name.startswith("pissa_niter"):
        return "pissa_fast"
    if first not in (None, True):
        given.not_offered("init_lora_weights", f"{short(first)} is not offered: kaiming, gaussian or pissa")
    return None
