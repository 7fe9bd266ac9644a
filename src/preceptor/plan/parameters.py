"""Parameters by kind, and which of them a run trains; for known model types by arithmetic from config.json."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from preceptor.errors import ModelError
from preceptor.model.options import PLAIN, LoraOptions
from preceptor.plan.shapes import Experts, ModelShape

Tensor = tuple[bool, tuple[int, ...]]
"""Whether it is a matrix or vector of a layer, and no stack of several experts' under LoRA; and its shape: of a bias
the number of elements, whatever its shape."""
_KINDS = ("embedding", "head", "attention", "norms", "mlp", "experts", "router")


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """LoRA of a `rank` on the linear layers named in `targets` (None: all but the output head)."""

    rank: int
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0
    options: LoraOptions = PLAIN

    @property
    def adapts_experts(self) -> bool:
        """Experts that are one tensor take neither DoRA nor dropout."""
        return self.targets is None and not self.options.dora and not self.dropout


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Of one decoder layer: all parameters, those that one token goes through, and of these the elements of matrices.

    query_width: of all heads together, 0 without attention. window: tokens that its attention looks back, None for all.
    trained: all parameters that are trained where no adapter is; trained_matrices: of `matrices`, those.
    """

    total: int
    active: int
    matrices: int
    query_width: int
    window: int | None
    trained: int
    trained_matrices: int


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many there are. `base`: of the model, by kind; `trained`: by kind, what an optimizer steps.

    tensors: how many of each shape are trained; empty where only their total is known. linears: how many linear layers
    of each shape the decoder has, which may be quantized.
    active: of the base, what one token goes through (all but the experts that it is not sent to). head: elements of the
    output head, tied or not. What a dry run alone finds out (layers, head) is empty in arithmetic from config.json.
    """

    base: Mapping[str, int]
    trained: Mapping[str, int]
    active: int
    layers: tuple[LayerParameters, ...] = ()
    head: int = 0
    tensors: Mapping[Tensor, int] = field(default_factory=dict)
    linears: Mapping[tuple[int, ...], int] = field(default_factory=dict)

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

    @property
    def first_trained(self) -> int:
        """The first layer that a backward pass reaches; their number where it reaches none."""
        if self.num_added or self.trained.get("embedding"):
            return 0
        return next((index for index, layer in enumerate(self.layers) if layer.trained), len(self.layers))

    @property
    def trains_head(self) -> bool:
        """A tied one is the embedding."""
        return bool(self.trained.get("head" if "head" in self.base else "embedding"))

    @property
    def outside(self) -> int:
        """Of no decoder layer: embedding, head, last norm, towers."""
        return self.num_base - sum(layer.total for layer in self.layers)

    def continued(self, other: "Parameters", times: float) -> "Parameters":
        """These and `times` what `other`, with more layers, trains more."""
        counts = ((kind, count, other.trained[kind]) for kind, count in self.trained.items())
        trained = {kind: round(one + times * (two - one)) for kind, one, two in counts}
        tensors = {own: round(n + times * (other.tensors.get(own, 0) - n)) for own, n in self.tensors.items()}
        return replace(self, trained=trained, tensors=tensors)

    def to_json(self) -> dict[str, Any]:
        return {
            "total": self.num_base + self.num_added,
            "active": self.active,
            "trained_total": self.num_trained,
            "base": dict(self.base),
            "trained": dict(self.trained),
        }


def count_parameters(shape: ModelShape, adapter: LoraSpec | None = None, num_new_tokens: int = 0) -> Parameters:
    """Parameters of a model, full fine-tuning or with an adapter, by arithmetic.

    num_new_tokens: tokens added to the vocabulary, whose rows an adapter run trains as well. Their rows are part of
    `shape.rows` already (see `with_rows`). adapter: one that is alike in all layers. Raises ModelError for an adapter
    target that the model has not.
    """
    base: Counter[str] = Counter(dict.fromkeys(_KINDS, 0))  # in this order
    tensors: Mapping[Tensor, int] = Counter(tensor for _, tensor in _weights(shape))
    for kind, (_, size) in _weights(shape):
        base[kind] += math.prod(size)
    idle = sum(
        math.prod(size) // experts.count * (experts.count - experts.per_token)
        for experts in filter(None, shape.experts)
        for kind, size in _layer_weights(shape, experts)
        if kind == "experts"
    )
    trained: Mapping[str, int] = dict(base)
    base["towers"] = shape.towers
    if adapter is not None:
        _check_targets(shape, adapter.targets)
        tensors = _adapter_tensors(shape, adapter, num_new_tokens)
        rows = num_new_tokens * shape.hidden * (1 if shape.tied else 2)
        total = sum(math.prod(size) * num for (_, size), num in tensors.items())
        trained = {"adapter": total - rows, "token rows": rows}
    return Parameters(
        base={kind: count for kind, count in base.items() if count},
        trained={kind: count for kind, count in trained.items() if count},
        active=sum(base.values()) - idle - shape.towers,
        tensors=tensors,
        linears=Counter((linear.outputs, linear.inputs) for linear in shape.linears()),
    )


def _weights(shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Each weight of the text model, with its kind."""
    matrix = shape.rows, shape.hidden
    yield "embedding", (False, matrix)
    if not shape.tied:
        yield "head", (False, matrix)
    yield "norms", (False, (shape.hidden,))
    for experts in shape.experts:
        for kind, size in _layer_weights(shape, experts):
            yield kind, (True, size)


def _layer_weights(shape: ModelShape, experts: Experts | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, head = shape.hidden, shape.head_dim
    of_keys = {"each head": (head, head), "joint": (shape.query_width, shape.key_width), None: ()}
    for size in (*[hidden] * (4 if shape.family.norms == "both" else 2), *of_keys[shape.family.qk_norm]):
        yield "norms", (size,)
    if shape.family.sinks:
        yield "attention", (shape.num_heads,)
    for linear in shape.linears_of(experts):
        yield linear.kind, (linear.outputs, linear.inputs)
        if linear.bias:
            yield linear.kind, (linear.outputs,)
    if experts is not None:
        count, width = experts.count, experts.width
        yield "router", (count, hidden)
        for inputs, outputs in ((hidden, 2 * width), (width, hidden)):
            yield "experts", (count, inputs, outputs) if experts.bias else (count, outputs, inputs)
        if experts.bias:
            yield "router", (count,)
            yield "experts", (2 * width * count,)
            yield "experts", (hidden * count,)


def _adapter_tensors(shape: ModelShape, adapter: LoraSpec, num_new_tokens: int) -> Mapping[Tensor, int]:
    """A and B of each adapted matrix (Hu et al. 2021), with DoRA its lengths; experts of a layer share one of each."""
    found: Counter[Tensor] = Counter()
    rank = adapter.rank * (2 if adapter.options.keeps_first_values else 1)
    hidden = shape.hidden
    for experts in shape.experts:
        linears = [
            linear for linear in shape.linears_of(experts) if adapter.targets is None or linear.name in adapter.targets
        ]
        sides = [(True, rank, linear.inputs, linear.outputs) for linear in linears]
        if adapter.options.dora:
            found.update([(True, (linear.outputs,)) for linear in linears])
        if experts is not None and adapter.adapts_experts:
            all_ranks, width, times = experts.count * rank, experts.width, 2 if shape.family.doubles_rank else 1
            sides += [(False, times * all_ranks, hidden, 2 * width), (False, all_ranks, width, hidden)]
        for is_matrix, of_rank, inputs, outputs in sides:
            found.update([(is_matrix, (of_rank, inputs)), (is_matrix, (outputs, of_rank))])
    if num_new_tokens:
        found[(False, (num_new_tokens, hidden))] += 1 if shape.tied else 2
    return found


def _check_targets(shape: ModelShape, targets: Sequence[str] | None) -> None:
    """Raises ModelError for the name of a linear layer that the model has not."""
    names = {linear.name for linear in shape.linears()}
    unknown = sorted(set(targets or ()) - names)
    if unknown:
        raise ModelError(
            f"adapter.target_modules: {shape.model_type} has no linear layer named {', '.join(unknown)}; "
            f"it has {', '.join(sorted(names))}"
        )
