"""The course of the learning rate, decay groups, and clipping."""

import itertools

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup, get_wsd_schedule

from preceptor import config
from preceptor.model.adapters.lora import add_adapter
from preceptor.train.optimizer import build_optimizer, clip_gradients, schedule
from tiny import tiny_model


def course(lr_scheduler, total=100, warmup=10, final=0.1, decay=None):
    settings = config.Optimizer(
        learning_rate=2.0,
        lr_scheduler=lr_scheduler,
        warmup=config.Duration(warmup, "steps"),
        min_lr_ratio=final,
        decay=decay and config.Duration(decay, "steps"),
    )
    return [*map(schedule(settings, 1, total), range(total))]


@pytest.mark.parametrize("lr_scheduler", ["cosine", "linear", "constant"])
def test_the_rise_and_the_ends(lr_scheduler):
    rates = course(lr_scheduler)
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert max(rates) == 2.0
    assert rates[-1] == pytest.approx(2.0 if lr_scheduler == "constant" else 0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_the_middle_of_the_fall():
    assert course("linear", total=110)[59] == pytest.approx(2.0 * 0.55)
    assert course("cosine", total=110)[59] == pytest.approx(2.0 * 0.55)
    assert course("cosine", total=110)[34] > course("linear", total=110)[34]


def test_without_warmup_the_first_step_is_near_the_peak():
    assert course("linear", warmup=0)[0] == pytest.approx(2.0 * 0.991)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 0), (4, 0), (3, 2), (50, 10)])
@pytest.mark.parametrize("lr_scheduler", ["linear", "cosine", "wsd"])
def test_a_fall_to_nothing_is_that_of_transformers_and_every_step_learns(lr_scheduler, total, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    decay = (total - warmup + 1) // 2
    if lr_scheduler == "wsd":
        more = {"num_stable_steps": total - warmup - decay, "num_decay_steps": decay, "decay_type": "linear"}
        theirs = get_wsd_schedule(optimizer, warmup, **more)
    else:
        of_theirs = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
        theirs = of_theirs[lr_scheduler](optimizer, warmup, total)
    expected = []
    for _ in range(total):
        expected += theirs.get_last_lr()
        optimizer.step()
        theirs.step()
    rates = course(lr_scheduler, total, warmup, 0.0, decay if lr_scheduler == "wsd" else None)
    assert rates[warmup:] == pytest.approx(expected[warmup:]) and min(rates) > 0


def test_wsd_stays_at_the_peak_until_the_last_part_and_falls_to_the_ratio():
    rates = course("wsd", decay=20)
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert set(rates[9:80]) == {2.0} and rates[89] == pytest.approx(2.0 * 0.55) and rates[99] == pytest.approx(0.2)
    assert course("wsd", 6, 2, decay=6)[5] == pytest.approx(0.2)  # longer than what is left


def test_matrices_decay_and_the_rest_does_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    model[0].weight.requires_grad_(True)
    model[1].bias.requires_grad_(False)
    optimizer = build_optimizer(model, 0.1, [0.9, 0.95])
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {id(model[0].weight): 0.1, id(model[0].bias): 0.0, id(model[1].weight): 0.0}


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")  # peft looks for layers alone
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_muon_is_for_no_stack_of_experts_matrices(kind):
    """A and B of all experts of a layer are one tensor of two dimensions, which no product makes a matrix."""
    model = add_adapter(tiny_model(kind, num_experts=4, num_experts_per_tok=2), 4, 8.0, 0.0, None, [], seed=0)
    names = {id(p): own_name for own_name, p in model.named_parameters()}
    rules = {
        names[id(p)]: group["rule"]
        for group in build_optimizer(model, name="muon", momentum=0.95).param_groups
        for p in group["params"]
    }
    assert {rule for own_name, rule in rules.items() if ".experts." in own_name} == {"adamw"}
    assert {rule for own_name, rule in rules.items() if ".self_attn." in own_name} == {"muon"}
    one = add_adapter(tiny_model("gpt_oss", num_local_experts=1, num_experts_per_tok=1), 4, 8.0, 0.0, None, [], seed=0)
    rules_of_one = {group["rule"] for group in build_optimizer(one, name="muon", momentum=0.95).param_groups}
    assert rules_of_one == {"muon"}


def test_clipping_returns_the_norm_before_it():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    assert clip_gradients(optimizer, 1.0).item() == pytest.approx(5.0)
    assert parameter.grad.norm().item() == pytest.approx(1.0, abs=1e-5)
