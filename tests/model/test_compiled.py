"""Decoder layers compiled by torch.compile, traced as for a GPU up to its kernels: the same losses and gradients."""

import numpy as np
import pytest
import torch
from test_passes import assert_same, loss_and_grads

from preceptor.data.forest import pack_trees
from preceptor.model import compiled, optimisations
from preceptor.model.activations.policy import ActivationPolicy
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.forward import Engine
from preceptor.model.optimisations import OPTIMISATIONS, give_up_compiling, install
from preceptor.train.precision import autocast
from tiny import branching, chain, tiny_model

# torch's own, in tracing
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

ALL = {optimisation.name for optimisation in OPTIMISATIONS}
WITHIN = {way: {each.name for each in OPTIMISATIONS if each.within == way} for way in ("compiled", "efficient")}
POLICIES = [
    ActivationPolicy(),
    ActivationPolicy("full", "all"),
    ActivationPolicy("recompute"),
    ActivationPolicy("detach"),
]


def sequence(seed):
    rng = np.random.default_rng(seed)
    return pack_trees([chain(rng, (9 + seed, 5, 3 + seed, 4)), chain(rng, (7, 6 + 2 * seed)), branching(rng)])


SEQUENCES = [sequence(seed) for seed in range(4)]


@pytest.fixture(autouse=True)
def as_far_as_a_cpu_can(monkeypatch):
    """aot_eager: graphs of forward and backward are made as for a GPU, and then run operation by operation."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()


def test_every_way_through_a_model_is_exact_and_two_lengths_are_compiled_for():
    model, true_model = (tiny_model("qwen3", dtype=torch.float64, num_hidden_layers=3) for _ in range(2))
    install(model, "compiled"), install(true_model, "efficient")
    before = compiled.num_graphs()
    for policy in POLICIES:
        graphs = []
        for each in SEQUENCES:
            found = loss_and_grads(model, Engine(model)(each, policy))
            assert_same(found, loss_and_grads(true_model, Engine(true_model)(each, policy)), 1e-11)
            graphs.append(compiled.num_graphs())
        assert before < graphs[1] == graphs[-1]
    assert compiled.num_graphs() - before <= 24


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_an_adapter_and_other_kinds_under_autocast(kind):
    results = []
    for mode in ("compiled", "plain"):
        model = tiny_model(kind)
        if kind == "llama":
            model = add_adapter(model, 4, 8.0, 0.0, None, [], seed=0)
        install(model, mode)
        with autocast(torch.device("cpu"), "bfloat16"):
            losses = [Engine(model)(each, ActivationPolicy("full", 1)) for each in SEQUENCES[:2]]
        sum(losses).backward()
        results.append([float(sum(losses)), *(p.grad.norm() for p in model.parameters() if p.grad is not None)])
    np.testing.assert_allclose(*map(np.array, results), rtol=0.05)


def test_one_mechanism_within_layers_and_which_is_said(monkeypatch):
    assert install(tiny_model("llama"), "compiled").optimisations == ALL - WITHIN["efficient"]
    assert install(tiny_model("llama"), "efficient").optimisations == ALL - WITHIN["compiled"]
    model = tiny_model("llama")
    state = install(model, "auto")
    assert state.optimisations == ALL - WITHIN["compiled"] and state.not_compiled == "on a GPU only"
    monkeypatch.setattr(optimisations, "why_not", lambda *_: None)
    model = tiny_model("llama")
    state = install(model, "auto")
    assert state.optimisations == ALL - WITHIN["efficient"] and state.not_compiled is None
    give_up_compiling(model, state, "because")
    assert state.optimisations == ALL - WITHIN["compiled"] and state.not_compiled == "because"


def test_evaluation_is_not_compiled():
    model = tiny_model("llama").eval()
    install(model, "compiled")
    before = compiled.num_graphs()
    with torch.no_grad():
        Engine(model)(SEQUENCES[0])
    assert compiled.num_graphs() == before


def test_compiling_takes_time_that_is_known():
    before = compiled.compile_seconds()
    model = tiny_model("llama", num_hidden_layers=1)
    install(model, "compiled")
    loss_and_grads(model, Engine(model)(SEQUENCES[0]))
    once = compiled.compile_seconds()
    assert once > before
    loss_and_grads(model, Engine(model)(SEQUENCES[0]))
    assert compiled.compile_seconds() == once
