"""Engine: a causal LM that takes packed sequences to hidden states and losses.

Legend: T tokens of a sequence, M tokens whose hidden states are asked for, D hidden size, N trained tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from preceptor.data.forest import AttentionRun, PackedSequence, attention_runs
from preceptor.errors import ModelError
from preceptor.model.activations.inputs import SequenceInputs, phases, split_by_loss
from preceptor.model.activations.modules import gradient_of, takes_gradient_in_place
from preceptor.model.activations.passes import (
    StepContext,
    decode_phases,
    decode_whole,
    no_phases,
)
from preceptor.model.attention.layout import path_lengths
from preceptor.model.loss.linear_cross_entropy import Head, linear_cross_entropy, output_head
from preceptor.model.optimisations import install
from preceptor.model.options import CROSS_ENTROPY, KEEP_ALL, ActivationPolicy, LossOptions
from preceptor.model.parts import decoder_of, device_of
from preceptor.model.routers import watch_routers
from preceptor.model.sizes import device_type_of

T = TypeVar("T")

Penalty = Callable[[Tensor, Tensor, Head, PackedSequence, float], Tensor]
"""(hidden_MD, source_N, head, sequence, divisor) -> what is added to the loss."""

# The last layer is spared for context-only tokens if they are at least one in so many,
_WORTH = 8
# and if the loss-bearing pieces, whose paths are copied one by one, join at most so many keys (4 KiB each in a model of
# 8B), or at most so many times those of the whole layer.
_FEW_KEYS = 65_536
_MOST_KEYS = 4


class Engine(nn.Module):
    """The root module of training. It wraps the model and holds no weights of its own."""

    def __init__(self, model: Any) -> None:
        """model: a transformers causal LM, bare or wrapped by peft. The first engine of a model installs `auto`."""
        super().__init__()
        self.model = model
        self.state = install(model)
        self.training = model.training

    @classmethod
    def of(cls, model: Any) -> "Engine":
        """The engine of a model: of a sharded one, that which `shard_model` was given."""
        engine = cls(model)
        ranks = engine.state.ranks
        return engine if ranks is None or ranks.root is None else ranks.root

    def forward(
        self,
        sequence: PackedSequence,
        policy: ActivationPolicy = KEEP_ALL,
        options: LossOptions = CROSS_ENTROPY,
        step: StepContext | None = None,
        penalty: Penalty | None = None,
    ) -> Tensor:
        """The sum of w_n * loss_n over the sequence's trained tokens, over `step.divisor`.

        A scalar with a graph, also where no token is trained. Where `step` accumulates, backward must follow. Of a
        sharded model this is the method of the engine that `shard_model` was given, on all ranks alike. Raises
        ModelError for `options.router_aux_coef` of a model without routers.
        """
        step = step or StepContext()
        with nullcontext() if self.state.ranks is None else self.state.ranks.entered():
            balanced = options.router_aux_coef > 0 and torch.is_grad_enabled()
            if balanced:
                watch_routers(self.model, self.state)
            inputs = self._inputs(sequence, policy, step.num_levels, balanced)
            try:
                self.state.accumulates = step.accumulates
                if step.noise is not None:
                    self.state.noise_TD = step.noise.of(sequence, decoder_of(self.model).get_input_embeddings())
                hidden_MD, source_N = self._loss_hidden_states(inputs, policy)
            finally:
                self.state.accumulates, self.state.noise_TD = False, None
            head, has_graph = output_head(self.model), torch.is_grad_enabled()
            in_place = "head_gradient" in self.state.optimisations and has_graph and step.accumulates
            loss = linear_cross_entropy(
                hidden_MD,
                head,
                source_N,
                inputs.target_N,
                inputs.weight_N / step.divisor,
                options=options,
                divisor=step.divisor,
                head_grad_VD=gradient_of(head.weight_VD)
                if in_place and takes_gradient_in_place(head.weight_VD)
                else None,
                head_cast=step.head_cast if "head_gradient" in self.state.optimisations else None,
                gradient_is_one=in_place,
                compiled=(self.state.compiles or self.state.fused) and has_graph,
            )
            if penalty is not None:
                loss = loss + penalty(hidden_MD, source_N, head, sequence, step.divisor)
            if inputs.routing is not None:
                aux = inputs.routing.loss() / step.divisor  # in the gradient; its value is left with the step
                if step.router_aux is not None:
                    step.router_aux.append(aux.detach())
                loss = loss + options.router_aux_coef * (aux - aux.detach())
            return loss

    def call(self, function: Callable[[], T]) -> T:
        """What a function gives that runs the model, in whatever way.

        Of a sharded model the weights outside its layers are gathered meanwhile, those of each layer while it runs. All
        ranks call it alike, and pass through the layers equally often in it.
        """
        ranks = self.state.ranks
        if ranks is None or ranks.root is None or ranks.inside:
            return function()
        try:
            result: T = ranks.root.enter(function)
        except BaseException:
            ranks.root.reset_iter_state()
            raise
        finally:
            ranks.reshard()
        return result

    def enter(self, function: Callable[[], T]) -> T:
        """`call`, between FSDP2's hooks (`register_fsdp_forward_method`)."""
        assert self.state.ranks is not None
        with self.state.ranks.entered():
            return function()

    def hidden_states(self, sequence: PackedSequence, policy: ActivationPolicy = KEEP_ALL) -> Tensor:
        """The last hidden state (T, D) of each token, each tree as if it were alone. No logits are computed."""
        padded = "attention" in self.state.optimisations and not sequence.alone
        return self.call(lambda: self._whole_states(SequenceInputs.of(self.model, sequence, padded=padded), policy))

    def loss_hidden_states(
        self, sequence: PackedSequence, policy: ActivationPolicy = KEEP_ALL, num_levels: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The last hidden states (M, D) of the loss-bearing tokens, at least; and source_N, as indices into them.

        A sequence without trained tokens goes through whole, so that every parameter still has its part in the graph.
        num_levels: as in StepContext. Raises ModelError for phases where layers mix tokens outside attention.
        """
        return self.call(lambda: self._loss_hidden_states(self._inputs(sequence, policy, num_levels), policy))

    def _whole_states(self, inputs: SequenceInputs, policy: ActivationPolicy) -> Tensor:
        if not inputs.sequence.alone:
            self._require_rope_for(inputs.sequence, policy)
        return decode_whole(self.model, self.state, inputs, policy)

    def _inputs(
        self, sequence: PackedSequence, policy: ActivationPolicy, num_levels: int, balanced: bool = False
    ) -> SequenceInputs:
        """What a loss reads of a sequence, on the device: whole, phase by phase, or with the last layer spared."""
        if sequence.alone and policy.context_gradient != "full":
            raise no_phases(self.model, policy)
        phased = policy.context_gradient != "full"
        if sequence.alone or "attention" not in self.state.optimisations:
            return SequenceInputs.of(self.model, sequence, num_levels=num_levels, padded=False, balanced=balanced)
        if phased and (sequence.num_trained or num_levels):
            plan = phases(sequence, num_levels)
            return SequenceInputs.of(self.model, sequence, plan, num_levels=num_levels, balanced=balanced)
        if sequence.num_trained and "last_layer" in self.state.optimisations and not balanced:
            split = split_by_loss(sequence)
            is_worth = _WORTH * (sequence.num_tokens - split[1].num_tokens) >= sequence.num_tokens
            if is_worth and self._joins_few_keys(sequence, split[1].runs):
                return SequenceInputs.of(self.model, sequence, split=split)
        return SequenceInputs.of(self.model, sequence, balanced=balanced)

    def _joins_few_keys(self, sequence: PackedSequence, runs: Sequence[AttentionRun]) -> bool:
        """Of N turns in one chain `runs` join (N + 1) / 2 times its tokens, which are the keys of the whole layer.

        Of branches that joins the paths as well; not on a GPU, where flex attention copies none.
        """
        num_keys = sum(path_lengths(runs)[1])
        if num_keys <= _FEW_KEYS:
            return True
        on_gpu = device_type_of(device_of(self.model)) == "cuda"
        num_whole = sequence.num_tokens if on_gpu else sum(path_lengths(attention_runs(sequence.spans))[1])
        return num_keys <= _MOST_KEYS * num_whole

    def _loss_hidden_states(self, inputs: SequenceInputs, policy: ActivationPolicy) -> tuple[Tensor, Tensor]:
        if inputs.by_phases:
            self._require_rope_for(inputs.sequence, policy)
            return decode_phases(self.model, self.state, inputs, policy), inputs.source_N
        return self._whole_states(inputs, policy), inputs.source_N

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
