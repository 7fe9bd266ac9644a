"""Floating-point operations of one row, forward and backward, by what is multiplied.

A matrix product of T tokens with P parameters takes 2 P T operations forward, as many again for the gradient of its
input and as many for that of its weight: the familiar 6 N T (Kaplan et al. 2020), here with what it leaves out or
counts too much: the head scores trained tokens only, frozen weights have no gradient, experts count as far as a token
goes through them, attention counts the pairs of tokens that see each other, and what is computed again, again.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from preceptor.plan.activations import Work
from preceptor.plan.parameters import Adapter, expert_parameters
from preceptor.plan.shapes import Layer, Shape


@dataclass(frozen=True, slots=True)
class Operations:
    """Operations of a row. again: of layers that run a second time in backward, as part of the total."""

    linear: float
    attention: float
    head: float
    adapter: float
    again: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.head + self.adapter + self.again


def operations(shape: Shape, work: Work, adapter: Adapter | None = None) -> Operations:
    """What one row takes, forward and backward. What the last layer spares of unread tokens (at most 1/L) counts."""
    tokens, read = work.num_tokens, work.num_trained
    backward_tokens = read if work.context_gradient == "detach" else tokens
    matrices = [_active_matrices(shape, layer) for layer in shape.layers]
    updates = [_adapter_matrices(shape, layer, adapter) for layer in shape.layers]
    pairs = [_visible_pairs(layer.window, work) for layer in shape.layers]
    weight_share = 2 if adapter is None else 1  # gradients of input and weight, or of the input alone
    linear = sum(matrices) * 2.0 * (tokens + weight_share * backward_tokens)
    seen_share = 1.0 if work.context_gradient != "detach" else _share_of_read_pairs(work)
    attention = sum(4.0 * shape.query_width * count * (1 + 2 * seen_share) for count in pairs)
    head_share = 3 if adapter is None else 2
    head = 2.0 * head_share * shape.rows * shape.hidden * read
    low_rank = sum(updates) * 2.0 * (tokens + 2 * backward_tokens)
    again = 0.0
    for index, (matrix, update, count) in enumerate(zip(matrices, updates, pairs, strict=True)):
        of_layer = 2.0 * (matrix + update) * tokens + 4.0 * shape.query_width * count
        again += of_layer * _share_again(work, index)
    return Operations(linear, attention, head, low_rank, again)


def _share_again(work: Work, index: int) -> float:
    """Share of a layer's forward work that backward does once more."""
    read_share = work.num_trained / max(1, work.num_tokens)
    share = read_share if index < work.checkpointed_layers else 0.0
    unread_runs_again = work.context_gradient == "recompute" or (
        work.context_gradient == "full" and index < work.checkpointed_layers
    )
    return share + (1 - read_share) * unread_runs_again


def _active_matrices(shape: Shape, layer: Layer) -> int:
    """Parameters that one token is multiplied with in a layer."""
    count = sum(linear.inputs * linear.outputs for linear in (*shape.attention_linears(), *shape.mlp_linears(layer)))
    if layer.experts is not None:
        count += layer.experts.per_token * expert_parameters(shape, layer) + layer.experts.count * shape.hidden
    return count


def _adapter_matrices(shape: Shape, layer: Layer, adapter: Adapter | None) -> int:
    if adapter is None:
        return 0
    return sum(
        adapter.rank * (linear.inputs + linear.outputs)
        for linear in (*shape.attention_linears(), *shape.mlp_linears(layer))
        if adapter.targets is None or linear.name in adapter.targets
    )


def _lengths(work: Work) -> Iterable[int]:
    return (sum(context + target for context, target in turns) for turns in work.conversations)


def _visible_pairs(window: int | None, work: Work) -> float:
    """Pairs (i, j) of tokens of which i sees j: about half the square of a conversation's length, or the window's."""
    pairs = 0.0
    for length in _lengths(work):
        seen = length if window is None else min(window, length)
        pairs += seen * (seen + 1) / 2 + (length - seen) * seen
    return pairs


def _share_of_read_pairs(work: Work) -> float:
    """Of those pairs, the share in which i is read, and so has a backward pass of its own."""
    read = total = 0.0
    for turns in work.conversations:
        seen = 0
        for context, target in turns:
            read += target * (seen + context) + target * (target + 1) / 2
            seen += context + target
        total += seen * (seen + 1) / 2
    return read / total if total else 0.0
