"""What an adapter trains: a table by kind of module, and what the first step has not moved."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from preceptor.model.adapters.pissa import lora_layers
from preceptor.model.sharding import own_part

_NAMED = 4  # layers without a gradient
AdaptedRow = tuple[str, str, str]
"""What is trained: its name, how, and its shape."""


def table_lines(model: nn.Module) -> Iterator[str]:
    """The table of an adapter: modules of one name, rank and shape in one line. None without an adapter."""
    rows: dict[AdaptedRow, list[int]] = {}
    for row, num_parameters in _rows(model):
        counts = rows.setdefault(row, [0, 0])
        counts[0] += 1
        counts[1] += num_parameters
    if not rows:
        return
    cells = [("adapted", "in", "how", "shape", "parameters")]
    cells += [(row[0], f"{num} x", *row[1:], f"{of_all:,}") for row, (num, of_all) in rows.items()]
    widths = [max(len(cell[at]) for cell in cells) for at in range(4)]
    for cell in cells:
        left = "  ".join(text.ljust(width) for text, width in zip(cell[:4], widths, strict=True))
        yield f"  {left}  {cell[4]:>12}"


def _rows(model: nn.Module) -> Iterator[tuple[AdaptedRow, int]]:
    for name, layer in lora_layers(model):
        own = [p for own_name, p in layer.named_parameters() if own_name.startswith("lora_")]
        rank, scale = layer.r["default"], layer.scaling["default"]
        how = f"{'DoRA' if layer.use_dora['default'] else 'LoRA'}, rank {rank}, scale {scale:.3g}"
        shape = f"{layer.in_features:,} -> {layer.out_features:,}"
        if getattr(layer, "num_experts", 1) > 1:
            shape += f", {layer.num_experts} experts"
        yield (_last(name, layer), how, shape), sum(p.numel() for p in own if p.requires_grad)
    for name, module in model.named_modules():
        short = name.rpartition(".")[2]
        if isinstance(module, ModulesToSaveWrapper):
            weights = list(module.modules_to_save["default"].parameters())
            shape = " + ".join(" x ".join(f"{size:,}" for size in p.shape) for p in weights[:2])
            yield (short, "whole", shape), sum(p.numel() for p in weights)
        elif isinstance(module, TrainableTokensWrapper):
            rows: Any = module.token_adapter.trainable_tokens_delta["default"]
            if rows.requires_grad:
                yield (name.rpartition(".")[2], "rows of tokens", " x ".join(map(str, rows.shape))), rows.numel()


def _last(name: str, layer: Any) -> str:
    """The last part of a layer's name, without the numbers of layers and experts."""
    parts = [part for part in name.split(".") if part != "base_layer" and not part.isdigit()]
    parameter = getattr(layer, "parameter_name", None)
    return f"{parts[-1]}.{parameter}" if parameter else parts[-1]


class FirstUpdate:
    """The values of an adapter before the first update, to see afterwards which layers it moved."""

    def __init__(self, model: nn.Module) -> None:
        self._before: Mapping[str, dict[str, Tensor]] = {
            layer: {name: own_part(p).detach().clone() for name, p in tensors.items()}
            for layer, tensors in _tensors_by_layer(model).items()
        }

    @torch.no_grad()
    def unmoved(self, model: nn.Module) -> list[str]:
        """The layers of which no tensor of this process has changed."""
        return [
            layer
            for layer, tensors in _tensors_by_layer(model).items()
            if all(torch.equal(own_part(p), self._before[layer][name]) for name, p in tensors.items())
        ]


def _tensors_by_layer(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The trained tensors of each adapted layer. A of a new adapter has no gradient while B is 0, so both count.

    Not the rows of new tokens: one that no context holds gets no gradient.
    """
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad and ".token_adapter." not in name:
            layer = name.removeprefix("base_model.model.")
            for mark in (".lora_", ".modules_to_save."):
                layer = layer.partition(mark)[0]
            found.setdefault(layer.replace(".base_layer", ""), {})[name] = p
    return found


def without_gradient(layers: Sequence[str]) -> str:
    """What to say of adapters that the first step has not moved; "" of none."""
    if not layers:
        return ""
    experts = [layer for layer in layers if ".experts." in layer]
    others = [layer for layer in layers if layer not in experts]
    said = []
    if others:
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        said.append(
            f"no gradient reached the adapter on {', '.join(others[:_NAMED])}{more}: it stays as it is (docs/models.md "
            "lists the layers of which that is known; leave them out with adapter.target_modules)"
        )
    if experts:
        said.append(f"no token of the first step went to {len(experts)} of the adapted experts' layers")
    return "; ".join(said)
