"""Bytes by component that are arithmetic, and operations of a sequence."""

from dataclasses import replace

import pytest
import torch
from measured import measured_peak, sequence_of
from test_parameters import LLAMA_8B, REAL, built
from torch.utils.flop_counter import FlopCounterMode

from preceptor.model.activations.passes import StepContext
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.forward import Engine
from preceptor.model.options import KEEP_ALL, ActivationPolicy
from preceptor.model.parts import choose_trained
from preceptor.plan.counting import count_built
from preceptor.plan.dry_run import dry_run_like
from preceptor.plan.memory import Moment, Setup, host_bytes, state_bytes, step_memory, update_bytes
from preceptor.plan.parameters import LoraSpec, count_parameters
from preceptor.plan.shapes import shape_of
from preceptor.plan.work import Work, operations
from preceptor.train.optimizer import (
    accumulate_in_float32,
    build_optimizer,
    expected_state_bytes,
    optimizer_memory,
)
from tiny import tiny_model


@pytest.fixture(scope="module")
def llama_70b():
    return built(REAL["Llama-3.1-70B"][0])


def test_full_adamw_of_a_70b_llama_takes_more_than_a_terabyte():
    parameters = count_parameters(shape_of(REAL["Llama-3.1-70B"][0]))
    count = 70_553_706_496
    found = state_bytes(Setup("float32", autocast=True), parameters)
    assert found == {"weights": 4 * count, "gradients": 4 * count, "optimizer": 8 * count}
    assert sum(found.values()) == 16 * count == 1_128_859_303_936


def test_the_moment_of_the_peak(llama_70b):
    parameters = llama_70b.parameters()
    setup = Setup("bfloat16", adapter=LoraSpec(4))
    moments = [
        Moment("forward pass", 5, 0, 0, 0),
        Moment("loss", 900, 600, 200, 100),
        Moment("backward pass", 950, 0, 0, 0),
    ]
    memory = step_memory(setup, parameters, moments)
    states = state_bytes(setup, parameters)
    gradients = states["gradients"]
    assert memory.moment == "optimizer step" and memory.peak_bytes == sum(states.values())
    moments[2] = Moment("backward pass", gradients + 1, 0, 0, 0)
    memory = step_memory(setup, parameters, moments)
    assert memory.moment == "backward pass" and memory.peak_bytes == sum(states.values()) + 1
    assert memory.components["activations"] == 300 and memory.components["loss"] == 300


def test_lora_beside_a_frozen_base(llama_70b):
    parameters = llama_70b.parameters(LoraSpec(16))
    trained = 80 * 16 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672))
    for weights, each in (("bfloat16", 2), ("float32", 4)):
        assert state_bytes(Setup(weights, True, LoraSpec(16)), parameters) == {
            "weights": each * 70_553_706_496 + 4 * trained,
            "gradients": 4 * trained,
            "optimizer": 8 * trained,
        }


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("adapter", [None, LoraSpec(4)])
def test_weights_gradients_and_optimizer_of_a_real_model(kind, adapter):
    model = tiny_model(kind)
    setup = Setup(adapter=adapter, num_new_tokens=1 if adapter else 0)
    shape = shape_of(model.config.to_dict())
    trained = model if adapter is None else add_adapter(model, 4, 8.0, 0.0, None, [5], seed=0)
    optimizer = build_optimizer(trained, 0.0, (0.9, 0.95))
    Engine(trained)(sequence_of([((20, 20),)])).backward()
    optimizer.step()
    found = state_bytes(setup, count_parameters(shape, setup.adapter, setup.num_new_tokens))
    parameters = list(trained.parameters())
    assert found["weights"] == sum(p.numel() * p.element_size() for p in parameters)
    assert found["gradients"] == sum(p.numel() * p.element_size() for p in parameters if p.grad is not None)
    means = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert found["optimizer"] == sum(mean.numel() * mean.element_size() for mean in means)


@pytest.mark.parametrize("adapter", [None, LoraSpec(4)])
@pytest.mark.parametrize("name", ["adamw_8bit", "muon", "adafactor", "sgd"])
@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "gpt_oss", "qwen3_moe"])
def test_the_state_of_every_optimizer_by_arithmetic_and_by_dry_run(kind, name, adapter):
    model = tiny_model(kind, **({"hidden_size": 136, "head_dim": 16} if kind == "qwen2" else {}))
    trained = model if adapter is None else add_adapter(model, 4, 8.0, 0.0, None, [5], seed=0)
    momentum = 0.9 if name in ("muon", "sgd") else None
    made = expected_state_bytes(build_optimizer(trained, name=name, momentum=momentum))
    setup = Setup(adapter=adapter, num_new_tokens=1 if adapter else 0, optimizer=name)
    shape = shape_of(model.config.to_dict())
    quick = state_bytes(setup, count_parameters(shape, adapter, setup.num_new_tokens))["optimizer"]
    dry = built(model.config.to_dict()).parameters(adapter, setup.num_new_tokens)
    found = state_bytes(setup, dry)["optimizer"]
    biases = 2 * 4 * 4 * (2 * 48 + 32) if (kind, name, adapter) == ("gpt_oss", "adafactor", None) else 0
    assert found - biases <= made <= found
    assert quick == found


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_without_momentum_has_no_state(momentum):
    model = tiny_model("llama")
    optimizer = build_optimizer(model, name="sgd", momentum=momentum)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    kept = (tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "updates")
    made = sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not None)
    parameters = count_built(model, model)
    assert made == (4 * parameters.num_trained if momentum else 0) == expected_state_bytes(optimizer)
    assert made == state_bytes(Setup(optimizer="sgd", momentum=momentum), parameters)["optimizer"]
    assert optimizer_memory(optimizer)[0] == made


@pytest.mark.parametrize(
    ("name", "rounding", "num_sequences"),
    [
        ("adamw", "exact", 1),
        ("adamw", "exact", 2),
        ("adamw", "stochastic", 1),
        ("adamw_8bit", "exact", 1),
        ("adamw_8bit", None, 2),
        ("muon", None, 1),
        ("muon", "exact", 2),
        ("adafactor", "nearest", 2),
        ("sgd", None, 1),
    ],
)
def test_the_peak_of_a_step_by_optimizer_and_type(name, rounding, num_sequences):
    """The update of the largest weight is the peak where a sequence is short."""
    dtype = torch.bfloat16 if rounding else torch.float32
    model = tiny_model("llama", vocab_size=2048, hidden_size=128, intermediate_size=1024, dtype=dtype)
    momentum = 0.9 if name in ("muon", "sgd") else None
    settings = {"name": name, "rounding": rounding, "momentum": momentum, "weight_decay": 0.1}
    measured = measured_peak(model, sequence_of((((9, 3),),)), KEEP_ALL, num_sequences=num_sequences, **settings)
    setup = Setup("bfloat16" if rounding else "float32", False, None, 0, num_sequences, "cpu", name, rounding)
    dry_run = dry_run_like(model)
    moments = dry_run.step(setup, KEEP_ALL, sequence_of((((9, 3),),)), 2048)
    parameters = dry_run.parameters()
    if num_sequences > 1:
        accumulate_in_float32(model)
    built = build_optimizer(model, name=name, momentum=momentum, rounding=rounding)
    expected = (state_bytes(setup, parameters)["optimizer"], update_bytes(setup, parameters))
    assert optimizer_memory(built) == expected
    memory = step_memory(setup, parameters, moments)
    assert memory.peak_bytes == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(("name", "rounding"), [("adamw", None), ("adamw", "exact"), ("adamw_8bit", None)])
def test_states_in_the_hosts_memory_are_on_the_device_one_weight_at_a_time(name, rounding):
    """What is measured is both memories."""
    dtype = torch.bfloat16 if rounding else torch.float32
    model = tiny_model("llama", vocab_size=2048, hidden_size=128, intermediate_size=1024, dtype=dtype)
    settings = {"name": name, "rounding": rounding, "weight_decay": 0.1}
    measured = measured_peak(model, sequence_of((((9, 3),),)), KEEP_ALL, offload=True, **settings)
    setup = Setup("bfloat16" if rounding else "float32", optimizer=name, rounding=rounding, offload=True)
    dry_run = dry_run_like(model)
    parameters = dry_run.parameters()
    memory = step_memory(setup, parameters, dry_run.step(setup, KEEP_ALL, sequence_of((((9, 3),),)), 2048))
    assert memory.components["optimizer"] == 0
    assert host_bytes(setup, parameters) == state_bytes(replace(setup, offload=False), parameters)["optimizer"]
    assert memory.peak_bytes + host_bytes(setup, parameters) == pytest.approx(measured, rel=0.02)


def test_operations_are_6_n_t_where_that_is_right():
    parameters = built({**LLAMA_8B, "vocab_size": 64}).parameters()
    found = operations(parameters, Work((((0, 2048),),)))
    assert found["linear layers"] == pytest.approx(6.0 * (parameters.num_base - parameters.outside) * 2048, rel=1e-4)
    # causal attention: scores and values, 2 operations each for every pair and channel, forward and twice backward
    assert found["attention"] == pytest.approx(32 * 3 * 4 * 4096 * 2048 * 2049 / 2, rel=1e-9)


def test_operations_that_are_left_out_or_added():
    llama = built(LLAMA_8B)
    turns = ((3000, 1000),)
    policies = (KEEP_ALL, *(ActivationPolicy(*each) for each in (("detach",), ("recompute",), ("full", "all"))))
    full, detached, again, all_again = (operations(llama.parameters(), Work((turns,), policy)) for policy in policies)
    linear, attention = full["linear layers"], full["attention"]
    assert detached["linear layers"] == pytest.approx(linear * (4000 + 2 * 1000) / (3 * 4000), rel=1e-3)
    assert again["computed again"] == pytest.approx(0.75 * all_again["computed again"], rel=1e-3)
    assert all_again["computed again"] == pytest.approx((linear + attention) / 3, rel=1e-6)
    lora = operations(llama.parameters(LoraSpec(16)), Work((turns,)))
    assert lora["linear layers"] == pytest.approx(linear * 4 / 6)
    assert lora["head"] == pytest.approx(full["head"] * 2 / 3)
    experts = built(REAL["Qwen3-30B-A3B"][0]).parameters()
    expected = 6 * (experts.active - experts.outside) * 4000
    assert operations(experts, Work((turns,)))["linear layers"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("freeze", "train_only"),
    [
        ((), ()),
        ((), ("*.layers.7.*",)),
        (("*.embed_tokens*", *(f"*.layers.{index}.*" for index in range(5))), ()),
        ((), ("lm_head*",)),
        ((), ("*.mlp.*",)),
        (("*.mlp.*",), ()),
        ((), ("*.layers.4.mlp.down_proj*",)),
    ],
)
def test_matrix_products_of_a_model_that_is_partly_frozen(freeze, train_only):
    """Those that torch does; the last layer spares what only context tokens need."""
    model = tiny_model("llama", vocab_size=512, num_hidden_layers=8)
    choose_trained(model, freeze, train_only)
    sequence = (((300, 100),),)
    with FlopCounterMode(display=False) as counter:
        Engine(model)(sequence_of(sequence), step=StepContext(accumulates=True)).backward()
    done = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    found = operations(count_built(model, model), Work(sequence))
    assert found["linear layers"] + found["head"] == pytest.approx(done, rel=0.15)
