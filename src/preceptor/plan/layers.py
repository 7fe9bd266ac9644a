"""Decoder layers as operations on sizes (saved.py), written as the families' modelling files are.

Legend: D hidden size, H query heads. A run's tokens are Q queries, the last of the P keys on their path.
"""

from dataclasses import dataclass, replace

from preceptor.model.sizes import BLOCK_TOKENS, backward_block, heads_at_once, mostly_short, on_grid
from preceptor.plan.saved import FLOAT32, HALF, Tape, Value, add, cast, gated, linear, multiply, norm, product, rotate
from preceptor.plan.shapes import Layer, Linear, Shape


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens that attend causally. joined: whether keys of earlier runs are joined to their own."""

    queries: int
    keys: int
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Pass:
    """Tokens that go through a layer together, on a CPU or not; `angles` are the rotary cosine and sine.

    num_tokens: those of the runs, in bfloat16 on a CPU rounded up to the grid. longest: the most keys that a run of the
    row has, all passes together: on a CPU one mask serves them all. spared: of the last layer by itself, with masks of
    its own.
    """

    runs: tuple[Run, ...]
    num_tokens: int
    angles: tuple[Value, Value]
    cpu: bool
    longest: int
    spared: bool = False

    def attention_bytes(self, product_bytes: int) -> int:
        """On a CPU short runs are computed in float32."""
        short = self.cpu and product_bytes == HALF and mostly_short((run.queries, run.keys) for run in self.runs)
        return FLOAT32 if short else product_bytes


def run_layer(tape: Tape, shape: Shape, layer: Layer, x: Value, tokens: Pass) -> Value:
    """One decoder layer: what comes out of it; the tape has what it keeps."""
    kind, place, num_tokens = shape.family.norm, shape.family.norms, tokens.num_tokens
    y = norm(tape, kind, x, num_tokens) if place != "after" else x
    y = attention(tape, shape, layer, y, tokens)
    if place != "before":
        y = norm(tape, kind, y, num_tokens)
    x = add(x, y)
    y = norm(tape, kind, x, num_tokens) if place != "after" else x
    y = mlp(tape, shape, layer, y, num_tokens)
    if place != "before":
        y = norm(tape, kind, y, num_tokens)
    return add(x, y)


def keys_only(tape: Tape, shape: Shape, layer: Layer, x: Value, tokens: Pass) -> Value:
    """A layer up to its keys and values, for tokens that others see and no loss reads."""
    family = shape.family
    normed = norm(tape, family.norm, x, tokens.num_tokens) if family.norms != "after" else x
    project(tape, shape, normed, tokens, queries=False)
    return x


def attention(tape: Tape, shape: Shape, layer: Layer, x: Value, tokens: Pass) -> Value:
    """Projections, norms of queries and keys, rotary positions, attention over the forest, output projection."""
    num_tokens = tokens.num_tokens
    query, key, value = project(tape, shape, x, tokens)
    out_linear = shape.attention_linears()[-1]
    dtype_bytes = tokens.attention_bytes(value.itemsize)
    attended = attend(tape, shape, layer, [cast(part, dtype_bytes) for part in (query, key, value)], tokens)
    return linear(tape, cast(attended, value.itemsize), out_linear, num_tokens)


def project(tape: Tape, shape: Shape, x: Value, tokens: Pass, queries: bool = True) -> tuple[Value, Value, Value]:
    """Queries, keys and values, with rotary positions. Without `queries` nothing is kept for those."""
    num_tokens = tokens.num_tokens
    of_queries = tape if queries else replace(tape, _kept={}, _shared={})
    tapes = [of_queries, tape, tape] if not shape.family.fused else [tape]
    layers = shape.attention_linears()[:-1]
    projected = [linear(each, x, layer, num_tokens) for each, layer in zip(tapes, layers, strict=True)]
    if shape.family.fused:  # views of one storage; rotation makes new ones of queries and keys
        (joint,) = projected
        widths = (shape.query_width, shape.key_width, shape.key_width)
        projected = [Value(num_tokens * width, joint.itemsize, joint.grad, joint.elements) for width in widths]
    query, key, value = projected
    if shape.family.qk_norm:
        kind = shape.family.norm
        heads, kv_heads = (1, 1) if shape.family.qk_norm == "joint" else (shape.num_heads, shape.num_kv_heads)
        query = norm(of_queries, kind, query, num_tokens * heads)
        key = norm(tape, kind, key, num_tokens * kv_heads)
    return rotate(of_queries, query, tokens.angles), rotate(tape, key, tokens.angles), value


def attend(tape: Tape, shape: Shape, layer: Layer, parts: list[Value], tokens: Pass) -> Value:
    """Attention run by run, as model/attention/runs.py computes it; the result is joined from the runs."""
    query, key, value = parts
    grad = query.grad or key.grad or value.grad
    result = Value(query.elements, query.itemsize, grad)
    if not grad:
        return result
    written_out = shape.softcap is not None or shape.family.sinks
    own_backward = tokens.cpu and query.itemsize == HALF and not written_out  # computes the weights again
    if not written_out:
        tape.keep(query)
        if not own_backward:
            queries = sum(run.queries for run in tokens.runs)
            log_sum_exp = Value(queries * shape.num_heads, FLOAT32, True)
            tape.keep(Value(queries * shape.query_width, query.itemsize, True), log_sum_exp)
        if not all(run.joined for run in tokens.runs):
            tape.keep(key, value)
    for run in tokens.runs:
        if run.joined and not written_out:
            tape.keep(*(Value(run.keys * shape.key_width, query.itemsize, True) for _ in range(2)))
        window = layer.window if layer.window is not None and layer.window < run.keys else None
        if own_backward:
            tape.scratch_bytes = max(tape.scratch_bytes, _scratch_bytes(shape, run, window))
        if not written_out and window is None and run.queries == run.keys:
            continue
        for first in range(0, run.queries, BLOCK_TOKENS):
            last = min(first + BLOCK_TOKENS, run.queries)
            offset = run.keys - run.queries
            num_keys = offset + last - (0 if window is None else max(0, offset + first - window + 1))
            if written_out:
                _write_out(tape, shape, query.itemsize, last - first, num_keys)
                continue
            share = tape.hold_shared if own_backward else tape.keep_shared
            share(*_mask_bytes(tokens, last - first, num_keys, window, query.itemsize))
            if not tokens.cpu and shape.num_heads != shape.num_kv_heads:  # no grouped heads under a mask on CUDA
                tape.keep(*(Value(num_keys * shape.query_width, query.itemsize, True) for _ in range(2)))
    return result


def _scratch_bytes(shape: Shape, run: Run, window: int | None) -> int:
    """Of the bfloat16 backward on a CPU: three times (heads, Q, P) of a block, for as many heads as the limit lets."""
    block = backward_block(run.queries)
    keys = run.keys if window is None else min(run.keys, window - 1 + block)
    of_head = shape.num_heads // shape.num_kv_heads * on_grid(block) * on_grid(keys)
    return 3 * HALF * of_head * heads_at_once(shape.num_kv_heads, of_head)


def _mask_bytes(tokens: Pass, num_queries: int, num_keys: int, window: int | None, itemsize: int) -> tuple[object, int]:
    """A name and a size. On a CPU all masks of one window are views of the largest (PathMasks of layout.py)."""
    rows, columns = (min(BLOCK_TOKENS, tokens.longest), tokens.longest) if tokens.cpu else (num_queries, num_keys)
    if window is not None:
        columns = min(columns, window + rows)
    return (tokens.spared, rows, columns, window, itemsize), rows * columns * itemsize


def _write_out(tape: Tape, shape: Shape, itemsize: int, num_queries: int, num_keys: int) -> None:
    """One block of attention with its scores: (H, Q, P) float32 for the soft-cap's tanh and for the softmax."""
    scores = shape.num_heads * num_queries * num_keys
    queries, keys = shape.query_width * num_queries, shape.query_width * num_keys
    tape.keep(Value(queries, itemsize, True), Value(keys, itemsize, True), Value(keys, itemsize, True))
    if shape.softcap is not None:
        tape.keep(Value(scores, FLOAT32, True))
    tape.keep(Value(num_queries * num_keys, 1, True))  # the mask, turned round
    sinks = shape.num_heads * num_queries * shape.family.sinks
    tape.keep(Value(scores + sinks, FLOAT32, True))
    if itemsize != FLOAT32:  # the weights in the values' type
        tape.keep(Value(scores, itemsize, True))


def mlp(tape: Tape, shape: Shape, layer: Layer, x: Value, num_tokens: int) -> Value:
    """down(act(gate(x)) * up(x)), or a mixture of such experts."""
    if layer.experts is not None:
        return experts(tape, shape, layer, x, num_tokens)
    *inner, down = shape.mlp_linears(layer)
    projected = [linear(tape, x, each, num_tokens) for each in inner]
    if shape.family.fused:
        return linear(tape, _gate_joint(tape, projected[0]), down, num_tokens)
    gate, up = projected
    return linear(tape, gated(tape, gate, up), down, num_tokens)


def _gate_joint(tape: Tape, joint: Value) -> Value:
    """act(gate) * up where both are views of one storage, which is kept once."""
    acted = Value(joint.elements // 2, joint.itemsize, joint.grad)
    if joint.grad:
        tape.keep(joint, acted)
    return Value(joint.elements // 2, joint.itemsize, joint.grad)


def experts(tape: Tape, shape: Shape, layer: Layer, x: Value, num_tokens: int) -> Value:
    """Router, then each token's experts as one grouped product over (token, expert) pairs, in the weights' own type."""
    assert layer.experts is not None
    own, count = layer.experts, layer.experts.count
    pairs = num_tokens * own.per_token
    weight_bytes = tape.precision.weight_bytes
    scores = linear(tape, x, Linear("router", shape.hidden, count, own.bias), num_tokens)
    grad = scores.grad
    if grad:
        wide = Value(num_tokens * (own.per_token if own.bias else count), FLOAT32, True)
        tape.keep(wide, Value(pairs, 8, True), Value(pairs, 8, True))  # softmax; top-k and gather indices
    tape.keep(Value(pairs, 8, True), Value(pairs, 8, True))  # order of the pairs, there and back
    selected = Value(pairs * shape.hidden, weight_bytes, x.grad)
    joint = product(tape, selected, 2 * own.width, pairs)
    gated = _gate_gpt_oss(tape, joint) if own.bias else _gate_joint(tape, joint)
    out = product(tape, gated, shape.hidden, pairs)
    weights = Value(pairs, scores.itemsize, grad)
    weighted = multiply(tape, out, weights)
    return Value(num_tokens * shape.hidden, x.itemsize, weighted.grad)


def _gate_gpt_oss(tape: Tape, joint: Value) -> Value:
    """(clamp(up) + 1) * clamp(gate) * sigmoid(alpha * clamp(gate)): many small operations, each of which keeps."""
    half = joint.elements // 2
    if joint.grad:
        tape.keep(joint)
        tape.keep(*(Value(half, joint.itemsize, True) for _ in range(4)))
    return Value(half, joint.itemsize, joint.grad)
