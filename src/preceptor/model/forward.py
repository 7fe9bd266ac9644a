"""Engine: a causal LM that takes packed sequences to hidden states and losses.

Legend: T tokens of a sequence, M tokens whose hidden states are asked for, D hidden size, N trained tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from preceptor.data.forest import PackedSequence
from preceptor.errors import ModelError
from preceptor.model.activations.context import StepContext
from preceptor.model.activations.passes import decode_alone, decode_dense, decode_phases, decode_whole
from preceptor.model.activations.phases import split_by_loss
from preceptor.model.activations.policy import KEEP_ALL, ActivationPolicy
from preceptor.model.head import Head, output_head
from preceptor.model.loss.options import CROSS_ENTROPY, LossOptions
from preceptor.model.optimisations import install
from preceptor.model.parts import decoder_of, model_type

Penalty = Callable[[Tensor, Tensor, Head, PackedSequence, float], Tensor]
"""(hidden_MD, source_N, head, sequence, divisor) -> what is added to the loss."""

_WORTH = 8  # the last layer is spared for context-only tokens if they are at least one in so many


class Engine(nn.Module):
    """The root module of training. It wraps the model and holds no weights of its own."""

    def __init__(self, model: Any) -> None:
        """model: a transformers causal LM, bare or wrapped by peft. The first engine of a model installs `auto`."""
        super().__init__()
        self.model = model
        self.state = install(model)
        self.training = model.training

    def forward(
        self,
        sequence: PackedSequence,
        policy: ActivationPolicy = KEEP_ALL,
        options: LossOptions = CROSS_ENTROPY,
        step: StepContext | None = None,
        penalty: Penalty | None = None,
    ) -> Tensor:
        """The sum of w_n * loss_n over the sequence's trained tokens, over `step.divisor`.

        A scalar with a graph, also where no token is trained. Where `step` accumulates, backward must follow.
        """
        step = step or StepContext()
        embedding = decoder_of(self.model).get_input_embeddings()
        noise_TD = None if step.noise is None else step.noise.of(sequence, embedding)
        with self.state.accumulating(step.accumulates, noise_TD):
            hidden_MD, source_N = self.loss_hidden_states(sequence, policy)
        head = output_head(self.model)
        if "head_gradient" not in self.state.optimisations:
            step = StepContext(step.divisor)
        loss = head.loss(hidden_MD, source_N, sequence, options, step)
        if penalty is not None:
            loss = loss + penalty(hidden_MD, source_N, head, sequence, step.divisor)
        return loss

    def hidden_states(self, sequence: PackedSequence, policy: ActivationPolicy = KEEP_ALL) -> Tensor:
        """The last hidden state (T, D) of each token, each tree as if it were alone. No logits are computed."""
        if sequence.alone:
            return decode_alone(self.model, self.state, sequence, policy)
        self._require_rope_for(sequence, policy)
        if "attention" not in self.state.optimisations:
            return decode_dense(self.model, self.state, sequence, policy)
        return decode_whole(self.model, self.state, sequence, replace(policy, context_gradient="full"))

    def loss_hidden_states(
        self, sequence: PackedSequence, policy: ActivationPolicy = KEEP_ALL
    ) -> tuple[Tensor, Tensor]:
        """The last hidden states (M, D) of the loss-bearing tokens, at least; and source_N, as indices into them.

        A sequence without trained tokens goes through whole, so that every parameter still has its part in the graph.
        Raises ModelError for phases of a sequence that is read alone.
        """
        if sequence.alone and policy.context_gradient != "full":
            raise ModelError(
                f"memory.context_gradient: {policy.context_gradient}, but the layers of a {model_type(self.model)} "
                f"model mix tokens outside attention, so a context cannot go through them apart from its targets. Set "
                f"it to `full`."
            )
        given = self.model, self.state, sequence, policy
        _, bearing = parts = split_by_loss(sequence)
        whole = sequence.alone or not sequence.num_trained or "attention" not in self.state.optimisations
        few = _WORTH * (sequence.num_tokens - bearing.num_tokens) < sequence.num_tokens
        if not whole and policy.context_gradient != "full":
            self._require_rope_for(sequence, policy)
            hidden_MD, index_M = decode_phases(*given)
        elif not whole and not few and "last_layer" in self.state.optimisations:
            self._require_rope_for(sequence, policy)
            hidden_MD, index_M = decode_whole(*given, parts), bearing.index_T()
        else:
            hidden_MD, index_M = self.hidden_states(sequence, policy), np.arange(sequence.num_tokens)
        place_T = np.zeros(sequence.num_tokens, dtype=np.int64)
        place_T[index_M] = np.arange(len(index_M))
        return hidden_MD, torch.from_numpy(place_T[sequence.source_N]).to(hidden_MD.device)

    def _require_rope_for(self, sequence: PackedSequence, policy: ActivationPolicy) -> None:
        """Reject sequences in which rotary frequencies that follow the longest position would tie conversations
        together, or set the tokens of one phase apart from those of another.
        """
        decoder = decoder_of(self.model)
        settings = getattr(decoder.config, "rope_parameters", None) or {}
        one_pass = policy.context_gradient == "full" and sum(span.parent is None for span in sequence.spans) < 2
        if settings.get("rope_type") not in ("dynamic", "longrope") or one_pass:
            return
        limit = settings.get("original_max_position_embeddings") or decoder.config.max_position_embeddings
        if sequence.position_T.max() >= limit:
            raise ModelError(
                f"{type(decoder).__name__} changes its rotary frequencies beyond position {limit}, for all "
                f"conversations of a pass at once. Set data.max_length to at most {limit}."
            )
