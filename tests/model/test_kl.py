"""The divergence from the base: its formula and gradient, zero for the base itself, added tokens left out."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from preceptor.data.forest import pack_trees
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.forward import Engine
from preceptor.model.kl import ReferenceModel, kl_to_base
from preceptor.model.loss.linear_cross_entropy import output_head
from tiny import chain, tiny_model

NUM_BASE = 56  # of 64 tokens


@pytest.fixture
def sequence():
    rng = np.random.default_rng(0)
    return pack_trees([chain(rng, (5, 9)), chain(rng, (3, 4, 2, 6))])


def moved(model, seed=5):
    """The same model a little further on."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def by_hand(model, base, sequence):
    known = sequence.target_N < NUM_BASE
    source = sequence.source_N[known]
    log_p = torch.log_softmax((model.lm_head(Engine(model).hidden_states(sequence)[source]))[:, :NUM_BASE], dim=-1)
    log_q = torch.log_softmax((base.lm_head(Engine(base).hidden_states(sequence)[source]))[:, :NUM_BASE], dim=-1)
    return (torch.from_numpy(sequence.weight_N)[known] * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()


@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_value_and_gradient_are_the_formula_s(sequence, chunk_tokens):
    assert 0 < (sequence.target_N < NUM_BASE).sum() < sequence.num_trained
    model, twin = (tiny_model("llama", dtype=torch.float64) for _ in range(2))
    base = ReferenceModel.of(model, NUM_BASE)
    moved(model), moved(twin)
    expected = by_hand(twin, base.model, sequence)
    found = kl_to_base(*Engine(model).loss_hidden_states(sequence), output_head(model), base, sequence, chunk_tokens)
    assert found.item() > 0.01
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    found.backward()
    expected.backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-8, atol=1e-12, msg=name)


def test_the_base_itself_diverges_by_nothing(sequence):
    model = tiny_model("gemma2", dtype=torch.float64)
    found = kl_to_base(
        *Engine(model).loss_hidden_states(sequence), output_head(model), ReferenceModel.of(model, NUM_BASE), sequence
    )
    assert found.item() == pytest.approx(0.0, abs=1e-12)


def test_with_an_adapter_the_base_is_the_model_without_it(sequence):
    plain = tiny_model("qwen3", dtype=torch.float64).eval()
    model = get_peft_model(
        tiny_model("qwen3", dtype=torch.float64), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    ).double()
    base = ReferenceModel.of(model, NUM_BASE)
    moved(model)
    assert not base.is_copy
    expected = by_hand(model.get_base_model(), plain, sequence)
    found = kl_to_base(*Engine(model).loss_hidden_states(sequence), output_head(model), base, sequence)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10) and found.item() > 1e-6
    found.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert model.training


def test_tokens_that_the_base_never_saw_are_not_held_to_it(sequence):
    """Nothing is left where every trained token of the base's vocabulary is one of them."""
    model = tiny_model("llama", dtype=torch.float64)
    known = sorted({int(token) for token in sequence.target_N if token < NUM_BASE})
    found = []
    for untrained in ((), known[:1], known):
        base = ReferenceModel.of(model, NUM_BASE, untrained)
        found.append(base)
    moved(model)
    read = (*Engine(model).loss_hidden_states(sequence), output_head(model))
    whole, fewer, none = (kl_to_base(*read, base, sequence).item() for base in found)
    assert whole > fewer > none == 0.0


UNTRAINED = (60, 61)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("known_before", [UNTRAINED, UNTRAINED[:1]])  # a row that an earlier run trained
def test_beside_trained_rows_of_the_vocabulary_value_and_gradient_are_the_formula_s(kind, known_before, sequence):
    """Rows of tokens that the base never saw: of an untied head, and of one that is the embedding."""
    model = tiny_model(kind, dtype=torch.float64).eval()
    model = add_adapter(model, 4, 8.0, 0.0, None, UNTRAINED, seed=0).double().eval()
    base = ReferenceModel.of(model, 64, known_before)
    moved(model)
    columns = [id_ for id_ in range(64) if id_ not in UNTRAINED]
    known = ~np.isin(sequence.target_N, known_before)

    def log_probs():
        hidden_ND = Engine(model).hidden_states(sequence)[sequence.source_N[known]]
        logits_NV = model.get_base_model().lm_head(hidden_ND)
        cap = output_head(model).softcap
        return torch.log_softmax((cap * torch.tanh(logits_NV / cap) if cap else logits_NV)[:, columns], dim=-1)

    with torch.no_grad(), model.disable_adapter():
        log_q = log_probs()
    log_p = log_probs()
    weight_N = torch.from_numpy(sequence.weight_N)[known]
    expected = (weight_N * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()
    expected.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    found = kl_to_base(*Engine(model).loss_hidden_states(sequence), output_head(model), base, sequence)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10) and found.item() > 1e-6
    found.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            none = torch.zeros_like(p)
            gradients = (none if p.grad is None else p.grad), wanted.get(name, none)
            torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12, msg=name)
