"""Which of CUDA's kernels is taken for what; no GPU is needed to choose."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from flash import flash, old_flash
from test_attention import forest_sequence
from test_attention_cuda import chains_sequence

from preceptor.errors import ModelError
from preceptor.model.attention import cuda
from preceptor.model.attention.cuda import attend_varlen, fast_path
from preceptor.model.attention.layout import AttentionOptions, ForestLayout


def tensor(num_heads, num_tokens=300, head_size=64, dtype=torch.bfloat16, device="cuda"):
    return SimpleNamespace(shape=(1, num_heads, num_tokens, head_size), dtype=dtype, device=torch.device(device))


CHAINS, TREES = (ForestLayout.from_sequence(sequence, "cpu") for sequence in (chains_sequence(), forest_sequence()))
LEVEL = ForestLayout(TREES.runs)


@pytest.mark.parametrize(
    ("chosen", "changes"),
    [
        ("attend_varlen", {}),
        ("attend_varlen", {"dtype": torch.float16}),
        ("attend_varlen", {"triton": False}),
        ("attend_varlen", {"layout": LEVEL}),
        ("attend_varlen", {"layout": TREES, "num_tokens": 127}),
        ("attend_varlen", {"layout": TREES, "triton": False}),
        ("attend_varlen", {"varlen": old_flash}),
        ("attend_varlen", {"varlen": old_flash, "layout": LEVEL}),
        ("attend_varlen", {"varlen": old_flash, "triton": False}),
        ("attend_flex", {"layout": TREES}),
        ("attend_flex", {"softcap": 2.0}),
        ("attend_flex", {"sinks": torch.zeros(4)}),
        ("attend_flex", {"head_size": 288}),
        ("attend_flex", {"head_size": 20}),
        ("attend_flex", {"value_size": 128}),
        ("attend_flex", {"varlen": old_flash, "layout": TREES}),
        ("attend_flex", {"capability": (7, 5)}),
        ("attend_flex", {"flash": False}),
        (None, {"device": "cpu"}),
        (None, {"device": "mps"}),
        (None, {"dtype": torch.float32}),
        (None, {"dtype": torch.float64}),
        (None, {"softcap": 2.0, "layout": LEVEL}),
        (None, {"sinks": torch.zeros(4), "num_tokens": 127}),
        (None, {"softcap": 2.0, "head_size": 8}),
        (None, {"softcap": 2.0, "triton": False}),
        (None, {"flash": False, "layout": LEVEL}),
    ],
    ids=lambda given: "+".join(given) if isinstance(given, dict) else str(given),
)
def test_what_is_chosen(chosen, changes, monkeypatch):
    asked = {"dtype": torch.bfloat16, "device": "cuda", "num_tokens": 300, "head_size": 64, "heads": (4, 2)}
    asked |= {"layout": CHAINS, "softcap": None, "sinks": None, "triton": True, "flash": True, "capability": (8, 0)}
    asked |= {"varlen": flash, **changes}
    monkeypatch.setattr(cuda, "varlen_attn", asked["varlen"])
    monkeypatch.setattr(cuda, "_has_triton", lambda: asked["triton"])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: asked["flash"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: asked["capability"])
    cuda._has_flash.cache_clear()
    sizes = (asked["num_tokens"], asked["head_size"], asked["dtype"], asked["device"])
    query, key = (tensor(heads, *sizes) for heads in asked["heads"])
    value = tensor(asked["heads"][1], sizes[0], asked.get("value_size", sizes[1]), *sizes[2:])
    options = AttentionOptions(1.0, None, asked["softcap"], asked["sinks"])
    found = fast_path(query, key, value, asked["layout"], options)
    cuda._has_flash.cache_clear()
    assert getattr(found, "__name__", None) == chosen


def test_autocast_makes_float32_half(monkeypatch):
    query = tensor(4, dtype=torch.float32)
    monkeypatch.setattr(cuda, "_has_flash", lambda _: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    assert fast_path(query, query, query, CHAINS, AttentionOptions(1.0)) is attend_varlen


@pytest.fixture
def switch(monkeypatch):
    """Torch's switch between flash kernels, without kernels: what was activated; `installed` says what can be."""
    state = SimpleNamespace(installed={}, active=None, capability=(9, 0), asked=[])

    def activate(name):
        state.asked.append(name)
        if error := state.installed.get(name, ModuleNotFoundError(name)):
            raise error
        state.active = name

    monkeypatch.setattr(cuda, "_in_use", set())
    monkeypatch.setattr(cuda, "_given_up", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: state.capability)
    monkeypatch.setattr(cuda.attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(cuda.attention, "current_flash_attention_impl", lambda: state.active)
    monkeypatch.setattr(cuda.attention, "restore_flash_attention_impl", lambda: setattr(state, "active", None))
    use = cuda._use_newest_flash
    use.cache_clear()
    yield state
    use.cache_clear()


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("installed", "capability", "active"),
    [
        ({"FA3": None, "FA4": None}, (9, 0), "FA3"),
        ({"FA4": None}, (9, 0), "FA4"),
        ({"FA3": None, "FA4": None}, (10, 0), "FA4"),
        ({"FA3": None, "FA4": None}, (8, 0), None),
        ({}, (9, 0), None),
    ],
)
def test_the_newest_flash_that_is_installed_and_made_for_the_gpu_is_switched_on_once(
    installed, capability, active, switch
):
    switch.installed, switch.capability = installed, capability
    for _ in range(2):
        cuda._use_newest_flash(GPU)
    assert switch.active == active and len(switch.asked) == len(set(switch.asked))
    assert cuda.kernels() == ({"flash": active} if active else {})


def test_a_flash_that_does_not_load_is_recorded_and_the_next_one_taken(switch):
    switch.installed = {"FA3": ImportError("undefined symbol: _ZN3c104impl"), "FA4": None}
    cuda._use_newest_flash(GPU)
    given_up = {"FA3": "ImportError: undefined symbol: _ZN3c104impl"}
    assert cuda.kernels() == {"flash": "FA4", "kernels_given_up": given_up}


def test_what_the_program_has_switched_to_stays(switch):
    switch.active, switch.installed = "FA4", {"FA3": None}
    cuda._use_newest_flash(GPU)
    assert switch.active == "FA4" and not switch.asked


def test_varlen_asks_for_it(switch, monkeypatch):
    asked = []
    monkeypatch.setattr(cuda, "_use_newest_flash", asked.append)
    monkeypatch.setattr(cuda, "varlen_attn", flash)
    query = torch.randn(1, 4, len(CHAINS.position_T), 16)
    attend_varlen(query, query, query, CHAINS, AttentionOptions(1.0))
    assert asked == [query.device]


def test_one_that_fails_gives_way_to_torchs_own(switch):
    switch.installed = {"FA3": None}
    cuda._use_newest_flash(GPU)
    assert cuda.replaceable_kernels() == ["FA3"] and cuda.give_up_kernel("no such head") == "FA3"
    assert switch.active is None and cuda.kernels() == {"kernels_given_up": {"FA3": "no such head"}}
    assert cuda.give_up_kernel("again") is None


def test_one_without_which_it_fails_too_is_used_again(switch):
    switch.installed = {"FA3": None}
    cuda._use_newest_flash(GPU)
    said = []
    with pytest.raises(ZeroDivisionError):
        cuda.with_kernels_that_run(lambda: 1 / 0, lambda *each: said.append(each))
    assert switch.active == "FA3" and cuda.kernels() == {"flash": "FA3"} and not said


@pytest.mark.parametrize(
    ("compares", "last", "num_tries"),
    [
        (False, None, 1),
        (True, ModelError("differ still"), 3),
        (True, torch.OutOfMemoryError("CUDA out of memory"), 3),
        (True, None, 3),
    ],
)
def test_numbers_that_differ_are_a_kernels_only_in_a_comparison(compares, last, num_tries, switch):
    """Each kernel may be the cause; where none is, the first error says what is wrong."""
    switch.installed, switch.active = {"FA3": None}, "FA3"
    cuda._in_use |= {"FA3", cuda.FLEX}
    outcomes = [ModelError("differ"), ModelError("differ too"), last]

    def run():
        if error := outcomes.pop(0):
            raise error

    with nullcontext() if num_tries == 3 and last is None else pytest.raises(ModelError, match=r"^differ$"):
        cuda.with_kernels_that_run(run, compares=compares)
    assert len(outcomes) == 3 - num_tries
    kept = num_tries == 1 or last is not None
    assert switch.active == ("FA3" if kept else None) and cuda.replaceable_kernels() == (
        ["FA3", cuda.FLEX] if kept else []
    )


def test_where_no_kernel_ran_no_other_process_is_asked(switch):
    asked = []
    with pytest.raises(ZeroDivisionError):
        cuda.with_kernels_that_run(lambda: 1 / 0, may_repeat=lambda: bool(asked.append(1)), compares=True)
    assert not asked
