"""Sizes of a model, read from its config.json alone: what the number of its parameters follows from.

For `plan --quick`, which answers without torch; a dry run (dry_run.py) needs none of this. `FAMILIES` lists what each
model type fixes in its code and does not write into config.json, taken from transformers' modelling files; tests count
the parameters of every family against transformers' own models. A model type that is not listed has no shape here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from preceptor.errors import ModelError


@dataclass(frozen=True, slots=True)
class Family:
    """What a model type fixes. Keys of config.json win over the defaults here (`head_dim`, `tied`).

    qkv_bias, o_bias: None where config.json's `attention_bias` decides. fused: one matrix for q, k and v, one for gate
    and up. norms: before attention and MLP, after, or both. qk_norm: of each head's queries and keys, or of all heads'
    together.
    doubles_rank: an adapter on the experts' gate and up, which are one tensor, has twice the rank (peft's rewriting of
    these types).
    defaults: what a config.json that leaves a size out means by it.
    """

    head_dim: int | None = None
    tied: bool = False
    qkv_bias: bool | None = False
    o_bias: bool | None = False
    norms: Literal["before", "after", "both"] = "before"
    qk_norm: Literal["each head", "joint"] | None = None
    fused: bool = False
    sinks: bool = False
    expert_bias: bool = False
    expert_width_key: str | None = None
    doubles_rank: bool = False
    defaults: Mapping[str, int] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    "llama": Family(qkv_bias=None, o_bias=None),
    "mistral": Family(),
    "ministral3": Family(),
    "smollm3": Family(qkv_bias=None, o_bias=None),
    "granite": Family(qkv_bias=None, o_bias=None),
    "olmo2": Family(qkv_bias=None, o_bias=None, norms="after", qk_norm="joint"),
    "olmo3": Family(qkv_bias=None, o_bias=None, norms="after", qk_norm="joint"),
    "mixtral": Family(expert_width_key="intermediate_size", doubles_rank=True),
    "phi3": Family(fused=True),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(head_dim=128, qkv_bias=None, o_bias=None, qk_norm="each head"),
    "qwen3_moe": Family(
        qkv_bias=None, o_bias=None, qk_norm="each head", expert_width_key="moe_intermediate_size", doubles_rank=True
    ),
    "gemma": Family(256, True, None, None),
    "gemma2": Family(256, True, None, None, norms="both"),
    "gemma3_text": Family(
        256,
        True,
        None,
        None,
        norms="both",
        qk_norm="each head",
        defaults={"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    "gpt_oss": Family(
        head_dim=64, qkv_bias=None, o_bias=None, sinks=True, expert_bias=True, expert_width_key="intermediate_size"
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
class LinearShape:
    """A linear layer, by the last part of its name, as `adapter.target_modules` has it. kind: attention or mlp."""

    kind: str
    name: str
    inputs: int
    outputs: int
    bias: bool


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A causal language model: `rows` of embedding, hidden size, heads; of each layer its experts, or None where it has
    an MLP of `width`.

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
    width: int
    experts: tuple[Experts | None, ...]
    towers: int = 0

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def linears_of(self, experts: Experts | None) -> list[LinearShape]:
        """Of a decoder layer, in the order in which it applies them. The weights of experts are no linear layers."""
        d, q, k, fused = self.hidden, self.query_width, self.key_width, self.family.fused
        outputs = {"qkv_proj": q + 2 * k} if fused else {"q_proj": q, "k_proj": k, "v_proj": k}
        found = [LinearShape("attention", name, d, width, self.qkv_bias) for name, width in outputs.items()]
        found.append(LinearShape("attention", "o_proj", q, d, self.o_bias))
        if experts is None:
            width = self.width
            outputs = {"gate_up_proj": 2 * width} if fused else {"gate_proj": width, "up_proj": width}
            found += [LinearShape("mlp", name, d, width, self.mlp_bias) for name, width in outputs.items()]
            found.append(LinearShape("mlp", "down_proj", self.width, d, self.mlp_bias))
        return found

    def linears(self) -> list[LinearShape]:
        """Every linear layer of the decoder, that is all but the output head."""
        return [linear for experts in self.experts for linear in self.linears_of(experts)]


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


def shape_of(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
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

    def number(*names: str) -> int:
        """The first of the keys that is there."""
        for name in names:
            if isinstance(config.get(name), int):
                return int(config[name])
        raise ModelError(f"{where}: has no {' or '.join(names)}, from which the model's size follows")

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    attention_bias = bool(config.get("attention_bias", model_type == "gpt_oss"))
    experts: list[Experts | None] = [None] * number("num_hidden_layers")
    if family.expert_width_key is not None:
        sparse_step, dense = int(config.get("decoder_sparse_step") or 1), config.get("mlp_only_layers") or ()
        count, per_token = number("num_experts", "num_local_experts"), number("num_experts_per_tok")
        of_layer = Experts(count, per_token, number(family.expert_width_key), family.expert_bias)
        experts = [
            None if index in dense or (index + 1) % sparse_step != 0 else of_layer for index in range(len(experts))
        ]
    return ModelShape(
        model_type=model_type,
        family=family,
        rows=number("vocab_size"),
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or family.head_dim or hidden // heads,
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.o_bias is None else family.o_bias,
        mlp_bias=model_type in ("llama", "granite", "smollm3") and bool(config.get("mlp_bias", False)),
        width=number("intermediate_size"),
        experts=tuple(experts),
    )
