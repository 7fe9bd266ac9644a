"""KL divergence of the tuned model from the base on the trained tokens.

    kl = sum_n  w_n * sum_v p_n[v] * (log p_n[v] - log q_n[v])        p: tuned, q: base, both over the tokens it knows

It is taken where the trained token is one that the base knows, over such tokens alone: the base knows nothing of added
tokens and of those that it never saw, and end-of-turn tokens should not be penalised. Chunked like the loss: at no time
more than one chunk's logits exist, and they are computed again in backward.

Legend: T tokens of a sequence, M of them with a hidden state at hand, D hidden size, B tokens of the base's vocabulary,
N trained tokens of a sequence, C of one chunk.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from preceptor.data.forest import PackedSequence
from preceptor.errors import explaining_out_of_memory
from preceptor.model.attention.layout import on_device
from preceptor.model.forward import Engine
from preceptor.model.loss.linear_cross_entropy import Head, output_head
from preceptor.model.parts import evaluating
from preceptor.model.sharding import is_sharded, sharded_copy

LOGITS_BYTES = 128 * 2**20  # budget of one chunk's float32 logits, of which there are two
_LEFT_OUT = -1e30  # of a logit: such a token has no part in a softmax, and no gradient
_NO_ROOM = (
    "loss.kl_coef: the copy of the base model does not fit in memory beside the model. Train an adapter, whose base is "
    "the model itself, or set loss.kl_coef: 0"
)


@dataclass(frozen=True, eq=False)
class ReferenceModel:
    """The model as it was before training. With an adapter it is the same model without it, at no cost; in full
    fine-tuning a frozen copy, which takes the memory of its weights again.

    num_tokens: its vocabulary, without tokens that were added for training. untrained: those of it that it never saw.
    """

    model: nn.Module
    is_copy: bool
    num_tokens: int
    untrained: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: Any, num_tokens: int, untrained: Sequence[int] = ()) -> "ReferenceModel":
        """Take it before the first step."""
        if hasattr(model, "disable_adapter"):
            return cls(model, False, num_tokens, tuple(untrained))
        with explaining_out_of_memory(_NO_ROOM):
            sharded = is_sharded(Engine.of(model))
            copied = sharded_copy(model) if sharded else deepcopy(model).requires_grad_(False).eval()
        return cls(copied, True, num_tokens, tuple(untrained))

    @torch.no_grad()
    def read(self, sequence: PackedSequence) -> tuple[Tensor, Head]:
        """Its hidden states (T, D) of a sequence, and its head. The head of a sharded copy stays gathered."""
        engine = Engine.of(self.model)
        adapter_off = nullcontext() if self.is_copy else self.model.disable_adapter()  # type: ignore[operator]
        with evaluating(self.model), adapter_off:
            if self.is_copy and is_sharded(engine):
                return engine.enter(lambda: (engine.hidden_states(sequence), output_head(self.model)))
            return engine.hidden_states(sequence), output_head(self.model)


def kl_to_base(
    hidden_MD: Tensor,
    source_N: Tensor,
    head: Head,
    base: ReferenceModel,
    sequence: PackedSequence,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The weighted sum of divergences over a sequence's trained tokens in nats, a scalar with a graph.

    hidden_MD, source_N: the tuned model's hidden states and where in them each trained token is predicted, as
    `Engine.loss_hidden_states` gives them.
    """
    base_hidden_TD, base_head = base.read(sequence)
    known = (sequence.target_N < base.num_tokens) & ~np.isin(sequence.target_N, base.untrained)
    arrays = {"known": np.flatnonzero(known), "source": sequence.source_N[known], "weight": sequence.weight_N[known]}
    given = on_device({**arrays, "untrained": np.array(base.untrained, dtype=np.int64)}, hidden_MD.device)
    offset_B = _offsets(head, given["untrained"])[: base.num_tokens]
    source_N, base_source_N, weight_N = source_N[given["known"]], given["source"], given["weight"]
    step = chunk_tokens or max(1, LOGITS_BYTES // (4 * base.num_tokens))
    if head.trained_rows is not None:  # none that counts here
        head = replace(head, weight_VD=head.weight_VD.detach())

    def divergence(hidden_CD: Tensor, base_CD: Tensor, weight_C: Tensor) -> Tensor:
        log_p_CB, log_q_CB = (
            torch.log_softmax(each.logits(states_CD, base.num_tokens).add_(offset_B), dim=-1)
            for each, states_CD in ((head, hidden_CD), (base_head, base_CD))
        )
        kl_C = (log_p_CB.exp() * (log_p_CB - log_q_CB)).sum(dim=-1)
        return (weight_C.to(kl_C) * kl_C).sum()

    total = hidden_MD.sum() * 0.0
    pieces = zip(source_N.split(step), base_source_N.split(step), weight_N.split(step), strict=True)
    for source_C, base_source_C, weight_C in pieces:
        chunk = (hidden_MD[source_C], base_hidden_TD[base_source_C], weight_C)
        total = total + checkpoint(divergence, *chunk, use_reentrant=False)
    return total


def _offsets(head: Head, untrained_U: Tensor) -> Tensor:
    """What is added to the logits (V,): 0, or what leaves out a token that the base never saw: one of `untrained_U`, or
    one whose row is trained."""
    offset_V = torch.zeros(len(head.weight_VD), dtype=torch.float32, device=untrained_U.device)
    offset_V.index_fill_(0, untrained_U, _LEFT_OUT)
    if head.trained_rows is not None:
        offset_V.index_fill_(0, head.trained_rows.rows_R, _LEFT_OUT)
    return offset_V
