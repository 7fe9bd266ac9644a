"""The engine's switchboard: by name, per model, and all off gives the same losses."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from test_passes import SEQUENCES, assert_same, loss_and_grads, rounding_in_float64
from torch import nn

from preceptor.data.forest import pack_trees
from preceptor.errors import ModelError
from preceptor.model import optimisations
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.checks import check_isolation
from preceptor.model.forward import Engine
from preceptor.model.optimisations import OPTIMISATIONS, install, remove
from preceptor.model.options import ActivationPolicy
from preceptor.train.checkpoint import State
from preceptor.train.optimizer import build_optimizer
from preceptor.train.step import Objective, take_step
from tiny import MODELS, branching, chain, tiny_model

# compile is for GPUs, unless asked for; these models have no layers for the others
ALL = {optimisation.name for optimisation in OPTIMISATIONS} - {"compile", "fused", "mixers", "adapters", "token_rows"}
POLICIES = [
    ActivationPolicy(),
    ActivationPolicy("recompute"),
    ActivationPolicy("detach"),
    ActivationPolicy("detach", "all"),
    ActivationPolicy("full", 1),
]


def plain_model(kind, **settings):
    model = tiny_model(kind, **settings)
    assert install(model, "plain").optimisations == set()
    return model


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_plain_gives_the_same_loss_and_gradient(kind, policy):
    sequence = SEQUENCES["packed"]
    found = loss_and_grads(model := tiny_model(kind, dtype=torch.float64), Engine(model)(sequence, policy))
    true = loss_and_grads(plain := plain_model(kind, dtype=torch.float64), Engine(plain)(sequence, policy))
    assert_same(found, true, rounding_in_float64(kind))


@pytest.mark.parametrize("mode", ["auto", "plain"])
def test_a_token_that_others_pad_with_learns_like_any_other(mode):
    model = tiny_model("qwen3", tie_word_embeddings=False)
    embedding, token = model.get_input_embeddings(), int(SEQUENCES["packed"].ids_T[0])
    embedding.padding_idx = token
    install(model, mode)
    Engine(model)(SEQUENCES["packed"]).backward()
    assert embedding.weight.grad[token].abs().sum() > 0
    remove(model)
    assert embedding.padding_idx == token


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_plain_trains_to_the_same_losses(kind, precision):
    rng = np.random.default_rng(0)
    steps = [[pack_trees([chain(rng, (5, 9, 3, 4)), branching(rng)]), pack_trees([chain(rng, (7, 6))])]] * 4
    losses = {}
    for mode in ("auto", "plain"):
        model = tiny_model(kind)
        assert install(model, mode).optimisations == (ALL if mode == "auto" else set()) - _NOT_IN.get(kind, set())
        state = State(model, build_optimizer(model, 0.0, (0.9, 0.95)))
        objective = Objective(ActivationPolicy("detach"))
        losses[mode] = [take_step(state, step, 1e-3, 1.0, precision, objective) for step in steps]
    (found, found_norm, _), (true, true_norm, _) = (np.array(losses[mode]).T for mode in ("auto", "plain"))
    np.testing.assert_allclose(found, true, rtol=1e-5 if precision == "float32" else 3e-2)
    np.testing.assert_allclose(found_norm, true_norm, rtol=1e-4 if precision == "float32" else 0.1)
    assert true[-1] < true[0]


_NOT_IN = {"gpt_oss": {"glu"}}  # its experts clamp the gate


def test_plain_with_an_adapter():
    losses = []
    for mode in ("auto", "plain"):
        model = add_adapter(tiny_model("llama", dtype=torch.float64), 4, 8.0, 0.0, None, [3], seed=0)
        install(model, mode)
        losses.append(loss_and_grads(model, Engine(model)(SEQUENCES["packed"])))
    assert_same(losses[0], losses[1], 1e-11)


def test_plain_runs_the_authors_modules_and_a_dense_mask(monkeypatch):
    """Planted: each fast path is broken."""
    model = plain_model("llama")
    true = Engine(model)(SEQUENCES["packed"]).item()
    from preceptor.model.activations import linear, modules
    from preceptor.model.attention import runs

    broken = lambda *_, **__: pytest.fail("not plain")  # noqa: E731
    monkeypatch.setattr(runs, "attend_runs", broken)
    for function in (modules._Gated, linear._HalfLinear, modules._Norm):
        monkeypatch.setattr(function, "apply", broken)
    with torch.autocast("cpu", torch.bfloat16):
        found = Engine(model)(SEQUENCES["packed"]).item()
    assert found == pytest.approx(true, rel=2e-2) and found != true


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "mistral"])
def test_plain_passes_the_proofs(kind):
    check_isolation(plain_model(kind))


def test_only_the_models_own_modules_are_changed_and_remove_undoes_it():
    model, other = tiny_model("llama"), tiny_model("llama")
    classes = [type(module) for module in model.modules()]
    forwards = {cls: cls.forward for cls in {*classes, nn.Linear, nn.Embedding}}
    Engine(model)(SEQUENCES["packed"]).backward()
    changed = [type(module) for module in model.modules()]
    assert sum(one is not own for one, own in zip(changed, classes, strict=True)) > 10
    assert [cls.__name__ for cls in changed] == [cls.__name__ for cls in classes]
    assert all(issubclass(one, own) for one, own in zip(changed, classes, strict=True))
    assert [type(module) for module in other.modules()] == classes
    assert {cls: cls.forward for cls in forwards} == forwards
    remove(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any(name.startswith("engine_") for module in model.modules() for name in module.__dict__)


def test_generation_is_the_authors_own_to_the_bit():
    model, ids = tiny_model("qwen3").eval(), torch.arange(20)[None]
    own = model(input_ids=ids).logits
    Engine(model)(SEQUENCES["packed"])
    assert torch.equal(model(input_ids=ids).logits, own)


def test_a_deep_copy_has_a_state_of_its_own():
    model = tiny_model("qwen3")
    engine = Engine(model)
    twin = deepcopy(model)
    other = Engine(twin)
    assert other.state is not engine.state and other.state.optimisations == engine.state.optimisations
    states = {id(module.engine_state) for module in twin.modules() if "engine_state" in module.__dict__}
    assert states == {id(other.state)}
    assert other(SEQUENCES["packed"]).item() == engine(SEQUENCES["packed"]).item()


def test_a_check_that_fails_leaves_an_optimisation_off(monkeypatch):
    monkeypatch.setattr(optimisations, "decode_whole", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a fault of ours is none of the layer's
        install(tiny_model("llama"))
    monkeypatch.undo()
    monkeypatch.setattr(optimisations, "rounding", lambda dtype: -1.0)
    assert install(tiny_model("llama")).optimisations == ALL - {"last_layer"}
    assert install(tiny_model("llama"), check=False).optimisations == ALL


def test_transformers_own_checkpointing_is_rejected():
    model = tiny_model("llama")
    model.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="gradient_checkpointing_disable"):
        Engine(model)(SEQUENCES["packed"])
