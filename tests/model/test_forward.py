"""A packed sequence through unmodified transformers models: it equals its conversations one by one, and the formula."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from preceptor.data.forest import pack_trees
from preceptor.errors import ModelError
from preceptor.model import checks
from preceptor.model.activations import inputs
from preceptor.model.attention import runs
from preceptor.model.attention.cuda import BLOCK
from preceptor.model.checks import check_head, check_isolation, check_sequential
from preceptor.model.forward import Engine
from preceptor.model.loss import linear_cross_entropy
from preceptor.model.loss.linear_cross_entropy import output_head
from preceptor.model.numerics import relative_error, rounding
from tiny import MODELS, branching, chain, separate_chains, tiny_model


def conversations():
    rng = np.random.default_rng(0)
    return [chain(rng, (5, 12, 4, 9)), chain(rng, (1, 3), weight=0.5), chain(rng, (14, 2, 1, 8)), chain(rng, (0, 11))]


def grads_of(loss, model):
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, grads, strict=True)}


def own_loss(model, trees):
    """The formula on the model's own logits, attention and masks, one conversation at a time."""
    model.set_attn_implementation("eager")  # sdpa leaves out the soft-cap in some versions of transformers
    total = torch.zeros((), dtype=torch.float64)
    for tree in trees:
        sequence = pack_trees([tree])
        logits_TV = model(input_ids=torch.from_numpy(sequence.ids_T)[None], use_cache=False).logits[0]
        log_probs_NV = torch.log_softmax(logits_TV[torch.from_numpy(sequence.source_N)].double(), dim=-1)
        losses_N = -log_probs_NV.gather(1, torch.from_numpy(sequence.target_N)[:, None])[:, 0]
        total = total + (losses_N * torch.from_numpy(sequence.weight_N)).sum()
    return total


def assert_same(found, true, tolerance):
    """Relative error of all gradients together, and of each against the largest, as some are all but zero."""
    assert found.keys() == true.keys()
    scale = max(float(grad.double().norm()) for grad in true.values())
    for name, grad in found.items():
        assert float((grad.double() - true[name].double()).norm()) < tolerance * scale, name


@pytest.mark.parametrize("kind", MODELS)
def test_a_sequence_equals_its_conversations_and_the_formula(kind):
    model, trees = tiny_model(kind), conversations()
    loss = Engine(model)(pack_trees(trees))
    grads = grads_of(loss, model)
    singles = sum(Engine(model)(pack_trees([tree])) for tree in trees)
    exact = tiny_model(kind, dtype=torch.float64)
    true_loss = own_loss(exact, trees)
    assert loss.item() == pytest.approx(true_loss.item(), rel=1e-5)
    assert singles.item() == pytest.approx(true_loss.item(), rel=1e-5)
    true_grads = grads_of(true_loss, exact)
    assert_same(grads, true_grads, 1e-5)
    assert_same(grads_of(singles, model), true_grads, 1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_tree_equals_its_separate_chains(kind):
    model, rng = tiny_model(kind), np.random.default_rng(1)
    trees = [branching(rng), chain(rng, (3, 4)), branching(rng)]
    chains = [single for tree in trees for single in separate_chains(tree)]
    assert len(chains) == 7
    sequence = pack_trees(trees)
    assert sequence.num_trained == sum(pack_trees([single]).num_trained for single in chains)
    loss = Engine(model)(sequence)
    exact = tiny_model(kind, dtype=torch.float64)
    true_loss = own_loss(exact, chains)
    assert loss.item() == pytest.approx(true_loss.item(), rel=1e-5)
    assert_same(grads_of(loss, model), grads_of(true_loss, exact), 1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_changing_one_conversation_changes_no_other(kind):
    model, trees = tiny_model(kind), conversations()
    before_TD = Engine(model).hidden_states(pack_trees(trees))
    start, end = trees[0].num_tokens, trees[0].num_tokens + trees[1].num_tokens
    trees[1] = chain(np.random.default_rng(9), (1, 3))
    after_TD = Engine(model).hidden_states(pack_trees(trees))
    others = torch.cat([torch.arange(start), torch.arange(end, len(before_TD))])
    torch.testing.assert_close(after_TD[others], before_TD[others], rtol=1e-6, atol=1e-6)
    assert (after_TD[start:end] - before_TD[start:end]).abs().max() > 0.1


def test_a_sequence_without_trained_tokens_still_has_a_graph():
    model = tiny_model("llama")
    loss = Engine(model)(pack_trees([chain(np.random.default_rng(0), (6,))]))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_autocast_gives_a_float32_loss_near_the_true_one():
    model, sequence = tiny_model("qwen3"), pack_trees(conversations())
    true = Engine(model)(sequence)
    with torch.autocast("cpu", torch.bfloat16):
        loss = Engine(model)(sequence)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(true.item(), rel=2e-2)
    assert loss.item() != true.item()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


HEADS = {
    "softcap": ("gemma2", {}),
    "logits_soft_cap": ("recurrent_gemma", {"logits_soft_cap": 2.0}),
    "output_logit_soft_cap": ("xlstm", {"output_logit_soft_cap": 2.0}),
    "logit_scale": ("cohere", {"logit_scale": 0.25}),
    "logits_scaling": ("granite", {"logits_scaling": 4.0}),
    "bias": ("phi", {}),
}


@pytest.mark.parametrize(("kind", "settings"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_the_models_own(kind, settings, dtype):
    model = tiny_model(kind, dtype=dtype, **settings)
    head = output_head(model)
    if head.bias_V is not None:
        torch.nn.init.normal_(head.bias_V)
    assert (head.softcap, head.logit_scale, head.bias_V is None) != (None, 1.0, True)
    check_head(model)


def test_a_head_that_does_more_is_rejected(monkeypatch):
    model = tiny_model("granite", logits_scaling=4.0)
    monkeypatch.setattr(linear_cross_entropy, "_number", lambda settings, name, default: default)
    with pytest.raises(ModelError, match="granite: the logits"):
        check_head(model)


def test_a_head_that_reads_something_else_than_hidden_states_is_rejected():
    with pytest.raises(ModelError, match=r"electra: the output embedding reads \d+ values per token"):
        check_head(tiny_model("electra", embedding_size=16))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_models_are_isolated(kind, dtype):
    model = tiny_model(kind, dtype=dtype)
    check_head(model)
    check_isolation(model)
    assert model.training


def test_a_window_that_a_layer_does_not_tell_is_found_beyond_the_probes_length():
    model = tiny_model("gemma2", sliding_window=64)
    model.model.layers[0].self_attn.sliding_window = None
    with pytest.raises(ModelError, match="layer 0 asks attention for no sliding window"):
        check_isolation(model)


def test_a_leak_in_attention_is_found(monkeypatch):
    """Planted: the layout says that the whole sequence is one run."""
    monkeypatch.setattr(inputs, "attention_runs", lambda spans: ((0, spans[-1].end, ()),))
    with pytest.raises(ModelError, match="another conversation"):
        check_isolation(tiny_model("llama"))


def test_attention_that_differs_from_the_models_own_is_found(monkeypatch):
    """Planted: our attention takes the wrong scale."""
    attend, wrong = runs.attend_runs, runs.AttentionOptions(1.0)
    monkeypatch.setattr(
        runs, "attend_runs", lambda q, k, v, layout, options, seen: attend(q, k, v, layout, wrong, seen)
    )
    with pytest.raises(ModelError, match="between the model's own attention and ours"):
        check_isolation(tiny_model("llama"))


def with_large_keys():
    """bfloat16, with biases of queries and keys that are large in a few slow dimensions, as those of trained Qwen 2.

    Eager attention rounds its scores of hundreds to bfloat16, before their softmax.
    """
    model = tiny_model("qwen2", hidden_size=128, head_dim=32, dtype=torch.bfloat16)
    for layer in model.model.layers:
        attention = layer.self_attn
        for part, size in ((attention.q_proj, 10.0), (attention.k_proj, 30.0)):
            part.bias.data.view(-1, 32)[:, [14, 15, 30, 31]] = size
    return model


@pytest.mark.parametrize("check", [check_isolation, check_sequential])
def test_kernels_that_are_more_exact_than_eager_attention_are_right(check):
    model = with_large_keys()
    ids, states = torch.arange(24)[None], {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        states[implementation] = model.model(input_ids=ids, use_cache=False).last_hidden_state.detach()
    assert relative_error(states["sdpa"], states["eager"]) > 2 * rounding(torch.bfloat16)
    check(model)


@pytest.mark.parametrize("wrong", [{"scale": 1.0}, {"softcap": 30.0}, {"window": 6}])
def test_attention_that_differs_is_found_beside_eager_attention_that_is_less_exact(wrong, monkeypatch):
    """Planted: of another scale, soft-capped, under another mask."""
    attend = runs.attend_runs

    def other(query, key, value, layout, options, seen):
        return attend(query, key, value, layout, replace(options, **wrong), seen)

    monkeypatch.setattr(runs, "attend_runs", other)
    with pytest.raises(ModelError, match="between the model's own attention and ours"):
        check_isolation(with_large_keys())


def test_on_a_gpu_the_probes_are_long_enough_for_flex(monkeypatch):
    monkeypatch.setattr(checks, "device_type_of", lambda device: "cuda")
    attend, lengths = runs.attend_runs, set()
    monkeypatch.setattr(runs, "attend_runs", lambda query, *given: lengths.add(query.shape[2]) or attend(query, *given))
    model = tiny_model("llama")
    Engine(model)
    lengths.clear()
    check_isolation(model)
    assert max(lengths) >= 2 * BLOCK


def test_rotary_frequencies_that_follow_the_longest_conversation_are_rejected():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model("llama", max_position_embeddings=16, rope_parameters=rope)
    rng = np.random.default_rng(0)
    Engine(model).hidden_states(pack_trees([chain(rng, (8, 8)), chain(rng, (3, 3))]))
    Engine(model).hidden_states(pack_trees([chain(rng, (9, 9))]))
    with pytest.raises(ModelError, match="max_length to at most 16"):
        Engine(model).hidden_states(pack_trees([chain(rng, (9, 9)), chain(rng, (3, 3))]))
