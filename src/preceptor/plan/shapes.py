"""The shape of a model, read from its config.json alone: what its parameters, memory and work follow from.

`FAMILIES` lists what each model type fixes in its code and does not write into config.json, taken from transformers'
modelling files; tests count every family's parameters against transformers' own models. A model type that is not listed
has no shape here, and whoever asks for one is told so by name: a guess would be a wrong number.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from preceptor.errors import ModelError

NormKind = Literal["llama", "gemma", "gpt_oss"]


@dataclass(frozen=True, slots=True)
class Family:
    """What a model type fixes. Keys of config.json win over the defaults here (`head_dim`, `tied`).

    qkv_bias, o_bias: None where config.json's `attention_bias` decides. fused: one matrix for q, k and v, one for gate
    and up. norms: before attention and MLP, after, or both. qk_norm: of each head's queries and keys, or of all heads'
    together. windows: which layers attend to a sliding window.
    adapts_experts: an adapter on all linear layers also goes on experts and router (peft's rewriting of these types).
    defaults: what a config.json that leaves a size out means by it.
    """

    head_dim: int | None = None
    tied: bool = False
    qkv_bias: bool | None = False
    o_bias: bool | None = False
    norm: NormKind = "llama"
    norms: Literal["before", "after", "both"] = "before"
    qk_norm: Literal["each head", "joint"] | None = None
    fused: bool = False
    sinks: bool = False
    scaled_embedding: bool = False
    expert_bias: bool = False
    expert_width_key: str | None = None
    adapts_experts: bool = False
    windows: Literal["all", "late", "alternate", "all_but_fourth", "all_but_sixth", "fourth"] = "all"
    defaults: Mapping[str, int] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    "llama": Family(qkv_bias=None, o_bias=None),
    "mistral": Family(),
    "ministral3": Family(),
    "smollm3": Family(qkv_bias=None, o_bias=None, windows="fourth"),
    "granite": Family(qkv_bias=None, o_bias=None),
    "olmo2": Family(qkv_bias=None, o_bias=None, norms="after", qk_norm="joint"),
    "olmo3": Family(qkv_bias=None, o_bias=None, norms="after", qk_norm="joint", windows="all_but_fourth"),
    "mixtral": Family(expert_width_key="intermediate_size", adapts_experts=True),
    "phi3": Family(fused=True),
    "qwen2": Family(qkv_bias=True, windows="late"),
    "qwen3": Family(head_dim=128, qkv_bias=None, o_bias=None, qk_norm="each head", windows="late"),
    "qwen3_moe": Family(
        qkv_bias=None, o_bias=None, qk_norm="each head", expert_width_key="moe_intermediate_size", adapts_experts=True
    ),
    "gemma": Family(256, True, None, None, norm="gemma", scaled_embedding=True),
    "gemma2": Family(256, True, None, None, norm="gemma", norms="both", scaled_embedding=True, windows="alternate"),
    "gemma3_text": Family(
        256,
        True,
        None,
        None,
        norm="gemma",
        norms="both",
        qk_norm="each head",
        scaled_embedding=True,
        windows="all_but_sixth",
        defaults={"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    "gpt_oss": Family(
        head_dim=64,
        qkv_bias=None,
        o_bias=None,
        norm="gpt_oss",
        sinks=True,
        expert_bias=True,
        expert_width_key="intermediate_size",
        windows="alternate",
    ),
}


# Text models of those that also see, by the family that they are built as.
_BUILT_AS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a layer: how many there are, how many a token goes through, and the width of each."""

    count: int
    per_token: int
    width: int
    bias: bool


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer, by the last part of its name, as `adapter.target_modules` has it."""

    name: str
    inputs: int
    outputs: int
    bias: bool

    @property
    def num_parameters(self) -> int:
        return self.inputs * self.outputs + self.outputs * self.bias


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer. window: tokens that its attention looks back, None for all; width: of its MLP."""

    window: int | None
    experts: Experts | None
    width: int


@dataclass(frozen=True, slots=True)
class Shape:
    """A causal language model: `rows` of embedding, hidden size, heads and layers.

    towers: parameters beside the text model, which see or hear and are not trained (model/towers.py).
    """

    model_type: str
    family: Family
    rows: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    softcap: float | None
    layers: tuple[Layer, ...]
    towers: int = 0

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def attention_linears(self) -> tuple[Linear, ...]:
        """In the order in which a layer applies them."""
        d, q, k, bias = self.hidden, self.query_width, self.key_width, self.qkv_bias
        out = Linear("o_proj", q, d, self.o_bias)
        if self.family.fused:
            return (Linear("qkv_proj", d, q + 2 * k, bias), out)
        return (Linear("q_proj", d, q, bias), Linear("k_proj", d, k, bias), Linear("v_proj", d, k, bias), out)

    def mlp_linears(self, layer: Layer) -> tuple[Linear, ...]:
        """In the order in which a layer applies them; none where it has experts, whose weights are no linear layers."""
        if layer.experts is not None:
            return ()
        d, bias = self.hidden, self.mlp_bias
        down = Linear("down_proj", layer.width, d, bias)
        if self.family.fused:
            return (Linear("gate_up_proj", d, 2 * layer.width, bias), down)
        return (Linear("gate_proj", d, layer.width, bias), Linear("up_proj", d, layer.width, bias), down)

    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer of the decoder, that is all but the output head."""
        return tuple(
            linear for layer in self.layers for linear in (*self.attention_linears(), *self.mlp_linears(layer))
        )


def text_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that is about text: all of it, or of a model that also sees or hears its text_config,
    with `model_type` the family that it is built as.
    """
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    model_type = str(text.get("model_type"))
    found = {**text, "model_type": _BUILT_AS.get(model_type, model_type)}
    return found if tied is None else {**found, "tie_word_embeddings": tied}


def shape_of(config: Mapping[str, Any], where: str = "config.json") -> Shape:
    """The shape that a config.json describes; of a model that also sees or hears, that of its text model.

    Raises ModelError naming a model type that is not known here, or a key that is missing.
    """
    config = text_settings(config)
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"{where}: model_type {model_type!r} is not known to the plan, which knows {known}")
    config = {**family.defaults, **config}
    read = _Reader(config, where)
    heads, hidden = read.number("num_attention_heads"), read.number("hidden_size")
    attention_bias = bool(config.get("attention_bias", model_type == "gpt_oss"))
    return Shape(
        model_type=model_type,
        family=family,
        rows=read.number("vocab_size"),
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or family.head_dim or hidden // heads,
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.o_bias is None else family.o_bias,
        mlp_bias=model_type in ("llama", "granite", "smollm3") and bool(config.get("mlp_bias", False)),
        softcap=config.get("attn_logit_softcapping", 50.0) if model_type == "gemma2" else None,
        layers=tuple(_layer(read, family, index) for index in range(read.number("num_hidden_layers"))),
    )


@dataclass(frozen=True, slots=True)
class _Reader:
    config: Mapping[str, Any]
    where: str

    def number(self, *names: str) -> int:
        """The first of the keys that is there. Raises ModelError if none is."""
        for name in names:
            if isinstance(self.config.get(name), int):
                return int(self.config[name])
        raise ModelError(f"{self.where}: has no {' or '.join(names)}, from which the model's size follows")


def _layer(read: _Reader, family: Family, index: int) -> Layer:
    width = read.number("intermediate_size")
    experts = None
    sparse_step = int(read.config.get("decoder_sparse_step") or 1)
    dense = index in (read.config.get("mlp_only_layers") or ()) or (index + 1) % sparse_step != 0
    if family.expert_width_key is not None and not dense:
        count, per_token = read.number("num_experts", "num_local_experts"), read.number("num_experts_per_tok")
        experts = Experts(count, per_token, read.number(family.expert_width_key), family.expert_bias)
    return Layer(_window(read.config, family, index), experts, width)


def _window(config: Mapping[str, Any], family: Family, index: int) -> int | None:
    """The sliding window of a layer; where config.json does not list the layers' types, by the family's own rule."""
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return None
    types = config.get("layer_types")
    if family.windows == "all":
        slides = True
    elif types:
        slides = types[index] == "sliding_attention"
    elif family.windows == "late":
        slides = bool(config.get("use_sliding_window")) and index >= int(config.get("max_window_layers") or 28)
    elif family.windows == "fourth":
        slides = bool(config.get("use_sliding_window")) and (index + 1) % 4 == 0
    else:
        fixed = {"alternate": 2, "all_but_fourth": 4}
        every = fixed.get(family.windows) or int(config.get("sliding_window_pattern") or 6)
        slides = (index + 1) % every != 0
    return int(window) if slides else None
