"""What a layer's mask shows it, by transformers' own rule, is what the forest shows it."""

import pytest
import torch

from preceptor.errors import ModelError
from preceptor.model import checks
from preceptor.model.checks import check_visibility
from tiny import MODELS, tiny_model


@pytest.mark.parametrize("kind", MODELS)
def test_masks_agree(kind):
    model = tiny_model(kind)
    former = model.config._attn_implementation
    check_visibility(model)
    assert model.config._attn_implementation == former
    assert model.training


def test_chunked_attention_is_rejected_by_layer():
    model = tiny_model(
        "llama4_text",
        attention_chunk_size=8,
        num_local_experts=2,
        intermediate_size_mlp=48,
        layer_types=["full_attention", "chunked_attention"],
    )
    with pytest.raises(ModelError, match="Llama4TextAttention of layer 1 asks attention for no sliding window"):
        check_visibility(model)


def test_bidirectional_attention_is_rejected():
    with pytest.raises(ModelError, match="BertSelfAttention of layer 0"):
        check_visibility(tiny_model("bert"))


@pytest.mark.parametrize("layer_window", [None, 6, 8])
def test_a_window_that_the_mask_has_but_the_layer_does_not_tell_is_found(layer_window):
    model = tiny_model("gemma2", sliding_window=7)
    model.model.layers[0].self_attn.sliding_window = layer_window
    with pytest.raises(ModelError, match="layer 0"):
        check_visibility(model)


def test_layers_that_drop_keyword_arguments_are_rejected():
    with pytest.raises(ModelError, match="StableLmAttention of layer 0 drops keyword arguments"):
        check_visibility(tiny_model("stablelm"))


def test_attention_that_no_interface_knows_is_rejected():
    with pytest.raises(ModelError, match="RwkvModel computes attention by itself"):
        check_visibility(tiny_model("rwkv"))
    check_visibility(tiny_model("mamba"))  # has none, and goes run by run


def test_the_probe_is_short_and_reaches_far():
    positions = checks._probe_positions(tiny_model("mistral", sliding_window=4096 * 3).config)
    assert len(positions) < 80
    assert {12287, 12288, 12289} <= set(positions)
    assert positions == sorted(set(positions))
    assert positions[-1] > 10**6
    assert torch.tensor(positions).min() == 0
