"""Optimizers beside fused AdamW, weights in bfloat16, and what each keeps."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from preceptor import config
from preceptor.errors import ModelError
from preceptor.model import compiled
from preceptor.model.numerics import random_bits, relative_error
from preceptor.train import optimizer as optimizer_module
from preceptor.train import weightwise
from preceptor.train.build import optimizer_of
from preceptor.train.checkpoint import Checkpoints, State
from preceptor.train.optimizer import (
    apply_learning_rate,
    build_optimizer,
    compile_update,
    expected_state_bytes,
    offloads,
    optimizer_lines,
    require_host_memory,
)
from preceptor.train.weightwise import decoded, encoded, narrow, widened
from preceptor.world import World
from tiny import tiny_model

NAMES = ("adamw", "adamw_8bit", "muon", "adafactor", "sgd")
HALF, FULL = torch.bfloat16, torch.float32


def built(model, name="adamw", **settings):
    momentum = {"muon": 0.95, "sgd": 0.9}.get(name)
    return build_optimizer(model, 0.1, (0.9, 0.95), name, momentum=momentum, **settings)


def take_steps(model, optimizer, num, seed=0, dtype=None, lr=1e-3):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator).to(HALF)
            parameter.grad = drawn.to(dtype or parameter.dtype)
        apply_learning_rate(optimizer, lr)
        optimizer.step()
    return model


def as_half(model):
    return model.load_state_dict({k: v.to(HALF).to(v.dtype) for k, v in model.state_dict().items()}) and model


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("muon", lambda ps: torch.optim.Muon(ps, 1e-3, 0.1, 0.95, adjust_lr_fn="match_rms_adamw")),
        ("adafactor", lambda ps: torch.optim.Adafactor(ps, 1e-3, weight_decay=0.1)),
        ("sgd", lambda ps: torch.optim.SGD(ps, 1e-3, momentum=0.9, weight_decay=0.1)),
    ],
)
def test_the_matrices_of_the_layers_are_torchs_own_to_the_bit(name, reference):
    one, other = tiny_model("llama"), tiny_model("llama")
    matrices = [p for p in other.model.layers.parameters() if p.ndim == 2]
    optimizer = reference(matrices)
    take_steps(one, built(one, name), 3)
    take_steps(other, optimizer, 3)
    assert all(
        torch.equal(p, dict(other.named_parameters())[n])
        for n, p in one.named_parameters()
        if ".layers." in n and p.ndim == 2
    )


def test_muon_leaves_embedding_head_and_vectors_to_adamw():
    one, other = tiny_model("llama"), tiny_model("llama")
    take_steps(one, built(one, "muon"), 3)
    take_steps(other, built(other), 3)
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q) == (".layers." not in name or p.ndim < 2), name


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("name", NAMES)
def test_states_in_the_hosts_memory_change_no_bit(name, dtype):
    rounding = "exact" if dtype == HALF else None
    one, other = tiny_model("llama", dtype=dtype), tiny_model("llama", dtype=dtype)
    offloaded, beside = built(one, name, rounding=rounding, offload=True), built(other, name, rounding=rounding)
    take_steps(one, offloaded, 3)
    take_steps(other, beside, 3)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        states = offloaded.state[p], beside.state[q]
        assert all(torch.equal(value, states[0][key]) for key, value in states[1].items())
    said = list(optimizer_lines(offloaded))
    assert any("bytes per parameter in the host's memory" in line for line in said)


def test_a_host_without_room_for_the_states_is_said_before_the_first_step(monkeypatch):
    model = tiny_model("llama")
    optimizer = built(model, "adamw", offload=True)
    needed = 8 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr("preceptor.train.optimizer.host_memory_bytes", lambda: (10**12, needed))
    require_host_memory(optimizer)
    require_host_memory(built(tiny_model("llama"), "adamw"), 2)
    with pytest.raises(ModelError, match=r"available\. Set optimizer.name: adamw_8bit"):
        require_host_memory(optimizer, 2)


@pytest.mark.parametrize(
    ("name", "shape", "needed"),
    [  # what torch's allocator takes for the tensors of one weight: the next power of two of each
        ("adamw", (3, 100), 2 * 2048 + 1024),
        ("adamw", (128,), 2 * 512 + 256),
        ("adamw_8bit", (3, 100), 2 * (512 + 16) + 1024),
        ("adafactor", (3, 100), 16 + 512 + 1024),
        ("sgd", (3, 100), 2048 + 1024),
    ],
)
def test_states_in_pinned_memory_are_counted_as_torch_allocates_them(name, shape, needed, monkeypatch):
    optimizer = built(nn.ParameterList([torch.zeros(shape, dtype=HALF)]), name, rounding="exact", offload=True)
    weight = SimpleNamespace(shape=shape, dtype=HALF, device=torch.device("cuda"))
    optimizer.param_groups[0]["params"] = [weight]
    for available in (needed, needed - 1):
        monkeypatch.setattr("preceptor.train.optimizer.host_memory_bytes", lambda free=available: (10**12, free))
        with nullcontext() if available == needed else pytest.raises(ModelError, match="Set optimizer"):
            require_host_memory(optimizer)


def test_a_run_offloads_from_another_device_alone():
    tree = {"model": {"path": "m"}, "data": {"train": [{"path": "d"}]}, "out": "o", "optimizer": {"offload": True}}
    run = config.build(tree, "run.yaml")
    assert offloads(optimizer_of(run, tiny_model("llama").to("meta")))
    assert not offloads(optimizer_of(run, tiny_model("llama")))


def test_states_of_a_run_that_began_on_a_cpu_are_taken_over():
    """There the same run has torch's own AdamW."""
    one, other = tiny_model("llama"), tiny_model("llama")
    beside, offloaded = built(one), built(other, offload=True)
    take_steps(one, beside, 2)
    take_steps(other, built(other), 2)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        offloaded.state[q] = {name: value.clone() for name, value in beside.state[p].items()}
    take_steps(one, beside, 1, seed=1)
    take_steps(other, offloaded, 1, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


class Copies(TorchDispatchMode):
    """Whether the host waits, of each copy."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._to_copy.default:
            self.waits.append(not (kwargs or {}).get("non_blocking"))
        if operation is torch.ops.aten.copy_.default:
            self.waits.append(not (len(args) > 2 and args[2]))
        return operation(*args, **(kwargs or {}))


def test_states_come_from_the_hosts_memory_and_go_back_without_a_wait():
    model = tiny_model("llama")
    optimizer = built(model, offload=True)
    take_steps(model, optimizer, 1)
    kept = {p: optimizer.state[p]["exp_avg"].data_ptr() for p in model.parameters()}
    with Copies() as copies:
        optimizer.step()
    assert copies.waits == [False] * 4 * len(kept)  # two means there, two back
    assert kept == {p: optimizer.state[p]["exp_avg"].data_ptr() for p in kept}


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_with_exact_rounding_is_the_float32_run_rounded(name):
    """The same gradients: the weights are those of a float32 master, nearest in bfloat16, at every step."""
    half, full = tiny_model("llama", dtype=HALF), as_half(tiny_model("llama"))
    one, other = built(half, name, rounding="exact"), built(full, name)
    take_steps(half, one, 4)
    take_steps(full, other, 4)
    for p, q in zip(half.parameters(), full.parameters(), strict=True):
        assert torch.equal(widened(p, one.state[p]["low"]), q)
        assert (p.float() - q).abs().max() <= (q.abs() * 2**-8).max()


def test_a_small_update_is_lost_by_nearest_kept_by_exact_and_right_in_the_mean_by_stochastic():
    moved = {}
    for rounding in ("nearest", "exact", "stochastic"):
        weight = torch.ones(1 << 14, dtype=HALF)
        low = torch.zeros_like(weight, dtype=torch.int16) if rounding == "exact" else None
        for step in range(64):
            narrow(widened(weight, low) + 1e-4, weight, rounding, low, key=step)
        moved[rounding] = (widened(weight, low) - 1).mean().item()
    assert moved["nearest"] == 0.0
    assert moved["exact"] == pytest.approx(64e-4, rel=1e-3)
    assert moved["stochastic"] == pytest.approx(64e-4, rel=0.03)


@pytest.mark.parametrize("value", [1.0, -1.0, 3e38, -3e38, 1e-40, 0.0, float("inf"), 1.00390625, -1.00390625, 0.7])
def test_a_split_weight_comes_back_to_the_bit(value):
    wide = torch.full((3,), value)
    weight, low = torch.zeros(3, dtype=HALF), torch.zeros(3, dtype=torch.int16)
    narrow(wide.clone(), weight, "exact", low, key=0)
    assert torch.equal(widened(weight, low), wide)
    narrow(wide.clone(), weight, "stochastic", None, key=0)
    assert torch.equal(weight.float(), wide) or (weight.float() - wide).abs().max() <= max(abs(value) * 2**-7, 1e-40)


def test_what_is_drawn_is_uniform_and_follows_from_key_and_place():
    bits = random_bits(7, 0, 1 << 16, torch.device("cpu"))
    assert torch.equal(bits[1000:2000], random_bits(7, 1000, 1000, torch.device("cpu")))
    assert not torch.equal(bits, random_bits(8, 0, 1 << 16, torch.device("cpu")))
    for shift in (0, 16):
        low = (bits >> shift) & 0xFFFF
        counts = torch.bincount(low >> 8, minlength=256)
        assert ((counts - 256).float() / 16).square().mean() == pytest.approx(1.0, abs=0.35)  # chi-square, 255 degrees
        assert abs(torch.corrcoef(torch.stack([low[:-1].float(), low[1:].float()]))[0, 1]) < 0.02


@pytest.mark.parametrize(("num_codes", "octaves"), [(127, 12.0), (255, 24.0)])
def test_eight_bits_keep_a_relative_error_and_the_mean(num_codes, octaves):
    values = torch.randn(12, 128) * torch.logspace(-3, 0, 128)
    values = values if num_codes == 127 else values.square()
    values[2] = 0
    found = []
    for key in range(200):
        noise = random_bits(key, 0, values.numel(), values.device).view_as(values) & 0xFFFF
        codes, scale = encoded(values, noise, num_codes, octaves)
        found.append(decoded(codes, scale, num_codes, octaves))
    assert codes.dtype == (torch.int8 if num_codes == 127 else torch.uint8) and scale.shape == (12, 1)
    mean, seen = torch.stack(found).mean(0), values.abs() > values.abs().max() * 2 ** (3 - octaves)
    assert (found[0][seen] / values[seen] - 1).abs().max() < 2 ** (octaves / (num_codes - 1)) - 1 + 1e-4
    assert (mean[seen] / values[seen] - 1).abs().max() < 0.02
    assert torch.equal(found[0][2], torch.zeros(128))


def test_adamw_8bit_follows_adamw():
    one, other = tiny_model("llama"), tiny_model("llama")
    start = {name: p.detach().clone() for name, p in one.named_parameters()}
    take_steps(one, built(one, "adamw_8bit"), 20)
    take_steps(other, built(other), 20)
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (p - q).norm() < 0.08 * (q - start[name]).norm(), name


def test_an_update_of_8_bits_is_bounded_as_adamws_is_where_gradients_are_tiny_or_stop():
    """No first mean that was rounded up is divided by epsilon alone. 1.2: the most of AdamW with these betas."""
    model = torch.nn.Linear(256, 16, bias=False)
    optimizer = built(model, "adamw_8bit")
    optimizer.param_groups[0] |= {"lr": 1e-3, "weight_decay": 0.0}
    sizes = 2.0 ** -torch.linspace(0, 30, 256)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        drawn = torch.randn(16, 256, generator=generator) * sizes
        model.weight.grad = drawn * (step % 4 == 0)  # the row of a token that occurs now and then
        before = model.weight.detach().clone()
        optimizer.step()
        assert (model.weight - before).abs().max() < 1.2 * 1.05 * 1e-3, step


# Compiled, as on a GPU.


@pytest.fixture
def on_a_gpu(monkeypatch):
    """aot_eager: graphs are made as for a GPU, and then run operation by operation."""
    monkeypatch.setattr(optimizer_module, "no_compiler", lambda device: None)
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    compiled._compiled.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize(
    ("name", "rounding"),
    [("adamw_8bit", None), ("adamw_8bit", "stochastic"), ("adamw", "exact"), ("muon", "stochastic")],
)
def test_compiled_updates_are_the_same_and_no_step_makes_another_graph(name, rounding, on_a_gpu, monkeypatch):
    """In chunks of a few rows, the last one shorter; learning rate, key and place are others in each. Of the models'
    matrices some have rows of 128 elements, some have padded ones."""
    monkeypatch.setattr(weightwise, "chunk_of", lambda device_type: 700)
    models = [tiny_model("llama", dtype=HALF if rounding else FULL) for _ in range(2)]
    optimizers = [built(model, name, rounding=rounding) for model in models]
    lines, graphs = [], []
    compile_update(optimizers[0], torch.device("cpu"), lines.append)
    assert optimizers[0].compiled and lines[0].startswith("the optimizer's update: compiled in ")
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            take_steps(model, optimizer, 1, seed=step, lr=0.1 / (step + 1))
        graphs.append(compiled.num_graphs())
    assert 0 < graphs[0] == graphs[-1]
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        own, other = (optimizer.state[each] for optimizer, each in zip(optimizers, (p, q), strict=True))
        assert own.keys() == other.keys() and relative_error(p.detach(), q.detach()) < 1e-6
        for (
            key,
            value,
        ) in own.items():  # the rate is float32 there: a last bit now and then, and a code that hangs on it
            assert (value != other[key]).float().mean() <= (1e-3 if value.dtype.itemsize == 1 else 0.5), key
            assert value.dtype.itemsize == 1 or torch.allclose(value, other[key], 1e-5)
        if name != "adamw_8bit":
            assert torch.equal(p, q) and all(torch.equal(value, other[key]) for key, value in own.items())


@pytest.mark.parametrize("intermediate_size", [168, 296])
def test_the_trial_of_8_bit_states_makes_all_graphs_that_a_step_needs(intermediate_size, on_a_gpu):
    """Rows of whole blocks, of less than one, of one or two and a rest; what fails in step 1 would end the run."""
    model = tiny_model("llama", hidden_size=256, intermediate_size=intermediate_size)
    optimizer = built(model, "adamw_8bit")
    compile_update(optimizer, torch.device("cpu"), lambda line: None)
    made = compiled.num_graphs()
    take_steps(model, optimizer, 1)
    assert 0 < made == compiled.num_graphs()


def fails(*_, **__):
    raise RuntimeError("backend='inductor' raised:\nmore")


def of_half_a_rate(formula, *given):
    formula(*given[:9], given[9] * 0.5, *given[10:])


def without_noise(formula):
    return lambda wide, weight, *rest: weight.copy_(wide)


@pytest.mark.parametrize(
    ("name", "rounding", "runs", "planted"),
    [
        ("adamw_8bit", None, "run_rowwise", fails),
        ("adamw_8bit", None, "run_rowwise", of_half_a_rate),
        ("adamw_8bit", None, "encoded", lambda values, noise, *form: encoded(values, noise.clamp(max=0), *form)),
        ("adamw", "stochastic", "compiled_function", without_noise),
        ("muon", "exact", "compiled_function", without_noise),
    ],
)
def test_an_update_that_is_another_one_compiled_is_not_compiled_and_it_is_said(
    name, rounding, runs, planted, on_a_gpu, monkeypatch
):
    """Planted."""
    if runs == "encoded":  # in what is compiled alone
        own = lambda formula, *given: _with(weightwise, "encoded", planted, lambda: formula(*given))  # noqa: E731
        monkeypatch.setattr(weightwise, "run_rowwise", own)
    else:
        monkeypatch.setattr(weightwise, runs, planted)
    model = tiny_model("llama", dtype=HALF if rounding else FULL)
    optimizer, lines = built(model, name, rounding=rounding), []
    compile_update(optimizer, torch.device("cpu"), lines.append)
    assert not optimizer.compiled and lines[0].startswith("the optimizer's update is not compiled: ")
    compile_update(built(tiny_model("llama")), torch.device("cpu"), lines.append)  # torch's own kernel
    assert len(lines) == 1


def _with(module, name, value, run):
    former = getattr(module, name)
    setattr(module, name, value)
    try:
        return run()
    finally:
        setattr(module, name, former)


def test_an_update_is_compiled_in_all_processes_or_in_none(on_a_gpu, monkeypatch):
    """Else replicas would drift apart, by last bits that decide of codes."""
    monkeypatch.setattr(World, "max", lambda world, *values: [1.0])
    optimizer, lines = built(tiny_model("llama"), "adamw_8bit"), []
    compile_update(optimizer, torch.device("cpu"), lines.append)
    assert not optimizer.compiled and lines == ["the optimizer's update is not compiled: another process cannot"]


@pytest.mark.parametrize("rounding", [None, "exact", "stochastic"])
@pytest.mark.parametrize("name", NAMES)
def test_states_go_through_a_checkpoint_and_have_the_predicted_size(name, rounding, tmp_path):
    def made(seed):
        model = tiny_model("llama", seed=seed, dtype=HALF if rounding else FULL)
        return model, built(model, name, rounding=rounding)

    model, optimizer = made(0)
    take_steps(model, optimizer, 2)
    states = [value for state in optimizer.state.values() for key, value in state.items() if value.ndim]
    assert sum(value.numel() * value.element_size() for value in states) == expected_state_bytes(optimizer)
    Checkpoints(tmp_path, "this", keep=1).save(State(model, optimizer, step=2))
    plain, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    goal = copy.deepcopy(take_steps(model, optimizer, 2, seed=1).state_dict())
    for way in ("checkpoint", "plain"):
        again, other = made(1)
        if way == "checkpoint":
            Checkpoints(tmp_path, "this", keep=1).restore(State(again, other), print)
        else:
            again.load_state_dict(weights)
            other.load_state_dict(plain)
        take_steps(again, other, 2, seed=1)
        assert all(torch.equal(value, goal[key]) for key, value in again.state_dict().items()), way


def test_factors_of_the_learning_rate_by_pattern():
    model = tiny_model("llama")
    optimizer = built(model, "sgd", lr_factors={"model.layers.0": 0.5, "*.mlp.*": 4.0})
    apply_learning_rate(optimizer, 2.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert found["model.layers.0.mlp.up_proj.weight"] == 4.0 and found["model.layers.0.self_attn.q_proj.weight"] == 1.0
    assert found["model.layers.1.mlp.up_proj.weight"] == 8.0 and found["lm_head.weight"] == 2.0
    assert [line for line in optimizer_lines(optimizer) if line.startswith("learning rate times 4: 3 of ")]
    with pytest.raises(ModelError, match=r"lr_factors: 'lm_hed' matches no parameter.*lm_head"):
        built(model, lr_factors={"lm_hed": 2.0})


def _in_a_shard(rank):
    """The second half of the rows of a weight, as the second of two ranks updates it, and as they are in the whole."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    whole, gradients = torch.randn(7, 200, generator=generator), torch.randn(3, 7, 200, generator=generator)

    def held(tensor, sharded):
        tensor = tensor.to(torch.bfloat16)
        if not sharded:
            return tensor
        part, size = tensor[4:].clone(), {"shape": (7, 200), "stride": (200, 1)}
        return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, **size)

    def trained(name, sharded):
        model = torch.nn.Linear(200, 7, bias=False, dtype=torch.bfloat16)
        model.weight = torch.nn.Parameter(held(whole, sharded))
        momentum = 0.9 if name == "sgd" else None
        optimizer = build_optimizer(model, 0.0, name=name, rounding="stochastic", momentum=momentum)
        for gradient in gradients:
            model.weight.grad = held(gradient, sharded)
            optimizer.param_groups[0]["lr"] = 1e-3
            optimizer.step()
        return model.weight.detach()

    names = ("adamw", "adamw_8bit", "sgd")
    return {name: (trained(name, True).to_local(), trained(name, False)[4:]) for name in names}


@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_a_shard_of_rows_is_updated_as_in_the_whole():
    (found,) = run_ranks(1, _in_a_shard, connected=False)
    assert not isinstance(found, BaseException), found.__notes__
    for name, (sharded, whole) in found.items():
        assert torch.equal(sharded, whole), name
