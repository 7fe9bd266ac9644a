"""Optimizer, adapter, length, batch and memory of another trainer's file -> those sections of a run file."""

import re
from collections.abc import Mapping
from typing import Any

from preceptor.config.durations import plain
from preceptor.config.peer_defaults import OF_ADAPTERS, OFF, SCHEDULERS, optimizer_name
from preceptor.config.peer_settings import Conversion
from preceptor.errors import short

_MOST_WARMUP = 100  # of Axolotl, where the file says nothing
OF_SCHEDULES = frozenset({"min_lr", "min_lr_rate", "min_lr_ratio", "num_decay_steps", "decay_type"})
"""Keys of `lr_scheduler_kwargs` that are carried over."""
_PATTERN = re.compile(r"[\\*+(\[|^$]")  # of a regular expression, in no name of a layer


def set_training(given: Conversion, packed: bool) -> None:
    """Set duration, batch size, precision and loss."""
    _set_duration(given)
    each = given.value("per_device_train_batch_size", "micro_batch_size", "batch_size")
    accumulated, processes = given.value("gradient_accumulation_steps"), given.value("num_processes")
    if given.peer == "Axolotl" and (total := given.on("batch_size")) is not None:
        each, accumulated = total, 1
    try:
        given.set("train.batch_size", int(each) * int(accumulated or 1) * int(processes or 1))
    except (TypeError, ValueError, OverflowError):
        given.note("batch size", f"{short(each)} times {short(accumulated)} is no number: set train.batch_size")
    else:
        unit = "packed sequences" if packed else "examples, each by itself; as many packed sequences hold more"
        devices = f" on {processes} devices" if processes else "; on several devices there, multiply by their number"
        given.note("batch size", f"{each} x {accumulated} {unit}{devices}")
    if _is_float32(given):
        given.set("train.precision", "float32")
    elif (half := given.on("bf16")) is not None:
        if half is True:
            given.set("train.precision", "bfloat16")
        elif half != "auto":
            given.note("bf16", f"{short(half)}: set train.precision")
    elif given.on("fp16", "float16") is not None:
        given.set("train.precision", "bfloat16")
        given.note("fp16", "float16 is not offered: bfloat16")
    loss = given.value("loss_type")
    if given.on("use_dft_loss") or loss == "dft":
        given.set("loss.type", "dft")
    elif loss not in (None, "nll", "chunked_nll"):
        given.not_offered("loss_type", f"{short(loss)} is not offered: nll or dft")
    if given.settings.keys() & {"router_aux_loss_coef", "moe_aux_loss_coef"}:
        given.used.add("output_router_logits")  # the coefficient says it


def _is_float32(given: Conversion) -> bool:
    """Whether the type that is otherwise chosen by the device is switched off."""
    if given.peer == "torchtune":
        return given.settings.get("dtype") == "fp32"
    if given.peer == "Unsloth" or (given.peer == "LLaMA-Factory" and trains_adapter(given)):  # by the model's type
        return False
    is_off = given.value("bf16") is False and given.on("fp16", "float16", "bfloat16") is None
    is_half = given.tree.get("model", {}).get("dtype") == "bfloat16" or given.settings.get("use_badam")
    return is_off and not is_half


def _set_duration(given: Conversion) -> None:
    steps = given.settings.get("max_steps")
    if isinstance(steps, int) and steps > 0:
        given.set("train.duration", f"{given.value('max_steps')} steps")
        given.used |= {"num_train_epochs", "num_epochs", "epochs"}  # steps come first
        return
    given.takes("max_steps", -1)  # transformers' word for none
    epochs = given.number("num_train_epochs", given.value("num_train_epochs", "num_epochs", "epochs"))
    given.set("train.duration", None if epochs is None else f"{plain(epochs)} epochs")


def set_moments(given: Conversion) -> None:
    """Set activation checkpointing, and when a checkpoint is saved and the model evaluated."""
    checkpointing = given.on("gradient_checkpointing", "activation_checkpointing")
    is_off = given.peer == "LLaMA-Factory" and given.on("disable_gradient_checkpointing")
    if checkpointing is None and not is_off:
        sharding = given.settings.get("fsdp_config")
        named = sharding if isinstance(sharding, Mapping) else {}
        checkpointing = given.defaults.get("gradient_checkpointing") or any(
            value is True for key, value in named.items() if str(key).endswith("activation_checkpointing")
        )
    if checkpointing:
        given.set("memory.activation_checkpointing", "all")
    if checkpointing not in (None, True, False):
        given.note("gradient_checkpointing", f"{short(checkpointing)}: all layers run again, on the device")
    _set_moment(given, "checkpoint.every", "save", 500)
    _set_moment(given, "eval.every", "eval", None)


def _set_moment(given: Conversion, ours: str, kind: str, default_steps: int | None) -> None:
    """`checkpoint.every` or `eval.every` from a strategy and a number of steps, or from so many an epoch."""
    if (per_epoch := given.on(f"{kind}s_per_epoch")) is not None:
        number = given.number(f"{kind}s_per_epoch", per_epoch)
        if number:
            _set_epochs(given, ours, kind, 1 / number)
        return
    strategy = given.value(f"{kind}_strategy", *(["evaluation_strategy"] if kind == "eval" else []))
    steps = given.settings.get(f"{kind}_steps") or (None if given.peer == "Axolotl" else default_steps)
    if kind == "eval" and strategy == "steps" and not steps:
        steps = _logging_steps(given)
    if strategy == "epoch":
        _set_epochs(given, ours, kind, 1)
    elif strategy in (None, "steps") and steps is not None:
        given.used.add(f"{kind}_steps")
        number = given.number(f"{kind}_steps", steps)
        if number is not None:
            given.set(ours, f"{plain(100 * number)} %" if number < 1 else f"{int(number)} steps")
    elif strategy not in (None, "no", "steps", False):
        given.note(f"{kind}_strategy", f"{short(strategy)}: set {ours}")


def _set_epochs(given: Conversion, ours: str, kind: str, epochs: float) -> None:
    if given.tree.get("data", {}).get("streaming"):
        given.note(kind, f"every {epochs:g} epochs there; a stream has none: set {ours} in steps or minutes")
    else:
        given.set(ours, f"{plain(round(epochs, 4))} epochs")


def _logging_steps(given: Conversion) -> Any:
    """What transformers takes for eval_steps that are not given; Axolotl's default depends on the number of steps."""
    steps = given.settings.get("logging_steps")
    steps = steps if given.peer == "Axolotl" else steps or given.defaults.get("logging_steps")
    why = "eval_steps is absent: as often as logging_steps there" if steps else "without eval_steps: set eval.every"
    given.note("eval_strategy", why)
    return steps


def set_optimizer(given: Conversion) -> None:
    """Set the section `optimizer`, but for keys whose values need no more than a type."""
    scheduled = given.value("lr_scheduler_type", "lr_scheduler")
    name = str(scheduled).rpartition(".")[2]
    scheduler = SCHEDULERS.get(name)
    given.set("optimizer.lr_scheduler", scheduler or "cosine")
    _set_decay(given, scheduler or "cosine")
    if scheduler is None:
        offered = ", ".join(sorted({*SCHEDULERS} - {"get_cosine_schedule_with_warmup"}))
        share = given.tree["optimizer"].get("min_lr_ratio", given.settings.get("cosine_min_lr_ratio")) or 0
        runs = f"; it is cosine here, down to {short(share)}{' of the rate' if share else ''}"
        given.not_offered("lr_scheduler_type", f"{short(scheduled)} is not offered: {offered}", runs)
    given.set("optimizer.warmup", _warmup(given, name))
    named = "muon" if given.on("use_muon") else given.value("optim", "optimizer")
    rule = "adamw" if named is None else optimizer_name(str(named))
    key = "optim" if "optim" in given.settings else "optimizer"
    if rule == "adamw_8bit" and "4bit" in str(named).lower():
        given.note(key, f"{short(named)}: its states have 4 bits there, 8 bits here: adamw_8bit")
    if rule is None:
        why = f"{short(named)} is not offered. Choose adamw, adamw_8bit, muon, adafactor or sgd"
        given.not_offered(key, why, "; it is adamw here, which needs another learning rate")
    given.set("optimizer.name", None if rule == "adamw" else rule)
    given.takes("adam_epsilon", 1e-8)  # as here
    betas = [given.number(key, given.value(key)) for key in ("adam_beta1", "adam_beta2")]
    given.set("optimizer.betas", None if None in betas or rule in ("adafactor", "sgd") else betas)
    given.set("optimizer.momentum", 0.0 if rule == "sgd" else None)


def _set_decay(given: Conversion, scheduler: str) -> None:
    """How the rate falls at the end."""
    kwargs = given.settings.get("lr_scheduler_kwargs")
    arguments: Mapping[str, Any] = kwargs if isinstance(kwargs, Mapping) else {}
    ratio = arguments.get("min_lr_rate", arguments.get("min_lr_ratio", 0.0))
    if (lowest := arguments.get("min_lr")) is not None:
        lowest = given.number("lr_scheduler_kwargs", lowest)
        peak = given.number("learning_rate", given.value("learning_rate", "lr"))
        ratio = lowest / peak if peak and lowest is not None else 0.0
    if scheduler == "constant":
        if given.settings.pop("cosine_min_lr_ratio", None) is not None:
            given.note("cosine_min_lr_ratio", "of a constant rate there is no last share: nothing to set")
    elif given.settings.get("cosine_min_lr_ratio") is None and scheduler in ("cosine", "linear", "wsd"):
        given.set("optimizer.min_lr_ratio", given.number("lr_scheduler_kwargs", ratio))
    if scheduler == "wsd":
        if (steps := arguments.get("num_decay_steps")) is not None:
            given.set("optimizer.decay", f"{steps} steps")
        if (form := arguments.get("decay_type", "cosine")) != "linear":
            given.note("lr_scheduler_type", f"at the end the rate falls by {form} there, linearly here")
    if arguments and arguments.keys() <= OF_SCHEDULES:
        given.used.add("lr_scheduler_kwargs")


def _warmup(given: Conversion, scheduler: str) -> str | None:
    """Steps, where they are not 0, come before a share. `constant` has none there, whatever is asked for."""
    keys = [key for key in ("warmup_steps", "warmup_ratio") if given.settings.get(key) not in OFF]
    given.used |= {"warmup_steps", "warmup_ratio"}
    if scheduler == "constant":
        for key in keys:
            given.note(key, "`constant` has no warm-up there (`constant_with_warmup` has); so here")
        return "0 steps"
    key = keys[0] if keys else "warmup_steps"
    warmup = given.number(key, given.value(key) or 0)
    if given.peer == "Axolotl" and key in given.defaults and warmup:
        if isinstance(steps := given.settings.get("max_steps"), int) and steps > 0:
            return f"{int(min(warmup * min(steps, 10**9), _MOST_WARMUP))} steps"
        given.note("warmup_steps", f"absent: at most {_MOST_WARMUP} steps there; set optimizer.warmup")
    if warmup is None:
        return None
    is_share = key == "warmup_ratio" or 0 < warmup < 1
    return f"{plain(100 * warmup)} %" if is_share else f"{int(warmup)} steps"


def trains_adapter(given: Conversion) -> bool:
    for key, values in (("finetuning_type", ("lora",)), ("adapter", ("lora", "qlora"))):
        if given.settings.get(key, given.defaults.get(key)) in values:
            given.used.add(key)
            return True
    return given.on("use_peft", "peft_type") is not None


def set_adapter(given: Conversion) -> None:
    """Set the section `adapter`; none where all weights are trained."""
    if not trains_adapter(given):
        kind = given.on("finetuning_type", "adapter")
        if kind == "freeze":
            given.not_offered(
                "adapter",
                "freeze: name what is trained in model.train_only",
                "; without it all weights are trained here",
            )
        elif kind not in (None, "full"):
            why = f"{short(kind)} is not offered: LoRA, or all weights"
            given.not_offered("adapter", why, "; all weights are trained here, which needs another learning rate")
        for key in [key for key in given.settings if key.startswith("lora_")]:
            given.note(key, "no adapter is asked for, so all weights are trained: nothing to set")
            given.used.add(key)
        return
    given.set("adapter.kind", "lora" if given.on("use_dora", "peft_use_dora") is None else "dora")
    given.carry(OF_ADAPTERS)
    if given.peer == "LLaMA-Factory" and (rank := given.tree["adapter"].get("rank")) is not None:
        given.set("adapter.alpha", 2.0 * rank)
    given.set("adapter.use_rslora", True if given.on("use_rslora", "peft_use_rslora") else None)
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = given.on(key)
        if patterns is not None and (patterns := given.cast(key, patterns, dict)) is not None:
            given.set(f"adapter.{key}", patterns)
            given.note(key, "a regular expression there, a pattern of names here")
    for key in ("modules_to_save", "lora_modules_to_save", "additional_target"):
        if "modules_to_save" not in given.tree["adapter"] and (whole := given.on(key)) is not None:
            names = whole.split(",") if isinstance(whole, str) else whole
            given.set("adapter.modules_to_save", given.cast(key, names, list))
    given.set("adapter.init", _first_values(given))
    if (ratio := given.on("loraplus_lr_ratio")) is not None:
        given.set("adapter.lr_ratio", given.number("loraplus_lr_ratio", ratio))
    _set_targets(given)


def _set_targets(given: Conversion) -> None:
    targets = given.on("lora_target_modules", "target_modules", "lora_target")
    if given.peer == "Axolotl" and given.on("lora_target_linear"):  # beside names: those as well
        targets = "all-linear"
    if isinstance(targets, str) and _PATTERN.search(targets):
        why = f"{short(targets)} is a regular expression; absent here: all linear layers of the decoder"
        given.note("lora_target_modules", f"{why}; adapter.target_modules takes names")
    elif isinstance(targets, str) and targets not in ("all", "all-linear"):
        targets = [name.strip() for name in targets.split(",")]
    if isinstance(targets, list):
        given.set("adapter.target_modules", list(dict.fromkeys(map(str, targets))))
    elif targets is None and given.peer in ("TRL", "Unsloth", "Axolotl"):
        given.note("lora_target_modules", "absent: peft's choice for the model there; here all linear layers")


def _first_values(given: Conversion) -> str | None:
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
