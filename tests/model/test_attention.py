"""Attention run by run against the dense reference and float64; what it rejects, by name."""

import numpy as np
import pytest
import torch

from preceptor.data.forest import pack_trees
from preceptor.errors import ModelError
from preceptor.model import sizes
from preceptor.model.attention import cpu, runs
from preceptor.model.attention.runs import (
    AttentionOptions,
    ForestLayout,
    attend_reference,
    attend_runs,
    dense_mask,
)
from preceptor.model.forward import Engine
from tiny import branching, chain, tiny_model

H, K, D = 4, 2, 8

FEATURES = {
    "plain": {},
    "window": {"window": 5},
    "wide window": {"window": 1000},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "all": {"window": 5, "softcap": 1.5, "sinks": True},
}


def forest_sequence(seed=0):
    rng = np.random.default_rng(seed)
    return pack_trees(
        [chain(rng, (4, 9)), branching(rng), chain(rng, (1, 1)), chain(rng, (0, 3, 8, 12)), branching(rng)]
    )


def tensors(layout, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    num_tokens = len(layout.position_T)
    heads = ((H, 3.0), (K, 1.0), (K, 1.0))
    made = [torch.randn(1, n, num_tokens, D, generator=generator, dtype=torch.float64) * s for n, s in heads]
    return [tensor.to(dtype).requires_grad_() for tensor in made], torch.randn(H, generator=generator).to(dtype)


def test_dense_mask_is_the_definition():
    sequence = forest_sequence()
    mask_TT = dense_mask(
        torch.from_numpy(sequence.subtree_end_T), torch.from_numpy(sequence.position_T), sliding_window=4
    )
    for i in range(sequence.num_tokens):
        for j in range(sequence.num_tokens):
            visible = j <= i < sequence.subtree_end_T[j] and sequence.position_T[i] - sequence.position_T[j] < 4
            assert mask_TT[i, j] == visible


def naive(query, key, value, layout, options):
    """What transformers' eager attention does with a dense mask, in the dtype of its inputs."""
    key, value = key.repeat_interleave(H // K, dim=1), value.repeat_interleave(H // K, dim=1)
    scores = query @ key.transpose(2, 3) * options.scale
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    mask_TT = dense_mask(layout.subtree_end_T, layout.position_T, options.window)
    scores = scores.masked_fill(~mask_TT, torch.finfo(scores.dtype).min)
    if options.sinks is not None:
        scores = torch.cat([scores, options.sinks[None, :, None, None].expand(1, H, len(mask_TT), 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights.to(scores.dtype)[..., : len(mask_TT)] @ value


def outputs_and_grads(function, layout, dtype, features):
    (query, key, value), sinks = tensors(layout, dtype)
    features = {**features, "sinks": sinks.requires_grad_()} if "sinks" in features else features
    output = function(query, key, value, layout, AttentionOptions(0.4, **features))
    leaves = [query, key, value, *([sinks] if "sinks" in features else [])]
    seed = torch.Generator().manual_seed(1)
    direction = torch.randn(output.shape, generator=seed, dtype=torch.float64).to(dtype)
    return [output, *torch.autograd.grad(output, leaves, direction)]


def error(found, true):
    return float((found.double() - true).detach().norm() / true.detach().norm())


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("block_tokens", [4, 1024])
def test_runs_equal_the_reference_in_float64(features, block_tokens, monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK_TOKENS", block_tokens)
    layout = ForestLayout.from_sequence(forest_sequence(), "cpu")
    found = outputs_and_grads(attend_runs, layout, torch.float64, features)
    reference = outputs_and_grads(attend_reference, layout, torch.float64, features)
    independent = outputs_and_grads(naive, layout, torch.float64, features)
    for one, other, third in zip(found, reference, independent, strict=True):
        assert error(one, third) < 1e-13
        assert error(other, third) < 1e-13


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize(
    ("dtype", "short_run_tokens"), [(torch.float32, 224), (torch.bfloat16, 0), (torch.bfloat16, 224)]
)
def test_runs_are_no_further_from_the_truth_than_the_naive_path(features, dtype, short_run_tokens, monkeypatch):
    monkeypatch.setattr(sizes, "SHORT_RUN_TOKENS", short_run_tokens)
    layout = ForestLayout.from_sequence(forest_sequence(), "cpu")
    (query, key, value), sinks = tensors(layout, dtype)
    features = {**features, "sinks": sinks} if "sinks" in features else features
    doubled = {name: f.double() if isinstance(f, torch.Tensor) else f for name, f in features.items()}
    true = naive(query.double(), key.double(), value.double(), layout, AttentionOptions(0.4, **doubled))
    found = attend_runs(query, key, value, layout, AttentionOptions(0.4, **features))
    other = naive(query, key, value, layout, AttentionOptions(0.4, **features))
    assert found.dtype == dtype
    assert error(found, true) <= 1.25 * error(other, true)


@pytest.mark.parametrize(("short_run_tokens", "products"), [(0, torch.bfloat16), (1000, torch.float32)])
def test_mixed_precision_under_autocast(short_run_tokens, products, monkeypatch):
    """Rotary embeddings give float32 queries and keys beside bfloat16 values; short runs are faster in float32."""
    seen = set()
    attend_path = runs.attend_path
    monkeypatch.setattr(sizes, "SHORT_RUN_TOKENS", short_run_tokens)
    monkeypatch.setattr(runs, "attend_path", lambda q, *rest: seen.add(q.dtype) or attend_path(q, *rest))
    layout = ForestLayout.from_sequence(forest_sequence(), "cpu")
    (query, key, value), _ = tensors(layout, torch.float32)
    options = AttentionOptions(0.4)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend_runs(query, key, value.bfloat16(), layout, options)
    assert found.dtype == torch.bfloat16
    assert seen == {products}
    assert error(found, attend_reference(query, key, value, layout, options).double()) < 2e-2


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "is_causal"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "attention_mask"),
        ({"unheard_of": 3}, "unheard_of"),
    ],
)
def test_what_cannot_be_honoured_is_rejected_by_name(asked, word):
    layout = ForestLayout.from_sequence(forest_sequence(), "cpu")
    (query, key, value), _ = tensors(layout)
    arguments = {"attention_mask": None, "forest": layout, **asked}
    with pytest.raises(ModelError, match=f"Linear asks attention for.*{word}"):
        runs.forest_attention_forward(torch.nn.Linear(1, 1), query, key, value, **arguments)


def test_without_a_layout_attention_is_an_error():
    model = tiny_model("llama")
    with (
        runs.attention_implementation(model.model, runs.IMPLEMENTATION),
        pytest.raises(ModelError, match="LlamaAttention"),
    ):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))


def test_the_former_attention_comes_back():
    model = tiny_model("qwen3")
    former = model.config._attn_implementation
    with pytest.raises(KeyError), runs.attention_implementation(model.model, runs.IMPLEMENTATION):
        assert model.config._attn_implementation == runs.IMPLEMENTATION
        raise KeyError
    assert model.config._attn_implementation == former
    Engine(model).hidden_states(forest_sequence())
    assert model.config._attn_implementation == former
    ids = torch.ones(1, 3, dtype=torch.long)
    assert model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 5)


def test_no_mask_is_built(monkeypatch):
    """T squared memory must not come back through transformers' masks."""
    seen = []
    forward = runs.forest_attention_forward
    monkeypatch.setitem(
        runs.AttentionInterface._global_mapping,
        runs.IMPLEMENTATION,
        lambda *arguments, **named: seen.append(arguments[4]) or forward(*arguments, **named),
    )
    Engine(tiny_model("gemma2")).hidden_states(forest_sequence())
    assert seen and all(mask is None for mask in seen)


@pytest.mark.parametrize(("kind", "key"), [("llama", "attention_dropout"), ("gpt2", "attn_pdrop")])
def test_dropout_in_attention_is_known_and_not_applied(kind, key):
    """A packed sequence has none, in no mode; the run says so (train/test_model_limits.py)."""
    model = tiny_model(kind, **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, key: 0.5})
    assert runs.attention_dropout(model.config) == (key, 0.5)
    assert runs.attention_dropout(tiny_model(kind).config) == (None if kind == "llama" else ("attn_pdrop", 0.1))
    found = [Engine(each).hidden_states(forest_sequence()) for each in (model.train(), model.eval())]
    assert torch.equal(*found)


def test_a_model_with_attention_of_its_own_is_rejected():
    with pytest.raises(ModelError, match="BloomModel computes attention by itself"):
        Engine(tiny_model("bloom", n_head=4, n_layer=1)).hidden_states(forest_sequence())
