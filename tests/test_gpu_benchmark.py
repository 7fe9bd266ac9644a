"""The script for the first hours on a GPU runs, in small, on a CPU."""

import json
import re
import sys
import time
import warnings
from pathlib import Path

import gpu
import gpu_phases
import pytest
import torch
from flash import flash
from torch.utils.flop_counter import FlopCounterMode

from preceptor.model import compiled, sizes
from preceptor.model.attention import cuda, layout
from preceptor.model.attention.layout import product_dtype

FLEX_MODULE = sys.modules["torch.nn.attention.flex_attention"]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Kernels are chosen as there; in their places are flex, not compiled, and what varlen's page describes."""
    monkeypatch.setattr(cuda, "varlen_attn", flash)
    monkeypatch.setattr(FLEX_MODULE, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(FLEX_MODULE, "_validate_device", lambda *_: None)
    monkeypatch.setattr(cuda, "_is_half_on_cuda", lambda value: product_dtype(value) == torch.bfloat16)
    monkeypatch.setattr(layout, "on_grid", lambda num_tokens: num_tokens)  # on CPUs alone sizes are rounded,
    monkeypatch.setattr(sizes, "SHORT_RUN_TOKENS", 0)  # and keys of short runs float32
    for name in ("_has_flash", "_has_triton"):
        monkeypatch.setattr(cuda, name, lambda *_: True)


@pytest.fixture
def graphs_as_they_are(monkeypatch):
    """Compiled anew, without a compiler."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    for made in (compiled._compiled, compiled.watch):  # by tests before this one
        made.cache_clear()
    torch._dynamo.reset()


def bench_of(folder, device="cpu", tiny=True):
    return gpu_phases.Bench(torch.device(device), tiny, folder, folder / "kernels.txt")


def run_small(phase, folder):
    found = gpu_phases.Found(folder / "found.json")
    gpu_phases.PHASES[phase](bench_of(folder), found)
    assert json.loads((folder / "found.json").read_text()) == json.loads(json.dumps(found))
    assert [case for case, each in found.items() if isinstance(each, dict) and "error" in each] == []
    return found


def test_the_product_in_small(tmp_path):
    found = run_small("product", tmp_path)
    assert found["stopped_after"] == 1 and len(found["losses"]) == 2 and "product" not in found["answer"]
    assert found["engine"]["mode"] == "efficient"
    assert found["qlora"] if isinstance(found["qlora"], str) else len(found["qlora"]["losses"]) == 1


def test_attention_in_small_reaches_both_kernels(as_on_a_gpu, tmp_path):
    found = run_small("attention", tmp_path)
    assert len(found) == 2 * len(gpu_phases.FEATURES) and max(max(each["errors"]) for each in found.values()) < 0.02
    assert max(each["worst"] for each in found.values()) < 1.25
    by = {case.partition(" ")[0] + case.rpartition(",")[2]: each["by"] for case, each in found.items()}
    assert by["chains plain"] == by["chains window 63"] == "attend_varlen"
    assert {name for case, name in by.items() if "trees" in case or "cap" in case or "sinks" in case} == {"attend_flex"}


def test_models_in_small_are_of_all_types_and_modes(as_on_a_gpu, tmp_path, monkeypatch):
    reached = set()
    for name in ("attend_varlen", "attend_flex"):
        own = getattr(cuda, name)
        monkeypatch.setattr(cuda, name, lambda *given, own=own: reached.add(own.__name__) or own(*given))
    found = run_small("models", tmp_path)
    words = [case.split(", ") for case in found]
    assert {word[0] for word in words} == {"llama", "qwen3", "gemma2", "gpt_oss"}
    assert {word[2] for word in words} == set(gpu_phases.MODES)
    assert "attend_flex" in reached
    for case, (each,) in found.items():
        bound = 1e-4 if "float32" in case else 0.05
        assert abs(each["loss_error"]) < bound > each["gradient_error"], case


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("phase", ["steps_8b", "memory", "lora_8b", "steps_small", "product_auto"])
def test_steps_in_small(phase, graphs_as_they_are, tmp_path):
    found = run_small(phase, tmp_path)
    if phase == "steps_8b":
        assert {bool(each["compile_seconds"]) for each in found.values()} == {False, True}
        tables = (tmp_path / "kernels.txt").read_text()
        assert all(case in tables and len(each["kernels"]) == 12 for case, each in found.items())
        assert all(0 < each["update_seconds"] < each["seconds"] for each in found.values())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_trl_has_the_same_loss(tmp_path):
    found = run_small("trl", tmp_path)
    assert "skipped" in found or abs(found["qwen3-0.6b, compared"]["loss_difference"]) < 0.01


def test_ours_is_measured_before_liger_changes_the_modules_and_each_shape_is_tried(tmp_path, monkeypatch):
    order = []

    def ours(bench, found, cases, **_):
        for case in cases:
            order.append(f"ours {case.shape}")
            found[str(case)] = {"losses": [2.0], "seconds": 3.0, "update_seconds": 1.0}

    def theirs(bench, case):
        order.append(f"TRL {case.shape}")
        if case.shape == "qwen3-0.6b":
            raise torch.OutOfMemoryError("no memory is left")
        return {"losses": [2.0], "seconds": 6.0, "gradient_seconds": 4.0}

    monkeypatch.setattr(gpu_phases, "run_cases", ours)
    monkeypatch.setattr(gpu_phases, "_trl_seconds", theirs)
    monkeypatch.setattr(gpu_phases.importlib.util, "find_spec", lambda name: True)
    found = gpu_phases.Found()
    gpu_phases.trl(bench_of(tmp_path, tiny=False), found)
    shapes = ("qwen3-0.6b", "llama-3.1-8b")
    assert order == [f"{whose} {shape}" for whose in ("ours", "TRL") for shape in shapes]
    assert "no memory is left" in found["qwen3-0.6b, TRL"]["error"]
    compared = {"loss_difference": 0.0, "times_as_fast": 2.0, "whole_step_times_as_fast": 2.0}
    assert found["llama-3.1-8b, compared"] == compared


# The processes --------------------------------------------------------------------------------------------------------

FINDS = "import json, os, pathlib; pathlib.Path('found.json').write_text(json.dumps({'first': 1}));"


@pytest.mark.parametrize(
    ("then", "error"),
    [
        ("", None),
        ("raise MemoryError('no memory is left')", "MemoryError: no memory is left"),
        ("print('so far', flush=True); os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        (
            "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
            "the budget of 9 s is spent",
        ),
    ],
)
def test_a_phase_that_ends_badly_keeps_what_it_found(then, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, log = tmp_path / "found.json", tmp_path / "log"
    result = gpu.run_phase([sys.executable, "-c", f"{FINDS}{then}"], file, log, 9 if "while" in then else 600)
    assert result["found"] == {"first": 1} and result.get("error") == error
    assert ("so far" in result.get("printed", "")) == ("so far" in then)


def test_a_phase_ends_with_all_that_it_started(tmp_path):
    inner = "import time; time.sleep(60)"
    starts = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {inner!r}]).pid, flush=True)"
    log = tmp_path / "log"
    gpu.run_phase([sys.executable, "-c", f"{starts}; 1 / 0"], tmp_path / "none", log, 600)
    status = Path(f"/proc/{log.read_text().split()[0]}/status")
    deadline = time.monotonic() + 30
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not status.exists() or "zombie" in status.read_text()


def test_the_script_leaves_three_files_and_prints_what_it_found(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(gpu.PHASES, "facts", (1, 600))
    found = gpu.main(["--tiny", "--device", "cpu", "--part", "1", "--phases", "facts", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "gpu-1.json").read_text()) == found and "error" not in found["facts"]
    assert {file.name for file in tmp_path.iterdir()} <= {"gpu-1.json", "kernels-1.txt", "log-1.txt"}
    said, _, values = capfd.readouterr().out.partition(" {")
    assert said.startswith("facts: done") and json.loads("{" + values) == gpu.compact(found["facts"]["found"])


def test_what_is_printed_is_short():
    found = {"case": {"seconds": 1.23456789, "kernels": [("mm", 1, 2.0)], "losses": [0.123456, 2]}}
    assert gpu.compact(found) == {"case": {"seconds": 1.235, "losses": [0.1235, 2]}}


# The order and the budgets --------------------------------------------------------------------------------------------

LENT, CALL = 900, 600  # seconds of the device, and of one command
START, INSTALL, TRANSFER, BETWEEN = 120, 15, 30, 30  # at most: its start, the wheels, files there and back, idle


def test_both_calls_fit_into_what_a_machine_is_lent_for():
    assert gpu.PHASES.keys() == gpu_phases.PHASES.keys()
    of_calls = [sum(budget for part, budget in gpu.PHASES.values() if part == call) for call in (1, 2)]
    assert max(of_calls) + INSTALL < CALL
    assert sum(of_calls) + START + 2 * (INSTALL + TRANSFER) + BETWEEN <= LENT
    page = (Path(gpu.__file__).parent / "gpu.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (\w+) \| (\d+) \|", page, re.MULTILINE)
    assert {name: (int(part), int(budget)) for part, name, budget in rows} == gpu.PHASES
    assert f"at most {sum(of_calls)} seconds" in page


def cases_of(phase, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_phases, "run_cases", lambda bench, found, cases, **_: asked.extend(cases))
    phase(bench_of(folder, "cuda", tiny=False), {})
    return asked


@pytest.mark.parametrize("phase", [gpu_phases.lora_8b, gpu_phases.steps_small])
def test_what_is_not_compiled_comes_first(phase, tmp_path, monkeypatch):
    engines = [case.engine for case in cases_of(phase, tmp_path, monkeypatch)]
    assert engines == sorted(engines, reverse=True) and set(engines) == {"efficient", "compiled"}


def test_what_is_most_wanted_of_8b_comes_first(tmp_path, monkeypatch):
    cases = cases_of(gpu_phases.steps_8b, tmp_path, monkeypatch)
    begin = [("efficient", "", 4096), ("compiled", "", 4096), ("efficient", "fused", 4096)]
    assert [(case.engine, case.without, case.num_tokens) for case in cases[:3]] == begin
    assert len({str(case) for case in cases}) == len(cases) == 6


def test_each_model_type_is_tried_by_both_engines_before_any_in_a_second_mode(tmp_path):
    cases = gpu_phases._model_cases(bench_of(tmp_path, tiny=False))
    first = [(kind, engine) for kind, engine, mode, _ in cases[:7] if mode == "full"]
    assert first == [
        *((kind, "efficient") for kind in ("llama", "qwen3", "gemma2", "gpt_oss")),
        *((kind, "compiled") for kind in ("llama", "qwen3", "gemma2")),
    ]
    assert {case[3] for case in cases if case[0] == "gpt_oss"} == {"float32"} and len(cases) == len({*cases}) == 52


def test_trees_come_first_and_the_second_shape_of_heads_last(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_phases, "_attention_case", lambda *_: {})
    found = gpu_phases.Found()
    monkeypatch.setattr(gpu_phases.ForestLayout, "from_sequence", lambda *_: None)
    gpu_phases.attention(bench_of(tmp_path, tiny=False), found)
    cases = [case.split(", ") for case in found]
    assert [case[0] + " " + case[2] for case in cases[2:6:3]] == ["trees 640 plain", "trees 640 window 63"]
    heads = [case[1] for case in cases]
    assert heads == sorted(heads, reverse=True) and len(set(heads)) == 2 and len(found) == 2 * 2 * 3 * 6


# A step ---------------------------------------------------------------------------------------------------------------


def test_a_step_is_taken_in_the_precision_of_a_run_on_that_device(tmp_path, monkeypatch):
    """bfloat16 weights too go under autocast on a GPU."""
    asked = []

    def take_step(state, sequences, learning_rate, norm, precision, objective):
        asked.append(precision)
        raise KeyError

    monkeypatch.setattr(gpu_phases, "take_step", take_step)
    monkeypatch.setattr(gpu_phases, "resolve_precision", lambda asked, device: f"of {device}")
    for weights in ("bfloat16", "float32"):
        with pytest.raises(KeyError):
            case = gpu_phases.Case("qwen3-0.6b", 96, weights=weights, optimizer="adamw")
            gpu_phases._step_case(bench_of(tmp_path), case, False)
    assert asked == ["of cpu", "of cpu"]


@pytest.mark.parametrize("mode", gpu_phases.MODES)
@pytest.mark.parametrize("adapter", [False, True], ids=["full fine-tuning", "LoRA"])
def test_the_operations_of_a_step_are_those_that_torch_counts(adapter, mode, tmp_path, monkeypatch):
    """But for attention, of which short conversations have little, and what the last of eight layers spares."""
    shape = {"model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 384}
    shape |= {"num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    monkeypatch.setitem(gpu_phases.SHAPES, "small", shape)
    counted, take_step = [], gpu_phases.take_step

    def added(total, left, right, **_):  # in place, which torch does not count by itself
        return 2 * left[0] * left[1] * right[1]

    def counting(*given):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as counter:
            found = take_step(*given)
        counted.append(counter.get_total_flops())
        return found

    monkeypatch.setattr(gpu_phases, "take_step", counting)
    monkeypatch.setattr(gpu_phases, "_predicted", lambda *_: None)
    case = gpu_phases.Case("small", 64, adapter=adapter, weights="float32", mode=mode, optimizer="adamw")
    found = gpu_phases._step_case(bench_of(tmp_path, tiny=False), case, False)
    assert found["operations_per_second"] * found["seconds"] == pytest.approx(counted[-1], rel=0.25)


def test_the_update_is_timed_by_itself_and_can_be_left_out(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    update = gpu_phases._Update(bench_of(tmp_path), optimizer)
    weight.grad = torch.ones(3)
    optimizer.step()
    update.off = True
    optimizer.step()
    assert weight.tolist() == [0.0] * 3 and len(update.seconds) == 2


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_the_profile_leaves_the_update_out(optimizer, tmp_path, monkeypatch):
    """The weights of a step that is profiled stay."""

    def profile(bench, case, step):
        model = models[0]
        before = [p.clone() for p in model.parameters()]
        step()
        return all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))

    models, model_of = [], gpu_phases._model_of
    monkeypatch.setattr(gpu_phases, "_model_of", lambda *given: models.append(model_of(*given)) or models[-1])
    monkeypatch.setattr(gpu_phases, "_profile", profile)
    case = gpu_phases.Case("qwen3-0.6b", 96, weights="float32", optimizer=optimizer)
    assert gpu_phases._step_case(bench_of(tmp_path), case, True)["kernels"] is True


def test_the_update_is_compiled_as_in_a_run_and_timed_both_ways(graphs_as_they_are, tmp_path, monkeypatch):
    def compile_update(optimizer, device, say):
        optimizer.compiled = True
        say("compiled")

    monkeypatch.setattr(gpu_phases, "compile_update", compile_update)
    found = gpu_phases._step_case(bench_of(tmp_path), gpu_phases.Case("qwen3-0.6b", 96), True)
    assert found["said"] == ["compiled"] and found["update_seconds"] > 0 < found["update_seconds_not_compiled"]
    assert compiled.num_graphs() > 0


def test_a_case_after_which_the_gpu_is_unusable_does_not_end_the_phase(tmp_path, monkeypatch):
    def free(bench):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_phases.Bench, "free", free)
    found = gpu_phases.Found()
    cases = [gpu_phases.Case("qwen3-0.6b", 96), gpu_phases.Case("llama-3.1-8b", 96)]
    gpu_phases.run_cases(bench_of(tmp_path), found, cases)
    assert ["illegal memory access" in each["error"] for each in found.values()] == [True, True]


def test_an_optimisation_can_be_left_out(tmp_path):
    case = gpu_phases.Case("qwen3-0.6b", 96, without="norms")
    model = gpu_phases._model_of(bench_of(tmp_path), case)
    on = model.model.__dict__["engine_model_state"].optimisations
    assert "glu" in on and "norms" not in on and str(case).endswith("efficient without norms")


def test_torchs_warning_of_the_mode_itself_is_no_wait():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)
    assert [*gpu_phases._places(heard).values()] == [1]
