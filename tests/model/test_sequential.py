"""Models that cannot keep conversations apart read one chain at a time, as the model itself would."""

import numpy as np
import pytest
import torch

from preceptor.data.forest import pack_trees
from preceptor.data.prefix_sharing import chains_of
from preceptor.errors import ModelError
from preceptor.model.checks import check_head, check_isolation, check_sequential
from preceptor.model.forward import Engine
from preceptor.model.optimisations import install
from tiny import branching, chain, tiny_model

MIXING = {
    "mamba": {"state_size": 4, "conv_kernel": 4, "expand": 2, "time_step_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 4,
        "use_mamba_kernels": False,
    },
    "stablelm": {},
    "llama4_text": {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
    "gptj": {"rotary_dim": 4},
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "glm_moe_dsa": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
    },
}

WHY_ALONE = {
    **dict.fromkeys(("mamba", "lfm2", "qwen3_next", "jamba"), "Its layers mix tokens outside attention"),
    "stablelm": "drops keyword arguments",
    "llama4_text": "its mask shows it other tokens",
    "gptj": "GPTJModel computes attention by itself",
    "bart": "behind others: its positions are lost",
    "glm_moe_dsa": "a layer fails on a sequence of several conversations",
}


@pytest.mark.parametrize("kind", MIXING)
def test_a_chain_alone_is_what_the_model_computes(kind):
    model = tiny_model(kind, **MIXING[kind]).eval()
    install(model, "plain")  # else layers that mix tokens go run by run
    check_head(model)
    with pytest.raises(ModelError, match=WHY_ALONE[kind]):
        check_isolation(model)
    check_sequential(model)
    rng = np.random.default_rng(0)
    for tree in (chain(rng, (5, 7, 3, 4)), *chains_of(branching(rng))):
        sequence = pack_trees([tree], alone=True)
        hidden_TD = Engine(model).hidden_states(sequence)
        true_TV = model(input_ids=torch.from_numpy(sequence.ids_T)[None], use_cache=False).logits[0]
        torch.testing.assert_close(model.get_output_embeddings()(hidden_TD), true_TV, rtol=1e-5, atol=1e-5)


def test_a_model_that_looks_ahead_is_rejected():
    with pytest.raises(ModelError, match="bert: its hidden states follow later tokens"):
        check_sequential(tiny_model("bert"))


def test_attention_that_is_not_the_authors_is_rejected(monkeypatch):
    """Planted: the implementation in force leaves out the scale."""
    from transformers.models.llama import modeling_llama

    model = tiny_model("llama")
    eager = modeling_llama.eager_attention_forward
    monkeypatch.setattr(
        modeling_llama,
        "eager_attention_forward",
        lambda module, q, k, v, mask, scaling, **rest: eager(module, q, k, v, mask, 1.0, **rest),
    )
    with pytest.raises(ModelError, match="llama: `sdpa` attention is not the eager one"):
        check_sequential(model)


def test_a_forest_is_not_taken_for_a_chain():
    with pytest.raises(AssertionError, match="one chain"):
        Engine(tiny_model("llama")).hidden_states(pack_trees([branching(np.random.default_rng(0))], alone=True))
