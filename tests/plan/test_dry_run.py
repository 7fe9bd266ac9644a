"""What a dry run predicts of a step against a real step: policies, precisions, adapters and model types."""

import pytest
from children import TORTURE
from measured import ONE, SEVERAL, measured_peak, sequence_of
from transformers import AutoConfig, AutoModelForCausalLM

from preceptor.errors import ModelError
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.options import KEEP_ALL, ActivationPolicy, LoraOptions, LossOptions
from preceptor.model.quantization import quantize
from preceptor.plan.dry_run import DryRun, dry_run_like
from preceptor.plan.memory import Setup, state_bytes, step_memory
from preceptor.plan.parameters import LoraSpec, count_parameters
from preceptor.plan.shapes import shape_of
from preceptor.plan.work import Work
from tiny import seeing_model, tiny_model

SIZES = {
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
POLICIES = (
    KEEP_ALL,
    ActivationPolicy("recompute"),
    ActivationPolicy("detach"),
    ActivationPolicy("full", "all"),
    ActivationPolicy("detach", "all"),
    ActivationPolicy("full", 1),
)
SPECIAL = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def predicted_peak(model, sequence, setup, policy=KEEP_ALL):
    dry_run = dry_run_like(model)
    moments = dry_run.step(setup, policy, sequence, dry_run.num_rows)
    parameters = dry_run.parameters(setup.adapter, setup.num_new_tokens)
    return step_memory(setup, parameters, moments).peak_bytes


def check(model, conversations, policy=KEEP_ALL, precision="float32", num_sequences=1, alone=False):
    setup = Setup(autocast=precision == "bfloat16", sequences_per_step=num_sequences)
    sequence = sequence_of(conversations, alone)
    found = predicted_peak(model, sequence, setup, policy)
    assert found == pytest.approx(measured_peak(model, sequence, policy, precision, num_sequences), rel=0.005)


@pytest.mark.parametrize(
    ("kind", "precision", "policy"),
    [
        *(("qwen3", "bfloat16", policy) for policy in POLICIES),
        *(("llama", "float32", policy) for policy in POLICIES[:3]),
        *(("gemma3_text", "bfloat16", policy) for policy in POLICIES[:2]),
    ],
    ids=str,
)
def test_the_peak_of_a_step(kind, precision, policy):
    check(tiny_model(kind, **SIZES), ONE, policy, precision)


def test_routers_that_are_balanced():
    """What is kept of each router, and the last layer for all tokens."""
    experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.1}
    model, sequence = tiny_model("qwen3_moe", **{**SIZES, **experts}), sequence_of(ONE)
    model.config.output_router_logits, policy = True, ActivationPolicy("recompute")
    found = {coef: predicted_peak(model, sequence, Setup(router_aux_coef=coef), policy) for coef in (None, 0.0)}
    options = LossOptions(router_aux_coef=0.1)
    assert found[None] == pytest.approx(measured_peak(model, sequence, policy, options=options), rel=0.01)
    assert found[None] > found[0.0]


@pytest.mark.parametrize(
    ("adapter", "precision", "policy"),
    [
        (None, "float32", POLICIES[1]),
        (None, "bfloat16", POLICIES[0]),
        (LoraSpec(4), "bfloat16", POLICIES[0]),
        (LoraSpec(4), "bfloat16", POLICIES[1]),
        *([(None, "float32", POLICIES[0]), (None, "bfloat16", POLICIES[1])] if TORTURE else []),
    ],
    ids=str,
)
def test_the_divergence_from_the_base(adapter, precision, policy):
    """Full fine-tuning holds the base a second time; an adapter is switched off."""
    model, num_new = tiny_model("llama", **SIZES), 2 * (adapter is not None)
    if adapter is not None:
        model = add_adapter(model, adapter.rank, 8.0, 0.0, None, range(512 - num_new, 512), seed=0).train()
    setup = Setup("float32", precision == "bfloat16", adapter, num_new, kl_to_base=True)
    sequence = sequence_of(SEVERAL)
    found = predicted_peak(model, sequence, setup, policy)
    measured = measured_peak(model, sequence, policy, precision, base_tokens=512 - num_new)
    assert found == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize("policy", POLICIES[:3], ids=str)
def test_several_conversations_and_several_sequences(policy):
    check(tiny_model("llama", **SIZES), SEVERAL, policy, "bfloat16", num_sequences=2)


# experts, soft-cap, sinks, windows, fused matrices; then types that have no shape
KINDS = ("gpt_oss", "qwen3_moe", "gemma2", "phi3", "mistral")
NEW_KINDS = ("cohere", "gpt_neox", "olmoe")


@pytest.mark.parametrize("kind", KINDS + NEW_KINDS)
def test_any_model_type(kind):
    check(tiny_model(kind, **SIZES), ONE, precision="bfloat16")


def test_models_that_read_one_conversation_at_a_time():
    check(tiny_model("nemotron", **SIZES), (((12, 8),),), alone=True)


def test_linear_attention_without_a_convolution_reads_one_conversation_at_a_time():
    assert dry_run_like(tiny_model("minimax", **SIZES)).reads_alone


@pytest.mark.filterwarnings("ignore")  # of kernels that are not installed
def test_layers_that_carry_a_state():
    model = tiny_model("lfm2", **SIZES, layer_types=["conv", "full_attention"])
    assert not dry_run_like(model).reads_alone and dry_run_like(model, "plain").reads_alone
    check(model, (((12, 8),), ((9, 5), (4, 7))))


@pytest.mark.parametrize(
    ("adapter", "num_new_tokens"),
    [(LoraSpec(4), 0), (LoraSpec(4, ("q_proj", "down_proj")), 2), (LoraSpec(4, None, 0.1), 3)],
)
def test_adapters(adapter, num_new_tokens):
    model = tiny_model("llama", **SIZES)
    new_ids = range(512 - num_new_tokens, 512)
    adapted = add_adapter(model, adapter.rank, 8.0, adapter.dropout, adapter.targets, new_ids, seed=0).train()
    setup, sequence = Setup("float32", True, adapter, num_new_tokens), sequence_of(ONE)
    found = predicted_peak(adapted, sequence, setup)
    assert found == pytest.approx(measured_peak(adapted, sequence, KEEP_ALL, "bfloat16"), rel=0.005)


def test_an_alpha_of_any_layer_costs_nothing():
    """Fewer layers stand for the whole: the one that is named may be none of them."""
    dry_run = dry_run_like(tiny_model("llama", **{**SIZES, "num_hidden_layers": 12}))
    named = LoraSpec(4, options=LoraOptions(alpha_pattern=(("layers.11", 2.0),)))
    assert dry_run.parameters(named) == dry_run.parameters(LoraSpec(4))


@pytest.mark.parametrize(
    "options",
    [
        LoraOptions(dora=True),
        LoraOptions(init="pissa"),
        LoraOptions(rank_pattern=(("layers.0", 9),), modules_to_save=("lm_head", "norm")),
    ],
    ids=["dora", "pissa", "by name"],
)
def test_kinds_of_adapters(options):
    model = tiny_model("llama", **SIZES)
    adapter = LoraSpec(4, None, 0.0, options)
    adapted = add_adapter(model, 4, 8.0, 0.0, None, [], seed=0, options=options).train()
    setup, sequence = Setup("float32", True, adapter), sequence_of(ONE)
    found = predicted_peak(adapted, sequence, setup)
    assert found == pytest.approx(measured_peak(adapted, sequence, KEEP_ALL, "bfloat16"), rel=0.005)


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("int8", False)])
def test_a_quantized_base(kind, double):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra `quantized`)")
    plain, model = (tiny_model("llama", **SIZES) for _ in range(2))
    quantize(model, kind, double, "cpu")
    model = add_adapter(model, 4, 8.0, 0.0, None, [], seed=0).train()
    adapter = LoraSpec(4)
    setup = Setup(autocast=True, adapter=adapter, quantization=kind, double_quantization=double)
    dry_run = dry_run_like(plain)
    parameters = dry_run.parameters(adapter)
    counted = count_parameters(shape_of(plain.config.to_dict()), adapter)
    assert counted.linears == parameters.linears
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *dict(model.named_buffers()).values()])
    held -= sum(b.numel() * b.element_size() for name, b in plain.named_buffers())
    assert state_bytes(setup, parameters)["weights"] == held
    sequence = sequence_of(ONE)
    found = step_memory(setup, parameters, dry_run.step(setup, KEEP_ALL, sequence, dry_run.num_rows)).peak_bytes
    assert found == pytest.approx(measured_peak(model, sequence, KEEP_ALL, "bfloat16"), rel=0.01)


def test_towers_are_held_beside():
    model = seeing_model("qwen3_vl", vocab_size=512)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("visual" not in name)
    check(model, ONE)


@pytest.mark.parametrize(
    ("kind", "layers", "period", "policy"),
    [
        ("llama", 10, 1, POLICIES[1]),
        ("gpt_oss", 17, 2, KEEP_ALL),
        *([("llama", 10, 1, KEEP_ALL), ("gpt_oss", 17, 2, POLICIES[1])] if TORTURE else []),
    ],
    ids=str,
)
def test_a_few_layers_stand_for_many(kind, layers, period, policy):
    """gpt-oss: windows that alternate make a period of two layers."""
    dry_run, whole = (dry_run_like(tiny_model(kind, **SIZES | {"num_hidden_layers": layers})) for _ in range(2))
    assert dry_run._short < layers and dry_run._long - dry_run._short == period
    whole._short = whole._long = layers
    setup, sequence = Setup(autocast=True, device_type="cuda"), sequence_of(ONE)
    found, true = (
        max(moment.peak_bytes for moment in each.step(setup, policy, sequence, 512)) for each in (dry_run, whole)
    )
    assert found == pytest.approx(true, rel=1e-3)


def llama_8b():
    config = AutoConfig.for_model("llama", **SPECIAL | LLAMA_8B, max_position_embeddings=1 << 17)
    return DryRun(config, AutoModelForCausalLM.from_config)


def test_an_8b_llama_on_a_gpu():
    """By hand: of a layer its input and the attention's result (float32); in bfloat16 the inputs of q, k, v and of gate
    and up, q, k, v, attention's output, gate, up and their product; and a number per token for each head and norm.
    """
    dry_run, tokens = llama_8b(), 4096
    assert dry_run.parameters().num_base == 8_030_261_248
    setup = Setup("float32", True, device_type="cuda")
    sequence = Work((((0, tokens),),)).sequence()  # all of it is read, so the last layer is as the others
    moments = dry_run.step(setup, KEEP_ALL, sequence, dry_run.num_rows)
    found = step_memory(setup, dry_run.parameters(), moments)
    hidden, keys, width, heads = 4096, 1024, 14336, 32
    of_layer = 2 * 4 * hidden + 2 * (2 * hidden + (hidden + 2 * keys) + hidden + 3 * width) + 4 * (heads + 2)
    assert found.components["activations"] == pytest.approx(32 * tokens * of_layer, rel=0.02)
    assert found.components["copies of weights"] == pytest.approx(
        2 * sum(p.matrices for p in dry_run.parameters().layers), rel=0.01
    )


def test_a_gpu_takes_other_paths_than_a_cpu():
    """Soft-cap and sinks by flex, windows by flash: no scores are kept, so twice the tokens take twice the memory."""
    for kind in ("gemma2", "gpt_oss", "mistral"):
        dry_run = dry_run_like(tiny_model(kind, **SIZES | {"head_dim": 16, "num_key_value_heads": 8}))
        one, two = (
            step_memory(
                setup := Setup("bfloat16", True, device_type="cuda"),
                dry_run.parameters(),
                dry_run.step(setup, KEEP_ALL, Work((((0, tokens),),)).sequence(), 512),
            ).components["activations"]
            for tokens in (2048, 4096)
        )
        assert two == pytest.approx(2 * one, rel=0.01)


def activations_on_a_gpu(kind, turns):
    dry_run = dry_run_like(tiny_model(kind, **SIZES | {"head_dim": 16, "num_key_value_heads": 8}))
    setup = Setup("bfloat16", True, device_type="cuda")
    moments = dry_run.step(setup, KEEP_ALL, Work((turns,)).sequence(), 512)
    return step_memory(setup, dry_run.parameters(), moments).components["activations"]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("num_turns", [1, 4, 32])
def test_no_number_of_turns_takes_more_than_to_train_all_tokens(kind, num_turns):
    """The paths of a last layer's pieces are copied while they are few; soft-cap and sinks know no pieces."""
    of_all = activations_on_a_gpu(kind, ((0, 4096),))
    found = activations_on_a_gpu(kind, ((3072 // num_turns, 1024 // num_turns),) * num_turns)
    assert found <= 1.01 * of_all


def test_what_cannot_run_without_values_is_said(monkeypatch):
    model = tiny_model("llama", **SIZES)
    dry_run = dry_run_like(model)
    attention = type(model.model.layers[0].self_attn)

    def by_value(self, *arguments, **named):
        raise TypeError("only one element tensors can be converted to Python scalars")

    monkeypatch.setattr(attention, "forward", by_value)
    with pytest.raises(ModelError, match="llama: cannot run without values: only one"):
        dry_run.step(Setup(), KEEP_ALL, sequence_of(ONE), 512)


def test_a_key_that_the_model_cannot_follow_is_said_as_training_says_it():
    dry_run = dry_run_like(tiny_model("llama", **SIZES))
    with pytest.raises(ModelError, match=r"^loss\.router_aux_coef: no router was found"):
        dry_run.step(Setup(router_aux_coef=0.1), KEEP_ALL, sequence_of(ONE), 512)
