"""Which tensors autograd keeps for backward: the operations of a decoder layer, run on sizes instead of values.

Each function here stands for one operation of a modelling file and adds to the tape what its backward formula needs, as
autograd does: a product keeps each factor that the other's gradient needs, a linear layer its input for the weight's
gradient and its weight for the input's, and a tensor that is kept twice in one storage counts once. So prediction and
measurement (the storages that `torch.autograd.graph.saved_tensors_hooks` sees) agree by construction, for full
fine-tuning and adapters, float32, bfloat16 and autocast alike.

Legend: T tokens, D hidden size, H query heads.
"""

from dataclasses import dataclass, field

from preceptor.plan.shapes import Linear, NormKind

FLOAT32, HALF = 4, 2  # bytes of an element


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A tensor without values, each one a storage of its own. grad: whether gradients flow to it.

    part_of: elements of the storage that it is a view of, which is kept whole.
    """

    elements: int
    itemsize: int
    grad: bool
    part_of: int | None = None

    @property
    def num_bytes(self) -> int:
        return (self.part_of or self.elements) * self.itemsize


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes of an element of the weights, and whether autocast computes matrix products in half precision."""

    weight_bytes: int = FLOAT32
    autocast: bool = False

    @property
    def product_bytes(self) -> int:
        return HALF if self.autocast else self.weight_bytes


@dataclass(slots=True)
class Tape:
    """What has been kept. `casts_bytes`: half-precision copies of weights that autocast made, kept beside the rest.
    scratch_bytes: the most that the backward of one operation writes down for itself, of those that say.

    full: whether the weights are trained; rank, targets, dropout: of the adapter, where they are not.
    """

    precision: Precision
    full: bool = True
    rank: int = 0
    targets: frozenset[str] | None = None
    dropout: bool = False
    token_rows: bool = False
    casts_bytes: int = 0
    scratch_bytes: int = 0
    _kept: dict[Value, int] = field(default_factory=dict)
    _shared: dict[object, int] = field(default_factory=dict)
    _held: dict[object, int] = field(default_factory=dict)
    _copies: dict[tuple[Value, int], Value] = field(default_factory=dict)

    @property
    def kept_bytes(self) -> int:
        return sum(self._kept.values()) + sum(self._shared.values())

    def keep(self, *values: Value) -> None:
        for value in values:
            self._kept[value] = value.num_bytes

    def copy_of(self, value: Value, itemsize: int) -> Value:
        """Its copy of that type, one for all who ask; itself where the type is right already."""
        return self._copies.setdefault((value, itemsize), cast(value, itemsize))

    def keep_shared(self, name: object, num_bytes: int) -> None:
        """What several layers keep together, such as a mask, counts once, at its largest, under its name."""
        self._shared[name] = max(num_bytes, self._shared.get(name, 0))

    def hold_shared(self, name: object, num_bytes: int) -> None:
        """What layers share and only those that run again hold on to; see `keep_held`."""
        self._held[name] = max(num_bytes, self._held.get(name, 0))

    def keep_held(self) -> None:
        """A layer runs again: it keeps the row's layout, and so what that holds."""
        for name, num_bytes in self._held.items():
            self.keep_shared(name, num_bytes)
        self._held = {}

    def take_shared(self, other: "Tape") -> None:
        """Move what is shared by layers, scratch memory too, from another tape to this one."""
        self._shared |= other._shared
        self._held |= other._held
        other._shared, other._held = {}, {}
        self.scratch_bytes = max(self.scratch_bytes, other.scratch_bytes)


def cast(value: Value, itemsize: int) -> Value:
    """The same tensor where the type is right already."""
    return value if value.itemsize == itemsize else Value(value.elements, itemsize, value.grad)


def multiply(tape: Tape, a: Value, b: Value, elements: int | None = None) -> Value:
    """a * b; `elements` of the result where one of them is broadcast."""
    if a.grad:
        tape.keep(b)
    if b.grad:
        tape.keep(a)
    return Value(elements or max(a.elements, b.elements), max(a.itemsize, b.itemsize), a.grad or b.grad)


def add(a: Value, b: Value) -> Value:
    """a + b keeps nothing."""
    return Value(max(a.elements, b.elements), max(a.itemsize, b.itemsize), a.grad or b.grad)


def pointwise(tape: Tape, value: Value, keeps_input: bool = True) -> Value:
    """A function of each element whose derivative needs its input (silu, gelu), or else its result (tanh, softmax)."""
    result = Value(value.elements, value.itemsize, value.grad)
    if value.grad:
        tape.keep(value if keeps_input else result)
    return result


def norm(tape: Tape, kind: NormKind, x: Value, tokens: int) -> Value:
    """norms.py: keeps its input and the root of each token; Llama's result has the wider type of x and weight."""
    grad = x.grad or tape.full
    if grad:
        tape.keep(x, Value(tokens, FLOAT32, False))
    itemsize = max(x.itemsize, tape.precision.weight_bytes) if kind == "llama" else x.itemsize
    return Value(x.elements, itemsize, grad)


def gated(tape: Tape, gate: Value, up: Value) -> Value:
    """act(gate) * up, model/activations/glu.py: keeps both and nothing of its own."""
    grad = gate.grad or up.grad
    if grad:
        tape.keep(gate, up)
    return Value(gate.elements, max(gate.itemsize, up.itemsize), grad)


def linear(tape: Tape, x: Value, layer: Linear, tokens: int) -> Value:
    """x W^T + b, with LoRA beside it where the tape has an adapter for the layer's name.

    Under autocast, layers that read the same float32 input share one copy of it (model/activations/modules.py).
    """
    out = _product(tape, x, layer.inputs, layer.outputs, tokens, tape.full, tape.precision.weight_bytes)
    if tape.rank == 0 or (tape.targets is not None and layer.name not in tape.targets):
        return out
    # peft: result + scaling * B(A(dropout(x as A's type)))
    inner = cast(x, FLOAT32)
    if tape.dropout:
        inner = multiply(tape, inner, Value(inner.elements, FLOAT32, False))
    low = _product(tape, inner, layer.inputs, tape.rank, tokens, True, FLOAT32)
    update = _product(tape, low, tape.rank, layer.outputs, tokens, True, FLOAT32)
    return cast(add(out, update), out.itemsize)


def _product(tape: Tape, x: Value, inputs: int, outputs: int, tokens: int, trained: bool, weight_bytes: int) -> Value:
    itemsize = HALF if tape.precision.autocast else weight_bytes
    if trained:
        tape.keep(tape.copy_of(x, itemsize))
    if (x.grad or trained) and weight_bytes != itemsize:
        # the cast of a trained weight is kept by autocast's cache even where no gradient needs it
        tape.casts_bytes += inputs * outputs * itemsize
    return Value(tokens * outputs, itemsize, x.grad or trained)


def rotate(tape: Tape, x: Value, angles: tuple[Value, Value]) -> Value:
    """x * cos + rotate_half(x) * sin; cosine and sine are constants that all layers share."""
    cos, sin = angles
    return add(multiply(tape, x, cos, x.elements), multiply(tape, x, sin, x.elements))


def product(tape: Tape, x: Value, outputs: int, rows: int) -> Value:
    """A grouped product with experts' weights, which autocast leaves alone: keeps its input where they are trained."""
    if tape.full:
        tape.keep(x)
    return Value(rows * outputs, tape.precision.weight_bytes, x.grad or tape.full)
