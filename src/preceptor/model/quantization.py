"""Frozen linear layers in 4 or 8 bits by bitsandbytes, under an adapter (QLoRA, Dettmers et al., arXiv:2305.14314).

    nf4    blocks of 64 weights: 4 bits each, an index into 16 quantiles of the normal distribution, and a float32
           scale; doubly quantized, the scales are 8 bits, with a float32 scale per 256 of them
    int8   rows: 8 bits per weight and a float32 scale

A layer computes x W^T + b with W dequantized, in the type of matrix products, once forward and once backward; between
them only the bits are kept. Activations are not quantized, unlike in LLM.int8: there outliers of one token decide how
another is rounded, and packed conversations would see each other.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from preceptor.errors import ConfigError, ModelError
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

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (outputs, inputs) in a type."""
        return _dequantized([*self.buffers()], (self.out_features, self.in_features), dtype)

    def forward(self, x: Tensor) -> Tensor:
        device_type = x.device.type
        half = device_type != "meta" and torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if half else x.dtype
        shape = self.out_features, self.in_features
        product: Tensor = _Product.apply(x, self.bias, shape, dtype, *self.buffers())
        return product

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


class _Product(torch.autograd.Function):
    """x W^T + b; backward dequantizes W once more. `quantized`: the tensors of W, as in `_dequantized`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, *quantized: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*quantized)
        ctx.shape, ctx.dtype = shape, x.dtype
        y = linear(x.to(dtype), _dequantized(quantized, shape, dtype))
        return y if bias is None else y.add_(bias)  # `linear` would give a view, into which no adapter may add

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        quantized = ctx.saved_tensors
        product = _opaque_product if torch.compiler.is_compiling() else _product
        return product(grad, [*quantized], [*ctx.shape]).to(ctx.dtype), *[None] * (3 + len(quantized))


def _product(grad: Tensor, quantized: list[Tensor], shape: list[int]) -> Tensor:
    """grad W."""
    return grad @ _dequantized(quantized, shape, grad.dtype)


_opaque_product = torch.library.custom_op("preceptor::product_with_quantized", _product, mutates_args=())
"""The same as one operator: a compiler that saw W dequantized in backward too would keep that of forward for it."""


@_opaque_product.register_fake
def _(grad: Tensor, quantized: list[Tensor], shape: list[int]) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], shape[1])


def _dequantized(quantized: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The weight of a layer's buffers, by bitsandbytes' operators as torch knows them, so that a graph may hold them.

    quantized: in the order in which `_quantized` names them.
    """
    codes, scales, *second = quantized
    if codes.dtype == torch.int8:
        return codes.float().mul_(scales[:, None]).mul_(1 / 127).to(dtype)
    dry = not torch.compiler.is_compiling() and is_dry_run()
    if dry or codes.device.type == "meta":  # as bitsandbytes does it, whose kernel is not asked
        scales = scales.float() if second else scales
        return torch.empty(shape, dtype=dtype, device=scales.device)
    operators = torch.ops.bitsandbytes
    if second:
        scales_of_scales, table, offset = second
        scales = operators.dequantize_blockwise(scales, scales_of_scales, table, SCALES_BLOCK, torch.float32) + offset
    known = torch.float32 if dtype == torch.float64 else dtype
    found: Tensor = operators.dequantize_4bit(codes, scales, BLOCK, "nf4", shape, known)
    return found.to(dtype)


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
        if name in names and isinstance(module, nn.Linear) and name.rpartition(".")[2] not in _ROUTERS
    }


@torch.no_grad()
def quantize(model: Any, kind: Quantization, double: bool, device: Any) -> int:
    """Put quantized layers in the place of linear ones, one after the other, and the rest of the model on `device`.

    Before an adapter is added. Returns how many layers. Raises ConfigError where bitsandbytes is not installed, and
    ModelError where no layer can be quantized.
    """
    found = quantizable(model)
    if not found:
        raise ModelError(
            f"model.quantization: {type(model).__name__} has no torch.nn.Linear in its decoder, which alone is "
            "quantized (GPT-2's layers are Conv1D); leave it out"
        )
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
    found = {"codes": codes, "scales": state.absmax}
    if double:
        second = state.state2
        found |= {"scales_of_scales": second.absmax, "table": second.code, "offset": state.offset}
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
        return {"codes": codes, "scales": empty(num_scales)}
    return {
        "codes": codes,
        "scales": empty(num_scales, dtype=torch.uint8),
        "scales_of_scales": empty(-(-num_scales // SCALES_BLOCK)),
        "table": empty(256),
        "offset": empty(),
    }
