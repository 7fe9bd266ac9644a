"""Tiny random models of every model type that transformers has, as far as a few general sizes make one."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

VOCABULARY = 64
_LARGEST = 20_000_000  # parameters
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large enough that attention is far from uniform and a wrong mask shows
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "expert_num"), 4),
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    "intermediate_size_mlp": 48,
    "ffn_hidden_size": 48,
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_INDEXER = {"num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 16}
_STATES = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_OLDER = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "rotary_dim": 4,
    "d_model": 32,
    "num_layers": 2,
    "n_layers": 2,
    "n_heads": 4,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOWER: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_PARTICULAR: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear"), _MIXED),
    "bamba": {"attn_layer_indices": [1], "mamba_chunk_size": 8},
    "falcon_h1": {"mamba_chunk_size": 8},
    "nemotron_h": {"chunk_size": 8},
    "gemma3n_text": {
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 2,
        "layer_types": ["full_attention"] * 5,
        "activation_sparsity_pattern": [0.0] * 5,
        "pad_token_id": 0,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "global_head_dim": 8,
        "pad_token_id": 0,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 7, "num_heads": 4},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 16,
        "mamba_chunk_size": 8,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "zamba": {"num_hidden_layers": 6, "n_groups": 1, "mamba_ngroups": 1},
    "zamba2": {"num_hidden_layers": 6, "n_groups": 1, "mamba_ngroups": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 8},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
        "lru_width": 32,
        "attention_window_size": 16,
    },
}
TOWERS: dict[str, dict[str, Any]] = {
    "mistral3": {**TOWER, "model_type": "pixtral", "head_dim": 8},
    "llama4": {**TOWER, "intermediate_size": 64, "vision_output_dim": 32, "projector_input_dim": 32}
    | {"projector_output_dim": 32},
    "gemma4": {**TOWER, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "patch_size": 4},
    "qwen2_vl": {**QWEN_TOWER, "embed_dim": 16, "hidden_size": 32},
    "internvl": {**TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
    "paligemma": {**TOWER, "model_type": "siglip_vision_model", "projection_dim": 32},
}


def model_types() -> list[str]:
    """Types that text is generated with, encoder-decoders left out."""
    known = {**auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    only_seeing = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() | auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
    return sorted(known.keys() & only_seeing)


def tiny_of(kind: str) -> PreTrainedModel:
    """The first of a few sets of sizes that gives a small model whose forward and backward work on text.

    Raises ValueError saying what stood in the way.
    """
    trouble = "no sizes"
    for sizes in _candidates(kind):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = AutoConfig.for_model(kind, **copy.deepcopy(sizes))  # some take what they are given apart
                if not _is_small(config):
                    trouble = "the general sizes do not reach all of its configuration"
                    continue
                causal = kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "vision_config" not in sizes
                loads = AutoModelForCausalLM if causal else AutoModelForMultimodalLM
                if config.is_encoder_decoder or _num_parameters(loads, config) > _LARGEST:
                    trouble = "an encoder-decoder" if config.is_encoder_decoder else "too large with the general sizes"
                    continue
                torch.manual_seed(0)
                model = loads.from_config(config)
                model(input_ids=torch.arange(8)[None], use_cache=False).logits.sum().backward()
        except Exception as error:  # whatever a configuration or a model does not like
            found = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"
            trouble = found if trouble == "no sizes" else trouble
            continue
        model.zero_grad(set_to_none=True)
        return _without_dropout(model)
    raise ValueError(trouble)


def _num_parameters(loads: Any, config: Any) -> int:
    """Without making them; 0 for a model that cannot be laid out so."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in loads.from_config(config).parameters())
    except Exception:  # values that its constructor reads
        return 0


def _candidates(kind: str) -> Iterator[dict[str, Any]]:
    more = {**_EXPERTS, **_LATENT, **_STATES, **_OLDER}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    particular = _PARTICULAR.get(kind, {})
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        without = {key: value for key, value in BASE.items() if key != "head_dim"}
        for base in (BASE, without):
            for extra in ({}, more, {**more, **_INDEXER}, {**more, **ids}, {**more, **_INDEXER, **ids}):
                yield {**base, **extra, **particular}
        yield {"vocab_size": VOCABULARY, **particular}
    text = {**BASE, "pad_token_id": 0, **_PARTICULAR.get(f"{kind}_text", {})}
    rope: dict[str, Any] = {"rope_parameters": ROPE}
    extras: list[dict[str, Any]] = [rope, {}, {**rope, **more}, {**rope, **more, **_MIXED}]
    families: list[dict[str, Any]] = [{}, *({"model_type": each} for each in ("llama", "ministral3", "gemma"))]
    for sizes in extras:
        for tower in (TOWERS.get(kind, TOWER), QWEN_TOWER):
            for family in families:
                yield {"text_config": {**text, **sizes, **family}, "vision_config": tower}


def _is_small(config: Any) -> bool:
    """And all configurations in it."""
    widths = ("hidden_size", "d_model", "embed_dim", "n_embd", "width", "encoder_embed_dim")
    depths = ("num_hidden_layers", "depth", "num_layers", "n_layer")
    for names, most in ((widths, 256), (depths, 32)):
        if any(isinstance(size := getattr(config, name, None), int) and size > most for name in names):
            return False
    return all(_is_small(inner) for inner in vars(config).values() if isinstance(inner, PretrainedConfig))


def _without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.eval()
