"""Objective of a run: the loss of the trained tokens in the run's variant, and the KL divergence from the base."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from preceptor import config
from preceptor.config.code import load_code
from preceptor.data.forest import PackedSequence
from preceptor.model.activations.context import StepContext
from preceptor.model.activations.noise import EmbeddingNoise
from preceptor.model.activations.policy import KEEP_ALL, ActivationPolicy
from preceptor.model.forward import Engine
from preceptor.model.kl import ReferenceModel, kl_to_base
from preceptor.model.loss.linear_cross_entropy import Head
from preceptor.model.loss.options import CROSS_ENTROPY, LossOptions
from preceptor.model.loss.own import TokenLoss, require_token_wise
from preceptor.model.parts import causal_lm
from preceptor.model.routers import require_routers, router_aux_coef


def own_loss(loss: config.Loss) -> TokenLoss | None:
    """The loss of the user's own. Raises ConfigError and ModelError for one that cannot be."""
    if loss.code is None:
        return None
    own: TokenLoss = load_code(loss.code, "loss.code").function
    require_token_wise(own)
    return own


@dataclass(frozen=True)
class Objective:
    """Called with an engine and a sequence: the weighted sum over its trained tokens, a scalar with a graph."""

    policy: ActivationPolicy = KEEP_ALL
    options: LossOptions = CROSS_ENTROPY
    kl_coef: float = 0.0
    base: ReferenceModel | None = None
    neftune_alpha: float = 0.0
    seed: int = 0

    def noise(self, step: int) -> EmbeddingNoise | None:
        """On the embeddings, in the step of this number."""
        return EmbeddingNoise(self.neftune_alpha, self.seed, step) if self.neftune_alpha else None

    @classmethod
    def of(
        cls,
        loss: config.Loss,
        memory: config.Memory,
        model: Any,
        num_base_tokens: int,
        untrained: Sequence[int] = (),
        train: config.Train | None = None,
        base: ReferenceModel | None = None,
    ) -> "Objective":
        """Before the first step and before a checkpoint is read, so that `model` still is the base.

        untrained: tokens of the base that it never saw. base: the base, where `model` was trained before. Raises as
        `own_loss`, and ModelError where a model has no routers that could be balanced.
        """
        router_coef = router_aux_coef(loss.router_aux_coef, causal_lm(model).config)
        if router_coef:
            require_routers(model)
        variant = LossOptions(loss.label_smoothing, loss.z_loss, loss.type == "dft", own_loss(loss), router_coef)
        return cls(
            policy=ActivationPolicy(memory.context_gradient, memory.activation_checkpointing),
            options=variant,
            kl_coef=loss.kl_coef,
            base=(base or ReferenceModel.of(model, num_base_tokens, untrained)) if loss.kl_coef else None,
            neftune_alpha=train.neftune_alpha if train else 0.0,
            seed=train.seed if train else 0,
        )

    def __call__(self, engine: Engine, sequence: PackedSequence, step: StepContext | None = None) -> Tensor:
        """The sum over `step.divisor`; where `step` accumulates, backward must follow.

        The routers' load-balancing loss is part of the gradient, not of the sum.
        """
        penalty = None if self.base is None else self._divergence
        loss: Tensor = engine(sequence, self.policy, self.options, step, penalty)
        return loss

    def _divergence(
        self, hidden_MD: Tensor, source_N: Tensor, head: Head, sequence: PackedSequence, divisor: float
    ) -> Tensor:
        assert self.base is not None
        return self.kl_coef / divisor * kl_to_base(hidden_MD, source_N, head, self.base, sequence)


CROSS_ENTROPY_LOSS = Objective()
