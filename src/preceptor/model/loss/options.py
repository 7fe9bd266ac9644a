"""Options of the loss, and the number of its logits that are held at once. No torch: a plan of the run needs both.

    loss_n = a_n * ((1 - eps) * -log p_n[t_n]  +  eps/V * sum_v -log p_n[v])  +  z * log(sum_v exp(logit_n[v]))^2

eps: label smoothing (Szegedy et al. 2015, arXiv:1512.00567). z: z-loss (PaLM, Chowdhery et al. 2022, arXiv:2204.02311).
a_n: 1, or p_n[t_n] as a constant under DFT (Dynamic Fine-Tuning, Wu et al. 2025, arXiv:2508.05629). The weight of the
token multiplies all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from preceptor.model.sizes import FINEST

# The head and its gradient are read and written once a chunk, which 512 tokens or more make up for: at a vocabulary of
# 152,000, 64 MiB (220 tokens) take 1.4 times as long. On CPU chunks of 2048 tokens take 5 to 15 % longer than of 1024,
# as the products' operands leave the cache (benchmarks/loss.py).
LOGITS_BYTES = 256 * 2**20
_GPU_LOGITS_BYTES = 2**30  # 4,096 tokens of a vocabulary of 128,000 in half precision: one chunk of most sequences
_MOST_TOKENS = {"cpu": 1024}


@dataclass(frozen=True, slots=True)
class LossOptions:
    """0 <= label_smoothing < 1; z_loss >= 0; dft: each token's loss times its own probability, without gradient.

    own: instead of both, a function of (log p_n[t_n], w_n) that gives w_n loss_n, each of shape (N,): see own.py.
    router_aux_coef: of the routers' load-balancing loss (activations/routing.py), which is in the gradient alone.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    dft: bool = False
    own: Callable[..., Any] | None = None
    router_aux_coef: float = 0.0

    def __post_init__(self) -> None:
        assert self.own is None or not (self.dft or self.label_smoothing)
        assert 0 <= self.label_smoothing < 1, self.label_smoothing
        assert self.z_loss >= 0 and self.router_aux_coef >= 0, self


CROSS_ENTROPY = LossOptions()


def logits_budget(device_type: str) -> int:
    """Bytes of the logits of one chunk."""
    return _GPU_LOGITS_BYTES if device_type == "cuda" else LOGITS_BYTES


def chunk_tokens(
    num_trained: int,
    vocab_size: int,
    bytes_per_logit: int,
    logits_bytes: int = LOGITS_BYTES,
    device_type: str = "cpu",
) -> int:
    """Trained tokens of one chunk: at least 1, at most what `logits_bytes` holds, and chunks of about one size.

    bytes_per_logit: of the type that the matrix products give. So the logits of a sequence take
    chunk_tokens * vocab_size * bytes_per_logit bytes.
    """
    most = most_tokens(vocab_size, bytes_per_logit, logits_bytes, device_type)
    num_chunks = max(1, -(-num_trained // most))
    return max(1, -(-num_trained // num_chunks))


def most_tokens(vocab_size: int, bytes_per_logit: int, logits_bytes: int, device_type: str) -> int:
    """Tokens whose logits `logits_bytes` hold, at least 1; in half precision on a CPU a size on the grid (sizes.py)."""
    assert logits_bytes > 0
    most = max(1, logits_bytes // (bytes_per_logit * vocab_size))
    most = min(most, _MOST_TOKENS.get(device_type, most))
    on_grids = device_type == "cpu" and bytes_per_logit == 2 and most >= FINEST
    return most // FINEST * FINEST if on_grids else most
