"""One row through a causal LM: hidden states, the output head, the loss; and two proofs that this is right.

Legend: T tokens of a row, D hidden size, V vocabulary, N trained tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preceptor.data.forest import Row, Segment, Tree, build_row
from preceptor.errors import ModelError
from preceptor.model.attention import ForestLayout, attention_implementation, causal_lm, decoder_of, forest_attention
from preceptor.model.loss import TrainedRows, linear_cross_entropy
from preceptor.model.visibility import check_visibility

_PROBE_TOKENS = 24


@dataclass(frozen=True, eq=False, slots=True)
class Head:
    """What turns a hidden state into logits: cap(scale * (h W^T + b)).

    Where only some rows are trained (peft's token rows), weight_VD is the merged weight with its graph, and
    `trained_rows` says which they are, so that a loss need not make a gradient of all V rows for them.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None
    logit_scale: float
    trained_rows: TrainedRows | None = None


def hidden_states(model: nn.Module, row: Row) -> Tensor:
    """The last hidden state (T, D) of each token of the row, each tree as if it were alone. No logits are computed."""
    decoder = decoder_of(model)
    device = decoder.get_input_embeddings().weight.device
    _require_rope_for(row, decoder)
    layout = ForestLayout.from_row(row, device)
    with forest_attention(model):
        output = decoder(
            input_ids=torch.from_numpy(row.ids_T).to(device)[None],
            position_ids=layout.position_T[None],
            use_cache=False,
            forest=layout,
        )
    hidden_TD: Tensor = output.last_hidden_state[0]
    return hidden_TD


def _require_rope_for(row: Row, decoder: PreTrainedModel) -> None:
    """Refuse rows in which rotary frequencies that follow the longest position would tie conversations together."""
    settings = getattr(decoder.config, "rope_parameters", None) or {}
    if settings.get("rope_type") not in ("dynamic", "longrope") or sum(span.parent is None for span in row.spans) < 2:
        return
    limit = settings.get("original_max_position_embeddings") or decoder.config.max_position_embeddings
    if row.position_T.max() >= limit:
        raise ModelError(
            f"{type(decoder).__name__} changes its rotary frequencies beyond position {limit}, for all conversations "
            f"of a row at once. Set data.max_row_tokens to at most {limit}."
        )


def output_head(model: nn.Module) -> Head:
    """The model's output head, also of a model that peft wraps. Raises ModelError for a model without one."""
    bare = causal_lm(model)
    layer = bare.get_output_embeddings()
    if layer is None:
        raise ModelError(f"{type(bare).__name__} has no output embeddings: it is not a causal language model")
    settings = bare.config.get_text_config(decoder=True)
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= _number(settings, name, 1.0)
    scale /= _number(settings, "logits_scaling", 1.0)
    softcap = _number(settings, "final_logit_softcapping", 0.0)
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


def row_loss(model: nn.Module, row: Row) -> Tensor:
    """The sum of w_n * loss_n over the row's trained tokens, a scalar with a graph (also where there is none)."""
    hidden_TD = hidden_states(model, row)
    head = output_head(model)
    device = hidden_TD.device
    return linear_cross_entropy(
        hidden_TD,
        head.weight_VD if head.trained_rows is None else head.weight_VD.detach(),
        torch.from_numpy(row.source_N).to(device),
        torch.from_numpy(row.target_N).to(device),
        torch.from_numpy(row.weight_N).to(device),
        bias_V=head.bias_V,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        trained_rows=head.trained_rows,
    )


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Prove on random tokens that `output_head` gives the logits of the model itself. Raises ModelError if not."""
    bare = causal_lm(model)
    head = output_head(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(head.weight_VD.shape[0], (1, 8), generator=generator).to(head.weight_VD.device)
    was_training = model.training
    model.eval()
    try:
        expected_NV = bare(input_ids=ids, use_cache=False).logits[0].double()
        hidden_ND = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0].double()
    finally:
        model.train(was_training)
    found_NV = hidden_ND @ head.weight_VD.double().T
    if head.bias_V is not None:
        found_NV = found_NV + head.bias_V.double()
    found_NV = found_NV * head.logit_scale
    if head.softcap is not None:
        found_NV = head.softcap * torch.tanh(found_NV / head.softcap)
    error = float((found_NV - expected_NV).norm() / expected_NV.norm().clamp_min(1e-30))
    bound = _rounding(head.weight_VD.dtype)
    if not error <= bound:
        raise ModelError(
            f"{bare.config.model_type}: the logits from the output embedding differ from the model's own by a relative "
            f"{error:.1e} (rounding allows {bound:.1e}): this model does more to its logits than is known here, so its "
            f"loss would be wrong. Use another model type."
        )


def _rounding(dtype: torch.dtype) -> float:
    """The relative error that many layers' rounding may add up to: 6e-6 for float32, 0.03 for bfloat16."""
    return float(torch.finfo(dtype).eps ** 0.75)


@torch.no_grad()
def check_isolation(model: nn.Module) -> None:
    """Prove on the model itself that a row keeps its trees and their branches apart, and changes nothing else.

    First `check_visibility`. Then the tokens of document 1, and those of one branch of document 2, are replaced: no
    hidden state that must not see them may move by more than rounding. Last, document 1 alone must give what the
    model gives without us. Raises ModelError if one of these fails.
    """
    check_visibility(model)
    vocab_size = output_head(model).weight_VD.shape[0]
    rng = np.random.default_rng(0)
    first, context, left, right, other_first, other_left = (
        tuple(rng.integers(vocab_size, size=_PROBE_TOKENS).tolist()) for _ in range(6)
    )
    was_training = model.training
    model.eval()
    try:
        before_TD = hidden_states(model, _probe_row(first, context, left, right))
        document_TD = hidden_states(model, _probe_row(other_first, context, left, right))
        branch_TD = hidden_states(model, _probe_row(first, context, other_left, right))
        decoder = decoder_of(model)
        ids = torch.tensor([first], device=before_TD.device)
        # eager is what the model's authors wrote; sdpa leaves Gemma 2's soft-cap out in transformers 5.17
        with attention_implementation(model, "eager"):
            own_TD = decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
    finally:
        model.train(was_training)
    mixing = (
        "Its layers mix tokens outside attention (recurrence or convolution), so conversations cannot share a row. "
        "Use a model with attention only."
    )
    n = _PROBE_TOKENS
    _require_equal(model, before_TD[n:], document_TD[n:], f"when another conversation of their row changes. {mixing}")
    _require_equal(
        model, before_TD[3 * n :], branch_TD[3 * n :], f"when another branch of their tree changes. {mixing}"
    )
    _require_equal(model, own_TD, before_TD[:n], "between the model's own attention and ours. Use another model type.")


def _probe_row(first: tuple[int, ...], context: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...]) -> Row:
    """Document 1, and document 2 with two branches after its context."""
    document = Tree("probe:1", (Segment("target", first, None),))
    segments = (Segment("context", context, None), Segment("target", left, 0), Segment("target", right, 0))
    return build_row([document, Tree("probe:2", segments)])


def _require_equal(model: nn.Module, before_TD: Tensor, after_TD: Tensor, when: str) -> None:
    moved = float((after_TD - before_TD).double().norm() / before_TD.double().norm().clamp_min(1e-30))
    bound = _rounding(before_TD.dtype)
    if not moved <= bound:
        raise ModelError(
            f"{_model_type(model)}: hidden states move by a relative {moved:.1e} (rounding allows {bound:.1e}) {when}"
        )


def _model_type(model: nn.Module) -> str:
    return str(causal_lm(model).config.model_type)
