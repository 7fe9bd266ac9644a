"""One row through a causal LM: hidden states, the output head, the loss; and two proofs that this is right.

Legend: T tokens of a row, D hidden size, V vocabulary, N trained tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preceptor.data.forest import PackedSequence, Segment, Tree, pack_trees
from preceptor.errors import ModelError
from preceptor.model.activations.embedding import gradient_of, takes_gradient_in_place
from preceptor.model.activations.levels import split
from preceptor.model.activations.passes import KEEP_ALL, Keep, decode_levels, decode_whole, recomputing
from preceptor.model.attention.runs import attention_implementation, causal_lm, decoder_of
from preceptor.model.checks.levels import FAILURES, relative_error, rounding, spares_the_last_layer
from preceptor.model.checks.sequential import plain_hidden_states
from preceptor.model.checks.visibility import check_visibility
from preceptor.model.loss.linear_cross_entropy import TrainedRows, linear_cross_entropy
from preceptor.model.loss.options import CROSS_ENTROPY, LossOptions

_PROBE_TOKENS = 24
_WORTH = 8  # the last layer is spared for unread tokens if they are at least one in so many


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


def hidden_states(model: nn.Module, row: PackedSequence, keep: Keep = KEEP_ALL) -> Tensor:
    """The last hidden state (T, D) of each token of the row, each tree as if it were alone. No logits are computed."""
    if row.alone:
        with recomputing(model, keep):
            return plain_hidden_states(model, row)
    _require_rope_for(row, decoder_of(model), keep)
    return decode_whole(model, row, keep)


def read_hidden_states(model: nn.Module, row: PackedSequence, keep: Keep = KEEP_ALL) -> tuple[Tensor, Tensor]:
    """The last hidden states (M, D) of the tokens that a loss reads, at least; and source_N, as indices into them.

    `keep` says what is kept for backward, and which gradients flow (passes.py). A row that no loss reads goes
    through whole, so that every parameter still has its part in the graph. Raises ModelError for levels of a row that
    is read alone.
    """
    if row.alone and keep.context_gradient != "full":
        raise ModelError(
            f"memory.context_gradient: {keep.context_gradient}, but the layers of a {_model_type(model)} model mix "
            f"tokens outside attention, so a context cannot go through them apart from its targets. Set it to `full`."
        )
    _, read = parts = split(row)
    if row.alone or not row.num_trained:
        hidden_MD, index_M = hidden_states(model, row, keep), np.arange(row.num_tokens)
    elif keep.context_gradient != "full":
        _require_rope_for(row, decoder_of(model), keep)
        hidden_MD, index_M = decode_levels(model, row, keep)
    elif _WORTH * (row.num_tokens - read.num_tokens) >= row.num_tokens and spares_the_last_layer(model):
        _require_rope_for(row, decoder_of(model), keep)
        hidden_MD, index_M = decode_whole(model, row, keep, parts), read.index_T()
    else:
        hidden_MD, index_M = hidden_states(model, row, keep), np.arange(row.num_tokens)
    place_T = np.zeros(row.num_tokens, dtype=np.int64)
    place_T[index_M] = np.arange(len(index_M))
    return hidden_MD, torch.from_numpy(place_T[row.source_N]).to(hidden_MD.device)


def _require_rope_for(row: PackedSequence, decoder: PreTrainedModel, keep: Keep) -> None:
    """Reject rows in which rotary frequencies that follow the longest position would tie conversations together, or
    set the tokens of one level apart from those of another.
    """
    settings = getattr(decoder.config, "rope_parameters", None) or {}
    one_pass = keep.context_gradient == "full" and sum(span.parent is None for span in row.spans) < 2
    if settings.get("rope_type") not in ("dynamic", "longrope") or one_pass:
        return
    limit = settings.get("original_max_position_embeddings") or decoder.config.max_position_embeddings
    if row.position_T.max() >= limit:
        raise ModelError(
            f"{type(decoder).__name__} changes its rotary frequencies beyond position {limit}, for all conversations "
            f"of a pass at once. Set data.max_length to at most {limit}."
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


def row_loss(
    model: nn.Module, row: PackedSequence, keep: Keep = KEEP_ALL, options: LossOptions = CROSS_ENTROPY
) -> Tensor:
    """The sum of w_n * loss_n over the row's trained tokens, a scalar with a graph (also where there is none).

    `keep` says what is kept for backward and which gradients flow; `options` say which loss it is.
    """
    return loss_of(*read_hidden_states(model, row, keep), output_head(model), row, options)


def loss_of(
    hidden_MD: Tensor,
    source_N: Tensor,
    head: Head,
    row: PackedSequence,
    options: LossOptions = CROSS_ENTROPY,
    divisor: float = 1.0,
    add_to_grad: bool = False,
) -> Tensor:
    """The same over `divisor`, from what `read_hidden_states` gave.

    add_to_grad: where the head is a plain parameter, its gradient joins its `.grad` here, in one buffer for all rows of
    a step; backward must then follow, with a gradient of 1.
    """
    device = hidden_MD.device
    in_place = add_to_grad and torch.is_grad_enabled() and takes_gradient_in_place(head.weight_VD)
    return linear_cross_entropy(
        hidden_MD,
        head.weight_VD if head.trained_rows is None else head.weight_VD.detach(),
        source_N,
        torch.from_numpy(row.target_N).to(device),
        torch.from_numpy(row.weight_N / divisor).to(device),
        bias_V=head.bias_V,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        trained_rows=head.trained_rows,
        options=options,
        head_grad_VD=gradient_of(head.weight_VD) if in_place else None,
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
    if hidden_ND.shape[-1] != head.weight_VD.shape[-1]:
        raise ModelError(
            f"{bare.config.model_type}: the output embedding reads {head.weight_VD.shape[-1]} values a token, hidden "
            f"states have {hidden_ND.shape[-1]}: this model does more between them than is known here, so its loss "
            f"would be wrong. Use another model type."
        )
    found_NV = hidden_ND @ head.weight_VD.double().T
    if head.bias_V is not None:
        found_NV = found_NV + head.bias_V.double()
    found_NV = found_NV * head.logit_scale
    if head.softcap is not None:
        found_NV = head.softcap * torch.tanh(found_NV / head.softcap)
    error = relative_error(found_NV, expected_NV)
    bound = rounding(head.weight_VD.dtype)
    if not error <= bound:
        raise ModelError(
            f"{bare.config.model_type}: the logits from the output embedding differ from the model's own by a relative "
            f"{error:.1e} (rounding allows {bound:.1e}): this model does more to its logits than is known here, so its "
            f"loss would be wrong. Use another model type."
        )


@torch.no_grad()
def check_isolation(model: nn.Module) -> None:
    """Prove on the model itself that a row keeps its trees and their branches apart, and changes nothing else.

    First `check_visibility`. Then the tokens of document 1, and those of one branch of document 2, are replaced: no
    hidden state that must not see them may move by more than rounding. Last, the other branch of document 2 must be the
    same in a row of its own, and document 1 what the model gives without us. Raises ModelError if one of these fails.
    """
    was_training = model.training
    model.eval()
    try:
        check_visibility(model)
        _check_probes(model)
    except (ModelError, torch.OutOfMemoryError):
        raise
    except FAILURES as error:
        # a layer that builds on the mask itself meets none here: the sparse attention of DeepSeek V3.2
        raise ModelError(
            f"{_model_type(model)}: a layer fails on a row of several conversations ({type(error).__name__}: {error}). "
            f"Use another model type."
        ) from error
    finally:
        model.train(was_training)


def _check_probes(model: nn.Module) -> None:
    vocab_size = output_head(model).weight_VD.shape[0]
    rng = np.random.default_rng(0)
    n = _PROBE_TOKENS
    first, context, left, right, other_first, other_left = (
        tuple(rng.integers(vocab_size, size=n).tolist()) for _ in range(6)
    )
    before_TD = hidden_states(model, _probe_row(first, context, left, right))
    document_TD = hidden_states(model, _probe_row(other_first, context, left, right))
    branch_TD = hidden_states(model, _probe_row(first, context, other_left, right))
    mixing = (
        "Its layers mix tokens outside attention (recurrence or convolution), so conversations cannot share a row. "
        "Use a model with attention only."
    )
    _require_equal(model, before_TD[n:], document_TD[n:], f"when another conversation of their row changes. {mixing}")
    _require_equal(
        model, before_TD[3 * n :], branch_TD[3 * n :], f"when another branch of their tree changes. {mixing}"
    )
    second = Tree("probe:2", (Segment("context", context, None), Segment("target", right, 0)))
    alone_TD = hidden_states(model, pack_trees([second]))
    second_TD = torch.cat([before_TD[n : 2 * n], before_TD[3 * n :]])
    _require_equal(model, alone_TD, second_TD, "between a conversation alone and behind others: its positions are lost")
    ids = torch.tensor([first], device=before_TD.device)
    # eager is what the model's authors wrote; sdpa leaves Gemma 2's soft-cap out in transformers 5.17
    with attention_implementation(model, "eager"):
        own_TD = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    _require_equal(model, own_TD, before_TD[:n], "between the model's own attention and ours. Use another model type.")


def _probe_row(
    first: tuple[int, ...], context: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...]
) -> PackedSequence:
    """Document 1, and document 2 with two branches after its context."""
    document = Tree("probe:1", (Segment("target", first, None),))
    segments = (Segment("context", context, None), Segment("target", left, 0), Segment("target", right, 0))
    return pack_trees([document, Tree("probe:2", segments)])


def _require_equal(model: nn.Module, before_TD: Tensor, after_TD: Tensor, when: str) -> None:
    moved = relative_error(after_TD, before_TD)
    bound = rounding(before_TD.dtype)
    if not moved <= bound:
        raise ModelError(
            f"{_model_type(model)}: hidden states move by a relative {moved:.1e} (rounding allows {bound:.1e}) {when}"
        )


def _model_type(model: nn.Module) -> str:
    return str(causal_lm(model).config.model_type)
