"""Every way of keeping less gives the gradient that it promises: the exact one, or TokenTune's."""

import numpy as np
import pytest
import torch

from preceptor.data.forest import pack_trees
from preceptor.errors import ModelError
from preceptor.model import forward
from preceptor.model.activations import passes
from preceptor.model.activations.passes import Keep
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.attention import runs
from preceptor.model.attention.runs import attend_reference
from preceptor.model.checks import levels
from preceptor.model.checks.levels import check_levels, spares_the_last_layer
from preceptor.model.forward import check_isolation, hidden_states, row_loss
from tiny import MODELS, branching, chain, tiny_model

RNG = np.random.default_rng(0)
ROWS = {
    "1 turn": pack_trees([chain(RNG, (15, 9))]),
    "5 turns": pack_trees([chain(RNG, (5, 3, 4, 2, 6, 3, 1, 5, 2, 2))]),
    "branches": pack_trees([branching(RNG)]),
    "packed": pack_trees(
        [chain(RNG, (7, 9, 2, 3)), branching(RNG), chain(RNG, (0, 4, 5, 1), weight=0.5), chain(RNG, (6,))]
    ),
}
LONGCAT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_topk": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 16,
}
EXACT = [Keep(gradient, again) for gradient in ("full", "recompute") for again in ("none", "all", 1)]


def rounding_in_float64(kind):
    """Gemma's norms take their weights to float32, and sum the weights' gradients over the tokens in it."""
    return 1e-7 if kind.startswith("gemma") else 1e-11


def whole(model, row):
    """The loss by plain means: all layers over all tokens, nothing spared."""
    hidden_TD, head = hidden_states(model, row), forward.output_head(model)
    logits_NV = hidden_TD[torch.from_numpy(row.source_N)] @ head.weight_VD.T * head.logit_scale
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    losses_N = -torch.log_softmax(logits_NV, -1).gather(1, torch.from_numpy(row.target_N)[:, None])[:, 0]
    return (losses_N * torch.from_numpy(row.weight_N)).sum()


def loss_and_grads(model, loss):
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return loss.item(), torch.cat([grad.flatten() for grad in grads])


def assert_same(found, true, tolerance):
    assert found[0] == pytest.approx(true[0], rel=tolerance)
    assert (found[1] - true[1]).norm() <= tolerance * true[1].norm()


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_exact_modes_give_loss_and_gradient_of_the_whole_row(kind, row):
    model = tiny_model(kind, dtype=torch.float64)
    true = loss_and_grads(model, whole(model, row))
    for keep in EXACT:
        assert_same(loss_and_grads(model, row_loss(model, row, keep)), true, rounding_in_float64(kind))


@pytest.mark.parametrize("keep", EXACT, ids=str)
def test_the_exact_modes_in_float32(keep):
    model = tiny_model("qwen3", num_hidden_layers=4)
    for row in ROWS.values():
        true = loss_and_grads(model, whole(model, row))
        assert_same(loss_and_grads(model, row_loss(model, row, keep)), true, 1e-5)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("kind", MODELS)
def test_none_holds_the_keys_and_values_of_unread_tokens_constant(kind, row, monkeypatch):
    """Against the dense reference with those keys and values detached, in one pass over the row."""
    model = tiny_model(kind, dtype=torch.float64)
    found = loss_and_grads(model, row_loss(model, row, Keep("detach")))
    exact = loss_and_grads(model, whole(model, row))
    read_T = torch.zeros(row.num_tokens, dtype=torch.bool)
    read_T[torch.from_numpy(row.source_N)] = True

    def constant(query, key, value, layout, *options):
        key, value = (torch.where(read_T[:, None], t, t.detach()) for t in (key, value))
        return attend_reference(query, key, value, layout, *options[:4])

    monkeypatch.setattr(runs, "attend_runs", constant)
    assert_same(found, loss_and_grads(model, whole(model, row)), rounding_in_float64(kind))
    assert found[0] == pytest.approx(exact[0], rel=1e-11)
    assert (found[1] - exact[1]).norm() > 0.01 * exact[1].norm()


@pytest.mark.parametrize("keep", [*EXACT[1:], Keep("detach"), Keep("detach", "all")], ids=str)
def test_adapters_and_their_dropout(keep):
    """Without dropout the exact gradient; with it, what runs again draws the same as the first time."""
    model = add_adapter(tiny_model("llama", dtype=torch.float64), 4, 8.0, 0.0, None, [3], seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    true = loss_and_grads(model, whole(model, ROWS["packed"]))
    found = loss_and_grads(model, row_loss(model, ROWS["packed"], keep))
    assert found[0] == pytest.approx(true[0], rel=1e-11)
    if keep.context_gradient != "detach":
        assert_same(found, true, 1e-11)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    without = Keep(keep.context_gradient)
    for row in (ROWS["packed"], ROWS["5 turns"]):
        drawn = []
        for one in (keep, without):
            torch.manual_seed(1)
            drawn.append(loss_and_grads(model, row_loss(model, row, one)))
        assert_same(drawn[0], drawn[1], 1e-11)
        assert drawn[0][0] != found[0]


def test_dropout_of_recomputed_contexts_is_that_of_the_first_time():
    """Loss as a function of the weights, dropout drawn from one seed: the gradient is its derivative."""
    model = add_adapter(tiny_model("llama"), 4, 8.0, 0.5, None, [], seed=0).double()
    weight = next(p for name, p in model.named_parameters() if "layers.0.self_attn.k_proj.lora_B" in name)
    row, keep = ROWS["5 turns"], Keep("recompute")
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss_at(step):
        with torch.no_grad():
            weight.add_(step * direction)
        torch.manual_seed(1)
        loss = row_loss(model, row, keep)
        with torch.no_grad():
            weight.sub_(step * direction)
        return loss

    torch.manual_seed(1)
    row_loss(model, row, keep).backward()
    slope = (loss_at(1e-3) - loss_at(-1e-3)).item() / 2e-3  # not less, as Llama's norms round to float32
    assert (weight.grad * direction).sum().item() == pytest.approx(slope, rel=1e-3)
    assert abs(slope) > 1e-3


def saved_bytes(model, forward):
    """Bytes of the storages that autograd holds for backward after `forward`, without those of parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    num_bytes = sum(num_bytes for num_bytes, _ in held.values())
    del output
    return num_bytes


def test_less_is_kept_for_long_contexts():
    """Of three quarters context, `none` keeps a quarter, and the keys and values."""
    model = tiny_model("qwen3", num_hidden_layers=4, hidden_size=64, intermediate_size=256)
    row = pack_trees([chain(np.random.default_rng(0), (600, 200))])
    whole_row = saved_bytes(model, lambda: hidden_states(model, row))
    kept = {
        keep: saved_bytes(model, lambda keep=keep: forward.read_hidden_states(model, row, keep))
        for keep in (Keep(), Keep("detach"), Keep("detach", "all"))
    }
    shares = [num_bytes / whole_row for num_bytes in kept.values()]
    assert shares[0] < 0.9  # in one of four layers little for three of four tokens
    assert shares[1] < 0.33
    assert shares[2] < 0.1


def test_layers_are_put_back_and_the_former_attention_too():
    model = tiny_model("llama")
    former = model.config._attn_implementation
    loss = row_loss(model, ROWS["packed"], Keep("recompute", "all"))
    assert not any("forward" in layer.__dict__ for layer in passes.decoder_layers(model))
    assert model.config._attn_implementation == former
    loss.backward()
    assert model.config._attn_implementation == former


def test_the_last_layer_sees_only_read_tokens():
    model, row = tiny_model("gemma2"), ROWS["1 turn"]
    sizes = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda m, args, out, index=index: sizes.update({index: args[0].shape[1]}))
    assert spares_the_last_layer(model)
    row_loss(model, row)
    assert sizes == {0: row.num_tokens, 1: row.num_trained}


@pytest.mark.parametrize("kind", MODELS)
def test_the_proofs_pass(kind):
    model = tiny_model(kind)
    assert spares_the_last_layer(model)
    check_levels(model, Keep("detach"))
    check_levels(model, Keep("recompute"))


def test_a_model_whose_last_layer_wants_all_tokens_gets_them(monkeypatch):
    """Planted: tokens are chosen wrongly. The proof fails, and training goes on without."""
    choose = passes._choose
    monkeypatch.setattr(passes, "_choose", lambda value, index_M, n: choose(value, index_M.flip(0), n))
    model, row = tiny_model("llama", dtype=torch.float64), ROWS["1 turn"]
    assert not spares_the_last_layer(model)
    assert_same(loss_and_grads(model, row_loss(model, row)), loss_and_grads(model, whole(model, row)), 1e-12)


@pytest.mark.parametrize(
    ("kind", "settings", "found"),
    [
        ("diffllama", {}, "hidden states move"),
        ("longcat_flash", LONGCAT, "a layer fails when a row goes through the model level by level"),
    ],
)
def test_layers_with_two_attentions_are_not_taken_apart(kind, settings, found):
    """One that asks its only attention twice, and two in each layer. In one pass they are like any other."""
    model = tiny_model(kind, **settings)
    check_isolation(model)
    check_levels(model, Keep("full"))
    for how in ("detach", "recompute"):
        with pytest.raises(ModelError, match=f"{kind}: {found}.*Set memory.context_gradient to `full`"):
            check_levels(model, Keep(how))


def test_levels_that_differ_are_found(monkeypatch):
    """Planted: keys of earlier levels are lost."""
    planted = lambda model, row, keep: (hidden_states(model, row)[row.source_N] * 1.01, row.source_N)  # noqa: E731
    monkeypatch.setattr(levels, "decode_levels", planted)
    with pytest.raises(ModelError, match=r"llama.*level by level"):
        check_levels(tiny_model("llama"), Keep("detach"))


def test_a_row_that_no_loss_reads_has_a_graph_in_every_mode():
    row = pack_trees([chain(np.random.default_rng(0), (6,))])
    for keep in (Keep("detach"), Keep("recompute", "all")):
        model = tiny_model("llama")
        row_loss(model, row, keep).backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_more_layers_than_there_are_and_other_checkpointing_are_rejected():
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="5 layers, but the model has 2"):
        row_loss(model, ROWS["1 turn"], Keep("full", 5))
    model.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="gradient_checkpointing_disable"):
        row_loss(model, ROWS["1 turn"], Keep("detach"))


def test_levels_reject_rotary_frequencies_that_follow_the_longest_position():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model("llama", max_position_embeddings=16, rope_parameters=rope)
    row = pack_trees([chain(np.random.default_rng(0), (9, 9))])
    row_loss(model, row)
    with pytest.raises(ModelError, match="max_length to at most 16"):
        row_loss(model, row, Keep("detach"))


@pytest.mark.parametrize("keep", [Keep("recompute"), Keep("detach"), Keep("full", "all")], ids=str)
def test_mixed_precision(keep):
    model, row = tiny_model("qwen3"), ROWS["packed"]
    true = row_loss(model, row)
    with torch.autocast("cpu", torch.bfloat16):
        loss = row_loss(model, row, keep)
    loss.backward()
    assert loss.item() == pytest.approx(true.item(), rel=2e-2)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_chain_that_is_read_alone_can_run_again_but_not_by_levels():
    tree = chain(np.random.default_rng(0), (9, 8))
    model, row = tiny_model("llama", dtype=torch.float64), pack_trees([tree], alone=True)
    true = loss_and_grads(model, row_loss(model, row))
    assert_same(loss_and_grads(model, row_loss(model, row, Keep("full", "all"))), true, 1e-11)
    with pytest.raises(ModelError, match="llama model mix tokens outside attention"):
        row_loss(model, row, Keep("detach"))
