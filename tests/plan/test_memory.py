"""Bytes by component: exact where they can be, and the peak of a step within a tenth of what is measured."""

import gc

import pytest
import torch
from test_activations import row_of, tracker_of
from test_parameters import LLAMA_8B, REAL

from preceptor.model.activations.policy import ActivationPolicy
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.forward import Engine
from preceptor.plan.activations import Work
from preceptor.plan.flops import operations
from preceptor.plan.memory import Setup, predict_memory, state_bytes
from preceptor.plan.parameters import Adapter, count_parameters
from preceptor.plan.shapes import shape_of
from preceptor.train.optimizer import build_optimizer
from preceptor.train.precision import autocast
from tiny import tiny_model

LLAMA_70B = shape_of(REAL["Llama-3.1-70B"][0])
LONG = Work((((3000, 1096),),))
STATES = ("weights", "gradients", "master weights", "optimizer")


def states(setup):
    return state_bytes(LLAMA_70B, setup, count_parameters(LLAMA_70B, setup.adapter, setup.num_new_tokens))


def test_full_adamw_of_a_70b_llama_takes_more_than_a_terabyte():
    count = 70_553_706_496
    both = {
        "bfloat16 + float32 master": {"weights": 2, "gradients": 2, "master weights": 4, "optimizer": 8},
        "float32": {"weights": 4, "gradients": 4, "master weights": 0, "optimizer": 8},
    }
    for weights, each in both.items():
        found = states(Setup(weights, autocast=True))
        assert found == {name: size * count for name, size in each.items()}
        assert sum(found.values()) == 16 * count == 1_128_859_303_936


@pytest.mark.parametrize("world_size", [8, 16, 64])
def test_ranks_share_all_states(world_size):
    alone, shared = (states(Setup("bfloat16 + float32 master", world_size=size)) for size in (1, world_size))
    for name in STATES:
        assert 0 <= shared[name] * world_size - alone[name] < world_size
    assert predict_memory(LLAMA_70B, LONG, Setup(world_size=world_size)).components["communication"] > 0


def test_lora_and_4_bits():
    lora, four_bits = (states(Setup(weights, True, Adapter(16))) for weights in ("bfloat16", "4 bits"))
    trained = 80 * 16 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672))
    assert lora == {
        "weights": 2 * 70_553_706_496 + 4 * trained,
        "gradients": 4 * trained,
        "master weights": 0,
        "optimizer": 8 * trained,
    }
    # QLoRA (Dettmers et al. 2023): 4.127 bits for each weight of a linear layer, the rest in bfloat16
    linear = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    expected = 4.127 / 8 * linear + 2 * (70_553_706_496 - linear) + 4 * trained
    assert four_bits["weights"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("adapter", [None, Adapter(4)])
def test_weights_gradients_and_optimizer_of_a_real_model(kind, adapter):
    model = tiny_model(kind)
    setup = Setup(adapter=adapter, num_new_tokens=1 if adapter else 0)
    shape = shape_of(model.config.to_dict())
    trained = model if adapter is None else add_adapter(model, 4, 8.0, 0.0, None, [5], seed=0)
    optimizer = build_optimizer(trained, 0.0, (0.9, 0.95))
    Engine(trained)(row_of([((20, 20),)])).backward()
    optimizer.step()
    found = state_bytes(shape, setup, count_parameters(shape, setup.adapter, setup.num_new_tokens))
    parameters = list(trained.parameters())
    assert found["weights"] == sum(p.numel() * p.element_size() for p in parameters)
    assert found["gradients"] == sum(p.numel() * p.element_size() for p in parameters if p.grad is not None)
    means = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert found["optimizer"] == sum(mean.numel() * mean.element_size() for mean in means)


@pytest.mark.parametrize(
    "mode",
    [ActivationPolicy(), ActivationPolicy("recompute"), ActivationPolicy("detach"), ActivationPolicy("full", "all")],
    ids=str,
)
@pytest.mark.parametrize(("kind", "precision", "tokens"), [("llama", "float32", 800), ("qwen3", "bfloat16", 1200)])
def test_the_peak_of_a_step(kind, precision, tokens, mode):
    model = tiny_model(
        kind,
        vocab_size=512,
        num_hidden_layers=4,
        hidden_size=128,
        intermediate_size=384,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    turns = ((tokens * 3 // 4, tokens // 4),)
    row, shape = row_of([turns]), shape_of(model.config.to_dict())
    optimizer = build_optimizer(model, 0.0, (0.9, 0.95))
    with torch.no_grad():
        Engine(model)(row, mode)  # what it finds out about a model once, it has found out
    gc.collect()
    with tracker_of(model) as tracker:
        for _ in range(2):
            tracker.peak_bytes = tracker.live_bytes
            with autocast(model.device, precision):
                loss = Engine(model)(row, mode)
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    work = Work((turns,), mode.context_gradient, mode.checkpointed_layers(4))
    found = predict_memory(shape, work, Setup(autocast=precision == "bfloat16", cpu=True))
    assert found.peak_bytes == pytest.approx(tracker.peak_bytes, rel=0.1)


def test_operations_are_6_n_t_where_that_is_right():
    shape = shape_of({**LLAMA_8B, "vocab_size": 64})
    found = operations(shape, Work((((0, 2048),),)))
    parameters = count_parameters(shape)
    assert found.linear == pytest.approx(6.0 * (parameters.num_base - parameters.outside) * 2048, rel=1e-4)
    # causal attention: scores and values, 2 operations each for every pair and channel, forward and twice backward
    assert found.attention == pytest.approx(32 * 3 * 4 * 4096 * 2048 * 2049 / 2, rel=1e-9)


def test_operations_that_are_left_out_or_added():
    shape = shape_of(LLAMA_8B)
    turns = ((3000, 1000),)
    full, none, again, all_again = (
        operations(shape, Work((turns,), mode, layers))
        for mode, layers in (("full", 0), ("detach", 0), ("recompute", 0), ("full", 32))
    )
    assert none.linear == pytest.approx(full.linear * (4000 + 2 * 1000) / (3 * 4000), rel=1e-3)
    assert again.again == pytest.approx(0.75 * all_again.again, rel=1e-3)
    assert all_again.again == pytest.approx((full.linear + full.attention) / 3, rel=1e-6)
    lora = operations(shape, Work((turns,)), Adapter(16))
    assert lora.linear == pytest.approx(full.linear * 4 / 6) and lora.head == pytest.approx(full.head * 2 / 3)
    experts = shape_of(REAL["Qwen3-30B-A3B"][0])
    active = count_parameters(experts)
    expected = 6 * (active.active - active.outside) * 4000
    assert operations(experts, Work((turns,))).linear == pytest.approx(expected, rel=1e-3)
