"""Outcomes follow from the intervals alone, also where less is better; figures are printed exactly."""

import pytest

import measures
import seeds


def change(low, high):
    return seeds.Figure((low + high) / 2, low, high, 100, 3)


@pytest.mark.parametrize(
    ("measure", "low", "high", "wanted", "outcome"),
    [
        ("EXACT", 0.1, 0.2, 1, "shown"),
        ("EXACT", -0.2, -0.1, 1, "refuted"),
        ("EXACT", -0.1, 0.2, 1, "open"),
        ("BITS", 0.01, 0.02, 1, "refuted"),
        ("BITS", 0.01, 0.02, -1, "shown"),
    ],
)
def test_a_claim_by_sign(measure, low, high, wanted, outcome):
    claim = measures.by_sign("x", getattr(measures, measure), change(low, high), wanted)
    assert claim.outcome == outcome


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(-0.02, 0.0, "shown"), (-0.02, 0.1, "shown"), (-0.04, 0.1, "open"), (-0.09, -0.04, "refuted")],
)
def test_a_claim_by_margin_wants_to_be_sure(low, high, outcome):
    assert measures.by_margin("x", measures.EXACT, change(low, high), 0.03).outcome == outcome
    mirrored = seeds.Figure(0.0, -high, -low, 100, 3)
    assert measures.by_margin("x", measures.BITS, mirrored, 0.03).outcome == outcome


def test_a_claim_by_level():
    found = [measures.by_level("x", change(*ends), 0.5, "").outcome for ends in ((0.6, 0.7), (0.4, 0.6), (0.1, 0.2))]
    assert found == ["shown", "open", "refuted"]


def test_figures_as_they_are_told():
    own = seeds.Figure(0.979, 0.9641, 0.9888, 300, 3, (0.973, 0.984, 0.98))
    assert measures.shown(measures.EXACT, own) == "97.9 % (96.4 to 98.9)"
    assert measures.of_seeds(measures.EXACT, own) == "97.3 to 98.4"
    assert measures.changed(measures.EXACT, change(-0.04, -0.0001)) == "−2.0 points (−4.0 to 0.0)"
    assert measures.changed(measures.BITS, change(0.002, 0.004)) == "+0.0030 bits per byte (+0.0020 to +0.0040)"


def test_measures_take_their_items_of_every_seed():
    models = [
        {"heldout": {"right": [1.0, 0.0, 1.0, 1.0]}, "library_heldout": {"bits": [8.0, 4.0], "num_bytes": [16.0, 8.0]}},
        {
            "heldout": {"right": [1.0, 1.0, 0.0, 0.0]},
            "library_heldout": {"bits": [8.0, 16.0], "num_bytes": [16.0, 8.0]},
        },
    ]
    assert measures.EXACT.of(models).by_seed == (0.75, 0.5)
    assert measures.EXACT.of(models, [0, 1]).value == 0.75
    assert measures.BITS.of(models).by_seed == (0.5, 1.0)
    assert measures.BITS.between(models[:1], models[1:]).value == 0.5
