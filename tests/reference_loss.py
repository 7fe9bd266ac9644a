"""Reference implementation of the loss (float64, autograd), used to test model/loss/linear_cross_entropy.py."""

import torch
from torch import Tensor

from preceptor.model.loss.linear_cross_entropy import Head, HeadCast
from preceptor.model.loss.softmax import LOGITS_BYTES
from preceptor.model.options import CROSS_ENTROPY, LossOptions


def linear_cross_entropy_reference(
    hidden_TD: Tensor,
    head: Head,
    source_N: Tensor,
    target_N: Tensor,
    weight_N: Tensor,
    *,
    options: LossOptions = CROSS_ENTROPY,
    divisor: float = 1.0,
    logits_bytes: int = LOGITS_BYTES,
    head_grad_VD: Tensor | None = None,
    head_cast: HeadCast | None = None,
) -> Tensor:
    """sum_n w_n loss_n with loss_n as in options.py. The last three arguments are of speed and memory: unused."""
    weight_VD, rows = head.weight_VD, head.trained_rows
    if rows is not None:
        weight_VD = weight_VD.index_copy(0, rows.rows_R, rows.weight_RD.to(weight_VD.dtype))
    with torch.autocast(hidden_TD.device.type, enabled=False):
        logits_NV = hidden_TD.double()[source_N] @ weight_VD.double().T
        if head.bias_V is not None:
            logits_NV = logits_NV + head.bias_V.double()
        logits_NV = logits_NV * head.logit_scale
        if head.softcap is not None:
            logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
        log_probs_NV = torch.log_softmax(logits_NV, dim=-1)
        target_log_prob_N = log_probs_NV.gather(1, target_N[:, None])[:, 0]
        eps = options.label_smoothing
        losses_N = -(1 - eps) * target_log_prob_N - eps * log_probs_NV.mean(dim=-1)
        if options.dft:
            losses_N = target_log_prob_N.detach().exp() * losses_N
        if options.own is not None:
            own_N = options.own(target_log_prob_N, weight_N.double() * divisor) / divisor
            losses_N = own_N / weight_N.double()
        losses_N = losses_N + options.z_loss * torch.logsumexp(logits_NV, dim=-1).square()
        return (weight_N.double() * losses_N).sum()
