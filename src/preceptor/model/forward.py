"""One row through a causal LM: hidden states, the output head, the loss; and two proofs that this is right.

Legend: T tokens of a row, D hidden size, V vocabulary, N trained tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from preceptor.data.forest import Row, Segment, Tree, build_row
from preceptor.errors import ModelError
from preceptor.model.attention import ForestLayout, causal_lm, decoder_of, forest_attention
from preceptor.model.loss import linear_cross_entropy

_PROBE_TOKENS = 24


@dataclass(frozen=True, eq=False, slots=True)
class Head:
    """What turns a hidden state into logits: cap(scale * (h W^T + b))."""

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None
    logit_scale: float


def hidden_states(model: nn.Module, row: Row) -> Tensor:
    """The last hidden state (T, D) of each token of the row, each tree as if it were alone. No logits are computed."""
    decoder = decoder_of(model)
    device = decoder.get_input_embeddings().weight.device
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


def output_head(model: nn.Module) -> Head:
    """The model's output head. With trained token rows (peft), the weight is the merged one and carries gradients."""
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
    return Head(
        weight_VD=_weight(layer), bias_V=getattr(layer, "bias", None), softcap=softcap or None, logit_scale=scale
    )


def _number(settings: object, name: str, default: float) -> float:
    """A setting that only some model types have; None counts as absent."""
    value = getattr(settings, name, None)
    return default if value is None else float(value)


def _weight(layer: nn.Module) -> Tensor:
    """The weight of an output layer, also where peft wraps it to train some of its rows."""
    wrapper = layer.token_adapter if hasattr(layer, "token_adapter") else layer
    if hasattr(wrapper, "get_merged_weights") and not (wrapper.merged or wrapper.disable_adapters):
        weight_VD: Tensor = wrapper.get_merged_weights(wrapper.active_adapters)
        return weight_VD
    plain: Tensor = layer.weight
    return plain


def row_loss(model: nn.Module, row: Row) -> Tensor:
    """The sum of w_n * loss_n over the row's trained tokens, a scalar with a graph (also where there is none)."""
    hidden_TD = hidden_states(model, row)
    head = output_head(model)
    device = hidden_TD.device
    return linear_cross_entropy(
        hidden_TD,
        head.weight_VD,
        torch.from_numpy(row.source_N).to(device),
        torch.from_numpy(row.target_N).to(device),
        torch.from_numpy(row.weight_N).to(device),
        bias_V=head.bias_V,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
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
    bound = 16 * torch.finfo(head.weight_VD.dtype).eps
    if not error <= bound:
        raise ModelError(
            f"{bare.config.model_type}: the logits from the output embedding differ from the model's own by a relative "
            f"{error:.1e} (rounding allows {bound:.1e}): this model does more to its logits than is known here, so its "
            f"loss would be wrong. Use another model type."
        )


@torch.no_grad()
def check_isolation(model: nn.Module) -> None:
    """Prove on the model itself that a row keeps its trees, and the branches of a tree, apart.

    The tokens of document 1, and then those of one branch of document 2, are replaced; no hidden state that must not
    see them may move by more than rounding. Raises ModelError if one does.
    """
    vocab_size = output_head(model).weight_VD.shape[0]
    rng = np.random.default_rng(0)
    tokens = [tuple(rng.integers(vocab_size, size=_PROBE_TOKENS).tolist()) for _ in range(6)]

    def probe(first: tuple[int, ...], branch: tuple[int, ...]) -> Tensor:
        document = Tree("probe:1", (Segment("target", first, None),))
        tree = Tree(
            "probe:2",
            (Segment("context", tokens[1], None), Segment("target", branch, 0), Segment("target", tokens[3], 0)),
        )
        return hidden_states(model, build_row([document, tree])).double()

    was_training = model.training
    model.eval()
    try:
        before_TD = probe(tokens[0], tokens[2])
        other_document_TD = probe(tokens[4], tokens[2])
        other_branch_TD = probe(tokens[0], tokens[5])
    finally:
        model.train(was_training)
    n = _PROBE_TOKENS
    _require_equal(model, "another conversation of its row", before_TD[n:], other_document_TD[n:])
    _require_equal(model, "another branch of its tree", before_TD[3 * n :], other_branch_TD[3 * n :])
    if torch.equal(before_TD[2 * n : 3 * n], other_branch_TD[2 * n : 3 * n]):
        raise ModelError(f"{_model_type(model)}: hidden states do not depend on the tokens; the weights are degenerate")


def _require_equal(model: nn.Module, changed: str, before_TD: Tensor, after_TD: Tensor) -> None:
    moved = float((after_TD - before_TD).norm() / before_TD.norm().clamp_min(1e-30))
    bound = 8 * torch.finfo(next(model.parameters()).dtype).eps
    if not moved <= bound:
        raise ModelError(
            f"{_model_type(model)}: the hidden states of a conversation move by a relative {moved:.1e} when {changed} "
            f"changes (rounding allows {bound:.1e}). Its layers mix tokens outside attention (recurrence or "
            f"convolution), so conversations cannot share a row. Use a model with attention only."
        )


def _model_type(model: nn.Module) -> str:
    return str(causal_lm(model).config.model_type)
