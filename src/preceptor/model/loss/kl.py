"""Staying near the base: the divergence of the tuned model from the base on the trained tokens.

    kl = sum_n  w_n * sum_v p_n[v] * (log p_n[v] - log q_n[v])        p: tuned, q: base, both over the base's vocabulary

It is taken where the trained token is one that the base has, over those tokens alone: the base knows nothing of added
tokens, and to be held back from ending a turn is not meant. Chunked like the loss: at no time more than one chunk's
logits exist, and they are computed again in backward.

Legend: T tokens of a row, M of them with a hidden state at hand, D hidden size, V vocabulary, B tokens of the base's
vocabulary, N trained tokens of a row, C of one chunk.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from preceptor.data.forest import PackedSequence
from preceptor.model.forward import Head, hidden_states, output_head

LOGITS_BYTES = 128 * 2**20  # budget of one chunk's float32 logits, of which there are two


@dataclass(frozen=True, eq=False)
class Base:
    """The model as it was before training. With an adapter it is the same model without it, at no cost; in full
    fine-tuning a frozen copy, which takes the memory of its weights again.

    num_tokens: its vocabulary, without tokens that were added for training.
    """

    model: nn.Module
    is_copy: bool
    num_tokens: int

    @classmethod
    def of(cls, model: Any, num_tokens: int) -> "Base":
        """Take it before the first step."""
        if hasattr(model, "disable_adapter"):
            return cls(model, is_copy=False, num_tokens=num_tokens)
        return cls(deepcopy(model).requires_grad_(False).eval(), is_copy=True, num_tokens=num_tokens)

    @contextmanager
    def _in_force(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        with nullcontext() if self.is_copy else self.model.disable_adapter():  # type: ignore[operator]
            yield
        self.model.train(was_training)

    @torch.no_grad()
    def read(self, row: PackedSequence) -> tuple[Tensor, Head]:
        """Its hidden states (T, D) of a row, and its head."""
        with self._in_force():
            return hidden_states(self.model, row), output_head(self.model)


def kl_to_base(
    hidden_MD: Tensor,
    source_N: Tensor,
    head: Head,
    base: Base,
    row: PackedSequence,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The weighted sum of divergences over a row's trained tokens in nats, a scalar with a graph.

    hidden_MD, source_N: the tuned model's hidden states and where in them each trained token is predicted, as
    `read_hidden_states` gives them.
    """
    base_hidden_TD, base_head = base.read(row)
    known_N = torch.from_numpy(row.target_N < base.num_tokens).to(hidden_MD.device)
    source_N = source_N[known_N]
    base_source_N = torch.from_numpy(row.source_N).to(hidden_MD.device)[known_N]
    weight_N = torch.from_numpy(row.weight_N).to(hidden_MD.device)[known_N]
    step = chunk_tokens or max(1, LOGITS_BYTES // (4 * base.num_tokens))
    # Where only rows of added tokens are trained, none of the base's rows is.
    weight_VD = head.weight_VD if head.trained_rows is None else head.weight_VD.detach()
    total = hidden_MD.sum() * 0.0
    pieces = zip(source_N.split(step), base_source_N.split(step), weight_N.split(step), strict=True)
    for source_C, base_source_C, weight_C in pieces:

        def divergence(hidden_CD: Tensor, weight_VD: Tensor, base_CD: Tensor, weight_C: Tensor) -> Tensor:
            log_p_CB = _log_probs(hidden_CD, weight_VD, head, base.num_tokens)
            log_q_CB = _log_probs(base_CD, base_head.weight_VD, base_head, base.num_tokens)
            kl_C = (log_p_CB.exp() * (log_p_CB - log_q_CB)).sum(dim=-1)
            return (weight_C.to(kl_C) * kl_C).sum()

        chunk = (hidden_MD[source_C], weight_VD, base_hidden_TD[base_source_C], weight_C)
        total = total + checkpoint(divergence, *chunk, use_reentrant=False)
    return total


def _log_probs(hidden_CD: Tensor, weight_VD: Tensor, head: Head, num_tokens: int) -> Tensor:
    """Of the first `num_tokens` tokens alone, in float32 at least."""
    logits_CB = linear(hidden_CD.to(weight_VD.dtype), weight_VD[:num_tokens])
    logits_CB = logits_CB.to(torch.promote_types(logits_CB.dtype, torch.float32))
    if head.bias_V is not None:
        logits_CB = logits_CB + head.bias_V[:num_tokens]
    logits_CB = logits_CB * head.logit_scale
    if head.softcap is not None:
        logits_CB = head.softcap * torch.tanh(logits_CB / head.softcap)
    return torch.log_softmax(logits_CB, dim=-1)
