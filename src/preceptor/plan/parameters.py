"""Parameters by kind, and which of them a run trains."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preceptor.errors import ModelError
from preceptor.plan.shapes import Layer, Shape

ROWS_MULTIPLE = 64  # as model/embeddings.py resizes; a test holds the two together


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA of a `rank` on the linear layers named in `targets` (None: all but the output head)."""

    rank: int
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many there are. `base`: of the model, by kind; `trained`: by kind, what an optimizer steps.

    active: of the base, what one token goes through (all but the experts that it is not sent to).
    casts: of the base, the elements of the matrices that autocast copies into half precision.
    largest_layer, largest_trained_layer: of one decoder layer; outside, outside_trained: of none (embedding, head,
    last norm, token rows).
    """

    base: Mapping[str, int]
    trained: Mapping[str, int]
    active: int
    casts: int
    largest_layer: int
    largest_trained_layer: int
    outside: int
    outside_trained: int

    @property
    def num_base(self) -> int:
        return sum(self.base.values())

    @property
    def num_trained(self) -> int:
        return sum(self.trained.values())

    @property
    def num_added(self) -> int:
        """Parameters that are not in the base: those of the adapter."""
        return sum(count for kind, count in self.trained.items() if kind not in self.base)

    def to_json(self) -> dict[str, Any]:
        return {
            "total": self.num_base + self.num_added,
            "active": self.active,
            "trained_total": self.num_trained,
            "base": dict(self.base),
            "trained": dict(self.trained),
        }


def count_parameters(shape: Shape, adapter: Adapter | None = None, num_new_tokens: int = 0) -> Parameters:
    """Parameters of a model, full fine-tuning or with an adapter.

    num_new_tokens: tokens added to the vocabulary, whose rows an adapter run trains as well. Their rows are part of
    `shape.rows` already (see `with_rows`). Raises ModelError for an adapter target that the model has not.
    """
    layers = [_layer_kinds(shape, layer) for layer in shape.layers]
    base: Counter[str] = Counter({"embedding": shape.rows * shape.hidden})
    if not shape.tied:
        base["head"] = shape.rows * shape.hidden
    for kinds in layers:
        base += kinds
    base["norms"] += shape.hidden
    per_layer = [sum(kinds.values()) for kinds in layers]
    idle = sum(
        (layer.experts.count - layer.experts.per_token) * expert_parameters(shape, layer)
        for layer in shape.layers
        if layer.experts is not None
    )
    trained: Mapping[str, int] = dict(base)
    trained_layers = per_layer
    base["towers"] = shape.towers
    if adapter is not None:
        trained_layers = [_adapter_parameters(shape, layer, adapter) for layer in shape.layers]
        trained = Counter({"adapter": sum(trained_layers)})
        trained["token rows"] = num_new_tokens * shape.hidden * (1 if shape.tied else 2)
    total, num_trained = sum(base.values()), sum(trained.values())
    return Parameters(
        base={kind: count for kind, count in base.items() if count},
        trained={kind: count for kind, count in trained.items() if count},
        active=total - idle - shape.towers,
        casts=sum(linear.inputs * linear.outputs for linear in shape.linears()),
        largest_layer=max(per_layer),
        largest_trained_layer=max(trained_layers),
        outside=total - sum(per_layer),
        outside_trained=num_trained - sum(trained_layers),
    )


def expert_parameters(shape: Shape, layer: Layer) -> int:
    """Of one expert: gate, up and down."""
    assert layer.experts is not None
    width = layer.experts.width
    return 3 * shape.hidden * width + (2 * width + shape.hidden) * layer.experts.bias


def _layer_kinds(shape: Shape, layer: Layer) -> "Counter[str]":
    kinds = Counter(attention=sum(linear.num_parameters for linear in shape.attention_linears()))
    kinds["attention"] += shape.num_heads * shape.family.sinks
    of_keys = {"each head": 2 * shape.head_dim, "joint": shape.query_width + shape.key_width, None: 0}
    kinds["norms"] = (4 if shape.family.norms == "both" else 2) * shape.hidden + of_keys[shape.family.qk_norm]
    if layer.experts is None:
        kinds["mlp"] = sum(linear.num_parameters for linear in shape.mlp_linears(layer))
    else:
        kinds["experts"] = layer.experts.count * expert_parameters(shape, layer)
        kinds["router"] = layer.experts.count * (shape.hidden + layer.experts.bias)
    return kinds


def _adapter_parameters(shape: Shape, layer: Layer, adapter: Adapter) -> int:
    """rank * (inputs + outputs) for each adapted matrix (Hu et al. 2021); of experts' gate and up, with 2 * rank."""
    rank, hidden, experts = adapter.rank, shape.hidden, layer.experts
    count = sum(
        rank * (linear.inputs + linear.outputs)
        for linear in (*shape.attention_linears(), *shape.mlp_linears(layer))
        if adapter.targets is None or linear.name in adapter.targets
    )
    if experts is not None and adapter.targets is None and shape.family.adapts_experts:
        of_one = 2 * rank * (hidden + 2 * experts.width) + rank * (experts.width + hidden)
        count += experts.count * of_one + rank * (hidden + experts.count)
    return count


def check_targets(shape: Shape, targets: Sequence[str] | None) -> None:
    """Raises ModelError for the name of a linear layer that the model has not."""
    names = {linear.name for linear in shape.linears()}
    unknown = sorted(set(targets or ()) - names)
    if unknown:
        raise ModelError(
            f"adapter.target_modules: {shape.model_type} has no linear layer named {', '.join(unknown)}; "
            f"it has {', '.join(sorted(names))}"
        )


def rows_for(shape_rows: int, num_tokens: int) -> int:
    """Rows of the embedding for a tokenizer of `num_tokens`: they grow to a multiple and never shrink."""
    return shape_rows if num_tokens <= shape_rows else -(-num_tokens // ROWS_MULTIPLE) * ROWS_MULTIPLE
