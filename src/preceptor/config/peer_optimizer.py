"""Optimizer and learning rate of another trainer -> the section `optimizer` of a run file."""

from collections.abc import Mapping
from typing import Any

from preceptor.config.durations import plain
from preceptor.config.peer_defaults import OFF, SCHEDULERS, optimizer_name
from preceptor.config.peer_settings import PeerSettings
from preceptor.errors import short

_MOST_WARMUP = 100  # of Axolotl, where the file says nothing


def optimizer_section(given: PeerSettings) -> dict[str, Any]:
    """Without keys whose values need no more than a type."""
    name = given.value("lr_scheduler_type", "lr_scheduler")
    scheduler = SCHEDULERS.get(str(name).rpartition(".")[2])
    if scheduler is None:
        offered = ", ".join(sorted({*SCHEDULERS} - {"get_cosine_schedule_with_warmup"}))
        given.not_offered("lr_scheduler_type", f"{short(name)} is not offered: {offered}")
    found = {"lr_scheduler": scheduler, **_decay(given, scheduler)}
    found["warmup"] = _warmup(given, str(name).rpartition(".")[2])
    return {key: value for key, value in {**found, **_kind(given)}.items() if value is not None}


def _warmup(given: PeerSettings, scheduler: str) -> str | None:
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
            return f"{min(int(warmup * steps), _MOST_WARMUP)} steps"
        given.note("warmup_steps", f"absent: at most {_MOST_WARMUP} steps there; set optimizer.warmup")
    if warmup is None:
        return None
    is_share = key == "warmup_ratio" or 0 < warmup < 1
    return f"{plain(100 * warmup)} %" if is_share else f"{int(warmup)} steps"


def _decay(given: PeerSettings, scheduler: str | None) -> dict[str, Any]:
    """How the rate falls at the end."""
    kwargs = given.settings.get("lr_scheduler_kwargs")
    arguments: Mapping[str, Any] = kwargs if isinstance(kwargs, Mapping) else {}
    ratio = arguments.get("min_lr_rate", arguments.get("min_lr_ratio", 0.0))
    found: dict[str, Any] = {}
    if given.settings.get("cosine_min_lr_ratio") is None and scheduler in ("cosine", "linear", "wsd"):
        found["min_lr_ratio"] = given.number("lr_scheduler_kwargs", ratio)
    if scheduler == "wsd":
        if (steps := arguments.get("num_decay_steps")) is not None:
            found["decay"] = f"{steps} steps"
        if (form := arguments.get("decay_type", "cosine")) != "linear":
            given.note("lr_scheduler_type", f"at the end the rate falls by {form} there, linearly here")
    if arguments.keys() <= {"min_lr_rate", "min_lr_ratio", "num_decay_steps", "decay_type"} and arguments:
        given.used.add("lr_scheduler_kwargs")
    return found


def _kind(given: PeerSettings) -> dict[str, Any]:
    named = "muon" if given.on("use_muon") else given.value("optim", "optimizer")
    name = "adamw" if named is None else optimizer_name(str(named))
    if name is None:
        why = f"{short(named)} is not offered. Choose adamw, adamw_8bit, muon, adafactor or sgd"
        given.note("optimizer", f"{why}; it is adamw here, which needs another learning rate")
        given.unoffered.append(("optim", why))
    betas = [given.number(key, given.value(key)) for key in ("adam_beta1", "adam_beta2")]
    return {
        "name": name if name != "adamw" else None,
        "betas": None if None in betas or name in ("adafactor", "sgd") else betas,
        "momentum": 0.0 if name == "sgd" else None,
    }
