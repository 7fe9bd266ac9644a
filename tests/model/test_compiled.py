"""Decoder layers compiled by torch.compile, traced as for a GPU up to its kernels: the same losses and gradients."""

import time
from concurrent.futures import ThreadPoolExecutor

import compiled as table
import numpy as np
import pytest
import torch
from test_passes import assert_same, loss_and_grads
from torch.utils._pytree import tree_map

from preceptor.data.dataset import Dataset
from preceptor.data.forest import pack_trees
from preceptor.data.loader import Loader
from preceptor.errors import ModelError
from preceptor.model import compiled, optimisations
from preceptor.model.activations import layers, modules
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.checks import check_fused
from preceptor.model.forward import Engine
from preceptor.model.loss import linear_cross_entropy as linear_cross_entropy_module
from preceptor.model.loss.linear_cross_entropy import Head, linear_cross_entropy
from preceptor.model.optimisations import OPTIMISATIONS, give_up_compiling, install
from preceptor.model.options import ActivationPolicy, LossOptions
from preceptor.train.preflight import preflight
from preceptor.train.step import Objective
from tiny import branching, chain, tiny_model

# torch's own, in tracing
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

_ELSEWHERE = {"mixers", "adapters", "token_rows", "fused"}  # there are no layers for them here; on a GPU only
ALL = {optimisation.name for optimisation in OPTIMISATIONS} - _ELSEWHERE
WITHIN = {
    way: {each.name for each in OPTIMISATIONS if each.within == way} - _ELSEWHERE for way in ("compiled", "efficient")
}
# `eager` runs the same graphs as they were traced, in a third of the time
WAYS = [
    ("aot_eager", ActivationPolicy()),
    ("eager", ActivationPolicy("recompute", "all")),
    ("eager", ActivationPolicy("detach")),
]


def sequence(seed):
    rng = np.random.default_rng(seed)
    return pack_trees([chain(rng, (9 + seed, 5, 3 + seed, 4)), chain(rng, (7, 6 + 2 * seed)), branching(rng)])


SEQUENCES = [sequence(seed) for seed in range(3)]


@pytest.fixture(autouse=True)
def as_far_as_a_cpu_can(monkeypatch):
    """aot_eager: graphs of forward and backward are made as for a GPU, and then run operation by operation."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    for made in (compiled._compiled, compiled.watch):
        made.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize(("backend", "policy"), WAYS, ids=str)
def test_every_way_through_a_model_is_exact_and_two_lengths_are_compiled_for(backend, policy, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", backend)
    model, true_model = (tiny_model("llama", dtype=torch.float64) for _ in range(2))
    install(model, "compiled"), install(true_model, "efficient")
    began = time.perf_counter()
    assert compiled.compile_seconds() == 0
    made = []
    for each in SEQUENCES:
        found = loss_and_grads(model, Engine(model)(each, policy))
        assert_same(found, loss_and_grads(true_model, Engine(true_model)(each, policy)), 1e-11)
        made.append((compiled.num_graphs(), compiled.compile_seconds()))
    assert 0 < made[1][0] <= 12 and made[1] == made[-1]
    assert 0 < compiled.compile_seconds() < time.perf_counter() - began


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
    with torch.no_grad():
        Engine(model)(SEQUENCES[0])
    assert compiled.num_graphs() == 0


def test_a_loss_of_the_users_own_is_computed_as_it_is_written():
    """By autograd within the forward pass, which cannot be compiled."""
    options = LossOptions(own=lambda log_prob_N, weight_N: -weight_N * log_prob_N * (1 - log_prob_N.exp()))
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(size, 8, generator=generator).requires_grad_() for size in (6, 16)]
    places = torch.arange(5), torch.arange(5) + 3, torch.ones(5)
    found = []
    for is_compiled in (False, True):
        loss = linear_cross_entropy(given[0], Head(given[1]), *places, options=options, compiled=is_compiled)
        found.append((loss, *torch.autograd.grad(loss, given)))
    assert all(map(torch.equal, *found))


def fails(*_):
    raise RuntimeError("backend='inductor' raised:\nmore")


# Norms, gated units and loss by themselves, where layers are not compiled.


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr("preceptor.train.preflight.no_compiler", lambda device: None)


def installed(model):
    """As after the proof."""
    state = install(model, "efficient")
    state.optimisations.add("fused")
    return state


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "qwen3_moe"])
def test_formulas_that_are_compiled_by_themselves_are_exact_for_any_length(kind, half, on_a_gpu):
    """All three forms of norm (of queries and keys too), two activations; a mixture's own gated units are its own."""
    model, true_model = (tiny_model(kind, num_hidden_layers=1) for _ in range(2))
    assert "compile" not in installed(model).optimisations
    install(true_model, "plain")
    made = []
    for each in SEQUENCES:
        losses = []
        for one in (model, true_model):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                losses.append(Engine(one)(each, ActivationPolicy("recompute", "all")))
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-2 if half else 1e-5)
        if half:
            losses[0].backward()
        else:
            assert_same(*(loss_and_grads(*given) for given in zip((model, true_model), losses, strict=True)), 1e-4)
        made.append(compiled.num_graphs())
    assert 0 < made[1] == made[-1] <= 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_each_compiled_formula_is_held_against_itself(kind, dtype, on_a_gpu):
    model = tiny_model(kind, dtype=dtype)
    installed(model)
    kinds = {type(each).__mro__[1].__name__ for each in modules.fusible(model)}
    assert kinds == {"EfficientNorm"} | ({"EfficientGLU"} if kind != "gpt_oss" else set())
    check_fused(model, LossOptions(), dtype)
    assert compiled.num_graphs() > 0
    bound = 1e-5 if dtype == torch.float32 else 0.02
    for each in modules.fusible(model):
        true, found = (modules.fused_trial(each, torch.device("cpu"), dtype, fused) for fused in (False, True))
        for own, expected in zip(found, true, strict=True):
            assert own.dtype == expected.dtype and torch.allclose(own, expected, bound, bound)


def test_a_last_bit_of_the_loss_under_autocast_is_no_other_loss(on_a_gpu, monkeypatch):
    """Planted, as a GPU's own exponential has it: it decides now and then how a gradient is rounded to bfloat16."""

    def almost(function):
        def run(logits_RV, *given):
            losses_R = function(logits_RV, *given)
            logits_RV.mul_(1 + 1e-5)
            return losses_R

        return run

    monkeypatch.setattr(linear_cross_entropy_module, "compiled_function", almost)
    model = tiny_model("llama")
    installed(model)
    with torch.autocast("cpu", torch.bfloat16):
        check_fused(model, LossOptions(), torch.bfloat16)
    with pytest.raises(ModelError, match=r"loss: compiled in torch\.float32, it gives something else"):
        check_fused(model, LossOptions(), torch.float32)


def test_where_layers_are_not_compiled_their_formulas_are_and_it_is_said(on_a_gpu):
    model, lines = tiny_model("llama"), []
    preflight(model, loader(), "bfloat16", lines.append)
    assert Engine(model).state.fused and Engine(model).state.not_compiled == "on a GPU only"
    assert any(line.startswith("proved: compiled norms, gated units and loss are exact") for line in lines)
    assert any(line.startswith("compiled in ") for line in lines)


@pytest.mark.parametrize("kind", ["hunyuan_v1_dense", "exaone4"])
def test_norms_of_heads_in_the_order_of_attention_are_compiled(kind, on_a_gpu):
    """Behind `transpose(1, 2)`: no buffer of theirs is contiguous."""
    model, lines = tiny_model(kind), []
    preflight(model, loader(), "float32", lines.append)
    assert Engine(model).state.fused, lines


def test_what_fails_in_the_largest_sequence_alone_is_given_up(on_a_gpu, monkeypatch):
    """Planted."""
    monkeypatch.setattr("preceptor.train.preflight.check_fused", lambda *_: None)
    monkeypatch.setattr(modules, "run_rowwise", fails)
    model, lines = tiny_model("llama"), []
    preflight(model, loader(), "float32", lines.append)
    assert not Engine(model).state.fused
    assert any(line.startswith("norms, gated units and loss are compiled no more: RuntimeError: ") for line in lines)


@pytest.mark.parametrize("plant", [lambda formula, *given: tree_map(torch.negative, formula(*given)), fails])
def test_formulas_that_cannot_be_compiled_are_not_and_it_is_said(plant, on_a_gpu, monkeypatch):
    """Planted."""
    monkeypatch.setattr(modules, "run_rowwise", plant)
    model, lines = tiny_model("llama"), []
    preflight(model, loader(), "float32", lines.append)
    assert not Engine(model).state.fused
    (line,) = (line for line in lines if line.startswith("norms, gated units and loss are not compiled: "))
    assert "LlamaMLP: " in line


def test_a_thread_of_backward_has_as_many_graphs_as_the_first(monkeypatch):
    """A GPU's backward pass runs in a thread of its own, and torch's settings are one thread's."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")

    def of_many_sizes():
        return [compiled.run_rowwise(torch.neg, torch.ones(3, size)).shape[1] for size in range(2, 14)]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(of_many_sizes).result() == of_many_sizes() == [*range(2, 14)]


def test_evaluation_and_plain_runs_compile_no_formula(on_a_gpu):
    model, plain = tiny_model("llama").eval(), tiny_model("llama")
    installed(model), install(plain, "plain")
    preflight(plain, loader(), "float32", lambda line: None)
    with torch.no_grad():
        Engine(model)(SEQUENCES[0])
    Engine(plain)(SEQUENCES[0]).backward()
    assert compiled.num_graphs() == 0


def loader():
    rng = np.random.default_rng(0)
    return Loader(Dataset.of([chain(rng, (5, 7)), chain(rng, (3, 9, 4, 6)), chain(rng, (8, 2))]), 64, 2, 0)


@pytest.mark.parametrize("policy", [ActivationPolicy(), ActivationPolicy("recompute"), ActivationPolicy("full", "all")])
def test_before_the_first_step_compiled_layers_are_held_against_the_layers_as_written(policy, monkeypatch):
    """Here beside an adapter with dropout, under autocast; also where layers run again in backward."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(optimisations, "why_not", lambda *_: None)
    model, lines = add_adapter(tiny_model("llama", num_hidden_layers=1), 4, 8.0, 0.3, None, [], seed=0), []
    preflight(model, loader(), "bfloat16", lines.append, Objective(policy))
    assert any(line.startswith("proved: compiled layers give the loss and the gradient") for line in lines)
    assert any(line.startswith("compiled in ") for line in lines) and Engine(model).state.compiles


def wrong(layer, forward, arguments, named):
    return forward(layer, *arguments, **named) * 1.01


def negated(layer, forward, arguments, named):
    """The same loss, and gradients of the same norms."""
    out = forward(layer, *arguments, **named)
    return 2 * out.detach() - out


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (wrong, "loss or gradient of compiled layers is another one"),
        (negated, "loss or gradient of compiled layers is another one"),
        (fails, "torch.compile failed"),
    ],
)
def test_layers_that_cannot_be_compiled_are_efficient_and_it_is_said(run, reason, monkeypatch):
    """Planted."""
    monkeypatch.setattr(optimisations, "why_not", lambda *_: None)
    monkeypatch.setattr(layers, "run_compiled", run)
    model, lines = tiny_model("llama"), []
    preflight(model, loader(), "float32", lines.append)
    state = Engine(model).state
    assert state.optimisations == ALL - WITHIN["compiled"] and reason in state.not_compiled
    assert any(line.startswith("layers are not compiled: llama: ") and reason in line for line in lines)
    asked = tiny_model("llama")
    install(asked, "compiled")
    with pytest.raises(ModelError, match=rf"{reason}.*engine: efficient"):
        preflight(asked, loader(), "float32", lines.append)


def test_a_model_that_is_spread_over_processes_is_not_compiled(monkeypatch):
    monkeypatch.setattr(optimisations, "why_not", lambda *_: None)
    monkeypatch.setattr("preceptor.train.preflight.is_sharded", lambda _: True)
    model, lines = tiny_model("llama"), []
    preflight(model, loader(), "float32", lines.append)
    assert not Engine(model).state.compiles
    assert any("it is spread over processes, so its layers cannot be compiled" in line for line in lines)


def test_a_model_with_adapted_experts_is_not_compiled(monkeypatch):
    def adapted(mode):
        model = add_adapter(tiny_model("qwen3_moe"), 2, 2.0, 0.0, None, (), seed=0)
        install(model, mode)
        return model

    with pytest.raises(ModelError, match=r"qwen3_moe: its experts are adapted.*engine: efficient"):
        preflight(adapted("compiled"), loader(), "float32", lambda line: None)
    monkeypatch.setattr(compiled, "device_type_of", lambda _: "cuda")
    monkeypatch.setattr(compiled, "find_spec", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert Engine(adapted("auto")).state.not_compiled == compiled.ADAPTED_EXPERTS


@pytest.mark.parametrize(
    "name", ["Gemma 2, soft-caps, windows", "Llama, QLoRA", "Llama, DoRA", "Llama, bfloat16, DoRA"]
)
def test_models_and_adapters_are_exact_and_nothing_is_compiled_for_the_third_length(name):
    """A tree is in each sequence. All cases, by aot_eager, are in benchmarks/results/compiled.json."""
    case = table.CASES[name]
    found = table.measure(case, "eager")
    bounds = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 0.03}
    assert max(found["loss_error"], found["gradient_error"]) < bounds[case.precision]
    assert 0 < found["graphs"][1] == found["graphs"][2] <= 12, "a layer is cut at its attention alone"


def test_more_layers_are_no_more_graphs():
    """Of two layers, the last one and the others have graphs of their own. More: benchmarks/results/compiled.json."""
    two, three = (table.measure(table.Case(settings={"num_hidden_layers": num}), "eager")["graphs"] for num in (2, 3))
    assert two == three
