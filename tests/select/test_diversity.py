"""Facility location against brute force, its lazy and sampled forms against the plain one, and planted clusters."""

import itertools

import numpy as np
import pytest

from preceptor.select import diversity
from preceptor.select.diversity import Points, coverage, facility_location, k_centre, nearest_chosen


def points_of(table):
    return Points(table.astype(np.float32), np.arange(len(table)))


def clusters(sizes, rng, size=8, spread=0.15):
    """Unit vectors round as many directions; returns the table and which cluster each is of."""
    centre = np.linalg.qr(rng.standard_normal((size, size)))[0][: len(sizes)]
    label = np.repeat(np.arange(len(sizes)), sizes)
    return centre[label] + spread * rng.standard_normal((len(label), size)), label


def objective(points, quality_N, chosen):
    """f(S) as the docstring writes it, in float64."""
    point_NE = points[np.arange(len(points))].astype(np.float64)
    cosine_NN = point_NE @ point_NE.T
    unlike = np.percentile(cosine_NN[np.triu_indices(len(points), 1)], 25)
    similarity_NN = np.maximum((cosine_NN - unlike) / (1 - unlike), 0) ** 2
    weight_N = 1 / similarity_NN.sum(axis=1)
    return float(weight_N @ (similarity_NN[:, chosen] * quality_N[chosen]).max(axis=1))


@pytest.mark.parametrize("seed", range(5))
def test_greedy_reaches_its_bound_and_its_gains_add_up(seed):
    rng = np.random.default_rng(seed)
    points, quality_N = points_of(rng.standard_normal((11, 4))), rng.uniform(0.3, 1, 11)
    order = facility_location(points, quality_N, 3, seed)
    reached = objective(points, quality_N, order.index_K)
    best = max(objective(points, quality_N, list(s)) for s in itertools.combinations(range(11), 3))
    assert (1 - 1 / np.e) * best <= reached <= best + 1e-6
    assert order.gain_K.sum() == pytest.approx(reached, rel=1e-5)
    assert (np.diff(order.gain_K) <= 1e-6).all()


def test_lazy_is_the_plain_greedy_choice():
    rng = np.random.default_rng(3)
    points, quality_N = points_of(rng.standard_normal((60, 5))), rng.uniform(0.2, 1, 60)
    chosen = []
    for _ in range(12):
        left = [row for row in range(60) if row not in chosen]
        chosen.append(max(left, key=lambda row: objective(points, quality_N, [*chosen, row])))
    assert facility_location(points, quality_N, 12, 0).index_K.tolist() == chosen


def test_the_sampled_form_is_nearly_as_good(monkeypatch):
    rng = np.random.default_rng(4)
    table, _ = clusters([40, 200, 30, 130], rng)
    points, quality_N = points_of(table), np.ones(400)
    exact = objective(points, quality_N, facility_location(points, quality_N, 10, 0).index_K)
    monkeypatch.setattr(diversity, "EXACT_EXAMPLES", 100)
    order = facility_location(points, quality_N, 10, 0)
    assert len(set(order.index_K.tolist())) == 10
    assert objective(points, quality_N, order.index_K) >= 0.9 * exact
    assert order.index_K.tolist() == facility_location(points, quality_N, 10, 0).index_K.tolist()
    assert order.index_K.tolist() != facility_location(points, quality_N, 10, 1).index_K.tolist()
    everything = facility_location(points, quality_N, 400, 0).index_K
    assert sorted(everything.tolist()) == list(range(400))


@pytest.mark.parametrize("method", [facility_location, k_centre])
def test_small_clusters_are_covered_where_chance_misses_them(method):
    rng = np.random.default_rng(5)
    table, label = clusters([300, 20, 20, 20, 20, 20], rng)
    points, quality_N = points_of(table), np.ones(400)
    order = method(points, quality_N, 6, 0)
    assert set(label[order.index_K].tolist()) == set(range(6))
    at_random = [np.random.default_rng(seed).permutation(400)[:6] for seed in range(20)]
    assert max(len(set(label[rows].tolist())) for rows in at_random) < 6
    assert coverage(points, order.index_K, 0) > max(coverage(points, rows, 0) for rows in at_random)


def test_quality_decides_among_equals_and_equals_are_drawn():
    table = np.repeat(np.eye(4), 5, axis=0)
    quality_N = np.tile([0.5, 0.6, 1.0, 0.7, 0.1], 4)
    for method in (facility_location, k_centre):
        assert sorted(method(points_of(table), quality_N, 4, 0).index_K.tolist()) == [2, 7, 12, 17]
    draws = {tuple(facility_location(points_of(table), np.ones(20), 4, seed).index_K.tolist()) for seed in range(9)}
    assert len(draws) > 5


def test_coverage_and_the_nearest_chosen():
    table, label = clusters([9, 9, 9], np.random.default_rng(6), spread=0.05)
    points = points_of(table)
    chosen = np.array([0, 9, 18])
    nearest_N, similarity_N = nearest_chosen(points, chosen)
    assert nearest_N.tolist() == label.tolist() and similarity_N[chosen] == pytest.approx(1)
    assert coverage(points, np.arange(27), 0) == pytest.approx(1, rel=1e-5)
    assert 0.9 < coverage(points, chosen, 0) < 1
    assert coverage(points, chosen[:1], 0) == pytest.approx(1 / 3, abs=0.05)
