"""Hidden states and losses of a model at the targets of trees, each token computed once.

Trees are packed into sequences as in training: choices share their context, conversations their prefixes. A model whose
layers mix tokens outside attention processes one chain at a time instead (`alone`).

Legend: M tokens of a sequence that predict a target, at least; D hidden size; N targets of a sequence or segment.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preceptor.data.forest import Tree, leaf_paths, pack_trees
from preceptor.data.loader import assign_to_ranks
from preceptor.data.packing import plan_sequences
from preceptor.data.prefix_sharing import chains_of
from preceptor.errors import ModelError
from preceptor.model.checks import check_isolation
from preceptor.model.forward import Engine
from preceptor.model.loss.linear_cross_entropy import output_head, token_losses
from preceptor.model.parts import evaluating
from preceptor.world import ONE, World


@dataclass(frozen=True, eq=False, slots=True)
class SegmentLosses:
    """Losses of the predicted tokens of one segment."""

    loss_N: np.ndarray  # nats
    correct_N: np.ndarray  # whether the token was the most likely one

    @property
    def nats(self) -> float:
        return float(self.loss_N.sum())

    def __len__(self) -> int:
        return len(self.loss_N)


@dataclass(frozen=True, eq=False, slots=True)
class SequenceStates:
    """The hidden states of one packed sequence at its N targets, and whose each target is."""

    hidden_MD: Tensor  # of the tokens that predict a target, at least
    source_N: Tensor  # for each target the place in hidden_MD that predicts it
    target_N: Tensor  # the target tokens
    owners: list[tuple[int, int, slice]]  # (tree, segment, its places in source_N and target_N)


def must_read_alone(model: Any) -> bool:
    """Whether conversations cannot share a sequence, because layers mix tokens outside attention."""
    try:
        check_isolation(model)
    except ModelError:
        return True
    return False


def segment_losses(
    model: Any, trees: Sequence[Tree], max_length: int, alone: bool = False, world: World = ONE
) -> list[list[SegmentLosses]]:
    """For each tree the losses of each of its segments (none for contexts), under the caller's autocast.

    world: each of its processes reads a part of the trees and has the losses of all.
    """
    found = [[SegmentLosses(np.zeros(0), np.zeros(0, dtype=bool)) for _ in tree.segments] for tree in trees]

    def measure() -> list[tuple[int, int, SegmentLosses]]:
        head, measured = output_head(model), []
        for states in read_trees(model, trees, max_length, alone, world):
            loss_N, correct_N = token_losses(states.hidden_MD, head, states.source_N, states.target_N)
            losses_N, hits_N = loss_N.double().cpu().numpy(), correct_N.cpu().numpy()
            measured += [
                (tree, segment, SegmentLosses(losses_N[own], hits_N[own])) for tree, segment, own in states.owners
            ]
        return measured

    for of_rank in world.gather(Engine.of(model).call(measure)):
        for tree, segment, losses in of_rank:
            found[tree][segment] = losses
    return found


@torch.no_grad()
def read_trees(
    model: Any, trees: Sequence[Tree], max_length: int, alone: bool = False, world: World = ONE
) -> Iterator[SequenceStates]:
    """Run the model over the trees, one packed sequence at a time, in a fixed order; its mode is restored.

    alone: one chain at a time; a target that several chains share is predicted in the first. world: this process reads
    its part of the sequences; all make the same number of passes, since they may share the model's weights.
    """
    parts = [
        (number, part, path)
        for number, tree in enumerate(trees)
        for part, path in (
            zip(chains_of(tree), leaf_paths(tree), strict=True) if alone else [(tree, range(len(tree.segments)))]
        )
    ]
    lengths = [part.num_tokens for _, part, _ in parts]
    plan = [[at] for at in range(len(parts))] if alone else plan_sequences(lengths, max([max_length, *lengths]), seed=0)
    plan = [indices for indices in plan if any(parts[index][1].num_trained for index in indices)]
    sizes = [sum(lengths[index] for index in indices) for indices in plan]
    assigned = assign_to_ranks(sizes, world.size)
    own = assigned[world.rank]
    shortest = min(range(len(plan)), key=sizes.__getitem__, default=0)
    surplus = [shortest] * (max(map(len, assigned)) - len(own))  # of no use but to the others
    engine = Engine.of(model)
    with evaluating(model):
        for number, at in enumerate([*own, *surplus]):
            packed = [parts[index] for index in plan[at]]
            sequence = pack_trees([part for _, part, _ in packed], alone=alone)
            hidden_MD, source_N = engine.loss_hidden_states(sequence)
            if number >= len(own):
                continue
            target_N = torch.from_numpy(sequence.target_N).to(source_N.device)
            owners = [
                (packed[span.tree][0], packed[span.tree][2][span.segment], span.targets)
                for span in sequence.spans
                if span.targets.start < span.targets.stop
            ]
            yield SequenceStates(hidden_MD, source_N, target_N, owners)
