"""Options of a pass through a model as plain values: what it keeps for its backward, and variants of the loss.

`memory.context_gradient` and `memory.activation_checkpointing`:

    full        all tokens in one pass
    recompute   phase by phase (inputs.py): of context-only tokens only each layer's input, keys and values are kept;
                the rest of a layer is computed again when backward comes to it. The exact gradient
    detach      phase by phase: keys and values of context-only tokens are constants (TokenTune, Simoulin et al. 2024),
                so nothing else of them is kept and backward never comes to them

A token is loss-bearing if a loss reads its hidden state, so with `detach` the gradient of each trained token flows
through all of the computation that predicts it, the last token of its context included, and stops at the keys and
values of the context's other tokens.

    loss_n = a_n * ((1 - eps) * -log p_n[t_n]  +  eps/V * sum_v -log p_n[v])  +  z * log(sum_v exp(logit_n[v]))^2

eps: label smoothing (Szegedy et al. 2015, arXiv:1512.00567). z: z-loss (PaLM, Chowdhery et al. 2022, arXiv:2204.02311).
a_n: 1, or p_n[t_n] as a constant under DFT (Dynamic Fine-Tuning, Wu et al. 2025, arXiv:2508.05629). The weight of the
token multiplies all of it. No torch here: a plan of the run needs both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from preceptor.errors import ModelError


@dataclass(frozen=True, slots=True)
class ActivationPolicy:
    """activation_checkpointing: no layer, all, or the first n keep only their input and run again in backward."""

    context_gradient: Literal["full", "recompute", "detach"] = "full"
    activation_checkpointing: Literal["none", "all"] | int = "none"

    def checkpointed_layers(self, num_layers: int) -> int:
        """How many layers, from the first on, are computed again in backward. Raises ModelError if there are fewer."""
        asked = self.activation_checkpointing
        if isinstance(asked, int):
            if asked > num_layers:
                raise ModelError(
                    f"memory.activation_checkpointing: {asked} layers, but the model has {num_layers}; set it "
                    f" to `all` or at most {num_layers}"
                )
            return asked
        return num_layers if asked == "all" else 0


KEEP_ALL = ActivationPolicy()


@dataclass(frozen=True, slots=True)
class LossOptions:
    """0 <= label_smoothing < 1; z_loss >= 0; dft: each token's loss times its own probability, without gradient.

    own: instead of both, a function of (log p_n[t_n], w_n) that gives w_n loss_n, each of shape (N,): see
    `softmax.own_losses`.
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
