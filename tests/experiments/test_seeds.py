"""The bootstrap over seeds and items, against closed forms: either alone, both, and what cannot vary."""

import numpy as np
import pytest

import seeds
from preceptor.evaluate.intervals import (
    DIFFERENCE_OF_SHARES,
    SHARE,
    exact_difference,
    exact_share,
    interval,
    paired_interval,
)

WIDTH = 2 * 1.96  # standard errors in a 95 % interval


def values(above, below=None):
    return seeds.Values.of(above, below)


def test_of_one_seed_it_is_the_bootstrap_over_items():
    items = np.random.default_rng(1).normal(size=400)
    found, known = seeds.figure(values([items])), interval(items)
    assert found.value == pytest.approx(known.value)
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=0.006)


def test_spread_of_seeds_and_of_items_add_up_as_in_the_closed_form():
    rng = np.random.default_rng(2)
    num_seeds, num_items = 40, 500
    above = rng.normal(size=(num_seeds, 1)) * 0.6 + rng.normal(size=(1, num_items)) * 3
    found = seeds.figure(values(above))
    of_seeds, of_items = above.mean(axis=1).var() / num_seeds, above.mean(axis=0).var() / num_items
    assert found.high - found.low == pytest.approx(WIDTH * np.sqrt(of_seeds + of_items), rel=0.05)
    assert found.high - found.low > 1.05 * WIDTH * np.sqrt(of_items), "items alone would be too sure"
    assert found.by_seed == pytest.approx(above.mean(axis=1)) and (found.num_seeds, found.num_items) == (40, 500)


def test_items_without_spread_leave_that_of_three_seeds():
    found = seeds.figure(values([[1.0] * 50, [2.0] * 50, [4.0] * 50]))
    assert (found.low, found.value, found.high) == pytest.approx((1.0, 7 / 3, 4.0))


def test_a_ratio_is_of_sums():
    found = seeds.figure(values([[1.0, 9.0]] * 2, [[2.0, 3.0]] * 2))
    assert found.value == 2.0 and found.low == pytest.approx(0.5) and found.high == pytest.approx(3.0)


def test_differences_pair_items_and_not_seeds():
    rng = np.random.default_rng(3)
    hard = rng.normal(size=300) * 5
    before, after = values([hard]), values([hard + 0.1, hard + 0.2, hard + 0.3])
    found = seeds.difference(before, after)
    assert found.value == pytest.approx(0.2) and found.low == pytest.approx(0.1) and found.high == pytest.approx(0.3)
    assert found.sign == 1 and seeds.difference(after, before).sign == -1
    same = seeds.difference(after, after)
    assert same.value == 0 and same.low < 0 < same.high, "two trainings of the same kind still differ"


def test_shares_that_cannot_vary_are_not_certain():
    all_right = values([[1.0] * 20] * 3)
    assert seeds.figure(all_right, SHARE).low == pytest.approx(0.025 ** (1 / 20))
    nothing = seeds.difference(all_right, all_right, DIFFERENCE_OF_SHARES)
    assert nothing.sign == 0 and nothing.high == pytest.approx(1 - 0.025 ** (1 / 20))


@pytest.mark.parametrize(("lost", "gained"), [(4, 0), (5, 0), (0, 4), (6, 1), (20, 3), (0, 0)])
def test_a_difference_is_widened_by_the_items_that_changed_as_compare_does(lost, gained):
    """4 losses and no gain among 140 items are chance: a fair coin gives them one time in eight."""
    before = np.array([1.0] * (140 - gained) + [0.0] * gained)
    after = np.array([0.0] * lost + [1.0] * (140 - lost))
    known = paired_interval(before, after, bounds=DIFFERENCE_OF_SHARES)
    for num_seeds in (1, 3):
        found = seeds.difference(values([before] * num_seeds), values([after] * num_seeds), DIFFERENCE_OF_SHARES)
        assert (found.value, found.sign) == (pytest.approx(known.value), known.sign)
        assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=0.0075)  # an item
    if (lost, gained) == (4, 0):
        assert found.sign == 0 and 100 * found.high == pytest.approx(0.6, abs=0.05)


def test_items_that_change_under_some_seeds_are_widened_by_the_size_of_their_change():
    """Six items, each lost under one seed of three: the share of gains among six, times two lost items."""
    after = np.ones((3, 100))
    for item in range(6):
        after[item % 3, item] = 0.0
    found = seeds.difference(values([[1.0] * 100]), values(after), DIFFERENCE_OF_SHARES)
    most = 1 - 0.025 ** (1 / 6)
    assert found.value == pytest.approx(-0.02) and found.high == pytest.approx((2 * most - 1) * 0.02, abs=0.005)
    assert found.low <= -0.02


@pytest.mark.parametrize("num_gained", [9, 30, 60])
def test_gains_and_losses_of_different_size_keep_the_value_within(num_gained):
    """20 items lost by all seeds, others gained by one of three: p G - (1 - p) L, with G = 1/3 and L = 1."""
    before, after = np.zeros((1, 100)), np.zeros((3, 100))
    before[0, :20] = 1.0
    after[np.arange(num_gained) % 3, 20 + np.arange(num_gained)] = 1.0
    mean = after.mean(axis=0) - before[0]
    num_changed = 20 + num_gained
    ends = exact_share(np.arange(num_changed) < num_gained)
    for sign in (1, -1):
        low, high = exact_difference(sign * mean)
        assert low < sign * mean.mean() < high
        known = sorted(sign * (p / 3 - (1 - p)) * num_changed / 100 for p in ends)
        assert (low, high) == pytest.approx(known)
    found = seeds.difference(values(before), values(after), DIFFERENCE_OF_SHARES)
    assert found.low < found.value < found.high


def test_other_items_are_rejected():
    with pytest.raises(ValueError, match="2 items and 3"):
        seeds.difference(values([[1.0, 2.0]]), values([[1.0, 2.0, 3.0]]))
    with pytest.raises(ValueError, match="same items"):
        values([[]])
