"""Shared beginnings are computed once: the same loss and gradient, fewer tokens; and taken apart again."""

import numpy as np
import pytest
import torch

from preceptor.data.dataset import Dataset, TreeList
from preceptor.data.forest import Segment, Tree, pack_trees, path_ids
from preceptor.data.prefix_sharing import chains_of
from preceptor.model.forward import Engine
from tiny import branching, chain, separate_chains, tiny_model

RNG = np.random.default_rng(0)


def ids(num):
    return tuple(RNG.integers(64, size=num).tolist())


def answer(prompt, num, source="f:1", weight=1.0):
    return Tree(source, (Segment("context", prompt, None), Segment("target", ids(num), 0, weight=weight)))


def reads(trees):
    """What each target reads, what it is, and its weight."""
    return sorted(
        (path_ids(tree, s.parent), s.ids, s.weight) for tree in trees for s in tree.segments if s.kind == "target"
    )


def test_answers_to_one_prompt_share_it():
    prompts = [ids(9), ids(12)]
    trees = [answer(prompts[n % 2], 3 + n, f"f:{n}", weight=1 + n) for n in range(6)]
    grouped = list(Dataset.of(trees).with_shared_prefixes(256, seed=0))
    assert len(grouped) == 2 and reads(grouped) == reads(trees)
    assert sum(tree.num_tokens for tree in grouped) == sum(tree.num_tokens for tree in trees) - 2 * 9 - 2 * 12
    assert sum(tree.num_trained for tree in grouped) == sum(tree.num_trained for tree in trees)
    assert all(tree.source.endswith(" and 2 more") for tree in grouped)


def test_a_long_common_beginning_is_shared_and_a_short_one_is_not():
    long, short = ids(100), ids(20)
    trees = [answer(long + ids(7), 3) for _ in range(5)] + [answer(short + ids(9), 3) for _ in range(4)]
    trees.append(answer(long, 4))  # a context that is no longer than what is shared
    grouped = list(Dataset.of(trees).with_shared_prefixes(1024, seed=0))
    assert len(grouped) == 5 and reads(grouped) == reads(trees)
    assert sum(tree.num_tokens for tree in trees) - sum(tree.num_tokens for tree in grouped) == 5 * 100


def test_both_levels_at_once_and_no_group_is_longer_than_a_row():
    system = ids(80)
    prompts = [system + ids(10) for _ in range(6)]
    trees = [answer(prompts[n % 6], 9) for n in range(24)]
    grouped = list(Dataset.of(trees).with_shared_prefixes(300, seed=0))
    assert reads(grouped) == reads(trees) and max(tree.num_tokens for tree in grouped) <= 300
    assert sum(tree.num_tokens for tree in grouped) < 0.4 * sum(tree.num_tokens for tree in trees)


def test_copies_of_a_row_stay_apart_and_what_shares_nothing_is_left_alone():
    tree, document = answer(ids(70), 5), Tree("d:1", (Segment("target", ids(9), None),))
    dataset = Dataset([TreeList([tree, document])], np.array([0, 0, 1, 1], np.int32))
    assert list(dataset.with_shared_prefixes(256, seed=0)) == [tree, document, tree, document]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_gradient_is_that_of_separate_conversations(kind):
    model, system, prompt = tiny_model(kind), ids(66), ids(5)
    trees = [answer(system + ids(3), 4), answer(system + ids(2), 5, weight=0.5)]
    trees += [answer(prompt, 3), answer(prompt, 6), branching(RNG), chain(RNG, (4, 5))]
    grouped = list(Dataset.of(trees).with_shared_prefixes(256, seed=0))
    assert len(grouped) == 4

    def loss_and_grads(rows):
        loss = sum(Engine(model)(row) for row in rows)
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    loss, grads = loss_and_grads([pack_trees(grouped)])
    true_loss, true_grads = loss_and_grads([pack_trees([tree]) for tree in trees])
    assert loss == pytest.approx(true_loss, rel=1e-5)
    assert float((grads - true_grads).norm() / true_grads.norm()) < 1e-5


def test_chains_are_the_paths_of_a_tree():
    tree = branching(RNG)
    assert chains_of(tree) == separate_chains(tree) and len(chains_of(tree)) == 3
    assert sum(single.num_trained for single in chains_of(tree)) == tree.num_trained
    shared_target = Tree(
        "s:1",
        (
            Segment("context", ids(2), None),
            Segment("target", ids(3), 0),
            Segment("context", ids(2), 1),
            Segment("target", ids(4), 2),
            Segment("context", ids(3), 1),
            Segment("target", ids(5), 4),
        ),
    )
    assert [single.num_trained for single in chains_of(shared_target)] == [7, 5]
    assert [single.num_tokens for single in chains_of(shared_target)] == [11, 13]
    plain = chain(RNG, (3, 4, 5, 6))
    assert chains_of(plain) == [plain]
