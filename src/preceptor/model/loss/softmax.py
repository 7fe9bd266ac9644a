"""Matrix products -> losses and their gradients, a block of tokens at a time, in place.

The products of a chunk (trained tokens x vocabulary) are held once, in the type in which they were computed. A block is
as many of its rows as fit the processor's cache in the softmax's type, so the dozen passes over a block cost about what
one pass over main memory would, and there is never a float32 copy of the chunk.

Legend: C tokens of a chunk, R tokens of a block, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from preceptor.errors import ModelError
from preceptor.model.attention.layout import computed_tokens
from preceptor.model.options import LossOptions
from preceptor.model.sizes import FINEST, device_type_of, representative

_BLOCK_LOGITS = {"cpu": 2**18, "cuda": 2**25}  # 1 MiB of float32, half of a core's cache; enough to fill a GPU


# The head and its gradient are read and written once a chunk, which 512 tokens or more make up for: at a vocabulary of
# 152,000, 64 MiB (220 tokens) take 1.4 times as long. On CPU chunks of 2048 tokens take 5 to 15 % longer than of 1024,
# as the products' operands leave the cache (benchmarks/loss.py).
LOGITS_BYTES = 256 * 2**20
_GPU_LOGITS_BYTES = 2**30  # 4,096 tokens of a vocabulary of 128,000 in half precision: one chunk of most sequences
_MOST_TOKENS = {"cpu": 1024}


def chunk_tokens(
    num_trained: int, vocab_size: int, bytes_per_logit: int, logits_bytes: int | None = None, device_type: str = "cpu"
) -> int:
    """Trained tokens of one chunk: at least 1, at most what `logits_bytes` holds, and chunks of about one size.

    bytes_per_logit: of the type that the matrix products give. So the logits of a sequence take
    chunk_tokens * vocab_size * bytes_per_logit bytes.
    """
    most = most_tokens(vocab_size, bytes_per_logit, logits_bytes, device_type)
    num_chunks = max(1, -(-num_trained // most))
    return max(1, -(-num_trained // num_chunks))


def most_tokens(vocab_size: int, bytes_per_logit: int, logits_bytes: int | None, device_type: str) -> int:
    """Tokens whose logits `logits_bytes` hold (None: the device's), at least 1; of halves on a CPU a grid's size."""
    logits_bytes = logits_bytes or (_GPU_LOGITS_BYTES if device_type == "cuda" else LOGITS_BYTES)
    most = max(1, logits_bytes // (bytes_per_logit * vocab_size))
    most = min(most, _MOST_TOKENS.get(device_type, most))
    on_grids = device_type == "cpu" and bytes_per_logit == 2 and most >= FINEST
    return most // FINEST * FINEST if on_grids else most


@dataclass(frozen=True, slots=True)
class LossForm:
    """What is constant during one call."""

    softcap: float | None
    logit_scale: float
    options: LossOptions
    product_dtype: torch.dtype
    chunk_tokens: int
    most_tokens: int
    divisor: float = 1.0  # by which weights are divided already
    compiled: bool = False

    def computed_tokens(self, num_tokens: int, head_VD: Tensor) -> int:
        """With those that round so many up to the grid, unless memory is not for so many."""
        computed = computed_tokens(num_tokens, head_VD)
        return computed if computed <= self.most_tokens else num_tokens

    @property
    def softmax_dtype(self) -> torch.dtype:
        return torch.float64 if self.product_dtype == torch.float64 else torch.float32


def block_tokens_of(device: torch.device, vocab_size: int) -> int:
    """Rows of a block, where there are as many."""
    return max(1, _BLOCK_LOGITS.get(device_type_of(device), 2**25) // vocab_size)


def blocks(products_CV: Tensor, form: LossForm, write_back: bool = True) -> Iterator[tuple[slice, Tensor]]:
    """Each block's rows of the chunk, and its products in the softmax's type: the chunk's own memory where it can be.

    With write_back, what is done to a block in place reaches the chunk once the next one is asked for.
    """
    num_tokens, vocab_size = products_CV.shape
    block_tokens = min(num_tokens, block_tokens_of(products_CV.device, vocab_size))
    own = products_CV.dtype == form.softmax_dtype
    if not own:
        buffer_RV = torch.empty(block_tokens, vocab_size, dtype=form.softmax_dtype, device=products_CV.device)
    for start in representative(range(0, num_tokens, block_tokens)):
        rows = slice(start, min(num_tokens, start + block_tokens))
        if own:
            yield rows, products_CV[rows]
            continue
        block_RV = buffer_RV[: rows.stop - start].copy_(products_CV[rows])
        yield rows, block_RV
        if write_back:
            products_CV[rows].copy_(block_RV)


def to_logits(products_RV: Tensor, bias_V: Tensor | None, form: LossForm) -> Tensor:
    """cap(scale * (h W^T + b)) with cap(x) = c * tanh(x / c), in place."""
    if bias_V is not None:
        products_RV += bias_V
    if form.logit_scale != 1.0:
        products_RV *= form.logit_scale
    if form.softcap is not None:
        products_RV.div_(form.softcap).tanh_().mul_(form.softcap)
    return products_RV


def token_losses_of(logits_RV: Tensor, target_R: Tensor) -> Tensor:
    """-log p of each target; the logits are used up. As one logit less the greatest, so that small losses keep bits."""
    return _exponentials(logits_RV, target_R)[-1][:, 0]


def losses_and_gradients(logits_RV: Tensor, target_R: Tensor, weight_R: Tensor, form: LossForm) -> Tensor:
    """Each token's weighted loss; the logits become the gradient of their sum by h W^T + b.

    With q = softmax(logits), a = w * (p_target if dft else 1), s = logsumexp(logits):

        gradient[v] = scale * cap'(.) * ((a + 2 w z s) * q[v]  -  a * eps / V  -  a * (1 - eps) * [v = target])

    so whatever the options, the exponentials are multiplied by one number a token.
    """
    eps, z_loss = form.options.label_smoothing, form.options.z_loss
    slope_RV = None
    if form.softcap is not None:  # d cap(x) / dx = 1 - tanh^2 = 1 - (cap(x) / c)^2
        slope_RV = (logits_RV / form.softcap).square_().neg_().add_(1.0)
    mean_R1 = logits_RV.mean(dim=-1, keepdim=True) if eps else None
    top_R1, total_R1, log_total_R1, cross_entropy_R1 = _exponentials(logits_RV, target_R)
    weight_R1 = weight_R.to(logits_RV.dtype)[:, None]
    share_R1 = weight_R1 * torch.exp(-cross_entropy_R1) if form.options.dft else weight_R1
    losses_R1 = cross_entropy_R1
    if mean_R1 is not None:
        losses_R1 = (1 - eps) * losses_R1 + eps * (top_R1 - mean_R1 + log_total_R1)
    losses_R1 = share_R1 * losses_R1
    if form.options.own is not None:
        own_R, slope_R = own_losses(form.options.own, -cross_entropy_R1[:, 0], weight_R1[:, 0] * form.divisor)
        losses_R1, share_R1 = own_R[:, None] / form.divisor, -slope_R[:, None] / form.divisor
    factor_R1 = share_R1
    if z_loss:
        log_sum_R1 = top_R1 + log_total_R1
        losses_R1 = losses_R1 + z_loss * weight_R1 * log_sum_R1.square()
        factor_R1 = factor_R1 + 2 * z_loss * weight_R1 * log_sum_R1
    gradient_RV = logits_RV.mul_(factor_R1 * form.logit_scale / total_R1)
    if eps:
        gradient_RV -= share_R1 * (form.logit_scale * eps / logits_RV.shape[1])
    gradient_RV.scatter_add_(1, target_R[:, None], -(1 - eps) * form.logit_scale * share_R1)
    if slope_RV is not None:
        gradient_RV *= slope_RV
    return losses_R1[:, 0]


def _exponentials(logits_RV: Tensor, target_R: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The logits become exp(logit - greatest). Of each token: the greatest, the sum, its logarithm, and -log p of the
    target.

    Bounded below where the result would be subnormal: torch's exp on CPU is 200 times slower there, and no sum of
    theirs reaches the last bit of a total that is at least 1.
    """
    least = math.ceil(math.log(torch.finfo(logits_RV.dtype).tiny))
    top_R1 = logits_RV.amax(dim=-1, keepdim=True)
    below_top_R1 = top_R1 - logits_RV.gather(1, target_R[:, None])
    total_R1 = logits_RV.sub_(top_R1).clamp_min_(least).exp_().sum(dim=-1, keepdim=True)
    log_total_R1 = total_R1.log()
    return top_R1, total_R1, log_total_R1, below_top_R1 + log_total_R1


# A loss of the user's own ---------------------------------------------------------------------------------------------

TokenLoss = Callable[[Tensor, Tensor], Tensor]
"""f(log_prob_N, weight_N) -> loss_N, all of shape (N,); by default f = -weight_N * log_prob_N.

What is minimised is the sum of f over the step, divided once by the step's number of trained tokens (or conversations).
f is called for parts of the tokens, so each of its values may depend on its own token alone. Then the gradient by the
logits is exact: df_n/dlog p_n * ([v = target] - q[v]), with q the softmax.
"""


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
