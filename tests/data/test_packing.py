"""The plan of an epoch: every example once, sequences full, epochs alike in number and unlike in content."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.data import packing
from preceptor.data.packing import EpochPlans, best_fit_decreasing, count_sequences, plan_epoch, plan_sequences


def chat_lengths(num, most=2048, seed=0):
    return np.random.default_rng(seed).lognormal(5.3, 0.9, num).astype(int).clip(8, most).tolist()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 64), max_size=200), st.integers(0, 5))
def test_the_plan_holds_every_example_once_and_no_sequence_overflows(lengths, seed):
    num_sequences = count_sequences(lengths, 64, seed)
    for plan in (plan_sequences(lengths, 64, seed), plan_epoch(lengths, 64, num_sequences, seed + 9)):
        assert sorted(index for row in plan for index in row) == list(range(len(lengths)))
        assert all(row and sum(lengths[index] for index in row) <= 64 for row in plan)
    assert len(plan) == num_sequences


def reasoning_lengths(num):
    """Three in five short chats, the others long reasoning, of which a row of 4,096 tokens holds two."""
    rng = np.random.default_rng(0)
    return np.where(rng.random(num) < 0.6, rng.lognormal(5, 0.6, num), rng.lognormal(7.6, 0.5, num)).astype(int)


@pytest.mark.parametrize("max_length", [4096, 16_384])
@pytest.mark.parametrize("draw", [chat_lengths, reasoning_lengths])
def test_rows_are_full(draw, max_length):
    lengths = draw(10_000)
    lengths = [length for length in lengths if 8 <= length <= max_length]
    plan = plan_sequences(lengths, max_length, seed=1)
    fill = np.array([sum(lengths[index] for index in row) for row in plan]) / max_length
    assert fill.mean() > 0.995 and (fill < 0.98).mean() < 0.01


def test_rows_are_as_mixed_as_chance_makes_them():
    """Lengths within a row are no more alike than those of random groups; best-fit decreasing gives 12 and more."""
    lengths = np.array(chat_lengths(20_000))
    plan = plan_sequences(lengths.tolist(), 4096, seed=1)
    logs = np.log(lengths)
    between = sum(len(row) * (logs[row].mean() - logs.mean()) ** 2 for row in plan) / len(plan)
    assert between / logs.var() < 1.5


def test_epochs_share_few_pairs_of_examples():
    lengths = chat_lengths(3000)

    def pairs(plan):
        return {(a, b) for row in plan for a in row for b in row if a < b}

    first, second = (pairs(plan_epoch(lengths, 4096, count_sequences(lengths, 4096, 0), seed)) for seed in (0, 1))
    chance = len(first) / (3000 * 2999 / 2)
    assert len(first & second) / len(first) < 2 * chance


def test_the_plan_is_a_function_of_its_seed():
    lengths = chat_lengths(500)
    assert (
        plan_sequences(lengths, 4096, seed=1)
        == plan_sequences(lengths, 4096, seed=1)
        != plan_sequences(lengths, 4096, seed=2)
    )


def test_epochs_have_the_same_number_of_sequences():
    """Long examples leave plans of different seeds with different numbers of sequences."""
    lengths = np.random.default_rng(0).integers(200, 700, 400).tolist()
    assert len({len(plan_sequences(lengths, 1024, seed)) for seed in range(10)}) > 1
    num_sequences = count_sequences(lengths, 1024, 0)
    assert {len(plan_epoch(lengths, 1024, num_sequences, seed)) for seed in range(10)} == {num_sequences}
    assert len(plan_epoch(lengths, 1024, num_sequences + 5, 0)) == num_sequences + 5
    decreasing = len(best_fit_decreasing(np.array(lengths), 1024, np.random.default_rng(0)))
    assert decreasing < len(
        plan_sequences(lengths, 1024, seed=0)
    )  # the plan that is left when others have too many sequences
    assert {len(plan_epoch(lengths, 1024, decreasing, seed)) for seed in range(3)} == {decreasing}
    with pytest.raises(ValueError, match=r"400 examples make .* sequences, not 3"):
        plan_epoch(lengths, 1024, 3, 0)


def test_an_example_longer_than_a_sequence_is_an_error():
    with pytest.raises(ValueError, match="example 1 has 9 tokens, a sequence holds 8"):
        plan_sequences([3, 9], 8, seed=0)


# More than one block -------------------------------------------------------------------------------------------------


@pytest.fixture
def blocks_of_500(monkeypatch):
    monkeypatch.setattr(packing, "_BLOCK", 500)


def sequences_of(plans, epoch):
    return plans.sequences(epoch, 0, plans.num_sequences)


@pytest.mark.parametrize("num", [1000, 2011, 3499])
def test_blocks_hold_every_example_once_in_the_same_number_of_sequences(blocks_of_500, num):
    lengths_N = np.array(chat_lengths(num), np.int32)
    plans = EpochPlans(lengths_N, 2048, seed=3)
    for epoch in range(2):
        plan = sequences_of(plans, epoch)
        assert len(plan) == plans.num_sequences
        assert sorted(index for row in plan for index in row) == list(range(num))
        assert all(row and lengths_N[row].sum() <= 2048 for row in plan)
    assert sequences_of(plans, 0) == sequences_of(EpochPlans(lengths_N, 2048, seed=3), 0) != plan
    assert plans.sequences(1, 5, 40) == plan[5:40]
    assert plan != sequences_of(EpochPlans(lengths_N, 2048, seed=4), 1)


def test_blocks_are_as_full_as_one_plan(blocks_of_500, monkeypatch):
    lengths_N = np.array(chat_lengths(20_000, most=512))
    in_blocks = EpochPlans(lengths_N, 512, 0).num_sequences
    monkeypatch.setattr(packing, "_BLOCK", 20_000)
    assert in_blocks < 1.005 * EpochPlans(lengths_N, 512, 0).num_sequences


@pytest.mark.parametrize("num", [1500, 1501])
def test_a_block_that_cannot_be_packed_anew_takes_the_packing_of_the_longest(blocks_of_500, monkeypatch, num):
    lengths_N = np.random.default_rng(0).integers(200, 700, num)
    plans = EpochPlans(lengths_N, 1024, 0)

    def cannot(*_):
        raise ValueError

    monkeypatch.setattr(packing, "plan_epoch", cannot)
    plan = sequences_of(plans, 0)
    assert len(plan) == plans.num_sequences and sorted(index for row in plan for index in row) == list(range(num))
    assert all(row and lengths_N[row].sum() <= 1024 for row in plan)


@pytest.mark.parametrize(
    "lengths",
    [[1100] * 1001, [1100] * 1502, [2048] * 1496 + [100] * 3, [1100] * 1000],
    ids=["two blocks", "three blocks", "books", "no rest"],
)
def test_blocks_where_nearly_every_example_stands_alone(blocks_of_500, lengths):
    """Each block has nearly as many sequences as examples, and some have one example more than others."""
    lengths_N = np.random.default_rng(0).permutation(lengths)
    plans = EpochPlans(lengths_N, 2048, 0)
    for epoch in range(4):
        plan = sequences_of(plans, epoch)
        assert len(plan) == plans.num_sequences <= len(lengths)
        assert sorted(index for row in plan for index in row) == list(range(len(lengths)))
        assert all(row and lengths_N[row].sum() <= 2048 for row in plan)
        assert [plans.sequences(epoch, at, at + 1)[0] for at in range(0, len(plan), 50)] == plan[::50]


def test_epochs_in_blocks_share_few_pairs_of_examples(blocks_of_500):
    plans = EpochPlans(np.array(chat_lengths(3000)), 4096, 0)
    first, second = (
        {(a, b) for row in sequences_of(plans, epoch) for a in row for b in row if a < b} for epoch in (0, 1)
    )
    chance = len(first) / (3000 * 2999 / 2)
    assert len(first & second) / len(first) < 2 * chance
