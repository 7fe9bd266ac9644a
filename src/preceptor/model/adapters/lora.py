"""LoRA through peft (Hu et al. 2021): low-rank updates beside frozen weights, and the rows of new tokens."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import nn
from transformers import PreTrainedModel

from preceptor.errors import ModelError
from preceptor.model.parts import decoder_of

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
) -> PeftModel:
    """Freeze the model and put LoRA beside its linear layers; the update is alpha / rank * B A, zero at first.

    target_modules: names of linear layers as in `q_proj`; None for all of the decoder's that an adapter has an effect
    on (see `_out_of_reach`). new_token_ids: rows of the embedding (and of an untied head) that are trained as they
    are, since tokens that the base never saw would otherwise stay at their first values; only these rows get gradients
    and optimizer state. What is trained is float32. The first values of A follow from `seed`. Raises ModelError for a
    target that the model has not, or that peft rejects.
    """
    layers = _linear_layers(model)
    names = {name.rpartition(".")[2] for name in layers}
    unknown = sorted(set(target_modules or ()) - names)
    if unknown:
        raise ModelError(
            f"adapter.target_modules: {type(model).__name__} has no linear layer named {', '.join(unknown)}; "
            f"it has {', '.join(sorted(names))}"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=list(target_modules) if target_modules else ALL_LINEAR,
        exclude_modules=_out_of_reach(model, layers, asked=target_modules is not None) or None,
        trainable_token_indices=_token_rows(model, new_token_ids),
    )
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
        # peft asks transformers by a name that 5.2x deprecates; a user can do nothing about it
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        # what peft sets by itself for experts of two fused halves, and then finds no layer for
        warnings.filterwarnings("ignore", message=".*(rank|alpha)_pattern keys did not match", category=RuntimeWarning)
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"adapter: {error}") from error
    assert isinstance(adapted, PeftModel)
    for settings in adapted.peft_config.values():  # sets, whose order is another one in each process
        for key in ("target_modules", "exclude_modules"):
            found = getattr(settings, key, None)
            if isinstance(found, set):
                setattr(settings, key, sorted(found))
    return adapted


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Give the adapter of `model` the weights of one that was saved. Raises ModelError where they do not fit."""
    saved, ours = LoraConfig.from_pretrained(str(folder)), model.peft_config["default"]
    assert isinstance(saved, LoraConfig) and isinstance(ours, LoraConfig)
    wrong = []
    for key, there, here in (("rank", saved.r, ours.r), ("alpha", saved.lora_alpha, ours.lora_alpha)):
        if there != here:
            wrong.append(f"adapter.{key}: {there:g} there, {here:g} here")
    weights = load_peft_weights(str(folder), device="cpu")
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    if not wrong:
        wrong += [
            f"{name}: not adapted here (adapter.target_modules, new tokens)" for name in sorted({*weights} - {*wanted})
        ]
        wrong += [
            f"{name}: not adapted there (adapter.target_modules, new tokens)" for name in sorted({*wanted} - {*weights})
        ]
        wrong += [
            f"{name}: {list(weights[name].shape)} there, {list(tensor.shape)} here"
            for name, tensor in sorted(wanted.items())
            if name in weights and weights[name].shape != tensor.shape
        ]
    if wrong:
        more = f"\n  and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise ModelError(
            f"{folder}: this adapter does not fit the run's, so it cannot be trained on. Set the same, or leave out "
            "the section `adapter` to train its merged model:\n"
            + "\n".join(f"  {line}" for line in wrong[:_NAMED])
            + more
        )
    set_peft_model_state_dict(model, weights)


def _linear_layers(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers that an adapter works on: not the head, not a vision tower's, which text does not go
    through, and not a router that returns more than x W^T."""
    head, within = model.get_output_embeddings(), set(decoder_of(model).modules())
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module in within and module is not head and not _returns_more(module)
    }


def _out_of_reach(model: PreTrainedModel, layers: set[str], asked: bool) -> list[str]:
    """Names of what gets no adapter: all outside the decoder but for the head, whatever it is called; linear layers
    that are none of `layers`; and, unless they were asked for by name, those of a state-space mixer but for its
    `in_proj`: its fused kernels take the weights, so an adapter would be passed by.
    """
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    within = {*decoder_of(model).modules(), head}
    found = []
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        mixer = hasattr(modules[parent], "A_log") and hasattr(modules[parent], "D")
        passed_by = mixer and not asked and last != "in_proj"
        linear = isinstance(module, nn.Linear) and module is not head
        if (module not in within and not [*module.children()]) or (linear and (name not in layers or passed_by)):
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


def _token_rows(model: PreTrainedModel, new_token_ids: Sequence[int]) -> dict[str, list[int]] | None:
    """peft's `trainable_token_indices`: by module name; a head tied to the embedding follows it by itself."""
    if not new_token_ids:
        return None
    ids = sorted(new_token_ids)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = {_name_of(model, embedding): ids}
    if head is not None and head.weight is not embedding.weight:
        rows[_name_of(model, head)] = ids
    return rows


def _name_of(model: PreTrainedModel, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted).rpartition(".")[2]
