"""AdamW with its parameter groups, the learning-rate schedule, and gradient clipping."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

Scheduler = Literal["cosine", "linear", "constant"]


def build_optimizer(model: nn.Module, weight_decay: float, betas: Sequence[float]) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) over what requires a gradient; matrices alone decay.

    One kernel for the whole update, which makes no temporaries of a parameter's size and is four times as fast on a
    CPU. The learning rate is set by the loop before each step.
    """
    mean, square = betas
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=(mean, square), fused=True)


def learning_rate_at(
    step: int, total_steps: int, warmup_steps: int, peak: float, lr_scheduler: Scheduler, min_lr_ratio: float
) -> float:
    """Learning rate of `step` (0-based): linear rise to `peak` over the warm-up, then the scheduler's fall.

    The first warm-up step already learns (peak / warmup_steps); the last step of the run has `min_lr_ratio * peak`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if lr_scheduler == "constant":
        return peak
    progress = (step - warmup_steps + 1) / max(1, total_steps - warmup_steps)
    fall = (1 + math.cos(math.pi * progress)) / 2 if lr_scheduler == "cosine" else 1 - progress
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * fall)


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """Scale all gradients together down to `max_norm`; return their norm before that, inf or nan as found.

    Of gradients that are spread over processes it is the norm of the whole.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)
