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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from preceptor import config
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


Quantization = Literal["nf4", "int8"]
Init = Literal["kaiming", "gaussian", "pissa", "pissa_fast"]


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """See the section `adapter` of the run file. Patterns are pairs (name, value): the first that fits holds."""

    dora: bool = False
    rslora: bool = False
    init: Init = "kaiming"
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    modules_to_save: tuple[str, ...] = ()

    @classmethod
    def of(cls, adapter: config.Adapter) -> "LoraOptions":
        return cls(
            adapter.kind == "dora",
            adapter.use_rslora,
            adapter.init,
            tuple(adapter.rank_pattern.items()),
            tuple(adapter.alpha_pattern.items()),
            tuple(adapter.modules_to_save),
        )

    @property
    def keeps_first_values(self) -> bool:
        """Whether the adapter holds its first values too, as half of its rank (pissa.py)."""
        return self.init.startswith("pissa")

    @property
    def differs_by_layer(self) -> bool:
        """Whether layers of one kind may be adapted in different ways."""
        return bool(self.rank_pattern or self.modules_to_save)


PLAIN = LoraOptions()


def lr_factors(adapter: config.Adapter | None) -> Mapping[str, float]:
    """Factors of the learning rate by pattern of names: LoRA+ (Hayou et al. 2024)."""
    return {} if adapter is None or adapter.lr_ratio == 1 else {"*.lora_B.*": adapter.lr_ratio}


def adapter_name(adapter: config.Adapter) -> str:
    """An adapter, such as `DoRA of rank 16 with PiSSA`."""
    name = "DoRA" if adapter.kind == "dora" else "rsLoRA" if adapter.use_rslora else "LoRA"
    return f"{name} of rank {adapter.rank}{' with PiSSA' if adapter.init.startswith('pissa') else ''}"
