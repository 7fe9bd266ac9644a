"""Counting the parameters of a model that is built, with or without values: by kind, by layer, and what is trained."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from preceptor.model.adapters.pissa import stacks_of_experts
from preceptor.model.parts import NUM_CHOSEN, NUM_EXPERTS, causal_lm, decoder_layers, tower_parameters
from preceptor.model.quantization import quantizable
from preceptor.plan.parameters import LayerParameters, Parameters, Tensor

_KINDS: Mapping[str, tuple[str, ...]] = {
    "norms": ("norm",),
    "experts": ("expert",),
    "router": (".gate.", "router"),
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "feed_forward", "ffn"),
}


def count_built(whole: Any, adapted: Any) -> Parameters:
    """Parameters of a model, and of what an adapted one of any depth trains (the same model: everything)."""
    layers = tuple(_layer_parameters(whole, layer) for layer in decoder_layers(whole))
    base: Counter[str] = Counter()
    trained: dict[str, int] = Counter()
    for kind, parameter in _kinds(whole):
        base[kind] += parameter.numel()
        trained[kind] += parameter.numel() * parameter.requires_grad
    if adapted is not whole:
        named = [(name, p.numel()) for name, p in adapted.named_parameters() if p.requires_grad]
        trained = {"adapter": sum(count for name, count in named if "lora_" in name)}
        trained["whole modules"] = sum(count for name, count in named if ".modules_to_save." in name)
        trained["token rows"] = sum(count for _, count in named) - sum(trained.values())
    return Parameters(
        base=dict(base),
        trained={kind: count for kind, count in trained.items() if count},
        active=sum(base.values()) - base.get("towers", 0) - sum(layer.total - layer.active for layer in layers),
        layers=layers,
        head=int(causal_lm(whole).get_output_embeddings().weight.numel()),
        tensors=_tensors(adapted),
        linears=Counter((layer.out_features, layer.in_features) for layer in quantizable(whole).values()),
    )


def _tensors(model: Any) -> dict[Tensor, int]:
    """How many of each shape are trained."""
    in_layers = {id(p) for layer in decoder_layers(model) for p in layer.parameters()} - stacks_of_experts(model)
    found: Counter[Tensor] = Counter()
    for name, p in model.named_parameters():
        if p.requires_grad:
            found[id(p) in in_layers, (p.numel(),) if name.endswith("bias") else tuple(p.shape)] += 1
    return dict(found)


def _kinds(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter once, with its kind."""
    bare = causal_lm(model)
    of_towers = {id(parameter) for parameter in tower_parameters(bare)}
    embedding, head = bare.get_input_embeddings().weight, bare.get_output_embeddings().weight
    for name, parameter in bare.named_parameters():
        if id(parameter) in of_towers:
            yield "towers", parameter
        elif parameter is embedding:
            yield "embedding", parameter
        elif parameter is head:
            yield "head", parameter
        else:
            kind = next((kind for kind, marks in _KINDS.items() if any(mark in name for mark in marks)), "other")
            yield kind, parameter


def _layer_parameters(model: Any, layer: nn.Module) -> LayerParameters:
    settings = causal_lm(model).config.get_text_config(decoder=True)
    count, per_token = _first(settings, NUM_EXPERTS), _first(settings, NUM_CHOSEN)
    share = per_token / count if count and per_token else 1.0  # of the experts' parameters, what a token goes through
    total, trained, active, matrices, trained_matrices = 0, 0, 0.0, 0.0, 0.0
    for name, parameter in layer.named_parameters():
        used = parameter.numel() * (share if ".experts." in f".{name}" else 1)
        total += parameter.numel()
        active += used
        matrices += used if parameter.dim() >= 2 else 0
        trained += parameter.numel() * parameter.requires_grad
        trained_matrices += used if parameter.dim() >= 2 and parameter.requires_grad else 0
    heads = int(getattr(settings, "num_attention_heads", 0) or 0)
    head_dim = int(getattr(settings, "head_dim", None) or (settings.hidden_size // heads if heads else 0))
    attends = any("attn" in name or "attention" in name for name, _ in layer.named_modules())
    return LayerParameters(
        total=total,
        active=round(active),
        matrices=round(matrices),
        query_width=heads * head_dim * attends,
        window=_window(settings, layer),
        trained=trained,
        trained_matrices=round(trained_matrices),
    )


def _window(settings: Any, layer: nn.Module) -> int | None:
    """What the layer's attention says; where it says nothing, what the config says of all layers."""
    own = [module.sliding_window for module in layer.modules() if hasattr(module, "sliding_window")]
    found = next((window for window in own if window), None) if own else getattr(settings, "sliding_window", None)
    return int(found) if isinstance(found, int) else None


def _first(settings: Any, names: Sequence[str]) -> int:
    """The first of the settings that a model has; 0 for none."""
    return next((value for name in names if isinstance(value := getattr(settings, name, None), int) and value), 0)
