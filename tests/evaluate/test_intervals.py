"""Intervals against closed forms, coverage in a seeded simulation, and the cases in which nothing varies."""

import numpy as np
import pytest

from preceptor.evaluate import intervals
from preceptor.evaluate.intervals import DIFFERENCE_OF_SHARES, SHARE, exact_share, interval, paired_interval

Z = 1.959964  # the normal distribution's 97.5 % quantile


def test_a_paired_interval_is_the_normal_one_of_the_differences():
    rng = np.random.default_rng(3)
    hardness = rng.normal(size=500) * 5  # of an item, for both models
    base, tuned = hardness + rng.normal(size=500), hardness + rng.normal(size=500) - 0.4
    found = paired_interval(base, tuned)
    error = (tuned - base).std(ddof=1) / np.sqrt(500)
    assert found.value == pytest.approx((tuned - base).mean())
    assert found.low == pytest.approx(found.value - Z * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.value + Z * error, abs=0.1 * error)
    assert found.sign == -1
    alone = interval(tuned)
    assert alone.half_width > 3 * found.half_width, "what makes an item hard for both is not noise"


def test_a_share_has_the_binomial_interval():
    hits = [1.0] * 240 + [0.0] * 160
    found = interval(hits, bounds=SHARE)
    error = np.sqrt(0.6 * 0.4 / 400)
    assert (found.value, found.num) == (0.6, 400)
    assert (found.high - found.low) / 2 == pytest.approx(Z * error, rel=0.05)


def test_a_ratio_of_sums_has_the_interval_of_the_delta_method():
    rng = np.random.default_rng(4)
    num_bytes = rng.integers(50, 500, size=300).astype(float)
    bits = num_bytes * 1.2 + rng.normal(size=300) * 20
    found = interval(bits, num_bytes)
    ratio = bits.sum() / num_bytes.sum()
    error = (bits - ratio * num_bytes).std(ddof=1) / num_bytes.mean() / np.sqrt(300)
    assert found.value == pytest.approx(ratio)
    assert found.half_width == pytest.approx(Z * error, rel=0.05)
    assert found.value != pytest.approx((bits / num_bytes).mean(), abs=1e-6), "not the mean of the items' ratios"


def test_the_truth_is_covered_as_often_as_is_said(monkeypatch):
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 400)
    rng = np.random.default_rng(5)
    covered = {"mean": 0, "paired": 0}
    for trial in range(600):
        base = rng.exponential(size=80)
        tuned = base + rng.normal(size=80) + 0.3
        own = interval(base, seed=trial)
        both = paired_interval(base, tuned, seed=trial)
        covered["mean"] += own.low <= 1.0 <= own.high
        covered["paired"] += both.low <= 0.3 <= both.high
    for name, count in covered.items():
        assert 0.915 <= count / 600 <= 0.975, (name, count / 600)


@pytest.mark.parametrize("changing", [0.02, 0.04, 0.4])
def test_no_difference_is_called_a_difference_more_often_than_one_time_in_twenty(changing, monkeypatch):
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 400)
    rng = np.random.default_rng(6)
    num_called = 0
    for trial in range(300):
        base = (rng.random(140) < 0.5).astype(float)
        tuned = np.where(rng.random(140) < changing, (rng.random(140) < 0.5), base).astype(float)
        found = paired_interval(base, tuned, bounds=DIFFERENCE_OF_SHARES, seed=trial)
        num_called += found.sign != 0
    assert num_called / 300 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 300)


def test_few_changes_have_the_exact_interval_of_the_sign_test():
    """Of 4 losses and no gain two-sided p = 1/8; of 6 losses and no gain 1/32."""
    base = np.ones(140)
    for num_lost, sign in ((4, 0), (5, 0), (6, -1)):
        tuned = np.where(np.arange(140) < num_lost, 0.0, 1.0)
        assert paired_interval(base, tuned, bounds=DIFFERENCE_OF_SHARES).sign == sign, num_lost


@pytest.mark.parametrize(
    ("hits", "num", "low", "high"), [(0, 10, 0, 0.3085), (3, 10, 0.0667, 0.6525), (50, 100, 0.3983, 0.6017)]
)
def test_exact_shares_are_those_of_the_tables(hits, num, low, high):
    found = exact_share(np.array([1.0] * hits + [0.0] * (num - hits)))
    assert found == pytest.approx((low, high), abs=1e-4)


def test_where_all_items_agree_the_interval_is_the_exact_one_and_not_empty():
    right = interval([1.0] * 20, bounds=SHARE)
    assert right.low == pytest.approx(0.025 ** (1 / 20)) and right.high == 1.0  # Clopper-Pearson: 0.832
    wrong = interval([0.0] * 20, bounds=SHARE)
    assert wrong.low == 0.0 and wrong.high == pytest.approx(1 - 0.025 ** (1 / 20))
    same = paired_interval([1.0, 0.0] * 30, [1.0, 0.0] * 30, bounds=DIFFERENCE_OF_SHARES)
    assert same.value == 0.0 and same.sign == 0
    assert same.high == -same.low == pytest.approx(1 - 0.025 ** (1 / 60))
    gained = paired_interval([0.0] * 60, [1.0] * 60, bounds=DIFFERENCE_OF_SHARES)
    assert gained.value == 1.0 and gained.sign == 1 and gained.low < 1.0


def test_of_a_model_with_itself_the_difference_is_zero():
    rng = np.random.default_rng(7)
    bits, num_bytes = rng.random(50) * 100, rng.integers(1, 90, size=50)
    found = paired_interval(bits, bits, num_bytes, num_bytes)
    assert (found.value, found.low, found.high, found.sign) == (0.0, 0.0, 0.0, 0)


def test_seeds_and_what_has_no_interval():
    values = np.random.default_rng(8).random(40)
    assert interval(values, seed=1) == interval(values, seed=1) != interval(values, seed=2)
    alone = interval([3.0], [2.0])
    assert (alone.value, alone.low, alone.high, alone.half_width, alone.sign) == (1.5, None, None, None, 0)
    for broken in (lambda: interval([]), lambda: interval([1.0], [0.0]), lambda: interval([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match="a figure needs items"):
            broken()
    with pytest.raises(ValueError, match="are not pairs"):
        paired_interval([1.0], [1.0, 2.0])


@pytest.mark.parametrize("num", [2, 3, 4, 5, 7, 10, 20])
def test_few_items_on_which_nothing_changed_seem_changed_one_time_in_twenty(num, monkeypatch):
    """Normal differences of bits; of two items the bootstrap knows only three resamples, which costs 1.5 %."""
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 400)
    rng = np.random.default_rng(9)
    base, bytes_I = rng.normal(size=num), np.full(num, 100.0)
    found = [
        paired_interval(base, base + rng.normal(size=num), bytes_I, bytes_I, seed=trial).sign for trial in range(1000)
    ]
    assert sum(map(abs, found)) / 1000 <= 0.065 + 2 * np.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.parametrize(("num", "t"), [(2, 12.7062), (3, 4.3027), (5, 2.7764), (10, 2.2622), (101, 1.9840)])
def test_an_interval_of_few_items_is_as_much_wider_as_students_distribution(num, t):
    """t of the tables. The bootstrap's deviation is that of the items, over n and not n - 1."""
    assert intervals._widening(num) == pytest.approx(t / Z * np.sqrt(num / (num - 1)), abs=1e-4)


def test_an_interval_is_cut_to_what_the_metric_can_be():
    two = interval([1.0, 3.0], [4.0, 4.0])
    assert two.low < 0.0 and two.high > 1.0 and two.within(0.0).low == 0.0 and two.within(0.0).high == two.high
    assert (two.within(0.0, 1.0).low, two.within(0.0, 1.0).high, two.within(0.0).value) == (0.0, 1.0, 0.5)
    assert interval([1.0]).within(0.0) == interval([1.0])
