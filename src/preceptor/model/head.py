"""The output head of a causal LM: found in a model, and the loss of a sequence by it."""

from typing import Any

import torch
from torch import Tensor, nn

from preceptor.errors import ModelError
from preceptor.model.activations.context import StepContext
from preceptor.model.activations.embedding import gradient_of, takes_gradient_in_place
from preceptor.model.activations.inputs import SequenceInputs
from preceptor.model.loss.linear_cross_entropy import Head, TrainedRows, linear_cross_entropy
from preceptor.model.loss.options import LossOptions
from preceptor.model.parts import causal_lm


def sequence_loss(
    head: Head,
    hidden_MD: Tensor,
    inputs: SequenceInputs,
    options: LossOptions,
    step: StepContext,
    compiled: bool = False,
) -> Tensor:
    """The sum of w_n * loss_n over the sequence's trained tokens, over `step.divisor`: a scalar with a graph."""
    in_place = step.accumulates and torch.is_grad_enabled() and takes_gradient_in_place(head.weight_VD)
    return linear_cross_entropy(
        hidden_MD,
        head,
        inputs.source_N,
        inputs.target_N,
        inputs.weight_N / step.divisor,
        options=options,
        divisor=step.divisor,
        head_grad_VD=gradient_of(head.weight_VD) if in_place else None,
        head_cast=step.head_cast,
        gradient_is_one=step.accumulates and torch.is_grad_enabled(),
        compiled=compiled and torch.is_grad_enabled(),
    )


def output_head(model: nn.Module) -> Head:
    """The model's output head, also of a model that peft wraps. Raises ModelError for a model without one."""
    bare = causal_lm(model)
    layer = bare.get_output_embeddings()
    if layer is None:
        raise ModelError(f"{type(bare).__name__} has no output embeddings: it is not a causal language model")
    settings = bare.config.get_text_config(decoder=True)
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= _number(settings, name, 1.0)
    scale /= _number(settings, "logits_scaling", 1.0)
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = max(_number(settings, name, 0.0) for name in caps)
    weight_VD, trained_rows = _weight(layer)
    bias_V = getattr(layer, "bias", None)
    return Head(weight_VD, bias_V, softcap=softcap or None, logit_scale=scale, trained_rows=trained_rows)


def _number(settings: object, name: str, default: float) -> float:
    """A setting that only some model types have; None counts as absent."""
    value = getattr(settings, name, None)
    return default if value is None else float(value)


def _weight(layer: Any) -> tuple[Tensor, TrainedRows | None]:
    """The weight of an output layer, also where peft wraps it to train some of its rows."""
    wrapper = layer.token_adapter if hasattr(layer, "token_adapter") else layer
    if not hasattr(wrapper, "get_merged_weights") or wrapper.merged or wrapper.disable_adapters:
        return layer.weight, None
    merged_VD = wrapper.get_merged_weights(wrapper.active_adapters)
    if len(wrapper.active_adapters) != 1 or wrapper.base_layer.weight.requires_grad:
        return merged_VD, None
    name = wrapper.active_adapters[0]
    rows_R = torch.tensor(wrapper.token_indices[name], device=merged_VD.device)
    return merged_VD, TrainedRows(rows_R, wrapper.trainable_tokens_delta[name])
