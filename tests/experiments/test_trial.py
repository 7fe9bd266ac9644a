"""Trials are kept, reused, and repeated if anything that they depend on has changed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import lima_curve
import measures
import mitigations
import trial

TASKS = tuple(task for task in measures.yardsticks(3, 2, Path("-")) if not task.file)
MEASURED = {task.task: {name: [1.0] * 2 for name in task.values} for task in TASKS}


@pytest.fixture
def trained(monkeypatch):
    """Names of what is trained; nothing is."""
    names = []

    def train(own, out):
        names.append(own.name)
        out.mkdir(parents=True)
        if own.name == "broken":
            raise RuntimeError("killed")
        (out / "metrics.jsonl").write_text('{"loss": 0.5}\n')
        return {"num_steps": 2, "examples_per_epoch": 5}

    monkeypatch.setattr(trial, "_train", train)
    monkeypatch.setattr(trial, "measure", lambda model, tasks: MEASURED)
    return names


def test_what_was_measured_is_not_measured_again(trained, tmp_path):
    a, broken, base = trial.Trial("a"), trial.Trial("broken"), trial.Trial("base", trained=False)
    with pytest.raises(RuntimeError):
        trial.run_all([base, a, broken], TASKS, tmp_path, 1, lambda line: None)
    said = []
    found = trial.run_all([base, a], TASKS, tmp_path, 1, said.append)
    assert trained == ["a", "broken"] and said == ["2 trials, 2 measured already"]
    assert found["a"]["model"] == MEASURED and found["base"]["num_steps"] == 0
    assert not (tmp_path / "runs" / "a").exists(), "run folders do not pile up"
    kept = json.loads((tmp_path / "measured" / "a.json").read_text())
    assert kept == found["a"]


def test_what_changed_is_measured_anew(trained, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("1")
    own = trial.Trial("a", data=str(data))
    for tasks, changed in ((TASKS, own), (TASKS, replace(own, seed=1)), (TASKS[:1], own)):
        trial.run_all([changed], tasks, tmp_path, 1, lambda line: None)
    assert len(trained) == 3
    data.write_text("2")
    trial.run_all([own], TASKS[:1], tmp_path, 1, lambda line: None)
    assert len(trained) == 4


def test_changes_make_a_run_that_is_valid(tmp_path):
    from preceptor import config

    (tmp_path / "replay.jsonl").write_text('{"text": "a"}\n')
    trials = mitigations.mitigation_trials(2, "3 epochs", tmp_path / "replay.jsonl", 10)
    assert [own.name for own in trials[:3]] == ["none-0", "none-1", "replay-0"]
    assert [bool(own.merge) for own in trials] == [own.name.startswith("none") for own in trials]
    runs = {own.name: config.build(trial.run_tree(own, tmp_path / "out"), own.name) for own in trials}
    assert runs["replay-1"].replay.share == mitigations.REPLAY_SHARE and runs["replay-1"].train.seed == 1
    assert runs["kl-0"].loss.kl_coef > 0 and runs["none-0"].loss.kl_coef == 0
    assert runs["lora-0"].adapter.rank == mitigations.LORA_RANK and runs["none-0"].adapter is None
    assert {str(run.train.duration) for run in runs.values()} == {"3 epochs"}


def test_the_trials_of_the_curve_differ_in_their_data_alone(tmp_path):
    sets = {name: {"file": f"{name}.jsonl", "planted": {"good": 10}} for name in ("random-10-0", "select-10-1")}
    first, second = lima_curve.curve_trials(sets, 80)
    assert first.changes == second.changes and (first.seed, second.seed) == (0, 1)
    assert replace(second, name=first.name, seed=0, data=first.data) == first
    results = {name: {"model": MEASURED} for name in sets}
    points = lima_curve.points_of(sets, results)
    assert [(point.way, point.size, point.planted) for point in points] == [
        ("random", 10, {"good": 10.0}),
        ("select", 10, {"good": 10.0}),
    ]


def test_items_outside_the_narrow_family():
    places = lima_curve.outside("heldout", 50)
    items = trial.Yardstick("heldout", 50, ()).read().items
    assert 0 < len(places) < 50
    assert {items[place].groups["family"] for place in range(50) if place not in places} == {"country_code"}
