"""Frozen linear layers in 4 or 8 bits by bitsandbytes, under an adapter (QLoRA, Dettmers et al., arXiv:2305.14314).

    nf4    blocks of 64 weights: 4 bits each, an index into 16 quantiles of the normal distribution, and a float32
           scale; doubly quantized, the scales are 8 bits, with a float32 scale per 256 of them
    int8   rows: 8 bits per weight and a float32 scale

A layer computes x W^T + b with W dequantized, in the type of matrix products, once forward and once backward; between
them only the bits are kept. Activations are not quantized, unlike in LLM.int8: there outliers of one token decide how
another is rounded, and packed conversations would see each other.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from preceptor.errors import ConfigError
from preceptor.model.adapters.lora import linear_layers
from preceptor.model.options import Quantization
from preceptor.model.sizes import is_dry_run

BLOCK, SCALES_BLOCK = 64, 256  # weights with one scale, and scales with one
_ROUTERS = {"gate", "router", "shared_expert_gate"}  # small, and what they round decides which expert computes


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is kept in few bits; `weight` gives it dequantized, for whoever asks."""

    def __init__(self, layer: nn.Linear, kind: Quantization, double: bool, device: Any) -> None:
        """Of a layer without values the shapes alone."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind, self.dtype = kind, layer.weight.dtype
        weight = layer.weight.detach()
        empty = weight.device.type == "meta"
        weight = weight if empty else weight.to(device)
        tensors = _shapes(weight, kind, double) if empty else _quantized(weight, kind, double)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.bias = layer.bias if layer.bias is None or empty else nn.Parameter(layer.bias.to(device), False)
        self.requires_grad_(False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.dequantized(self.dtype)

    @torch.no_grad()
    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (outputs, inputs) in a type."""
        own: Any = self
        if self.kind == "int8":
            return own.codes.float().mul_(own.scales[:, None]).mul_(1 / 127).to(dtype)
        shape = self.out_features, self.in_features
        if is_dry_run() or own.codes.device.type == "meta":  # as bitsandbytes does it, whose kernel is not asked
            scales = own.scales.float() if hasattr(own, "table") else own.scales
            return torch.empty(shape, dtype=dtype, device=scales.device)
        functional = bitsandbytes().functional
        second = None
        if hasattr(own, "table"):
            second = functional.QuantState(
                absmax=own.scales_of_scales, code=own.table, blocksize=SCALES_BLOCK, dtype=torch.float32
            )
        state = functional.QuantState(
            absmax=own.scales,
            shape=torch.Size(shape),
            code=own.quantiles,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=torch.float32 if dtype == torch.float64 else dtype,
            offset=getattr(own, "offset", None),
            state2=second,
        )
        found: Tensor = functional.dequantize_4bit(own.codes, state)
        return found.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        device_type = x.device.type
        half = device_type != "meta" and torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if half else x.dtype
        product: Tensor = _Product.apply(x, self, dtype)
        return product

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


class _Product(torch.autograd.Function):
    """x W^T + b; backward dequantizes W once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        ctx.layer, ctx.dtype = layer, x.dtype
        bias: Tensor | None = layer.bias
        return linear(x.to(dtype), layer.dequantized(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return (grad @ ctx.layer.dequantized(grad.dtype)).to(ctx.dtype), None, None


def bitsandbytes() -> Any:
    """The package. Raises ConfigError where it is not installed."""
    try:
        import bitsandbytes as package
    except ImportError as error:
        raise ConfigError(
            "model.quantization: needs bitsandbytes, which is not installed: pip install 'preceptor[quantized]'"
        ) from error
    return package


def quantizable(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of the decoder, by name: not the head, no router, and no experts that are one tensor."""
    names = linear_layers(model)
    return {
        name: module
        for name, module in model.named_modules()
        if name in names and name.rpartition(".")[2] not in _ROUTERS
    }


@torch.no_grad()
def quantize(model: Any, kind: Quantization, double: bool, device: Any) -> int:
    """Put quantized layers in the place of linear ones, one after the other, and the rest of the model on `device`.

    Before an adapter is added. Returns how many layers. Raises ConfigError where bitsandbytes is not installed.
    """
    found = quantizable(model)
    for name, layer in found.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, QuantizedLinear(layer, kind, double, device))
    if device != "meta":
        model.to(device)
    return len(found)


def quantized_layers(model: nn.Module) -> Iterator[QuantizedLinear]:
    return (module for module in model.modules() if isinstance(module, QuantizedLinear))


def num_parameters(model: nn.Module) -> int:
    """As of the model that is not quantized."""
    own = sum(layer.in_features * layer.out_features for layer in quantized_layers(model))
    return own + sum(p.numel() for p in model.parameters())


def _quantized(weight: Tensor, kind: Quantization, double: bool) -> dict[str, Tensor]:
    functional = bitsandbytes().functional
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return {"codes": codes, "scales": scales}
    codes, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=double, quant_type="nf4"
    )
    found = {"codes": codes, "scales": state.absmax, "quantiles": state.code}
    if double:
        second = state.state2
        found |= {"offset": state.offset, "scales_of_scales": second.absmax, "table": second.code}
    return found


def _shapes(weight: Tensor, kind: Quantization, double: bool) -> dict[str, Tensor]:
    """The tensors of `_quantized` without values."""

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    if kind == "int8":
        return {"codes": empty(*weight.shape, dtype=torch.int8), "scales": empty(len(weight))}
    num_scales = -(-weight.numel() // BLOCK)
    codes = empty(-(-weight.numel() // 2), 1, dtype=torch.uint8)
    if not double:
        return {"codes": codes, "scales": empty(num_scales), "quantiles": empty(16)}
    return {
        "codes": codes,
        "scales": empty(num_scales, dtype=torch.uint8),
        "quantiles": empty(16),
        "offset": empty(),
        "scales_of_scales": empty(-(-num_scales // SCALES_BLOCK)),
        "table": empty(256),
    }
