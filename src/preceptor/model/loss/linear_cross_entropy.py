"""Linear cross-entropy on the trained tokens only.

    loss = sum_n  w_n * -log softmax( cap( scale * (h_{s_n} W^T + b) ) )[t_n]        cap(x) = c * tanh(x / c)

`linear_cross_entropy` computes it, or a variant of it (options.py), and its gradients in one pass, a chunk of
trained tokens at a time, so the logits of context tokens never exist and at no time more than one chunk's (the idea of
Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", and of Liger Kernel, here in plain matrix
products). tests/reference_loss.py is the same in naive float64; `token_losses` is for evaluation.

Legend: T tokens of a sequence, D hidden size, V vocabulary, N trained tokens, C trained tokens of one chunk.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from preceptor.errors import ModelError
from preceptor.model.compiled import compiled_function
from preceptor.model.loss.softmax import (
    LossForm,
    blocks,
    chunk_tokens,
    losses_and_gradients,
    most_tokens,
    to_logits,
    token_losses_of,
)
from preceptor.model.numerics import stays_wide
from preceptor.model.options import CROSS_ENTROPY, LossOptions
from preceptor.model.parts import causal_lm
from preceptor.model.sizes import device_type_of, is_dry_run, representative

# Rows of the head in one matrix product: on CPU so that what is read again stays in the cache (oneDNN is a third
# slower on all of a large head at once), on a GPU so that a product that is added to float32 stays small.
_HEAD_ROWS = {"cpu": 2048, "cuda": 2**15}
_FEW_COLUMNS, _MANY_ROWS = 640, 512
_NOT_DIFFERENTIABLE = (None,) * 8
_NOT_ONE = (
    "the loss of a step is multiplied after its gradients were computed (and the head's added to its buffer) for a "
    "gradient of 1: put divisors in weight_N"
)


@dataclass(frozen=True, eq=False, slots=True)
class TrainedRows:
    """The only rows of a head that are trained: weight_VD[rows_R] has the values of weight_RD, which gets gradients.

    So a few new tokens beside a frozen head cost R rows of gradient and not V.
    """

    rows_R: Tensor
    weight_RD: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Head:
    """The map from a hidden state to logits, cap(scale * (h W^T + b)).

    Where only some rows are trained (peft's token rows), weight_VD is the merged weight with its graph, and
    `trained_rows` says which they are, so that a loss need not make a gradient of all V rows for them.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    trained_rows: TrainedRows | None = None

    def logits(self, hidden_CD: Tensor, num_tokens: int | None = None) -> Tensor:
        """Logits of the first `num_tokens` of the vocabulary (None: all).

        Products are in the head's type, or autocast's; the rest is float32, or float64 for a float64 head.
        """
        logits_CV = linear(hidden_CD.to(self.weight_VD.dtype), self.weight_VD[:num_tokens])
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        if self.bias_V is not None:
            logits_CV = logits_CV + self.bias_V[:num_tokens]
        logits_CV = logits_CV * self.logit_scale
        if self.softcap is not None:
            logits_CV = self.softcap * torch.tanh(logits_CV / self.softcap)
        return logits_CV


@dataclass(eq=False)
class HeadCast:
    """The head's copy in the products' type, for all sequences of a step, as long as the head itself is not changed.

    For sequences with few trained tokens the copy takes a notable part of the loss's time. It costs V * D numbers of
    that type from the first call to the end of the step.
    """

    _kept: tuple[nn.Parameter, int, Tensor] | None = None

    def of(self, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
        if weight_VD.dtype == dtype or not isinstance(weight_VD, nn.Parameter):
            return weight_VD.to(dtype)
        kept = self._kept
        if kept is None or kept[0] is not weight_VD or kept[1] != weight_VD._version or kept[2].dtype != dtype:
            self._kept = None  # freed before the new one is made
            self._kept = kept = (weight_VD, weight_VD._version, weight_VD.detach().to(dtype))
        return kept[2]


def linear_cross_entropy(
    hidden_TD: Tensor,
    head: Head,
    source_N: Tensor,
    target_N: Tensor,
    weight_N: Tensor,
    *,
    options: LossOptions = CROSS_ENTROPY,
    divisor: float = 1.0,
    logits_bytes: int | None = None,
    head_grad_VD: Tensor | None = None,
    head_cast: HeadCast | None = None,
    gradient_is_one: bool = False,
    compiled: bool = False,
) -> Tensor:
    """The weighted sum of the losses of N trained tokens, a scalar; gradients reach hidden_TD and the head.

    Matrix products run in the dtype of weight_VD, or of autocast where that is on for the device; the softmax, the
    loss and the sum are float32 (float64 for float64 inputs). A head without `requires_grad` costs no gradient. With
    N = 0 the result is a zero whose backward gives zeros. One backward only, as its gradients are computed ahead.
    divisor: by which weight_N is divided already; what a loss of the user's own is given is not.

    head_grad_VD: a buffer, such as weight_VD.grad, to which this call adds the gradient of weight_VD; backward then
    gives weight_VD none. So the gradient of several sequences needs one buffer, not two. The buffer is filled before it
    is known by what the loss will be multiplied, so it needs gradient_is_one. head_cast: shared by calls with one head.
    gradient_is_one: backward will come with a gradient of 1, else RuntimeError (a divisor belongs in weight_N), and so
    multiplies nothing. compiled: what is done to a block of logits is compiled (softmax.py).

    Memory beyond inputs and gradients: the logits of one chunk in the products' type, at most logits_bytes (None: what
    the device's budget) or one token's; two blocks of them in float32, cache-sized on CPU; the head in the
    products' type; a float32 accumulator of the gradient of a half-precision head, for more than one chunk."""
    form = _form(hidden_TD, head, target_N, options, logits_bytes, divisor, compiled)
    bias_V, rows = head.bias_V, head.trained_rows
    weight_VD = head.weight_VD if rows is None else head.weight_VD.detach()
    rows_R, weight_RD = (None, None) if rows is None else (rows.rows_R, rows.weight_RD)
    if head_grad_VD is not None:
        assert gradient_is_one, "the buffer cannot be multiplied afterwards"
        assert weight_VD.requires_grad and head_grad_VD.shape == weight_VD.shape
        assert head_grad_VD.dtype == form.softmax_dtype, "half-precision sums over sequences would lose bits"
    if not torch.is_grad_enabled():  # autograd would ask for gradients all the same, and drop them
        hidden_TD, weight_VD, weight_RD, head_grad_VD = hidden_TD.detach(), weight_VD.detach(), None, None
        bias_V = None if bias_V is None else bias_V.detach()
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden_TD,
        weight_VD,
        bias_V,
        weight_RD,
        rows_R,
        source_N,
        target_N,
        weight_N,
        head_grad_VD,
        form,
        head_cast or HeadCast(),
        gradient_is_one,
    )
    return loss


@torch.no_grad()
def token_losses(hidden_TD: Tensor, head: Head, source_N: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """For evaluation: each token's unweighted -log p (float32) and whether it is the most likely one (bool)."""
    form = _form(hidden_TD, head, target_N, CROSS_ENTROPY)
    losses_N = torch.zeros(len(target_N), dtype=form.softmax_dtype, device=hidden_TD.device)
    correct_N = torch.zeros(len(target_N), dtype=torch.bool, device=hidden_TD.device)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        for chunk, _, products_CV in _chunks(hidden_TD, head.weight_VD.to(form.product_dtype), source_N, form):
            target_C, losses_C, correct_C = target_N[chunk], losses_N[chunk], correct_N[chunk]
            for rows, block_RV in blocks(products_CV[: len(target_C)], form, write_back=False):
                logits_RV = to_logits(block_RV, head.bias_V, form)
                correct_C[rows] = logits_RV.max(dim=-1).indices == target_C[rows]  # argmax is three times slower
                losses_C[rows] = token_losses_of(logits_RV, target_C[rows])
    return losses_N.float(), correct_N


def _form(
    hidden_TD: Tensor,
    head: Head,
    target_N: Tensor,
    options: LossOptions,
    logits_bytes: int | None = None,
    divisor: float = 1.0,
    compiled: bool = False,
) -> LossForm:
    device_type = hidden_TD.device.type
    product_dtype = head.weight_VD.dtype
    if product_dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        product_dtype = torch.get_autocast_dtype(device_type)
    kind = device_type_of(hidden_TD.device)
    sizes = head.weight_VD.shape[0], product_dtype.itemsize, logits_bytes, kind
    chunk, most = chunk_tokens(len(target_N), *sizes), most_tokens(*sizes)
    return LossForm(head.softcap, head.logit_scale, options, product_dtype, chunk, most, divisor, compiled)


def _chunks(
    hidden_TD: Tensor, head_VD: Tensor, source_N: Tensor, form: LossForm
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each chunk's trained tokens, hidden states and products h W^T, the last in one buffer for all chunks.

    Of hidden states and products there may be more than tokens (LossForm.computed_tokens): zeros, which stay zeros.
    """
    num_trained, vocab_size = len(source_N), head_VD.shape[0]
    most = form.computed_tokens(min(form.chunk_tokens, num_trained), head_VD)
    buffer_CV = hidden_TD.new_empty(most, vocab_size, dtype=form.product_dtype)
    for start in representative(range(0, num_trained, form.chunk_tokens)):
        chunk = slice(start, min(num_trained, start + form.chunk_tokens))
        num_tokens = chunk.stop - start
        added = form.computed_tokens(num_tokens, head_VD) - num_tokens
        hidden_CD = pad(hidden_TD[source_N[chunk]].to(form.product_dtype), (0, 0, 0, added))
        products_CV = buffer_CV[: num_tokens + added]
        for rows in _head_rows(head_VD):
            torch.mm(hidden_CD, head_VD[rows].T, out=products_CV[:, rows])
        yield chunk, hidden_CD, products_CV


def _head_rows(head_VD: Tensor) -> Iterator[slice]:
    rows = _HEAD_ROWS.get(device_type_of(head_VD.device), 2**15)
    return (slice(start, start + rows) for start in representative(range(0, head_VD.shape[0], rows)))


def _zeros(like: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert like is not None
    return torch.zeros_like(like, dtype=dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients together; backward only scales them by the gradient of the loss."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        weight_RD: Tensor | None,
        rows_R: Tensor | None,
        source_N: Tensor,
        target_N: Tensor,
        weight_N: Tensor,
        head_grad_VD: Tensor | None,
        form: LossForm,
        head_cast: HeadCast,
        gradient_is_one: bool,
    ) -> Tensor:
        leaves = (hidden_TD, weight_VD, bias_V, weight_RD)
        needed = ctx.needs_input_grad  # type: ignore[attr-defined]
        exact = form.softmax_dtype
        of_head = exact if len(target_N) > form.chunk_tokens else weight_VD.dtype
        grad_hidden_TD = torch.zeros_like(hidden_TD) if needed[0] else None
        grad_weight_VD = _zeros(weight_VD, of_head) if needed[1] and head_grad_VD is None else None
        grad_bias_V = _zeros(bias_V, exact) if needed[2] else None
        grad_weight_RD = _zeros(weight_RD, exact) if needed[3] else None
        head_total_VD = grad_weight_VD if head_grad_VD is None else head_grad_VD
        losses_N = torch.zeros(len(target_N), dtype=form.softmax_dtype, device=hidden_TD.device)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            head_VD = head_cast.of(weight_VD, form.product_dtype)
            for chunk, hidden_CD, products_CV in _chunks(hidden_TD, head_VD, source_N, form):
                source_C, target_C = source_N[chunk], target_N[chunk]
                losses_N[chunk] = _to_gradients(
                    products_CV[: len(target_C)], target_C, weight_N[chunk], bias_V, grad_bias_V, form
                )
                if grad_hidden_TD is not None:  # a source may occur several times: where a tree branches
                    grad_CD = _through_head(products_CV, head_VD, hidden_TD.dtype)[: len(source_C)]
                    grad_hidden_TD.index_add_(0, source_C, grad_CD)
                if head_total_VD is not None:
                    add_product(head_total_VD, products_CV.T, hidden_CD, _head_rows(head_total_VD))
                if grad_weight_RD is not None:
                    add_product(grad_weight_RD, products_CV[:, rows_R].T, hidden_CD, _head_rows(grad_weight_RD))
        ctx.gradient_is_one = gradient_is_one  # type: ignore[attr-defined]
        ctx.grads = [  # type: ignore[attr-defined]
            None if grad is None or leaf is None else grad.to(leaf.dtype)
            for leaf, grad in zip(leaves, (grad_hidden_TD, grad_weight_VD, grad_bias_V, grad_weight_RD), strict=True)
        ]
        return losses_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = ctx.grads  # type: ignore[attr-defined]
        if grads is None:
            raise RuntimeError(
                "linear_cross_entropy can be differentiated once only: its gradients are scaled in place"
            )
        ctx.grads = None  # type: ignore[attr-defined]
        if ctx.gradient_is_one:  # type: ignore[attr-defined]
            torch._assert_async(grad_loss == 1, _NOT_ONE)  # on a GPU without a wait
            return (*grads, *_NOT_DIFFERENTIABLE)
        scaled = [None if grad is None else grad.mul_(grad_loss.to(grad.dtype)) for grad in grads]
        return (*scaled, *_NOT_DIFFERENTIABLE)


def _to_gradients(
    products_CV: Tensor,
    target_C: Tensor,
    weight_C: Tensor,
    bias_V: Tensor | None,
    grad_bias_V: Tensor | None,
    form: LossForm,
) -> Tensor:
    """Each token's weighted loss; the products become the gradient by themselves, whose sum joins grad_bias_V."""
    losses_C = torch.empty(len(target_C), dtype=form.softmax_dtype, device=products_CV.device)
    compiles = form.compiled and form.options.own is None  # own losses have a gradient by autograd, never compiled
    found = compiled_function(losses_and_gradients) if compiles else losses_and_gradients
    for rows, block_RV in blocks(products_CV, form):
        logits_RV = to_logits(block_RV, bias_V, form)
        losses_C[rows] = found(logits_RV, target_C[rows], weight_C[rows], form)
        if grad_bias_V is not None:
            grad_bias_V += logits_RV.sum(dim=0)
    return losses_C


def _through_head(grad_CV: Tensor, head_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """grad W, as `dtype`; in halves where oneDNN would leave it all to one core: many rows, few columns, bfloat16."""
    narrow = head_VD.dtype.itemsize == 2 and head_VD.shape[1] < _FEW_COLUMNS and len(grad_CV) >= _MANY_ROWS
    if device_type_of(head_VD.device) != "cpu" or not narrow:
        return (grad_CV @ head_VD).to(dtype)
    return torch.cat([(grad_CV @ half_VD).to(dtype) for half_VD in head_VD.chunk(2, dim=1)], dim=1)


def add_product(total: Tensor, left: Tensor, right: Tensor, rows: Iterable[slice]) -> None:
    """total += left right, in place. rows: of a temporary each, where one is needed."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif not stays_wide(total, left):
        for part in rows:
            total[part] += left[part] @ right
    elif not is_dry_run():  # which has no such product on its tensors, and here no temporary to count
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


# The head of a model --------------------------------------------------------------------------------------------------


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
    kept = hasattr(wrapper, "rows_of")  # embeddings.py
    rows_R = wrapper.rows_of(name) if kept else torch.tensor(wrapper.token_indices[name], device=merged_VD.device)
    return merged_VD, TrainedRows(rows_R, wrapper.trainable_tokens_delta[name])
