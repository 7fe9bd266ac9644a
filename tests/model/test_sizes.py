"""Tokens that only round a number up to the grid change no loss and no gradient, under no activation policy."""

import numpy as np
import pytest
import torch
from test_passes import SEQUENCES, assert_same, loss_and_grads, rounding_in_float64
from torch.utils._python_dispatch import TorchDispatchMode

from preceptor.data.forest import pack_trees
from preceptor.model.activations import inputs, layers
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.attention.layout import computed_tokens
from preceptor.model.attention.runs import AttentionOptions, ForestLayout, attend_runs
from preceptor.model.forward import Engine
from preceptor.model.loss import softmax
from preceptor.model.numerics import autocast
from preceptor.model.options import ActivationPolicy
from preceptor.model.sizes import FINEST, mostly_short, on_grid
from tiny import MODELS, branching, chain, tiny_model

MODES = [
    ActivationPolicy(gradient, again) for gradient in ("full", "recompute", "detach") for again in ("none", "all", 1)
]


def to_tens(num_tokens, _):
    """A coarser grid than there is, for float64 too."""
    return -(-num_tokens // 10) * 10


def round_up(monkeypatch, computed):
    """By it everywhere; `computed` gets the numbers that were asked for."""
    monkeypatch.setattr(softmax, "computed_tokens", to_tens)
    for module in (layers, inputs):
        monkeypatch.setattr(module, "computed_tokens", lambda n, like: computed.append(n) or to_tens(n, like))


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 64, 65, 1000, 2047, 2049, 4095, 5000, 70_000])
def test_the_grid(num_tokens):
    size = on_grid(num_tokens)
    assert num_tokens <= size < num_tokens + max(FINEST, num_tokens / 16)
    assert on_grid(size) == size and size % FINEST == 0


def test_a_long_run_meets_few_sizes():
    assert len({on_grid(num_tokens) for num_tokens in range(1, 8193)}) == 32 + 16 + 16


def test_only_bfloat16_on_a_cpu_is_rounded_up():
    assert computed_tokens(70, torch.zeros(1, dtype=torch.bfloat16)) == 128
    assert computed_tokens(70, torch.zeros(1)) == 70
    with torch.autocast("cpu", torch.bfloat16):
        assert computed_tokens(70, torch.zeros(1)) == 128
    assert computed_tokens(70, torch.zeros(1, dtype=torch.bfloat16, device="meta")) == 70


@pytest.mark.parametrize("policy", MODES, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_without(kind, policy, monkeypatch):
    sequence = SEQUENCES["packed"]
    model = tiny_model(kind, dtype=torch.float64)
    true = loss_and_grads(model, Engine(model)(sequence, policy))
    computed = []
    round_up(monkeypatch, computed)
    found = loss_and_grads(model, Engine(model)(sequence, policy))
    assert any(n % 10 for n in computed), "nothing was rounded up"
    assert_same(found, true, rounding_in_float64(kind))


def test_with_an_adapter_and_new_tokens(monkeypatch):
    sequence, losses = SEQUENCES["packed"], []
    for rounded in (False, True):
        if rounded:
            round_up(monkeypatch, [])
        model = add_adapter(tiny_model("llama", dtype=torch.float64), 4, 8.0, 0.0, None, [5, 7], seed=0).double()
        losses.append(loss_and_grads(model, Engine(model)(sequence, ActivationPolicy("recompute"))))
    assert_same(losses[1], losses[0], 1e-11)


def test_attention_gives_zeros_for_tokens_in_no_run():
    layout = ForestLayout.from_sequence(pack_trees([branching(np.random.default_rng(0))]), "cpu")
    num_tokens = len(layout.position_T)
    query, key, value = (torch.randn(1, heads, num_tokens + 3, 8, dtype=torch.float64) for heads in (4, 2, 2))
    options = AttentionOptions(0.4)
    found = attend_runs(query, key, value, layout, options)
    alone = attend_runs(*(part[:, :, :num_tokens] for part in (query, key, value)), layout, options)
    assert torch.equal(found[:, :, :num_tokens], alone)
    assert not found[:, :, num_tokens:].any() and found.shape == query.shape


class Products(TorchDispatchMode):
    """Sizes of the bfloat16 matrix products that are computed."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            factors = [arg for arg in args if isinstance(arg, torch.Tensor)][-2:]
            if factors[0].dtype == torch.bfloat16:
                self.sizes.add((operation.overloadpacket.__name__, *(tuple(factor.shape) for factor in factors)))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("context_gradient", ["full", "recompute", "detach"])
def test_sequences_of_other_lengths_multiply_the_same_sizes(context_gradient):
    """Or else oneDNN compiles for each: the loss, all layers and attention's backward, whatever is kept."""
    model, found = tiny_model("qwen3"), []
    Engine(model)  # what it finds out about a model once, it has found out
    for more in (0, 3, 11):
        rng = np.random.default_rng(0)
        sequence = pack_trees([chain(rng, (410 + more, 200 + more)), chain(rng, (140 + more, 150))])
        with autocast(model.device, "bfloat16"), Products() as products:
            Engine(model)(sequence, ActivationPolicy(context_gradient)).backward()
        found.append(products.sizes)
    assert {name for name, *_ in found[0]} >= {"mm", "bmm", "baddbmm"}
    assert found[0] == found[1] == found[2]


def test_few_tokens_on_a_long_path_are_no_short_run():
    assert mostly_short([(100, 100)]) and mostly_short([(30, 800)]) and not mostly_short([(30, 1500)])
    assert mostly_short([(100, 100), (90, 90), (180, 180)]) and not mostly_short([(100, 100), (180, 180)])


@pytest.mark.parametrize("context_gradient", ["full", "recompute", "detach"])
def test_bfloat16_gives_what_float32_gives_but_for_rounding(context_gradient):
    """Long enough for attention in bfloat16, with branches, and hidden states are those of the tokens asked for."""
    rng = np.random.default_rng(0)
    sequence = pack_trees([chain(rng, (150, 100, 60, 40)), branching(rng), chain(rng, (190, 30))])
    model, policy = tiny_model("qwen3"), ActivationPolicy(context_gradient)
    true = loss_and_grads(model, Engine(model)(sequence, policy))
    with autocast(model.device, "bfloat16"):
        hidden_MD, source_N = Engine(model).loss_hidden_states(sequence, policy)
        loss = Engine(model)(sequence, policy)
    assert len(source_N) == sequence.num_trained and source_N.max() < len(hidden_MD) <= sequence.num_tokens
    found = loss_and_grads(model, loss)
    assert_same(found, true, 0.02)
