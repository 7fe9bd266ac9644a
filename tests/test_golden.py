"""Trees and losses are those that were recorded in tests/golden (record.py there records them again)."""

import pytest
from golden import conversations, data, subject

from tiny import tiny_tokenizer

ENTRIES = conversations.read_entries() if conversations.TEMPLATES.is_dir() else []
_RECORDED = {name: data.recorded(name) for name in ("trees", "losses")}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.skipif(not ENTRIES, reason="the folder shared/templates is not beside the repository")
def test_each_template_and_each_case_is_recorded():
    assert [entry.name for entry in ENTRIES] == list(_RECORDED["trees"])
    assert list(subject.CASES) == list(_RECORDED["losses"])


@pytest.mark.skipif(
    not subject.aliases_reasoning(tiny_tokenizer()),
    reason="recorded with a transformers that shows reasoning to templates under other names too",
)
@pytest.mark.parametrize(("place", "entry"), list(enumerate(ENTRIES)), ids=[entry.name for entry in ENTRIES])
def test_trees_are_as_recorded(place, entry):
    found = data.tree_differences(data.trees(entry, place), _RECORDED["trees"][entry.name])
    assert not found, "\n".join(found)


@pytest.mark.parametrize("case", subject.CASES)
def test_losses_are_as_recorded(case, models):
    found = data.loss_differences(data.trajectory(case, models), _RECORDED["losses"][case], subject.is_coarse(case))
    assert not found, "\n".join(found)


def test_differences_are_found():
    tree = {"bytes": {"plain": ["a", "b"]}}
    assert data.tree_differences(tree, tree) == []
    assert len(data.tree_differences({"bytes": {"plain": ["a", "c"]}}, tree)) == 1
    run = {"num_examples": 3, "loss": [2.0, 1.0], "grad_norm": [1.0, 1.0]}
    assert data.loss_differences(run | {"loss": [2.0, 1.00005]}, run) == []
    assert len(data.loss_differences(run | {"loss": [2.0, 1.0002]}, run)) == 1
    assert len(data.loss_differences(run | {"loss": [2.0]}, run)) == 1
    assert len(data.loss_differences(run | {"num_examples": 4}, run)) == 1
