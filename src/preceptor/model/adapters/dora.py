"""DoRA (Liu et al. 2024, arXiv:2402.09353) of a half-precision base, with lengths in float32.

    y = x (m / |V + s B A|  (V + s B A))^T        V: the base's matrix, m: the trained lengths of its rows

peft rounds the first m, and in its forward pass the divisor, to the type of V: each by up to 0.4 %. At the start the
two cancel; but the divisor of a merge, and of the fused forward pass, is float32: each row would begin off by as much.
"""

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from preceptor.model.adapters.pissa import lora_layers

_HALF = (torch.bfloat16, torch.float16)


class WideDoraLayer(DoraLinearLayer):
    """peft's, whose lengths of a half-precision matrix are float32."""

    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        norm: Tensor = super().get_weight_norm(
            weight.to(wide), lora_weight.to(wide), scaling, adapter_name=adapter_name
        )
        return norm


@torch.no_grad()
def start_at_lengths(model: nn.Module) -> None:
    """Let the trained lengths of every DoRA layer start at those of the base, in float32, as all that divides them."""
    for _, layer in lora_layers(model):
        weight: Any = layer.get_base_layer().weight
        if "default" in layer.lora_magnitude_vector and weight.dtype in _HALF:
            magnitude = layer.lora_magnitude_vector["default"]
            magnitude.__class__ = WideDoraLayer
            rows = weight.T if layer.fan_in_fan_out else weight
            magnitude.weight.copy_(torch.linalg.vector_norm(rows.float(), dim=1))
