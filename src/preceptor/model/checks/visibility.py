"""Proof that each attention layer sees in a packed sequence what transformers itself would let it see.

transformers puts sliding windows, chunks and bidirectional spans into masks, and models hand only some of that to the
attention function. So the model is run once with a mask function that asks transformers' own rule, at positions that
lie far apart as well as side by side, and with an attention function that compares the answer with the rule that
`attend_runs` follows. This costs one forward pass of about a hundred tokens, whatever the length of the window.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from preceptor.errors import ModelError
from preceptor.model.attention.runs import attention_implementation
from preceptor.model.parts import decoder_of, evaluating, model_type, path_mixers

_PROBE = "preceptor_visibility_probe"
_LARGEST_POWER = 20  # positions up to 2^20, beyond any window in use


@torch.no_grad()
def check_visibility(model: nn.Module) -> None:
    """Raises ModelError, naming the layer, where the forest would show a layer other tokens than transformers does."""
    decoder = decoder_of(model)
    positions = _probe_positions(decoder.config)
    probed: list[str] = []
    device = decoder.get_input_embeddings().weight.device
    ids = torch.zeros(1, len(positions), dtype=torch.long, device=device)
    with evaluating(model), attention_implementation(decoder, _PROBE):
        decoder(input_ids=ids, use_cache=False, probe_positions=positions, probed=probed)
    if not probed and not path_mixers(model):
        raise ModelError(
            f"{model_type(model)}: no layer looks its attention up in transformers' AttentionInterface, so "
            f"conversations cannot be kept apart in one sequence. Use another model type."
        )


def _probe_positions(config: object) -> list[int]:
    """Neighbours of the powers of two, and of the window or chunk that the config names; ascending."""
    edges = [2**power for power in range(1, _LARGEST_POWER + 1)]
    for name in ("sliding_window", "attention_chunk_size"):
        edge = getattr(config, name, None)
        if isinstance(edge, int):
            edges.append(edge)
    return sorted({0, *(edge + step for edge in edges for step in (-1, 0, 1))})


def _probe_mask(mask_function: Callable[..., Tensor], config: object, device: torch.device, **_: Any) -> Tensor:
    """transformers' rule at the probe's positions, (1, 1, P, P) bool, in place of the mask of P neighbours."""
    position_P = torch.tensor(_probe_positions(config), device=device)
    zero = torch.zeros((), dtype=torch.long, device=device)
    visible_PP: Tensor = mask_function(zero, zero, position_P[:, None], position_P[None, :])
    return visible_PP[None, None]


def _probe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    probe_positions: list[int] | None = None,
    probed: list[str] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compare the layer's mask with what the forest would show it; the output is any finite values."""
    name = f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')}"
    if probe_positions is None or probed is None:
        raise ModelError(
            f"{name} drops keyword arguments on the way to attention, so it cannot be told a sequence's layout"
        )
    position_P = torch.tensor(probe_positions, device=query.device)
    distance_PP = position_P[:, None] - position_P[None, :]
    expected_PP = distance_PP >= 0
    if sliding_window is not None:
        expected_PP &= distance_PP < sliding_window
    if attention_mask is None or not torch.equal(attention_mask[0, 0].bool(), expected_PP):
        window = "no sliding window" if sliding_window is None else f"a sliding window of {sliding_window}"
        raise ModelError(
            f"{name} asks attention for {window}, but its mask shows it other tokens than that (chunked or "
            f"bidirectional attention, or no mask at all). Use a model whose layers attend causally."
        )
    probed.append(name)
    output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_PROBE, _probe_attention)
AttentionMaskInterface.register(_PROBE, _probe_mask)
