"""Rank and alpha of each adapted layer, by the patterns of a run file, and as peft reads them."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel

from preceptor.errors import ModelError
from preceptor.model.adapters.pissa import lora_layers
from preceptor.model.options import LoraOptions
from preceptor.model.parts import matches, require_matches

ALL_LINEAR = "all-linear"
_ROUTER = "gate.weight"  # as peft names it


def set_patterns(config: LoraConfig, model: PreTrainedModel, options: LoraOptions, layers: Collection[str]) -> None:
    """Set rank and alpha: in all, and of layers that a pattern names or that have twice the rank, by their whole names.

    layers: the linear ones within reach. An adapter that keeps its first values has twice the rank, and as
    with those the alpha that leaves the scale as it is. Raises ModelError for a pattern that fits no name.
    """
    times, grown = growth(options)
    config.r, config.lora_alpha = config.r * times, config.lora_alpha * grown  # type: ignore[assignment]
    doubled = _rewrite_targets(config, model, layers)
    names = _adapted_names(config, model, layers)
    found: list[dict[str, Any]] = []
    for key, own, factor in (
        ("rank_pattern", options.rank_pattern, times),
        ("alpha_pattern", options.alpha_pattern, grown),
    ):
        patterns: Mapping[str, float] = dict(own)  # type: ignore[arg-type]
        require_matches(patterns, names, f"adapter.{key}", _fits, "adapted layer")
        chosen = {name: next((p for p in patterns if _fits(p, name)), None) for name in names}
        found.append({name: patterns[p] * factor for name, p in chosen.items() if p is not None})
    ranks, alphas = found
    for name in (name for name in doubled if name not in ranks):
        ranks[name] = 2 * config.r
        alphas.setdefault(name, config.lora_alpha * (math.sqrt(2) if options.rslora else 2))
    config.rank_pattern, config.alpha_pattern = ranks, alphas


def _rewrite_targets(config: LoraConfig, model: PreTrainedModel, layers: Collection[str]) -> list[str]:
    """Let peft rewrite its targets for experts that were linear layers in transformers 4, as it does at every load.
    Not for their router, which was one too and now returns more than scores.

    Returns the names of the tensors that hold two such layers, which get twice the rank. peft names them by a pattern
    that also fits what has a pattern of its own, and in the saved file is read before it; so it is taken out again.
    """
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError as error:
        raise ModelError(f"adapter: {error}") from error
    targets = config.target_parameters or ()
    if _ROUTER in targets and not any(f".{name}".endswith(".gate") for name in layers):
        config.target_parameters = sorted({*targets} - {_ROUTER})
    fused, config.rank_pattern, config.alpha_pattern = list(config.rank_pattern), {}, {}
    return [name for name in expert_parameters(model) if get_pattern_key(fused, name) in fused]


def _adapted_names(config: LoraConfig, model: PreTrainedModel, layers: Collection[str]) -> list[str]:
    """Names of the linear layers, and tensors of experts, that the targets of `config` name."""
    targets, parameters = config.target_modules, config.target_parameters or ()
    chosen = [name for name in layers if targets == ALL_LINEAR or name.rpartition(".")[2] in (targets or ())]
    return sorted(chosen + [n for n in expert_parameters(model) if any(f".{n}".endswith(f".{p}") for p in parameters)])


def expert_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the tensors that hold a matrix of each expert; not of experts that text does not go to (ERNIE VL)."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and name.split(".")[-2] == "experts" and "vision" not in name
    ]


def growth(options: LoraOptions) -> tuple[int, float]:
    """By what rank and alpha are multiplied for peft."""
    times = 2 if options.keeps_first_values else 1
    return times, math.sqrt(times) if options.rslora else times


def _fits(pattern: str, name: str) -> bool:
    """Whether a pattern is the name of a layer, its end, or that of a module around it."""
    return matches(pattern, name) or matches(f"*.{pattern}", name)


def alphas_by_name(config: LoraConfig, model: PeftModel) -> dict[str, float]:
    """The alpha of each layer of `model` that a pattern of `config` gives it."""
    found = {}
    for at, layer in lora_layers(model):
        parameter = getattr(layer, "parameter_name", None)
        name = at.replace(".base_layer", "") + (f".{parameter}" if parameter else "")
        key = get_pattern_key([*config.alpha_pattern], name)
        if key in config.alpha_pattern:
            found[name] = float(config.alpha_pattern[key])
    return found
