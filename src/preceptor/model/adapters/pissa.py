"""PiSSA (Meng et al. 2024, arXiv:2404.02948): an adapter that starts at the base's largest singular values.

    W = U S V^T,  A0 = sqrt(S_r / s) V_r^T,  B0 = U_r sqrt(S_r / s);  the layer is  W + s (B A - B0 A0),  s the scale

The paper subtracts s B0 A0 from the base. Here the base stays as it is, so that it is still at hand, in any type, and a
saved adapter is a plain LoRA on it, of twice the rank: A and A0 above each other, B and -B0 side by side. The halves A0
and B0 get no gradient. Experts that are one tensor get an adapter each, as peft lays them out.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from preceptor.errors import ModelError

_ITERATIONS = 16  # of the fast decomposition, as in the paper
_ALIKE = 1e-3  # inner products, over the largest of them


@torch.no_grad()
def start_at_singular_values(model: nn.Module, fast: bool) -> None:
    """Set the first values of every LoRA layer, whose rank is twice that which is trained.

    fast: by random projections (Halko et al. 2011). Raises ModelError where a matrix has fewer singular values.
    """
    for name, layer in lora_layers(model):
        lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if lora_a.device.type != "meta":
            rank = layer.r["default"] // 2
            weight_EOI = _weight(layer)
            if rank > min(weight_EOI.shape[1:]):
                raise ModelError(
                    f"adapter.rank: {rank}, but {name} has {min(weight_EOI.shape[1:])} singular values; lower it there "
                    "with adapter.rank_pattern, or use another adapter.init"
                )
            a_ERI, b_EOR = _factors(weight_EOI, rank, layer.scaling["default"], fast)
            _by_expert_a(layer, lora_a).copy_(torch.cat([a_ERI, a_ERI], dim=1))
            _by_expert_b(layer, lora_b).copy_(torch.cat([b_EOR, -b_EOR], dim=2).permute(1, 2, 0))


def keep_first_values(model: nn.Module) -> None:
    """The second half of every LoRA layer's rank gets no gradient."""
    for _, layer in lora_layers(model):
        for parameter, half in _halves(layer):
            parameter.register_hook(partial(_without, half))


def _without(half: Callable[[Tensor], Tensor], gradient: Tensor) -> Tensor:
    gradient = gradient.clone(memory_format=torch.contiguous_format)
    half(gradient).zero_()
    return gradient


def without_singular_values(model: nn.Module, saved: Mapping[str, Tensor]) -> list[str]:
    """The tensors A of an adapter that was saved of such a model, whose halves A0 and B0 are no PiSSA of any matrix.

    They are sqrt(S / s) V^T and U sqrt(S / s): A0 A0^T and B0^T B0 are one diagonal matrix, S / s.
    """
    names = {id(p): name.replace(".default", "") for name, p in model.named_parameters()}
    found = []
    for _, layer in lora_layers(model):
        a0_ERI, b0_ORE = (half(saved[names[id(p)]]).float() for p, half in _halves(layer))
        of_a_ERR, of_b_ERR = a0_ERI @ a0_ERI.mT, torch.einsum("ore,oqe->erq", b0_ORE, b0_ORE)
        diagonal_ERR = torch.diag_embed(of_a_ERR.diagonal(dim1=1, dim2=2))
        bound_E11 = _ALIKE * diagonal_ERR.amax(dim=(1, 2), keepdim=True)
        if not all(bool(((each - diagonal_ERR).abs() <= bound_E11).all()) for each in (of_a_ERR, of_b_ERR)):
            found.append(names[id(layer.lora_A["default"].weight)])
    return found


def _halves(layer: Any) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """A and B of a layer, each with what gives the second half of its rank."""
    rank = layer.r["default"] // 2
    yield layer.lora_A["default"].weight, lambda tensor: _by_expert_a(layer, tensor)[:, rank:]
    yield layer.lora_B["default"].weight, lambda tensor: _by_expert_b(layer, tensor)[:, rank:]


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Every module under LoRA, by its name in the base model."""
    return [
        (name.removeprefix("base_model.model."), module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]


def stacks_of_experts(model: nn.Module) -> set[int]:
    """Ids of the tensors A and B that hold a matrix of each expert, side by side."""
    stacks = (layer for _, layer in lora_layers(model) if _num_experts(layer) > 1)
    return {id(p) for layer in stacks for p in (layer.lora_A["default"].weight, layer.lora_B["default"].weight)}


def _num_experts(layer: Any) -> int:
    return int(getattr(layer, "num_experts", 1))


def _by_expert_a(layer: Any, lora_a: Tensor) -> Tensor:
    """(experts, rank, inputs)."""
    return lora_a.view(_num_experts(layer), -1, lora_a.shape[-1])


def _by_expert_b(layer: Any, lora_b: Tensor) -> Tensor:
    """(outputs, rank, experts)."""
    return lora_b.view(lora_b.shape[0], -1, _num_experts(layer))


def _weight(layer: Any) -> Tensor:
    """The adapted matrix of each expert (experts, outputs, inputs) in float32; of a linear layer one."""
    weight = layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
    if weight.dim() == 2:
        turned = getattr(layer, "fan_in_fan_out", False)  # Conv1D of transformers: (inputs, outputs)
        return (weight.T if turned else weight).float()[None]
    return weight.float() if layer._did_swap_in_out_features else weight.float().transpose(1, 2)


def _factors(weight_EOI: Tensor, rank: int, scale: float, fast: bool) -> tuple[Tensor, Tensor]:
    if fast:
        u_EOR, s_ER, v_EIR = torch.svd_lowrank(weight_EOI, rank, niter=_ITERATIONS)
        v_ERI = v_EIR.transpose(1, 2)
    else:
        u_EOR, s_ER, v_ERI = torch.linalg.svd(weight_EOI, full_matrices=False)
        u_EOR, s_ER, v_ERI = u_EOR[:, :, :rank], s_ER[:, :rank], v_ERI[:, :rank]
    root_ER = (s_ER / scale).sqrt()
    return root_ER[:, :, None] * v_ERI, u_EOR * root_ER[:, None, :]
