"""What a run minimises: the loss of the trained tokens in the run's variant, and the divergence from the base."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from preceptor import config
from preceptor.data.forest import PackedSequence
from preceptor.model.activations.passes import KEEP_ALL, Keep
from preceptor.model.forward import loss_of, output_head, read_hidden_states
from preceptor.model.loss.kl import Base, kl_to_base
from preceptor.model.loss.options import CROSS_ENTROPY, LossOptions


@dataclass(frozen=True)
class Objective:
    """Called with a model and a row: the weighted sum over the row's trained tokens, a scalar with a graph."""

    keep: Keep = KEEP_ALL
    options: LossOptions = CROSS_ENTROPY
    kl_coef: float = 0.0
    base: Base | None = None

    @classmethod
    def of(cls, loss: config.Loss, memory: config.Memory, model: Any, num_base_tokens: int) -> "Objective":
        """Before the first step and before a checkpoint is read, so that `model` still is the base."""
        return cls(
            keep=Keep(memory.context_gradient, memory.activation_checkpointing),
            options=LossOptions(loss.label_smoothing, loss.z_loss, dft=loss.type == "dft"),
            kl_coef=loss.kl_coef,
            base=Base.of(model, num_base_tokens) if loss.kl_coef else None,
        )

    def __call__(self, model: Any, row: PackedSequence, divisor: float = 1.0, add_to_grad: bool = False) -> Tensor:
        """The sum over `divisor`. add_to_grad: see `loss_of`; backward must follow."""
        hidden_MD, source_N = read_hidden_states(model, row, self.keep)
        head = output_head(model)
        loss = loss_of(hidden_MD, source_N, head, row, self.options, divisor, add_to_grad)
        if self.base is not None:
            loss = loss + self.kl_coef / divisor * kl_to_base(hidden_MD, source_N, head, self.base, row)
        return loss


CROSS_ENTROPY_OF_A_ROW = Objective()
