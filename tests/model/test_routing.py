"""The load-balancing loss of routers: transformers' own of each path alone, in every mode, whatever is packed."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import tiny_types
from preceptor.data.dataset import Dataset, weigh
from preceptor.data.forest import Segment, Tree, empty_sequence, pack_trees
from preceptor.data.prefix_sharing import chains_of
from preceptor.errors import ModelError
from preceptor.model import compiled
from preceptor.model.activations import inputs
from preceptor.model.activations.passes import StepContext
from preceptor.model.activations.routing import balanced_paths
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.forward import Engine
from preceptor.model.optimisations import install, remove
from preceptor.model.options import CROSS_ENTROPY, KEEP_ALL, ActivationPolicy, LossOptions
from preceptor.model.parts import decoder_of
from preceptor.model.routers import WatchedRouter, require_routers, router_aux_coef, watch_routers
from tiny import branching, chain, tiny_model

EXPERTS = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {},
}
ELSEWHERE = (
    *("deepseek_v2", "deepseek_v3", "ernie4_5_moe", "flex_olmo", "glm4_moe", "granitemoe", "hunyuan_v1_moe", "jetmoe"),
    *("longcat_flash", "minimax_m2", "phimoe", "qwen2_moe"),
    *("granitemoehybrid", "jamba", "lfm2_moe", "llama4_text", "qwen3_next", "zaya"),
)
LATENT = {"num_key_value_heads": 4, "first_k_dense_replace": 0}
PARTICULAR = dict.fromkeys(("deepseek_v2", "deepseek_v3", "longcat_flash"), LATENT)
PARTICULAR["zaya"] = {"num_experts_per_tok": 1}
BALANCED = LossOptions(router_aux_coef=50.0)  # so that its gradient is not small beside the loss's
POLICIES = [ActivationPolicy(gradient, again) for gradient in ("full", "recompute") for again in ("none", "all", 1)]
RNG = np.random.default_rng(0)
CHAINS = [chain(RNG, (5, 9, 3, 4)), chain(RNG, (7, 6)), chain(RNG, (0, 4, 2, 3)), chain(RNG, (4,))]
TREES = [*CHAINS[:2], branching(RNG), CHAINS[2]]


def mixture(kind, dtype=torch.float64, **settings):
    model = tiny_model(kind, dtype=dtype, **EXPERTS[kind], **settings)
    model.set_experts_implementation("eager")  # the grouped kernels know no float64
    return model


def found(model, sequences, policy=KEEP_ALL, options=BALANCED):
    """What the gradient has of the load-balancing loss, divided by the coefficient, and its value."""
    engine, grads, values = Engine(model), [], []
    for each in (options, replace(options, router_aux_coef=0.0)):
        for sequence in sequences:
            engine(sequence, policy, each, StepContext(router_aux=values)).backward()
        grads.append(gradient(model))
    return sum(value.item() for value in values), (grads[0] - grads[1]) / options.router_aux_coef


def gradient(model):
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    return torch.cat([grad.flatten() for grad in grads])


def true(model, trees):
    """transformers' function over what the model reads of each path alone, times the tokens that are trained there."""
    total = 0.0
    num_chosen = require_routers(model)[0][2]
    for own in (chained for tree in trees for chained in chains_of(tree) if chained.num_trained):
        last = max(place for place, segment in enumerate(own.segments) if segment.kind == "target")
        ids = [token for segment in own.segments[: last + 1] for token in segment.ids][:-1]
        given = {"input_ids": torch.tensor([ids]), "use_cache": False, "output_router_logits": True}
        logits = decoder_of(model)(**given).router_logits
        logits = tuple(each.reshape(-1, each.shape[-1]) for each in logits)
        total = total + pack_trees([own]).divisor * load_balancing_loss_func(logits, logits[0].shape[-1], num_chosen)
    total.backward()
    return total.item(), gradient(model)


def assert_same(found, true, tolerance):
    assert found[0] == pytest.approx(true[0], rel=tolerance)
    assert (found[1] - true[1]).norm() <= tolerance * true[1].norm()
    assert true[1].norm() > 0


@pytest.mark.parametrize("kind", EXPERTS)
def test_value_and_gradient_are_those_of_transformers_in_every_mode(kind):
    """In float64, but for transformers' sums in float32."""
    model = mixture(kind)
    expected = true(model, TREES)
    for policy in POLICIES:
        assert_same(found(model, [pack_trees(TREES)], policy), expected, 1e-6)
    remove(model)
    hooks = [hook for module, *_ in require_routers(model) for hook in module._forward_hooks.values()]
    assert not any(isinstance(hook, WatchedRouter) for hook in hooks)
    install(model, "plain")
    assert_same(found(model, [pack_trees(TREES)], ActivationPolicy("full", "all")), expected, 1e-6)


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_every_kind_of_router_is_found(kind):
    few_experts = [*tiny_types._candidates(kind)][1]
    model = tiny_model(kind, **few_experts | PARTICULAR.get(kind, {})).double().eval()
    model.set_experts_implementation("eager")
    sequences = [pack_trees([chained], alone=True) for tree in TREES for chained in chains_of(tree)]
    assert_same(found(model, sequences), true(model, TREES), 1e-5)


def test_one_conversation_has_the_loss_that_its_model_gives():
    """As `output_router_logits` has it: nll and load-balancing loss in one."""
    model = mixture("qwen3_moe", router_aux_loss_coef=0.3)
    tree = chain(np.random.default_rng(1), (0, 20))
    ids = torch.tensor([tree.segments[1].ids])
    given = model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:], labels=ids[:, 1:], output_router_logits=True)
    given.loss.backward()
    expected = gradient(model)
    values = []
    step, options = StepContext(divisor=19.0, router_aux=values), LossOptions(router_aux_coef=0.3)
    loss = Engine(model)(pack_trees([tree]), options=options, step=step)
    loss.backward()
    assert values[0].item() == pytest.approx(given.aux_loss.item(), rel=1e-6)
    assert loss.item() + 0.3 * values[0].item() == pytest.approx(given.loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[3]], ids=str)
def test_it_is_the_same_however_conversations_are_packed(policy):
    model = mixture("olmoe")
    expected = found(model, [pack_trees(CHAINS)], policy)
    for sequences in (
        [pack_trees(CHAINS[::-1])],
        [pack_trees([tree]) for tree in CHAINS],
        [pack_trees(CHAINS[1:3]), empty_sequence(), pack_trees([CHAINS[3], CHAINS[0]])],
    ):
        assert_same(found(model, sequences, policy), expected, 1e-11)


def test_shared_prefixes_and_paths_taken_apart_change_nothing():
    prompt = Segment("context", tuple(range(20)), None)
    answers = [Segment("target", tuple(range(n, n + 5 + n)), 0) for n in (3, 9, 1)]
    trees = [weigh(Tree(f"one:{n}", (prompt, answer)), "conversation") for n, answer in enumerate(answers)]
    joined = list(Dataset.of(trees).with_shared_prefixes(100, 0))
    assert len(joined) == 1
    model = mixture("mixtral")
    assert_same(found(model, [pack_trees(joined)]), found(model, [pack_trees(trees)]), 1e-6)
    apart = [pack_trees([chained], alone=True) for chained in chains_of(TREES[2])]
    assert_same(found(model, [pack_trees([TREES[2]])]), found(model, apart), 1e-6)  # its router is in float32


def test_what_several_paths_share_is_trained_in_the_first_and_trailing_tokens_count_nowhere():
    """A trained turn before two contexts, the first of which no target follows."""
    ids = [(1, 2), (3, 4), (5, 6, 7), (8,), (9, 10)]
    segments = [
        Segment(kind, own, parent, share=0.5)
        for kind, own, parent in zip(
            ("context", "target", "context", "context", "target"), ids, (None, 0, 1, 1, 3), strict=True
        )
    ]
    cell_T, _, paths = balanced_paths(pack_trees([Tree("one", tuple(segments))]))
    assert paths["share_G"].tolist() == [1.0, 1.0]
    members = [set(np.flatnonzero(np.isin(cell_T, paths["cell"][paths["path"] == path]))) for path in (0, 1)]
    assert members == [{0, 1, 2}, {0, 1, 2, 3, 7, 8}]
    cell_T, num_cells, paths = balanced_paths(empty_sequence())
    assert num_cells == 0 and not len(paths["share_G"]) and cell_T.tolist() == [0]


@pytest.mark.parametrize("again", ["none", "all"])
def test_contexts_held_constant_count_but_have_no_gradient(again):
    """The same by phases as by a dense mask; the value is the exact one."""
    model = mixture("qwen3_moe")
    exact = found(model, [pack_trees(TREES)])
    by_phases = found(model, [pack_trees(TREES)], ActivationPolicy("detach", again))
    remove(model)
    install(model, "plain")
    assert_same(found(model, [pack_trees(TREES)], ActivationPolicy("detach", again)), by_phases, 1e-11)
    assert by_phases[0] == pytest.approx(exact[0], rel=1e-11)
    assert (by_phases[1] - exact[1]).norm() > 0.01 * exact[1].norm()


@pytest.mark.parametrize("policy", [KEEP_ALL, ActivationPolicy("recompute", "all")], ids=str)
def test_a_frozen_router_is_balanced_by_the_adapters_before_it(policy):
    model = add_adapter(mixture("qwen3_moe"), 4, 8.0, 0.0, ["q_proj", "v_proj"], [], seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".gate." in name)
    assert_same(found(model, [pack_trees(TREES)], policy), true(model, TREES), 1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers_give_the_same(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    compiled._compiled.cache_clear()
    torch._dynamo.reset()
    model = mixture("mixtral")
    expected = found(copy.deepcopy(model), [pack_trees(TREES)])
    install(model, "compiled", check=False)
    assert_same(found(model, [pack_trees(TREES)], ActivationPolicy("recompute", "all")), expected, 1e-6)


def test_autocast_takes_probabilities_in_float32():
    model = mixture("qwen3_moe", torch.float32)
    expected = found(model, [pack_trees(TREES)])
    with torch.autocast("cpu", torch.bfloat16):
        assert found(model, [pack_trees(TREES)])[0] == pytest.approx(expected[0], rel=0.02)


def test_it_balances_what_is_not():
    """Twenty steps on it alone."""
    model = mixture("qwen3_moe", torch.float32)
    optimizer, sequence = torch.optim.SGD(model.parameters(), lr=0.02), pack_trees(TREES)
    values = []
    for _ in range(20):
        step = StepContext(divisor=sequence.divisor, router_aux=values)
        loss = Engine(model)(sequence, options=LossOptions(router_aux_coef=1.0), step=step)
        (loss - Engine(model)(sequence, step=StepContext(divisor=sequence.divisor))).backward()
        optimizer.step(), optimizer.zero_grad()
    assert values[0] > 3.3 and values[-1] < 3.0 + 0.7 * (values[0] - 3.0)  # 3 experts a token: balanced is 3


def test_a_copy_has_routers_of_its_own_and_generation_meets_none():
    model = mixture("olmoe")
    watch_routers(model, Engine(model).state)
    twin = copy.deepcopy(model)
    sequence = pack_trees(TREES)
    assert_same(found(twin, [sequence]), found(model, [sequence]), 1e-11)
    model.generate(input_ids=torch.arange(4)[None], max_new_tokens=2, do_sample=False)
    with torch.no_grad():  # an evaluation has no gradient, and no such loss
        values = []
        Engine(model)(sequence, options=BALANCED, step=StepContext(router_aux=values))
    assert values == []


def test_what_runs_again_in_backward_leaves_nothing(monkeypatch):
    """What it computes again would keep the activations of its layer."""
    made, of = [], inputs.Routing
    monkeypatch.setattr(inputs, "Routing", lambda *given: made.append(of(*given)) or made[-1])
    Engine(mixture("olmoe"))(pack_trees(TREES), ActivationPolicy("full", "all"), BALANCED).backward()
    assert [len(routing.probability_sums) for routing in made] == [2]


def test_models_without_routers_are_refused():
    with pytest.raises(ModelError, match=r"no router was found in this llama model.*Set it to 0"):
        Engine(tiny_model("llama"))(pack_trees(TREES), options=BALANCED)
    for kind, why in (("doge", "logits of keys"), ("gemma4_text", "probabilities")):
        settings = {"is_moe": True, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
        model = tiny_model(kind, **settings, moe_intermediate_size=16, num_experts_per_tok=2)
        with pytest.raises(ModelError, match=f"router of a {kind} model .*{why}"):
            require_routers(model)


def test_what_a_config_asks_for():
    settings = tiny_model("mixtral", router_aux_loss_coef=0.02, num_hidden_layers=1).config
    assert router_aux_coef(None, settings) == 0.0
    settings.output_router_logits = True
    assert router_aux_coef(None, settings) == 0.02
    assert router_aux_coef(None, tiny_model("llama", num_hidden_layers=1).config) == 0.0
    assert CROSS_ENTROPY.router_aux_coef == 0.0
