"""LoRA through peft (Hu et al. 2021): low-rank updates beside frozen weights, and the rows of new tokens."""

import difflib
import json
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
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from preceptor.errors import ModelError
from preceptor.model.adapters.dora import start_at_lengths
from preceptor.model.adapters.patterns import ALL_LINEAR, alphas_by_name, expert_parameters, growth, set_patterns
from preceptor.model.adapters.pissa import keep_first_values, start_at_singular_values, without_singular_values
from preceptor.model.options import PLAIN, LoraOptions
from preceptor.model.parts import decoder_of

_NAMED = 5  # of what does not fit
_LINEAR = (nn.Linear, Conv1D)  # GPT-2's: a linear layer whose matrix lies turned
_ROWS = ".token_adapter.trainable_tokens_delta"


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
    on (see `_out_of_reach`), and experts. new_token_ids: tokens that the base never saw; their rows of the embedding
    and of an untied head alone are trained, as they are. What is trained is float32. The first values of A follow from
    `seed`; first_values False: they will be replaced, so PiSSA need not compute its own. revision: of the base, saved.
    Raises ModelError for a target or pattern that the model has not, for what peft rejects, and as `_modules_to_save`.
    """
    layers = linear_layers(model)
    _require_targets(model, layers, target_modules)
    whole = _modules_to_save(model, options.modules_to_save, new_token_ids)
    experts = [] if target_modules or options.dora or dropout else expert_parameters(model)
    excluded = _out_of_reach(model, layers, target_modules is not None, whole)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=list(target_modules) if target_modules else ALL_LINEAR,
        target_parameters=experts or None,
        exclude_modules=excluded or None,
        trainable_token_indices=_token_rows(model, new_token_ids, whole),
        modules_to_save=whole or None,
        use_dora=options.dora,
        use_rslora=options.rslora,
        init_lora_weights="gaussian" if options.init == "gaussian" else True,
    )
    set_patterns(config, model, options, layers.difference(excluded))
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
        _quieten_peft()
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config, revision=revision)
        except ValueError as error:
            raise ModelError(f"adapter: {_reason(error)}") from error
        assert isinstance(adapted, PeftModel)
        if options.dora:
            start_at_lengths(adapted)
        if options.keeps_first_values:
            if first_values:
                start_at_singular_values(adapted, fast=options.init == "pissa_fast")
            keep_first_values(adapted)
    _train_in_float32(adapted)
    _settle(adapted.peft_config["default"])
    return adapted


def _quieten_peft() -> None:
    """Within `warnings.catch_warnings`: a user can do nothing about these."""
    # peft asks transformers by a name that 5.2x deprecates
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    # it looks for a pattern's layers among the linear ones, not among tensors of experts
    warnings.filterwarnings("ignore", message=".*(rank|alpha)_pattern keys did not match", category=RuntimeWarning)
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)  # and sets it


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


def _settle(config: Any) -> None:
    """Settings that mean the same in every process and folder: peft keeps names as sets, whose order is another one in
    each process, and the base as it was named, which may be a relative path."""
    for key in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save"):
        found = getattr(config, key, None)
        if isinstance(found, set):
            setattr(config, key, sorted(found))
    base = config.base_model_name_or_path
    if base and Path(base).is_dir():
        config.base_model_name_or_path = str(Path(base).absolute())


def _modules_to_save(model: PreTrainedModel, patterns: Sequence[str], new_token_ids: Sequence[int]) -> list[str]:
    """Names of the modules that are trained whole. Raises ModelError for what is none, or is one table with another.

    Where tokens are new, tables that are more than rows are trained whole too (`_is_more_than_rows`).
    """
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
    for table in (embedding, head) if new_token_ids else ():
        if _is_more_than_rows(table):
            if head.weight is embedding.weight:
                raise ModelError(
                    f"adapter: this data has tokens that are new to the model. {name_of(model, table)} of "
                    f"{type(model).__name__} has more than a row for each token (a bias, a norm), which peft leaves "
                    "out where it trains rows; and embedding and head are one table, which peft cannot train whole. "
                    "Train without an adapter, or set a data.chat_template whose special tokens the model knows"
                )
            found.append(name_of(model, table))
    inner = [name for name in found if any(name.startswith(f"{other}.") for other in found)]
    return sorted({*found} - {*inner})


def _is_more_than_rows(table: nn.Module) -> bool:
    """Whether an embedding or head computes more than a lookup or x W^T. Where peft trains some of its rows, it leaves
    that out: the bias of a head (Phi, GPT-J), the norm of an embedding (Inkling); but not an embedding's scale."""
    plain = type(table).forward in (nn.Embedding.forward, nn.Linear.forward) or hasattr(table, "embed_scale")
    return not plain or getattr(table, "bias", None) is not None


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
            before = copy.register_forward_pre_hook(_to_own_dtype, with_kwargs=True)
            copy.casts = [before, copy.register_forward_hook(partial(_to_dtype, dtype))]


def merge(adapted: PeftModel) -> PreTrainedModel:
    """The base with the adapter merged into it, without casts; what was trained whole is float32 still."""
    for module in adapted.modules():
        for cast in vars(module).get("casts", ()):
            cast.remove()
    merged: PreTrainedModel = adapted.merge_and_unload()  # type: ignore[operator]
    return merged


def _to_own_dtype(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """float32, unless the program has changed it since."""
    cast = partial(_cast, next(module.parameters()).dtype)
    return tuple(map(cast, given)), {name: cast(value) for name, value in named.items()}


def _to_dtype(dtype: torch.dtype, _: nn.Module, given: Any, output: Any) -> Any:
    return _cast(dtype, output)


def _cast(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def load_adapter(model: PeftModel, folder: Path, options: LoraOptions = PLAIN) -> None:
    """Give the adapter of `model` the weights of one that was saved. Raises ModelError where they do not fit.

    Rows of tokens go by their ids; those that the saved one does not hold stay as they are.
    """
    saved, ours = LoraConfig.from_pretrained(str(folder)), model.peft_config["default"]
    assert isinstance(saved, LoraConfig) and isinstance(ours, LoraConfig)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = _with_rows(load_peft_weights(str(folder), device="cpu"), wanted, saved, ours)
    there, here = _settings(saved, model, options), _settings(ours, model, options)
    wrong = [f"adapter.{key}: {value} there, {here[key]} here" for key, value in there.items() if value != here[key]]
    if not wrong:
        keys = "(adapter.target_modules, adapter.modules_to_save)"
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


def token_rows_of(folder: Path) -> set[int]:
    """Ids of the tokens of which a saved adapter holds rows."""
    saved = LoraConfig.from_pretrained(str(folder))
    return {id_ for ids in _rows_by_module(saved).values() for id_ in ids}


def _rows_by_module(config: Any) -> dict[str, list[int]]:
    found: dict[str, list[int]] = config.trainable_token_indices or {}
    return found


def _with_rows(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], saved: Any, ours: Any) -> dict[str, Tensor]:
    """The weights of a saved adapter, with a row for each token of which the model's adapter trains one."""
    found = dict(weights)
    for name, rows_RD in wanted.items():
        if name.endswith(_ROWS):
            module = name.removesuffix(_ROWS).rpartition(".")[2]
            here, there = (_rows_by_module(config).get(module, []) for config in (ours, saved))
            assert {*there} <= {*here}, "build_model trains the rows of both"
            found[name] = rows_RD.detach().cpu().clone()
            if there:
                found[name][[here.index(id_) for id_ in there]] = weights[name].to(rows_RD.dtype)
    return found


def _settings(config: LoraConfig, model: PeftModel, options: LoraOptions) -> dict[str, str]:
    """What two adapters must have in common, by the keys of the run file."""
    times, grown = growth(options)
    return {
        "rank": f"{config.r / times:.15g}",
        "alpha": f"{config.lora_alpha / grown:.15g}",
        "kind": "dora" if config.use_dora else "lora",
        "use_rslora": str(bool(config.use_rslora)).lower(),
        "alpha_pattern": json.dumps(alphas_by_name(config, model), sort_keys=True),
    }


def linear_layers(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers that an adapter works on: not the head, not a vision tower's, which text does not go
    through, and not a router that returns more than x W^T."""
    head, within = model.get_output_embeddings(), set(decoder_of(model).modules())
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, _LINEAR) and module in within and module is not head and not _returns_more(module)
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
        linear = isinstance(module, _LINEAR) and module is not head
        trained = any(name == other or name.startswith(f"{other}.") for other in whole)
        refused = name not in layers or passed_by or trained
        if (module not in within and not [*module.children()]) or (linear and refused):
            found.append(name)
    return found


@torch.no_grad()
def _returns_more(module: Any) -> bool:
    """Whether a subclass of nn.Linear gives something else than one output of its size, as Llama 4's router does."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
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
