"""Every tree once an epoch, in an order that is a function of the step."""

from collections import Counter

from preceptor.data import packing
from preceptor.data.dataset import Dataset
from preceptor.data.forest import Segment, Tree
from preceptor.data.loader import Loader, assign_to_ranks, few_steps

TREES = [
    Tree(f"f:{n}", (Segment("context", (n,) * (1 + n % 5), None), Segment("target", (n,), 0))) for n in range(1, 38)
]


def tokens(rows):
    return Counter(token for row in rows for token in row.ids_T.tolist())


def test_every_token_once_an_epoch():
    loader = Loader(Dataset.of(TREES), max_length=16, batch_size=3, seed=0)
    expected = Counter(token for tree in TREES for segment in tree.segments for token in segment.ids)
    for epoch in range(3):
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        assert sum((tokens(loader.batch(step)) for step in steps), Counter()) == expected


def test_epochs_differ_and_a_step_is_reproducible():
    loader = Loader(Dataset.of(TREES), max_length=16, batch_size=3, seed=0)
    again = Loader(Dataset.of(TREES), max_length=16, batch_size=3, seed=0)
    other = Loader(Dataset.of(TREES), max_length=16, batch_size=3, seed=1)
    late = loader.steps_per_epoch + 1
    assert [r.ids_T.tolist() for r in again.batch(late)] == [r.ids_T.tolist() for r in loader.batch(late)]
    assert loader.trees(0, 99) != loader.trees(1, 99)
    assert loader.trees(0, 99) != other.trees(0, 99)


def test_steps_are_even_and_hold_no_more_rows_than_asked():
    loader = Loader(Dataset.of(TREES), max_length=16, batch_size=3, seed=0)
    for epoch in range(3):
        sizes = [len(loader.batch(epoch * loader.steps_per_epoch + step)) for step in range(loader.steps_per_epoch)]
        assert sum(sizes) == loader.sequences_per_epoch and max(sizes) <= 3 and max(sizes) - min(sizes) <= 1


def test_a_step_is_dealt_to_processes_by_tokens():
    assert assign_to_ranks([5, 9, 4, 4, 3], 1) == [[0, 1, 2, 3, 4]]
    assert assign_to_ranks([5, 9, 4, 4, 3], 2) == [[1, 3], [0, 2, 4]]  # 13 and 12 tokens
    assert assign_to_ranks([7, 7], 3) == [[0], [1], []]
    loader = Loader(Dataset.of(TREES), max_length=16, batch_size=6, seed=0)
    for step in range(2 * loader.steps_per_epoch):
        for num in (2, 4, 9):
            assigned = [loader.batch(step, rank, num) for rank in range(num)]
            assert sum(map(tokens, assigned), Counter()) == tokens(loader.batch(step))
            if num == 2:
                sizes = [sum(sequence.num_tokens for sequence in own) for own in assigned]
                assert max(sizes) - min(sizes) <= 16  # at most a sequence


def test_apart_every_tree_is_a_row_in_the_same_step():
    loader = Loader(Dataset.of(TREES), max_length=16, batch_size=3, seed=0)
    apart = loader.apart()
    assert apart.alone and not loader.alone
    for step in range(loader.steps_per_epoch):
        assert tokens(apart.batch(step)) == tokens(loader.batch(step))
        assert all(row.alone for row in apart.batch(step))


def test_few_steps_are_told_with_what_makes_more():
    assert few_steps(50, 2, 10_000, 90) is None
    assert few_steps(1, 1, 10_000, 90) == (
        "only 1 optimizer step, too few to learn much (under 50): `train.batch_size: 1` with `data.max_length: 128` "
        "gives about 79 in each epoch; or raise `train.duration`, or add examples"
    )
    add = "(under 50): add examples, or raise `train.duration`"
    assert few_steps(3, 3, 500, 90).endswith(add)
    assert few_steps(40, 40, 40 * 128, 128).endswith(add), "batches of 1 of the longest example's length already"
    in_steps = few_steps(2, 900, 10**6, 90, by_epochs=False)
    assert in_steps.endswith("(under 50): raise `train.duration`, which is in steps: an epoch has 900")
    assert few_steps(50, 2, 10_000, 90, by_epochs=False) is None


def test_more_than_one_block(monkeypatch):
    monkeypatch.setattr(packing, "_BLOCK", 10)
    loader = Loader(Dataset.of(TREES), max_length=16, batch_size=3, seed=0)
    expected = Counter(token for tree in TREES for segment in tree.segments for token in segment.ids)
    assert sum((tokens(loader.batch(step)) for step in range(loader.steps_per_epoch)), Counter()) == expected
    largest = loader.largest_sequences()
    steps = [row for step in range(loader.steps_per_epoch) for row in loader.batch(step)]
    assert max(row.num_trained for row in largest) >= max(row.num_trained for row in steps)
    assert all(row.num_tokens <= 16 for row in largest)
