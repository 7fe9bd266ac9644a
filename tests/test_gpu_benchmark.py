"""The script for the first hours on a GPU runs, in small, on a CPU."""

import json

import gpu
import pytest
import torch

from preceptor.model import compiled


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_all_phases_run_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", compiled.BACKEND)  # put back afterwards
    gpu.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == list(gpu.PHASES)
    assert {name: phase.get("error") for name, phase in found.items()} == dict.fromkeys(gpu.PHASES)
    cases = {**found["attention"]["found"], **found["models"]["found"], **found["steps_8b"]["found"]}
    assert [case for case, each in cases.items() if "error" in each] == []
    assert all(max(each["errors"]) < 0.02 for each in found["attention"]["found"].values())
    steps = [each for case, each in found["steps_8b"]["found"].items() if "trees" not in case]
    assert {bool(each["compile_seconds"]) for each in steps} == {False, True}
    of_trl = found["trl"]["found"]
    assert "skipped" in of_trl or abs(of_trl["qwen3-0.6b"]["loss_difference"]) < 0.01


def test_a_phase_that_fails_or_takes_too_long_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    def fails(bench):
        raise torch.OutOfMemoryError("no memory is left")

    def hangs(bench):
        while True:
            pass

    phases = {"fails": (1, 5, fails), "hangs": (1, 1, hangs), "works": (1, 5, lambda bench: {"a": 1})}
    monkeypatch.setattr(gpu, "PHASES", phases)
    found = gpu.run_phases(gpu.Bench(torch.device("cpu"), True, tmp_path), list(phases))
    assert "no memory is left" in found["fails"]["error"] and "budget of 1 s" in found["hangs"]["error"]
    assert found["works"]["found"] == {"a": 1}
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
