"""Linear cross-entropy on the trained tokens only.

    loss = sum_n  w_n * -log softmax( cap( scale * (h_{s_n} W^T + b) ) )[t_n]        cap(x) = c * tanh(x / c)

`linear_cross_entropy` computes it and its gradients in one pass, a chunk of trained tokens at a time, so the logits of
context tokens never exist and at no time more than one chunk's (the idea of Wijmans et al. 2024, "Cut Your Losses in
Large-Vocabulary Language Models", and of Liger Kernel, here in plain matrix products).
`linear_cross_entropy_reference` is the same in naive float64; `token_losses` is for evaluation.

Legend: T tokens of a row, D hidden size, V vocabulary, N trained tokens, C trained tokens of one chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_BYTES = 256 * 2**20  # budget of one chunk's float32 logits


@dataclass(frozen=True, eq=False, slots=True)
class TrainedRows:
    """The only rows of a head that are trained: weight_VD[rows_R] has the values of weight_RD, which gets gradients.

    So a few new tokens beside a frozen head cost R rows of gradient and not V.
    """

    rows_R: Tensor
    weight_RD: Tensor


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    source_N: Tensor,
    target_N: Tensor,
    weight_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    trained_rows: TrainedRows | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The weighted sum of the losses of N trained tokens, a scalar; gradients reach hidden_TD, weight_VD and bias_V.

    Matrix products run in the dtype of weight_VD, or of autocast where that is on for the device; the softmax, the
    loss and the sum are float32 (float64 for float64 inputs). A head without `requires_grad` costs no gradient. With
    N = 0 the result is a zero whose backward gives zeros. One backward only, as its gradients are computed ahead.
    With trained_rows, weight_VD holds their values already.

    Memory beyond inputs and gradients: two float32 buffers of chunk_tokens x V, where
    chunk_tokens defaults to what keeps one of them within LOGITS_BYTES; and, for a half-precision head whose tokens
    take more than one chunk, a float32 accumulator of its gradient, since rounding after each chunk would lose bits.
    """
    form = _Form(softcap, logit_scale, _product_dtype(hidden_TD, weight_VD), _chunk_tokens(weight_VD, chunk_tokens))
    rows_R, weight_RD = (None, None) if trained_rows is None else (trained_rows.rows_R, trained_rows.weight_RD)
    if not torch.is_grad_enabled() or not _any_requires_grad(hidden_TD, weight_VD, bias_V, weight_RD):
        losses_N, _ = _losses(hidden_TD, weight_VD, source_N, target_N, bias_V, form)
        return (losses_N * weight_N.to(losses_N)).sum()
    leaves = (hidden_TD, weight_VD, bias_V, weight_RD)
    loss: Tensor = _LinearCrossEntropy.apply(*leaves, rows_R, source_N, target_N, weight_N, form)
    return loss


def linear_cross_entropy_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    source_N: Tensor,
    target_N: Tensor,
    weight_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    trained_rows: TrainedRows | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The formula as it stands, in float64, with all logits at once and autograd's own gradients."""
    if trained_rows is not None:
        weight_VD = weight_VD.index_copy(0, trained_rows.rows_R, trained_rows.weight_RD.to(weight_VD.dtype))
    with torch.autocast(hidden_TD.device.type, enabled=False):
        logits_NV = hidden_TD.double()[source_N] @ weight_VD.double().T
        if bias_V is not None:
            logits_NV = logits_NV + bias_V.double()
        logits_NV = logits_NV * logit_scale
        if softcap is not None:
            logits_NV = softcap * torch.tanh(logits_NV / softcap)
        log_probs_NV = torch.log_softmax(logits_NV, dim=-1)
        return -(weight_N.double() * log_probs_NV.gather(1, target_N[:, None])[:, 0]).sum()


@torch.no_grad()
def token_losses(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    source_N: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """For evaluation: each token's unweighted loss (float32) and whether it is the most likely one (bool)."""
    form = _Form(softcap, logit_scale, _product_dtype(hidden_TD, weight_VD), _chunk_tokens(weight_VD, None))
    losses_N, correct_N = _losses(hidden_TD, weight_VD, source_N, target_N, bias_V, form)
    return losses_N.float(), correct_N


@dataclass(frozen=True, slots=True)
class _Form:
    """What is constant during one call."""

    softcap: float | None
    logit_scale: float
    product_dtype: torch.dtype
    chunk_tokens: int

    @property
    def softmax_dtype(self) -> torch.dtype:
        return torch.float64 if self.product_dtype == torch.float64 else torch.float32


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _product_dtype(hidden_TD: Tensor, weight_VD: Tensor) -> torch.dtype:
    device_type = hidden_TD.device.type
    if weight_VD.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return weight_VD.dtype


def _chunk_tokens(weight_VD: Tensor, asked: int | None) -> int:
    if asked is not None:
        assert asked > 0
        return asked
    return max(1, LOGITS_BYTES // (4 * weight_VD.shape[0]))


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, form: _Form) -> Tensor:
    """cap(scale * (h W^T + b)) of one chunk in the softmax's dtype; weight_VD is already in the products' dtype."""
    logits_CV = (hidden_CD @ weight_VD.T).to(form.softmax_dtype)
    if bias_V is not None:
        logits_CV += bias_V
    if form.logit_scale != 1.0:
        logits_CV *= form.logit_scale
    if form.softcap is not None:
        logits_CV.div_(form.softcap).tanh_().mul_(form.softcap)
    return logits_CV


def _losses(
    hidden_TD: Tensor, weight_VD: Tensor, source_N: Tensor, target_N: Tensor, bias_V: Tensor | None, form: _Form
) -> tuple[Tensor, Tensor]:
    """The loss of each trained token and whether it is the most likely one; no gradients."""
    losses_N = torch.zeros(len(target_N), dtype=form.softmax_dtype, device=hidden_TD.device)
    correct_N = torch.zeros(len(target_N), dtype=torch.bool, device=hidden_TD.device)
    with torch.no_grad(), torch.autocast(hidden_TD.device.type, enabled=False):
        head_VD = weight_VD.to(form.product_dtype)
        for start in range(0, len(target_N), form.chunk_tokens):
            chunk = slice(start, start + form.chunk_tokens)
            logits_CV = _logits(hidden_TD[source_N[chunk]].to(form.product_dtype), head_VD, bias_V, form)
            correct_N[chunk] = logits_CV.argmax(dim=-1) == target_N[chunk]
            losses_N[chunk] = -torch.log_softmax(logits_CV, dim=-1).gather(1, target_N[chunk, None])[:, 0]
    return losses_N, correct_N


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
        form: _Form,
    ) -> Tensor:
        leaves = (hidden_TD, weight_VD, bias_V, weight_RD)
        needed = ctx.needs_input_grad  # type: ignore[attr-defined]
        many_chunks = len(target_N) > form.chunk_tokens
        grad_hidden_TD, grad_weight_VD, grad_bias_V, grad_weight_RD = (
            torch.zeros_like(leaf, dtype=form.softmax_dtype if many_chunks and leaf is not hidden_TD else leaf.dtype)
            if leaf is not None and needs_grad
            else None
            for leaf, needs_grad in zip(leaves, needed, strict=False)
        )
        loss = torch.zeros((), dtype=form.softmax_dtype, device=hidden_TD.device)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            head_VD = weight_VD.to(form.product_dtype)
            for start in range(0, len(target_N), form.chunk_tokens):
                chunk = slice(start, start + form.chunk_tokens)
                hidden_CD = hidden_TD[source_N[chunk]].to(form.product_dtype)
                logits_CV = _logits(hidden_CD, head_VD, bias_V, form)
                chunk_loss, grad_CV = _chunk_loss_and_grad(logits_CV, target_N[chunk], weight_N[chunk], form)
                loss += chunk_loss
                if grad_bias_V is not None:
                    grad_bias_V += grad_CV.sum(dim=0)
                grad_CV = grad_CV.to(form.product_dtype)
                if grad_hidden_TD is not None:  # a source may occur several times: where a tree branches
                    grad_hidden_TD.index_add_(0, source_N[chunk], (grad_CV @ head_VD).to(hidden_TD.dtype))
                if grad_weight_VD is not None:
                    _add_product(grad_weight_VD, grad_CV, hidden_CD)
                if grad_weight_RD is not None:
                    _add_product(grad_weight_RD, grad_CV[:, rows_R], hidden_CD)
        ctx.grads = [  # type: ignore[attr-defined]
            None if grad is None or leaf is None else grad.to(leaf.dtype)
            for leaf, grad in zip(leaves, (grad_hidden_TD, grad_weight_VD, grad_bias_V, grad_weight_RD), strict=True)
        ]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = ctx.grads  # type: ignore[attr-defined]
        if grads is None:
            raise RuntimeError(
                "linear_cross_entropy can be differentiated once only: its gradients are scaled in place"
            )
        ctx.grads = None  # type: ignore[attr-defined]
        scaled = [None if grad is None else grad.mul_(grad_loss.to(grad.dtype)) for grad in grads]
        return (*scaled, None, None, None, None, None)


def _add_product(total_XD: Tensor, grad_CX: Tensor, hidden_CD: Tensor) -> None:
    """total += grad^T hidden, without a temporary where the dtypes agree."""
    if total_XD.dtype == grad_CX.dtype:
        total_XD.addmm_(grad_CX.T, hidden_CD)
    else:
        total_XD += grad_CX.T @ hidden_CD


def _chunk_loss_and_grad(logits_CV: Tensor, target_C: Tensor, weight_C: Tensor, form: _Form) -> tuple[Tensor, Tensor]:
    """The chunk's loss, and its gradient by h W^T + b: w * scale * cap'(.) * (softmax - onehot).

    By softmax and its maximum rather than log_softmax and exp: torch's exp on CPU is 20 times slower where results
    underflow. -log p_t would be infinite there, so the loss is (z_max - z_t) - log p_max.
    """
    weight_C1 = weight_C.to(logits_CV.dtype)[:, None]
    top_C1 = logits_CV.amax(dim=-1, keepdim=True)
    grad_CV = torch.softmax(logits_CV, dim=-1)
    losses_C1 = top_C1 - logits_CV.gather(1, target_C[:, None]) - grad_CV.amax(dim=-1, keepdim=True).log()
    grad_CV.scatter_add_(1, target_C[:, None], torch.full_like(losses_C1, -1.0))
    grad_CV *= weight_C1 * form.logit_scale
    if form.softcap is not None:  # d cap(x) / dx = 1 - tanh^2 = 1 - (cap(x) / c)^2
        grad_CV *= logits_CV.div_(form.softcap).square_().neg_().add_(1.0)
    return (weight_C1 * losses_C1).sum(), grad_CV
