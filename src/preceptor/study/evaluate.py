"""Held-out measures: loss and token accuracy on targets, and exact match of generated answers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from preceptor.data.forest import Row
from preceptor.model.forward import hidden_states, output_head
from preceptor.model.loss import token_losses


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Mean loss in nats and share of tokens predicted first, over `num_trained` held-out target tokens."""

    loss: float
    token_accuracy: float
    num_trained: int


@torch.no_grad()
def held_out(model: Any, rows: Iterable[Row]) -> HeldOut:
    """Teacher-forced measures over the targets of `rows`, each token counted once, under the caller's autocast.

    Raises ValueError if the rows hold no target.
    """
    was_training = model.training
    model.eval()
    loss_sum, num_correct, num_trained = 0.0, 0, 0
    for row in rows:
        hidden_TD = hidden_states(model, row)
        head = output_head(model)
        loss_N, correct_N = token_losses(
            hidden_TD,
            head.weight_VD,
            torch.as_tensor(row.source_N, device=hidden_TD.device),
            torch.as_tensor(row.target_N, device=hidden_TD.device),
            bias_V=head.bias_V,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        )
        loss_sum += loss_N.double().sum().item()
        num_correct += int(correct_N.sum().item())
        num_trained += row.num_trained
    model.train(was_training)
    if num_trained == 0:
        raise ValueError("no held-out target to measure on")
    return HeldOut(loss_sum / num_trained, num_correct / num_trained, num_trained)


def is_exact(text: str, accepted: Sequence[str]) -> bool:
    """Whether a generated answer is one of the accepted ones, letter for letter; only space around it is ignored."""
    return text.strip() in {answer.strip() for answer in accepted}


def goes_on_with_question(text: str) -> bool:
    """Whether a continuation's first line that is not blank is a question: what a base model does to a question."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return first.endswith("?")


def share(hits: Sequence[bool]) -> float:
    """Share of true values; raises ValueError for none at all, since 0/0 is no result."""
    if not hits:
        raise ValueError("a share of nothing")
    return sum(hits) / len(hits)
