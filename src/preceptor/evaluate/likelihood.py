"""What a model makes of given tokens: its hidden states and losses at the targets of trees, each token computed once.

Trees are packed into rows as in training, so that choices share their context and conversations their prefixes. Models
whose layers mix tokens outside attention read one chain at a time instead (`alone`).

Legend: M tokens of a row that are read at least, D hidden size, N targets of a row or segment.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preceptor.data.forest import Tree, pack_trees
from preceptor.data.packing import plan_sequences
from preceptor.data.prefix_sharing import chains_of
from preceptor.errors import ModelError
from preceptor.model.forward import check_isolation, output_head, read_hidden_states
from preceptor.model.loss.linear_cross_entropy import token_losses


@dataclass(frozen=True, eq=False, slots=True)
class Losses:
    """Of the predicted tokens of one segment: loss in nats, and whether the token was the most likely one."""

    loss_N: np.ndarray
    correct_N: np.ndarray

    @property
    def nats(self) -> float:
        return float(self.loss_N.sum())

    def __len__(self) -> int:
        return len(self.loss_N)


@dataclass(frozen=True, eq=False, slots=True)
class Read:
    """A row that the model has read: for each target where to read hidden_MD, the token, its tree and its segment."""

    hidden_MD: Tensor
    source_N: Tensor
    target_N: Tensor
    tree_N: np.ndarray
    segment_N: np.ndarray


def must_read_alone(model: Any) -> bool:
    """Whether conversations cannot share a row, because layers mix tokens outside attention."""
    try:
        check_isolation(model)
    except ModelError:
        return True
    return False


def segment_losses(model: Any, trees: Sequence[Tree], max_length: int, alone: bool = False) -> list[list[Losses]]:
    """For each tree the losses of each of its segments (none for contexts), under the caller's autocast."""
    found = [[Losses(np.zeros(0), np.zeros(0, dtype=bool)) for _ in tree.segments] for tree in trees]
    head = output_head(model)
    for read in read_trees(model, trees, max_length, alone):
        loss_N, correct_N = token_losses(
            read.hidden_MD,
            head.weight_VD,
            read.source_N,
            read.target_N,
            bias_V=head.bias_V,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        )
        losses_N, hits_N = loss_N.double().cpu().numpy(), correct_N.cpu().numpy()
        for tree, segment in dict.fromkeys(zip(read.tree_N.tolist(), read.segment_N.tolist(), strict=True)):
            own_N = (read.tree_N == tree) & (read.segment_N == segment)
            found[tree][segment] = Losses(losses_N[own_N], hits_N[own_N])
    return found


@torch.no_grad()
def read_trees(model: Any, trees: Sequence[Tree], max_length: int, alone: bool = False) -> Iterator[Read]:
    """Let the model read the trees, a row at a time, in a fixed order; the model is left in its mode."""
    paths = [(number, path) for number, tree in enumerate(trees) for path in (chains(tree) if alone else [whole(tree)])]
    lengths = [path.tree.num_tokens for _, path in paths]
    plan = [[at] for at in range(len(paths))] if alone else plan_sequences(lengths, max([max_length, *lengths]), seed=0)
    with evaluating(model):
        for indices in plan:
            row = pack_trees([paths[index][1].tree for index in indices], alone=alone)
            if not row.num_trained:
                continue
            owners = [
                (number, segment)
                for number, path in (paths[index] for index in indices)
                for place, segment in zip(path.order, (path.segments[at] for at in path.order), strict=True)
                for _ in range(_num_predicted(path.tree, place))
            ]
            assert len(owners) == row.num_trained, "targets are laid out depth-first"
            tree_N, segment_N = np.array(owners).T
            hidden_MD, source_N = read_hidden_states(model, row)
            yield Read(hidden_MD, source_N, torch.from_numpy(row.target_N).to(source_N.device), tree_N, segment_N)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off, and the model's mode restored."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass(frozen=True, slots=True)
class Path:
    """A tree, or one chain of it; `segments` are their indices in the whole tree, `order` that of the layout."""

    tree: Tree
    segments: tuple[int, ...]
    order: tuple[int, ...]


def whole(tree: Tree) -> Path:
    """All of a tree; its segments are laid out depth-first."""
    children: list[list[int]] = [[] for _ in tree.segments]
    order: list[int] = []
    stack = [index for index, segment in enumerate(tree.segments) if segment.parent is None][::-1]
    for index, segment in enumerate(tree.segments):
        if segment.parent is not None:
            children[segment.parent].append(index)
    while stack:
        order.append(stack.pop())
        stack += reversed(children[order[-1]])
    return Path(tree, tuple(range(len(tree.segments))), tuple(order))


def chains(tree: Tree) -> list[Path]:
    """The paths from root to leaf; a target that several share is predicted in the first."""
    parents = {segment.parent for segment in tree.segments}
    found = []
    leaves = (index for index in range(len(tree.segments)) if index not in parents)
    for leaf, chain in zip(leaves, chains_of(tree), strict=True):
        path = [leaf]
        while (parent := tree.segments[path[0]].parent) is not None:
            path.insert(0, parent)
        found.append(Path(chain, tuple(path), tuple(range(len(path)))))
    return found


def _num_predicted(tree: Tree, index: int) -> int:
    """How many tokens of a segment are predicted: all of a target's but one that no token comes before."""
    segment = tree.segments[index]
    if segment.kind == "context" or segment.weight <= 0 or not segment.ids:
        return 0
    parent = segment.parent
    while parent is not None and not tree.segments[parent].ids:
        parent = tree.segments[parent].parent
    return len(segment.ids) - (parent is None)
