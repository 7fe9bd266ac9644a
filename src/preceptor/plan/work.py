"""Work of one packed sequence: its tokens, and the floating-point operations that it takes, by what is multiplied.

A matrix product of T tokens with P parameters takes 2 P T operations forward, as many for the gradient of its input and
as many for that of its weight: the familiar 6 N T (Kaplan et al. 2020), here with its errors corrected: the head scores
trained tokens only, frozen weights have no gradient, nor has what lies below the first trained layer, experts count as
far as a token goes through them, attention counts the pairs of tokens that see each other, and layers that run again
count again.
"""

from dataclasses import dataclass

from preceptor.data.forest import PackedSequence, Segment, Tree, pack_trees
from preceptor.model.options import KEEP_ALL, ActivationPolicy
from preceptor.plan.parameters import LayerParameters, Parameters

TurnLengths = tuple[tuple[int, int], ...]
"""A conversation: tokens of each turn's context and of its target, in turn; a context is what is new in it."""


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence, and under which policy it is computed. alone: by a model that reads one conversation at a time."""

    conversations: tuple[TurnLengths, ...]
    policy: ActivationPolicy = KEEP_ALL
    alone: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(context + target for turns in self.conversations for context, target in turns)

    @property
    def num_trained(self) -> int:
        """Target tokens, but for the first of a conversation, which nothing comes before."""
        return sum(
            target - (index == 0 and context == 0 and target > 0)
            for turns in self.conversations
            for index, (context, target) in enumerate(turns)
        )

    def longest_alone(self) -> "Work":
        longest = max(self.conversations, key=lambda turns: sum(map(sum, turns)))
        return Work((longest,), self.policy, alone=True)

    def sequence(self) -> PackedSequence:
        """A packed sequence of these lengths; its tokens are all the same."""
        return pack_trees([_tree(turns) for turns in self.conversations if sum(map(sum, turns))], self.alone)


def _tree(turns: TurnLengths) -> Tree:
    segments: list[Segment] = []
    for context, target in turns:
        for kind, length in (("context", context), ("target", target)):
            if length:
                parent = len(segments) - 1 if segments else None
                segments.append(Segment(kind, (0,) * length, parent))  # type: ignore[arg-type]
    return Tree("plan", tuple(segments))


def operations(parameters: Parameters, work: Work, kl_to_base: bool = False) -> dict[str, float]:
    """Forward and backward, by what is multiplied. What the last layer spares of context-only tokens (at most 1/L)
    counts.

    kl_to_base: `loss.kl_coef`, whose logits are computed again in backward.
    """
    tokens, bearing = work.num_tokens, work.num_trained
    detached = work.policy.context_gradient == "detach"
    backward_tokens = bearing if detached else tokens
    layers, updates, first = parameters.layers, parameters.trained.get("adapter", 0), parameters.first_trained
    matrices = sum(layer.matrices for layer in layers)
    reached = sum(layer.matrices for layer in layers[first:])  # of these the gradient of the input is computed
    weights = 0 if parameters.num_added else sum(layer.trained_matrices for layer in layers)
    seen_share = _share_of_bearing_pairs(work) if detached else 1.0
    of_divergence = 5 + parameters.trains_head  # base's logits twice, the tuned model's, and back through its head
    attention = [4.0 * layer.query_width * _visible_pairs(layer, work) for layer in layers]
    again = sum(
        (2.0 * (layer.matrices + updates / len(layers)) * tokens + pairs) * _share_again(work, index, len(layers))
        for index, (layer, pairs) in enumerate(zip(layers, attention, strict=True))
        if index >= first
    )
    divergence = matrices * 2.0 * tokens + sum(attention) + 2.0 * of_divergence * parameters.head * bearing
    return {
        "linear layers": 2.0 * (matrices * tokens + (reached + weights) * backward_tokens),
        "attention": sum(attention) + 2 * seen_share * sum(attention[first:]),
        "head": 2.0 * (2 + parameters.trains_head) * parameters.head * bearing,
        "adapter": updates * 2.0 * (tokens + 2 * backward_tokens),
        "computed again": again,
        "base (kl_coef)": kl_to_base * divergence,
    }


def _share_again(work: Work, index: int, num_layers: int) -> float:
    """Share of a layer's forward work that backward does once more."""
    bearing_share = work.num_trained / max(1, work.num_tokens)
    checkpointed = index < work.policy.checkpointed_layers(num_layers)
    context_again = {"recompute": True, "full": checkpointed, "detach": False}[work.policy.context_gradient]
    return bearing_share * checkpointed + (1 - bearing_share) * context_again


def _visible_pairs(layer: LayerParameters, work: Work) -> float:
    """Pairs (i, j) of tokens of which i sees j: about half the square of a conversation's length, or the window's."""
    pairs = 0.0
    for turns in work.conversations:
        length = sum(map(sum, turns))
        seen = length if layer.window is None else min(layer.window, length)
        pairs += seen * (seen + 1) / 2 + (length - seen) * seen
    return pairs


def _share_of_bearing_pairs(work: Work) -> float:
    """Of those pairs, the share in which a loss reads i, which so has a backward pass of its own."""
    bearing = total = 0.0
    for turns in work.conversations:
        seen = 0
        for context, target in turns:
            bearing += target * (seen + context) + target * (target + 1) / 2
            seen += context + target
        total += seen * (seen + 1) / 2
    return bearing / total if total else 0.0
