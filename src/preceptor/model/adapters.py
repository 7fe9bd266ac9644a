"""LoRA through peft (Hu et al. 2021): low-rank updates beside frozen weights, and the rows of new tokens."""

import copy
import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from preceptor.errors import ModelError

ALL_LINEAR = "all-linear"


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

    target_modules: names of linear layers as in `q_proj`; None for all but the output head. new_token_ids: rows of
    the embedding (and of an untied head) that are trained as they are, since tokens that the base never saw would
    otherwise stay at their first values; only these rows get gradients and optimizer state. What is trained is
    float32. The first values of A follow from `seed`. Raises ModelError for a target that the model has not.
    """
    names = _linear_names(model)
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
        trainable_token_indices=_token_rows(model, new_token_ids),
    )
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
        # peft asks transformers by a name that 5.2x deprecates; nothing a user could mend
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def _linear_names(model: PreTrainedModel) -> set[str]:
    head = model.get_output_embeddings()
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


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


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """A plain transformers model with the adapter added into its weights; `model` itself stays as it is.

    The copy shares every weight that no adapter changes, so it costs the bytes of the adapted layers only. Merging in
    place and taking it back would not do: W + BA - BA is not W to the bit.
    """
    adapted = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for parameter in module.parameters()
    }
    shared = {id(p): p for p in model.parameters() if id(p) not in adapted}
    merged: PreTrainedModel = copy.deepcopy(model, shared).merge_and_unload()
    return merged
