"""`preceptor doctor`: what it finds, what it advises, and that torch is not imported for it."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from preceptor.inspect import machine
from preceptor.plan import devices
from preceptor.plan.devices import DeviceSpec

ROOT = Path(__file__).parents[2]


def test_doctor_is_fast_since_torch_is_not_imported():
    code = (
        "import atexit, sys; from preceptor import cli; sys.argv = ['preceptor', 'doctor', '--json'];"
        "atexit.register(lambda: print('torch' in sys.modules, 'transformers' in sys.modules)); cli.main()"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.stdout.endswith("False False\n"), shown.stderr
    found = json.loads(shown.stdout.removesuffix("False False\n"))
    assert found["problems"] == [] and found["num_cores"] >= 1
    assert found["packages"]["torch"] == found["torch"]["version"]
    assert 0 < found["available_memory_bytes"] <= found["memory_bytes"]


def test_the_build_of_torch_is_read_from_its_file():
    expected = "cpu" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    assert machine._torch_build() == expected


def test_every_extra_for_users_is_explained():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(machine.EXTRAS) == set(extras) - {"dev", "docs"}
    for name, (package, _) in machine.EXTRAS.items():
        assert extras[name][0].startswith(package)


@pytest.mark.parametrize(
    ("needs", "says"),
    [
        ("torch>=99", f"torch {torch.__version__} is not the version that is needed: pip install 'torch>=99'"),
        ("no-such-package>=1", "no-such-package is not installed: pip install 'no-such-package>=1'"),
    ],
)
def test_a_package_that_is_absent_or_old_is_a_problem(preceptor, monkeypatch, needs, says):
    monkeypatch.setattr(machine, "requires", lambda name: ["numpy", needs, "other>=99; extra == 'lm-eval'"])
    code, out, _ = preceptor("doctor")
    assert code == 3 and f"Problems\n  {says}" in out and "other" not in out


def test_a_gpu_needs_a_torch_for_it(preceptor, monkeypatch):
    monkeypatch.setattr(machine, "this_machine", lambda: DeviceSpec("this machine (H100)", 80 * 10**9, None, None))
    monkeypatch.setattr(machine, "_torch_build", lambda: "cpu")
    code, out, _ = preceptor("doctor")
    assert code == 3 and "this machine (H100), 80.0 GB" in out and "torch is built for the CPU" in out
    monkeypatch.setattr(machine, "_torch_build", lambda: "CUDA 12.9")
    assert preceptor("doctor")[0] == 0


def test_a_container_has_the_memory_of_its_limit(tmp_path, monkeypatch):
    (tmp_path / "limit").write_text("1000000\n")
    monkeypatch.setattr(devices, "_CGROUP_LIMITS", (tmp_path / "limit", tmp_path / "none"))
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:       500 kB\n")
    assert devices.host_memory_bytes(tmp_path / "meminfo") == (1_000_000, 512_000)
    assert devices.host_memory_bytes(tmp_path / "none") == (1_000_000, None)
    monkeypatch.setattr(devices, "_gpu_by_driver", lambda: None)
    assert devices.this_machine().memory_bytes == 1_000_000
    (tmp_path / "limit").write_text("max\n")
    assert devices.host_memory_bytes(tmp_path / "none")[0] > 10**9


def test_without_a_driver_it_says_that_training_runs_on_the_cpu(preceptor, monkeypatch):
    monkeypatch.setattr(machine, "this_machine", lambda: DeviceSpec("this machine", 10**9, None, None, "cpu"))
    code, out, _ = preceptor("doctor")
    assert code == 0 and "training runs on the CPU" in out and "Nothing is wrong." in out
