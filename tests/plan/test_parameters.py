"""Counts from config.json alone against transformers' own models, without values (meta device)."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from preceptor.errors import ModelError
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.options import LoraOptions
from preceptor.model.parts import decoder_of, tower_parameters
from preceptor.model.sizes import rows_for
from preceptor.plan.dry_run import DryRun, dry_run_like
from preceptor.plan.parameters import LoraSpec, count_parameters
from preceptor.plan.shapes import FAMILIES, shape_of
from tiny import seeing_model, tiny_model

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
QWEN3_06B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
# The shapes that the published config.json files have; the figures are what their model cards say.
REAL = {
    "Llama-3.1-8B": (LLAMA_8B, 8_030_261_248),
    "Llama-3.1-70B": (
        {
            **LLAMA_8B,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
        },
        70_553_706_496,
    ),
    "Llama-3.2-1B": (
        {
            **LLAMA_8B,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
        1_235_814_400,
    ),
    "Qwen3-0.6B": (QWEN3_06B, 596_049_920),
    "Qwen3-8B": (
        {
            **QWEN3_06B,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
        8_190_735_360,
    ),
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "tie_word_embeddings": False,
        },
        30_532_122_624,
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        494_032_768,
    ),
    "Gemma-2-2B": (
        {
            "model_type": "gemma2",
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
        },
        2_614_341_888,
    ),
    "Gemma-3-1B": (
        {
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
        999_885_952,
    ),
    "Mistral-7B": (
        {
            "model_type": "mistral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        7_241_732_096,
    ),
    "Mixtral-8x7B": (
        {
            "model_type": "mixtral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        46_702_792_704,
    ),
    "Phi-3-mini": (
        {
            "model_type": "phi3",
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "sliding_window": 2047,
            "pad_token_id": 32000,
        },
        3_821_079_552,
    ),
    "gpt-oss-20b": (
        {
            "model_type": "gpt_oss",
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "tie_word_embeddings": False,
        },
        20_914_757_184,
    ),
}


def built(config):
    """A dry run of a config.json."""
    settings = {key: value for key, value in config.items() if key != "model_type"}
    return DryRun(AutoConfig.for_model(config["model_type"], **settings), AutoModelForCausalLM.from_config)


@pytest.mark.parametrize("name", REAL)
def test_real_sizes_are_counted_exactly(name):
    """By arithmetic, and by the model that transformers builds."""
    config, published = REAL[name]
    counted, whole = count_parameters(shape_of(config)), built(config).parameters()
    assert counted.base == whole.base and counted.active == whole.active
    assert counted.num_base == published


@pytest.mark.parametrize("kind", FAMILIES)
def test_tiny_models_of_every_family_are_counted_exactly(kind):
    model = tiny_model(kind, attention_bias=True) if kind in ("llama", "qwen3", "gemma") else tiny_model(kind)
    counted, whole = count_parameters(shape_of(model.config.to_dict())), dry_run_like(model).parameters()
    assert counted.base == counted.trained == whole.base == whole.trained
    assert counted.num_base == sum(p.numel() for p in model.parameters())
    assert whole.head == model.lm_head.weight.numel()
    assert whole.outside == sum(p.numel() for name, p in model.named_parameters() if ".layers." not in name)


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "qwen3_vl"])
def test_of_a_model_that_sees_the_text_model_is_counted(kind):
    model = seeing_model(kind)
    towers = sum(p.numel() for p in tower_parameters(model))
    shape = shape_of(model.config.to_dict())
    assert count_parameters(shape).num_base == sum(p.numel() for p in model.parameters()) - towers
    counted = count_parameters(replace(shape, towers=towers))
    assert counted.num_base == sum(p.numel() for p in model.parameters())
    assert counted.num_trained == counted.active == counted.num_base - towers


def test_sizes_that_gemma_3_leaves_out_of_its_config_are_filled_in():
    """As config.json of Gemma 3 4B has it."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    config = {"model_type": "gemma3", "text_config": text | {"sliding_window": 1024}}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    of_text = sum(p.numel() for p in decoder_of(model).parameters())
    assert count_parameters(shape_of(config)).num_base == of_text


@pytest.mark.parametrize("kind", FAMILIES)
def test_windows_are_the_models_own(kind):
    model = tiny_model(kind, num_hidden_layers=7, layer_types=None, sliding_window=5, use_sliding_window=True)
    own = [
        getattr(layer.self_attn, "sliding_window", model.config.sliding_window)
        if hasattr(model.config, "sliding_window")
        else None
        for layer in model.model.layers
    ]
    assert [layer.window for layer in dry_run_like(model).parameters().layers] == own


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")  # peft, of its own pattern
@pytest.mark.parametrize("targets", [None, ("o_proj",)])
@pytest.mark.parametrize("kind", FAMILIES)
def test_an_adapter_is_counted_exactly(kind, targets):
    model = tiny_model(kind)
    adapter = LoraSpec(3, targets)
    counted = count_parameters(shape_of(model.config.to_dict()), adapter, num_new_tokens=2)
    assert dry_run_like(model).parameters(adapter, num_new_tokens=2).trained == counted.trained
    adapted = add_adapter(model, 3, 6.0, 0.0, targets, [5, 9], seed=0)
    trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    assert counted.num_trained == sum(trained.values())
    assert counted.trained["adapter"] == sum(count for name, count in trained.items() if "lora_" in name)


@pytest.mark.parametrize("options", [LoraOptions(init="pissa"), LoraOptions(dora=True)], ids=["pissa", "dora"])
@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "phi3"])
def test_kinds_of_adapters_are_counted_exactly(kind, options):
    model, adapter = tiny_model(kind), LoraSpec(3, None, 0.0, options)
    counted = count_parameters(shape_of(model.config.to_dict()), adapter, num_new_tokens=2)
    found = dry_run_like(model).parameters(adapter, num_new_tokens=2)
    assert found.trained == counted.trained and found.tensors == counted.tensors
    adapted = add_adapter(model, 3, 6.0, 0.0, None, [5, 9], seed=0, options=options)
    assert counted.num_trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_an_adapter_by_name_is_counted_in_every_layer():
    options = LoraOptions(rank_pattern=(("layers.[0-6].*", 1),), modules_to_save=("lm_head",))
    model = tiny_model("llama", num_hidden_layers=10)
    found = dry_run_like(model).parameters(LoraSpec(3, None, 0.0, options))
    adapted = add_adapter(model, 3, 6.0, 0.0, None, [], seed=0, options=options)
    assert found.num_trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert found.trained["whole modules"] == model.lm_head.weight.numel()


def test_experts_that_a_token_is_not_sent_to_are_not_active():
    assert count_parameters(shape_of(REAL["Qwen3-30B-A3B"][0])).active == 3_353_032_704  # "A3B"
    assert count_parameters(shape_of(LLAMA_8B)).active == 8_030_261_248


def test_what_is_not_known_is_said_by_name():
    with pytest.raises(ModelError, match=r"model\.json: model_type 'mamba' is not known"):
        shape_of({"model_type": "mamba"}, "model.json")
    with pytest.raises(ModelError, match="has no hidden_size"):
        shape_of({key: value for key, value in LLAMA_8B.items() if key != "hidden_size"})
    with pytest.raises(ModelError, match="no linear layer named qproj"):
        count_parameters(shape_of(LLAMA_8B), LoraSpec(4, ("qproj",)))
    with pytest.raises(ModelError, match="no linear layer named qproj"):
        dry_run_like(tiny_model("llama")).parameters(LoraSpec(4, ("qproj",)))


def test_rows_grow_as_the_trainer_lets_them():
    assert rows_for(128256, 128256) == 128256 and rows_for(4096, 4099) == 4160
