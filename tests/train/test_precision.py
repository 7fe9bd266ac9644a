"""`train.precision` by default: what the device is fast in, written out in the record of the run."""

import pytest
import torch

from preceptor import config
from preceptor.model.numerics import cpu_bfloat16_feature, resolve_precision
from preceptor.train import build as building

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("given", "device", "gpu_has_it", "expected"),
    [
        (None, CPU, True, "float32"),
        (None, GPU, True, "bfloat16"),
        (None, GPU, False, "float32"),
        ("bfloat16", CPU, False, "bfloat16"),
        ("float32", GPU, True, "float32"),
    ],
)
def test_the_default_follows_the_device(monkeypatch, given, device, gpu_has_it, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_has_it)
    assert resolve_precision(given, device) == expected


@pytest.mark.parametrize(
    ("flags", "feature"),
    [
        ("fpu avx512f avx512_bf16 amx_bf16", "AMX"),
        ("fpu avx512_bf16", "AVX-512 BF16"),
        ("fpu avx512f", None),
        (None, None),
    ],
)
def test_what_a_cpu_has_for_bfloat16(tmp_path, flags, feature):
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"processor\t: 0\nmodel name\t: with amx_bf16 in its name\nflags\t\t: {flags}\n")
    assert cpu_bfloat16_feature(file) == feature


@pytest.mark.parametrize(
    ("given", "feature", "says"), [(None, "AMX", True), (None, None, False), ("float32", "AMX", False)]
)
def test_a_run_writes_its_precision_out_and_says_what_would_be_faster(
    preceptor, run_file, tmp_path, monkeypatch, given, feature, says
):
    monkeypatch.setattr(building, "cpu_bfloat16_feature", lambda: feature)
    code, out, _ = preceptor("train", run_file(train__precision=given, train__device="cpu", train__duration="1 steps"))
    assert code == 0
    assert ("this CPU has AMX" in out) == says
    assert config.load(tmp_path / "run" / "config.yaml").train.precision == "float32"


@pytest.mark.parametrize("variable", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_gpus_memory_may_grow_in_place_unless_the_user_has_chosen(variable, monkeypatch):
    """However the run is started; the command line has the environment for it."""
    asked = []
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "max_split_size_mb:512")
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append)
    assert building.choose_device("cpu") == CPU and asked == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert building.choose_device("auto") == GPU
    assert asked == ([] if variable else ["expandable_segments:True"])
