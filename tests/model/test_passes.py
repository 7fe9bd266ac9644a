"""Every way of keeping less gives the gradient that it promises: the exact one, or TokenTune's."""

import numpy as np
import pytest
import torch

from preceptor.data.forest import Segment, Tree, attention_runs, pack_trees
from preceptor.errors import ModelError
from preceptor.model import checks, forward
from preceptor.model.activations import layers
from preceptor.model.activations.inputs import split_by_loss
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.attention import runs
from preceptor.model.attention.layout import path_lengths
from preceptor.model.attention.runs import attend_reference
from preceptor.model.checks import check_isolation, check_phases
from preceptor.model.forward import Engine
from preceptor.model.loss.linear_cross_entropy import output_head
from preceptor.model.options import ActivationPolicy
from tiny import MODELS, branching, chain, tiny_model

RNG = np.random.default_rng(0)
SEQUENCES = {
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
EXACT = [ActivationPolicy(gradient, again) for gradient in ("full", "recompute") for again in ("none", "all", 1)]


def rounding_in_float64(kind):
    """Gemma's norms take their weights to float32, and sum the weights' gradients over the tokens in it."""
    return 1e-7 if kind.startswith("gemma") else 1e-11


def whole(model, sequence):
    """The loss by plain means: all layers over all tokens, nothing spared."""
    hidden_TD, head = Engine(model).hidden_states(sequence), output_head(model)
    logits_NV = hidden_TD[torch.from_numpy(sequence.source_N)] @ head.weight_VD.T * head.logit_scale
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    losses_N = -torch.log_softmax(logits_NV, -1).gather(1, torch.from_numpy(sequence.target_N)[:, None])[:, 0]
    return (losses_N * torch.from_numpy(sequence.weight_N)).sum()


def loss_and_grads(model, loss):
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return loss.item(), torch.cat([grad.flatten() for grad in grads])


def assert_same(found, true, tolerance):
    assert found[0] == pytest.approx(true[0], rel=tolerance)
    assert (found[1] - true[1]).norm() <= tolerance * true[1].norm()


@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("kind", MODELS)
def test_the_exact_modes_give_loss_and_gradient_of_the_whole_sequence(kind, sequence):
    model = tiny_model(kind, dtype=torch.float64)
    true = loss_and_grads(model, whole(model, sequence))
    for policy in EXACT:
        assert_same(loss_and_grads(model, Engine(model)(sequence, policy)), true, rounding_in_float64(kind))


@pytest.mark.parametrize("policy", EXACT, ids=str)
def test_the_exact_modes_in_float32(policy):
    model = tiny_model("qwen3", num_hidden_layers=4)
    for sequence in SEQUENCES.values():
        true = loss_and_grads(model, whole(model, sequence))
        assert_same(loss_and_grads(model, Engine(model)(sequence, policy)), true, 1e-5)


@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("kind", MODELS)
def test_none_holds_the_keys_and_values_of_context_only_tokens_constant(kind, sequence, monkeypatch):
    """Against the dense reference with those keys and values detached, in one pass over the sequence."""
    model = tiny_model(kind, dtype=torch.float64)
    found = loss_and_grads(model, Engine(model)(sequence, ActivationPolicy("detach")))
    exact = loss_and_grads(model, whole(model, sequence))
    bearing_T = torch.zeros(sequence.num_tokens, dtype=torch.bool)
    bearing_T[torch.from_numpy(sequence.source_N)] = True

    def constant(query, key, value, layout, options, seen):
        key, value = (torch.where(bearing_T[:, None], t, t.detach()) for t in (key, value))
        return attend_reference(query, key, value, layout, options)

    monkeypatch.setattr(runs, "attend_runs", constant)
    assert_same(found, loss_and_grads(model, whole(model, sequence)), rounding_in_float64(kind))
    assert found[0] == pytest.approx(exact[0], rel=1e-11)
    assert (found[1] - exact[1]).norm() > 0.01 * exact[1].norm()


@pytest.mark.parametrize("policy", [*EXACT[1:], ActivationPolicy("detach"), ActivationPolicy("detach", "all")], ids=str)
def test_adapters_and_their_dropout(policy):
    """Without dropout the exact gradient; with it, what runs again draws the same as the first time."""
    model = add_adapter(tiny_model("llama", dtype=torch.float64), 4, 8.0, 0.0, None, [3], seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    true = loss_and_grads(model, whole(model, SEQUENCES["packed"]))
    found = loss_and_grads(model, Engine(model)(SEQUENCES["packed"], policy))
    assert found[0] == pytest.approx(true[0], rel=1e-11)
    if policy.context_gradient != "detach":
        assert_same(found, true, 1e-11)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    without = ActivationPolicy(policy.context_gradient)
    for sequence in (SEQUENCES["packed"], SEQUENCES["5 turns"]):
        drawn = []
        for one in (policy, without):
            torch.manual_seed(1)
            drawn.append(loss_and_grads(model, Engine(model)(sequence, one)))
        assert_same(drawn[0], drawn[1], 1e-11)
        assert drawn[0][0] != found[0]


def test_dropout_of_recomputed_contexts_is_that_of_the_first_time():
    """Loss as a function of the weights, dropout drawn from one seed: the gradient is its derivative."""
    model = add_adapter(tiny_model("llama"), 4, 8.0, 0.5, None, [], seed=0).double()
    weight = next(p for name, p in model.named_parameters() if "layers.0.self_attn.k_proj.lora_B" in name)
    sequence, policy = SEQUENCES["5 turns"], ActivationPolicy("recompute")
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss_at(step):
        with torch.no_grad():
            weight.add_(step * direction)
        torch.manual_seed(1)
        loss = Engine(model)(sequence, policy)
        with torch.no_grad():
            weight.sub_(step * direction)
        return loss

    torch.manual_seed(1)
    Engine(model)(sequence, policy).backward()
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
    sequence = pack_trees([chain(np.random.default_rng(0), (600, 200))])
    whole_sequence = saved_bytes(model, lambda: Engine(model).hidden_states(sequence))
    kept = {
        policy: saved_bytes(model, lambda policy=policy: Engine(model).loss_hidden_states(sequence, policy))
        for policy in (ActivationPolicy(), ActivationPolicy("detach"), ActivationPolicy("detach", "all"))
    }
    shares = [num_bytes / whole_sequence for num_bytes in kept.values()]
    assert shares[0] < 0.9  # in one of four layers little for three of four tokens
    assert shares[1] < 0.33
    assert shares[2] < 0.1


def test_the_former_attention_comes_back_after_forward_and_backward():
    model = tiny_model("llama")
    former = model.config._attn_implementation
    loss = Engine(model)(SEQUENCES["packed"], ActivationPolicy("recompute", "all"))
    assert model.config._attn_implementation == former
    loss.backward()
    assert model.config._attn_implementation == former


def test_the_last_layer_sees_only_loss_bearing_tokens():
    model, sequence = tiny_model("gemma2"), SEQUENCES["1 turn"]
    sizes = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda m, args, out, index=index: sizes.update({index: args[0].shape[1]}))
    assert "last_layer" in Engine(model).state.optimisations
    Engine(model)(sequence)
    assert sizes == {0: sequence.num_tokens, 1: sequence.num_trained}


def last_layer_tokens(model, sequence, policy=EXACT[0]):
    """How many go through its MLP; loss and gradient."""
    engine, sizes = Engine(model), []
    hook = model.model.layers[-1].mlp.register_forward_hook(lambda m, args, out: sizes.append(args[0].shape[1]))
    found = loss_and_grads(model, engine(sequence, policy))
    hook.remove()
    return sizes[0], found


@pytest.mark.parametrize(("num_turns", "spared"), [(4, True), (7, True), (8, False), (40, False)])
def test_of_many_turns_the_last_layer_is_not_taken_apart(num_turns, spared, monkeypatch):
    """N pieces would have (N + 1) / 2 times the keys of the conversation."""
    monkeypatch.setattr(forward, "_FEW_KEYS", 0)
    model = tiny_model("llama", dtype=torch.float64)
    sequence = pack_trees([chain(np.random.default_rng(0), (5, 3) * num_turns)])
    num_tokens, found = last_layer_tokens(model, sequence)
    assert num_tokens == (sequence.num_trained if spared else sequence.num_tokens)
    assert_same(found, loss_and_grads(model, whole(model, sequence)), 1e-11)


def shared_prompt(num_tokens, num_conversations):
    segments = [Segment("context", (7,) * num_tokens, None)]
    for _ in range(num_conversations):
        segments += [Segment("context", (8,) * 6, 0), Segment("target", (9,) * 2, len(segments))]
    return Tree("shared:1", tuple(segments))


@pytest.mark.parametrize(("device_type", "spared"), [("cpu", True), ("cuda", False)])
def test_branches_join_their_paths_in_the_whole_layer_too_but_not_by_flex(device_type, spared, monkeypatch):
    monkeypatch.setattr(forward, "_FEW_KEYS", 0)
    monkeypatch.setattr(forward, "device_type_of", lambda device: device_type)
    model, sequence = tiny_model("llama"), pack_trees([shared_prompt(100, 12)])
    keys = [sum(path_lengths(each)[1]) for each in (attention_runs(sequence.spans), split_by_loss(sequence)[1].runs)]
    assert keys[0] > keys[1] > 4 * sequence.num_tokens
    num_tokens, _ = last_layer_tokens(model, sequence)
    assert num_tokens == (sequence.num_trained if spared else sequence.num_tokens)


@pytest.mark.parametrize("turns", [(60, 20) * 8, (180, 20) * 10])
def test_few_copied_keys_are_no_reason_to_compute_more(turns):
    model, sequence = tiny_model("llama"), pack_trees([chain(np.random.default_rng(0), turns)])
    assert last_layer_tokens(model, sequence)[0] == sequence.num_trained


@pytest.mark.parametrize("policy", [ActivationPolicy(), ActivationPolicy("full", "all")], ids=str)
def test_attention_without_a_kernel_for_parts_of_a_sequence_runs_whole(policy, monkeypatch):
    """As soft-cap and sinks on a GPU."""

    def flex(query, key, value, layout, options):
        layout.whole_alone = layout.subtree_end_T is not None

    monkeypatch.setattr(runs, "fast_path", flex)
    model, sequence = tiny_model("gemma2", dtype=torch.float64), SEQUENCES["packed"]
    num_tokens, found = last_layer_tokens(model, sequence, policy)
    assert num_tokens == sequence.num_tokens
    assert_same(found, loss_and_grads(model, whole(model, sequence)), rounding_in_float64("gemma2"))


@pytest.mark.parametrize("kind", MODELS)
def test_the_proofs_pass(kind):
    model = tiny_model(kind)
    assert "last_layer" in Engine(model).state.optimisations
    check_phases(model, ActivationPolicy("detach"))
    check_phases(model, ActivationPolicy("recompute"))


def test_a_model_whose_last_layer_wants_all_tokens_gets_them(monkeypatch):
    """Planted: tokens are chosen wrongly. The proof fails, and training goes on without."""
    cut = layers._cut
    monkeypatch.setattr(layers, "_cut", lambda value, index_M, n: cut(value, index_M.flip(0), n))
    model, sequence = tiny_model("llama", dtype=torch.float64), SEQUENCES["1 turn"]
    assert "last_layer" not in Engine(model).state.optimisations
    assert_same(loss_and_grads(model, Engine(model)(sequence)), loss_and_grads(model, whole(model, sequence)), 1e-12)


@pytest.mark.parametrize(
    ("kind", "settings", "found"),
    [
        ("diffllama", {}, "hidden states move"),
        ("longcat_flash", LONGCAT, "a layer fails when a sequence goes through the model phase by phase"),
    ],
)
def test_layers_with_two_attentions_are_not_taken_apart(kind, settings, found):
    """One that asks its only attention twice, and two in each layer. In one pass they are like any other."""
    model = tiny_model(kind, **settings)
    check_isolation(model)
    check_phases(model, ActivationPolicy("full"))
    for how in ("detach", "recompute"):
        with pytest.raises(ModelError, match=f"{kind}: {found}.*Set memory.context_gradient to `full`"):
            check_phases(model, ActivationPolicy(how))


def test_phases_that_differ_are_found(monkeypatch):
    """Planted: keys of earlier phases are lost."""

    decode = checks.decode_phases
    monkeypatch.setattr(checks, "decode_phases", lambda *given: decode(*given) * 1.01)
    with pytest.raises(ModelError, match=r"llama.*phase by phase"):
        check_phases(tiny_model("llama"), ActivationPolicy("detach"))


def test_a_sequence_that_no_loss_reads_has_a_graph_in_every_mode():
    sequence = pack_trees([chain(np.random.default_rng(0), (6,))])
    for policy in (ActivationPolicy("detach"), ActivationPolicy("recompute", "all")):
        model = tiny_model("llama")
        Engine(model)(sequence, policy).backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_more_layers_than_there_are_and_other_checkpointing_are_rejected():
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="5 layers, but the model has 2"):
        Engine(model)(SEQUENCES["1 turn"], ActivationPolicy("full", 5))
    model.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="gradient_checkpointing_disable"):
        Engine(model)(SEQUENCES["1 turn"], ActivationPolicy("detach"))


def test_phases_reject_rotary_frequencies_that_follow_the_longest_position():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model("llama", max_position_embeddings=16, rope_parameters=rope)
    sequence = pack_trees([chain(np.random.default_rng(0), (9, 9))])
    Engine(model)(sequence)
    with pytest.raises(ModelError, match="max_length to at most 16"):
        Engine(model)(sequence, ActivationPolicy("detach"))


@pytest.mark.parametrize(
    "policy", [ActivationPolicy("recompute"), ActivationPolicy("detach"), ActivationPolicy("full", "all")], ids=str
)
def test_mixed_precision(policy):
    model, sequence = tiny_model("qwen3"), SEQUENCES["packed"]
    true = Engine(model)(sequence)
    with torch.autocast("cpu", torch.bfloat16):
        loss = Engine(model)(sequence, policy)
    loss.backward()
    assert loss.item() == pytest.approx(true.item(), rel=2e-2)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_chain_that_is_read_alone_can_run_again_but_not_by_phases():
    tree = chain(np.random.default_rng(0), (9, 8))
    model, sequence = tiny_model("llama", dtype=torch.float64), pack_trees([tree], alone=True)
    true = loss_and_grads(model, Engine(model)(sequence))
    assert_same(loss_and_grads(model, Engine(model)(sequence, ActivationPolicy("full", "all"))), true, 1e-11)
    with pytest.raises(ModelError, match="llama model mix tokens outside attention"):
        Engine(model)(sequence, ActivationPolicy("detach"))
