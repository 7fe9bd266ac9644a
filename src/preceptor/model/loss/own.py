"""A loss of the user's own: a function of each token's log-probability and weight, with its gradient by autograd.

    f(log_prob_N, weight_N) -> loss_N,    all of shape (N,);    by default  f = -weight_N * log_prob_N

What is minimised is the sum of f over the step, divided once by the step's number of trained tokens (or conversations).
f is called for parts of the tokens, so each of its values may depend on its own token alone. Then the gradient by the
logits is exact: df_n/dlog p_n * ([v = target] - q[v]), with q the softmax.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from preceptor.errors import ModelError

TokenLoss = Callable[[Tensor, Tensor], Tensor]


def own_losses(function: TokenLoss, log_prob_R: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of some tokens, and their slopes by the log-probability. Raises ModelError for another shape."""
    with torch.enable_grad():
        leaf_R = log_prob_R.detach().requires_grad_()
        losses_R = function(leaf_R, weight_R)
        if not isinstance(losses_R, Tensor) or losses_R.shape != leaf_R.shape:
            found = f"of shape {tuple(losses_R.shape)}" if isinstance(losses_R, Tensor) else type(losses_R).__name__
            raise ModelError(f"loss.code: gave {found} for {len(leaf_R)} tokens; give a tensor of their shape (N,)")
        if not losses_R.requires_grad:
            raise ModelError("loss.code: its losses have no gradient by the log-probabilities; compute them with torch")
        (slope_R,) = torch.autograd.grad(losses_R.sum(), leaf_R)
    return losses_R.detach().to(log_prob_R.dtype), slope_R


def require_token_wise(function: TokenLoss) -> None:
    """Raises ModelError for a function that gives a token another loss beside other tokens, or fails."""
    log_prob_N = torch.tensor([-0.01, -3.0, -0.7, -12.0, -0.2, -1.5], dtype=torch.float64)
    weight_N = torch.tensor([1.0, 1.0, 0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
    try:
        together = own_losses(function, log_prob_N, weight_N)
        alone = [own_losses(function, log_prob_N[n : n + 1], weight_N[n : n + 1]) for n in range(len(log_prob_N))]
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"loss.code: raised {type(error).__name__}: {error}") from error
    for what, whole_N, parts in zip(("loss", "gradient"), together, zip(*alone, strict=True), strict=True):
        if not torch.allclose(whole_N, torch.cat(parts), rtol=1e-9, atol=1e-12, equal_nan=True):
            raise ModelError(
                f"loss.code: the {what} of a token changes with the tokens beside it, and they are computed in parts: "
                "let each value depend on its own log-probability and weight alone, and divide by nothing"
            )
