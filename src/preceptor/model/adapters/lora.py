"""LoRA through peft (Hu et al. 2021): low-rank updates beside frozen weights, and the rows of new tokens."""

import difflib
import json
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from preceptor.errors import ModelError
from preceptor.model.adapters.pissa import keep_first_values, start_at_singular_values, without_singular_values
from preceptor.model.options import PLAIN, LoraOptions
from preceptor.model.parts import decoder_of, matches, require_matches

ALL_LINEAR = "all-linear"
_NAMED = 5  # of what does not fit


def add_adapter(
    model: PreTrainedModel,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str] | None,
    new_token_ids: Sequence[int],
    seed: int,
    options: LoraOptions = PLAIN,
    first_values: bool = True,
    revision: str | None = None,
) -> PeftModel:
    """Freeze the model and put LoRA beside its linear layers; the update is alpha / rank * B A, zero at first.

    target_modules: names of linear layers as in `q_proj`; None for all of the decoder's that an adapter has an effect
    on (see `_out_of_reach`), and experts. new_token_ids: rows of the embedding (and of an untied head) that are trained
    as they are, since tokens that the base never saw would otherwise stay at their first values; only these rows get
    gradients and optimizer state. What is trained is float32. The first values of A follow from `seed`. first_values
    False: they will be replaced, so PiSSA need not compute its own. revision: of the base, saved with the adapter.
    Raises ModelError for a target or a pattern that the model has not, or that peft rejects.
    """
    layers = linear_layers(model)
    _require_targets(model, layers, target_modules)
    whole = _modules_to_save(model, options.modules_to_save)
    experts = [] if target_modules or options.dora or dropout else _expert_parameters(model)
    excluded = _out_of_reach(model, layers, target_modules is not None, whole)
    chosen = {name for name in layers if not target_modules or name.rpartition(".")[2] in target_modules}
    patterns = _patterns(rank, alpha, options, sorted({*chosen.difference(excluded), *experts}))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        lora_dropout=dropout,
        target_modules=list(target_modules) if target_modules else ALL_LINEAR,
        target_parameters=experts or None,
        exclude_modules=excluded or None,
        trainable_token_indices=_token_rows(model, new_token_ids, whole),
        modules_to_save=whole or None,
        use_dora=options.dora,
        use_rslora=options.rslora,
        init_lora_weights="gaussian" if options.init == "gaussian" else True,
        **patterns,
    )
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
        # peft asks transformers by a name that 5.2x deprecates; a user can do nothing about it
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        # what peft sets by itself for experts of two fused halves, and then finds no layer for
        warnings.filterwarnings("ignore", message=".*(rank|alpha)_pattern keys did not match", category=RuntimeWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)  # and sets it
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config, revision=revision)
        except ValueError as error:
            raise ModelError(f"adapter: {_reason(error)}") from error
        assert isinstance(adapted, PeftModel)
        if options.keeps_first_values:
            if first_values:
                start_at_singular_values(adapted, fast=options.init == "pissa_fast")
            keep_first_values(adapted)
    _train_in_float32(adapted)
    _sort_names(adapted)
    return adapted


def _require_targets(model: nn.Module, layers: Collection[str], target_modules: Sequence[str] | None) -> None:
    names = {name.rpartition(".")[2] for name in layers}
    unknown = sorted(set(target_modules or ()) - names)
    if unknown:
        raise ModelError(
            f"adapter.target_modules: {type(model).__name__} has no linear layer named {', '.join(unknown)}; "
            f"it has {', '.join(sorted(names))}"
        )


def _reason(error: ValueError) -> str:
    """What peft says; of experts that are one tensor with what to do."""
    if "lora.ParamWrapper" not in str(error):
        return str(error)
    return (
        "experts that are one tensor take neither dropout nor DoRA. Name linear layers in adapter.target_modules, or "
        "use `kind: lora` without dropout"
    )


def _sort_names(adapted: PeftModel) -> None:
    """peft keeps names as sets, whose order is another one in each process."""
    for settings in adapted.peft_config.values():
        for key in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save"):
            found = getattr(settings, key, None)
            if isinstance(found, set):
                setattr(settings, key, sorted(found))


def _patterns(rank: int, alpha: float, options: LoraOptions, names: Sequence[str]) -> dict[str, Any]:
    """Rank and alpha for peft: in all, and of the layers that a pattern names, each by its whole name.

    names: of all that is adapted. An adapter that keeps its first values has twice the rank, and the alpha that leaves
    the scale as it is. Raises ModelError for a pattern that fits no name.
    """
    times, grown = _growth(options)
    found: dict[str, Any] = {"r": rank * times, "lora_alpha": alpha * grown}
    for key, own, factor in (
        ("rank_pattern", options.rank_pattern, times),
        ("alpha_pattern", options.alpha_pattern, grown),
    ):
        patterns: Mapping[str, float] = dict(own)  # type: ignore[arg-type]
        require_matches(patterns, names, f"adapter.{key}", _fits, "adapted layer")
        chosen = {name: next((p for p in patterns if _fits(p, name)), None) for name in names}
        found[key] = {name: patterns[p] * factor for name, p in chosen.items() if p is not None}
    return found


def _growth(options: LoraOptions) -> tuple[int, float]:
    """By what rank and alpha are multiplied for peft."""
    times = 2 if options.keeps_first_values else 1
    return times, math.sqrt(times) if options.rslora else times


def _fits(pattern: str, name: str) -> bool:
    """Whether a pattern is the name of a layer, its end, or that of a module around it."""
    return matches(pattern, name) or matches(f"*.{pattern}", name)


def _modules_to_save(model: PreTrainedModel, patterns: Sequence[str]) -> list[str]:
    """Names of the modules that are trained whole. Raises ModelError for what is none, or is one table with another."""
    names = [name for name, _ in model.named_modules() if name]
    found: list[str] = []
    for pattern in patterns:
        own = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
        if not own:
            near = difflib.get_close_matches(pattern, sorted({name.rpartition(".")[2] for name in names}), n=3)
            raise ModelError(
                f"adapter.modules_to_save: {type(model).__name__} has no module {pattern!r}"
                + (f"; near it: {', '.join(near)}" if near else "")
            )
        found += own
    for name in found:
        _require_trainable(name, model.get_submodule(name))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = {name_of(model, embedding), name_of(model, head)}
    if head.weight is embedding.weight and not tables.isdisjoint(found):
        raise ModelError(
            f"adapter.modules_to_save: embedding and head of {type(model).__name__} are one table, which peft cannot "
            "train whole beside an adapter. Rows of new tokens are trained in any case; else train without an adapter"
        )
    inner = [name for name in found if any(name.startswith(f"{other}.") for other in found)]
    return sorted({*found} - {*inner})


def _require_trainable(name: str, module: nn.Module) -> None:
    """Raises ModelError for a module that cannot be trained whole."""
    of_linear = [each for each in module.modules() if isinstance(each, nn.Linear)]
    if any("weight" not in each._parameters for each in of_linear):  # it is made of the bits, whenever it is asked for
        raise ModelError(
            f"adapter.modules_to_save: {name} is quantized and cannot be trained; leave it out, or leave out "
            "model.quantization"
        )
    if not any(True for _ in module.parameters()):
        raise ModelError(f"adapter.modules_to_save: {name} has no parameters to train; leave it out")


def _expert_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the tensors that hold a matrix of each expert; not of experts that text does not go to (ERNIE VL)."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and name.split(".")[-2] == "experts" and "vision" not in name
    ]


def _train_in_float32(adapted: PeftModel) -> None:
    """Modules that are trained whole, whatever the type of the base: between casts to theirs and back.

    peft does so for LoRA itself, not for copies of modules.
    """
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            copy = module.modules_to_save["default"]
            dtype = next(copy.parameters()).dtype
            if dtype not in (torch.bfloat16, torch.float16):
                continue
            copy.float()
            copy.register_forward_pre_hook(_to_float32, with_kwargs=True)
            copy.register_forward_hook(partial(_to_dtype, dtype))


def _to_float32(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return tuple(map(_wide, given)), {name: _wide(value) for name, value in named.items()}


def _to_dtype(dtype: torch.dtype, _: nn.Module, given: Any, output: Any) -> Any:
    return output.to(dtype) if isinstance(output, torch.Tensor) and output.is_floating_point() else output


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def load_adapter(model: PeftModel, folder: Path, options: LoraOptions = PLAIN) -> None:
    """Give the adapter of `model` the weights of one that was saved. Raises ModelError where they do not fit."""
    saved, ours = LoraConfig.from_pretrained(str(folder)), model.peft_config["default"]
    assert isinstance(saved, LoraConfig) and isinstance(ours, LoraConfig)
    weights = load_peft_weights(str(folder), device="cpu")
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    there, here = _settings(saved, options), _settings(ours, options)
    wrong = [f"adapter.{key}: {value} there, {here[key]} here" for key, value in there.items() if value != here[key]]
    if not wrong:
        keys = "(adapter.target_modules, new tokens)"
        wrong += [f"{name}: not adapted here {keys}" for name in sorted({*weights} - {*wanted})]
        wrong += [f"{name}: not adapted there {keys}" for name in sorted({*wanted} - {*weights})]
        shapes = {name: (weights[name].shape, wanted[name].shape) for name in sorted({*weights} & {*wanted})}
        wrong += [f"{name}: {[*one]} there, {[*other]} here" for name, (one, other) in shapes.items() if one != other]
    if not wrong and options.keeps_first_values:
        without = without_singular_values(model, weights)
        wrong += [f"{name}: no first values of PiSSA there (adapter.init)" for name in without]
    if wrong:
        more = f"\n  and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise ModelError(
            f"{folder}: this adapter does not fit the run's, so it cannot be trained on. Set the same, or leave out "
            "the section `adapter` to train its merged model:\n"
            + "\n".join(f"  {line}" for line in wrong[:_NAMED])
            + more
        )
    set_peft_model_state_dict(model, weights)


def _settings(config: LoraConfig, options: LoraOptions) -> dict[str, str]:
    """What two adapters must have in common, by the keys of the run file."""
    times, grown = _growth(options)
    return {
        "rank": f"{config.r / times:.15g}",
        "alpha": f"{config.lora_alpha / grown:.15g}",
        "kind": "dora" if config.use_dora else "lora",
        "use_rslora": str(bool(config.use_rslora)).lower(),
        "alpha_pattern": json.dumps(config.alpha_pattern, sort_keys=True),
    }


def linear_layers(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers that an adapter works on: not the head, not a vision tower's, which text does not go
    through, and not a router that returns more than x W^T."""
    head, within = model.get_output_embeddings(), set(decoder_of(model).modules())
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module in within and module is not head and not _returns_more(module)
    }


def _out_of_reach(model: PreTrainedModel, layers: set[str], asked: bool, whole: Sequence[str] = ()) -> list[str]:
    """Names of what gets no adapter: all outside the decoder but for the head, whatever it is called; linear layers
    that are none of `layers`, or part of the modules `whole`, which are trained; and, unless they were asked for by
    name, those of a state-space mixer but for its `in_proj`: its fused kernels take the weights, so an adapter would be
    passed by.
    """
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    within = {*decoder_of(model).modules(), head}
    found = []
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        mixer = hasattr(modules[parent], "A_log") and hasattr(modules[parent], "D")
        passed_by = mixer and not asked and last != "in_proj"
        linear = isinstance(module, nn.Linear) and module is not head
        trained = any(name == other or name.startswith(f"{other}.") for other in whole)
        refused = name not in layers or passed_by or trained
        if (module not in within and not [*module.children()]) or (linear and refused):
            found.append(name)
    return found


@torch.no_grad()
def _returns_more(module: nn.Linear) -> bool:
    """Whether a subclass of nn.Linear gives something else than one output of its size, as Llama 4's router does."""
    if type(module).forward is nn.Linear.forward:
        return False
    try:
        output = module(module.weight.new_zeros(1, module.in_features))
    except (RuntimeError, ValueError, IndexError):
        return True
    return not isinstance(output, torch.Tensor) or output.shape != (1, module.out_features)


def _token_rows(
    model: PreTrainedModel, new_token_ids: Sequence[int], whole: Sequence[str] = ()
) -> dict[str, list[int]] | None:
    """peft's `trainable_token_indices`: by module name; a head tied to the embedding follows it by itself.

    whole: modules of which all is trained.
    """
    if not new_token_ids:
        return None
    ids = sorted(new_token_ids)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embedding, *([head] if head is not None and head.weight is not embedding.weight else [])]
    names = [name for name in (name_of(model, table) for table in tables) if name not in whole]
    return {name.rpartition(".")[2]: ids for name in names} or None


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
