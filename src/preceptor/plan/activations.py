"""Bytes that are kept for the backward of one row, for each way in which model/activations/passes.py can compute it.

Every layer is run on sizes (layers.py, saved.py), a pass at a time, as the trainer runs it on values:

    full        one pass over all tokens; of unread tokens the last layer computes keys and values only
    recompute   level by level; of unread tokens each layer's input is kept, and what read tokens attend to
    detach      level by level; of unread tokens only the keys and values that read tokens attend to

A token is read if a loss reads its hidden state (levels.py). With `checkpointed_layers` the first so many layers
keep nothing but their input; while backward computes one of them again, what it keeps is in memory as well.

Legend: a turn is (context, target): so many tokens to read, then so many to generate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from preceptor.model.sizes import on_grid
from preceptor.plan.layers import Pass, Run, keys_only, run_layer
from preceptor.plan.parameters import Adapter
from preceptor.plan.saved import HALF, Precision, Tape, Value, norm
from preceptor.plan.shapes import Layer, Shape

ContextGradient = Literal["full", "recompute", "detach"]
_WORTH = 8  # the last layer is spared for unread tokens if they are at least one in so many (model/forward.py)
_INDEX_BYTES = 8
_NO_ANGLE = Value(0, 1, False)

Turns = Sequence[tuple[int, int]]
"""A conversation: tokens of each turn's context and of its target, in turn; a context is what is new in it."""


@dataclass(frozen=True, slots=True)
class Work:
    """One row, and how it is computed: `checkpointed_layers`, from the first on, are computed again in backward."""

    conversations: tuple[Turns, ...]
    context_gradient: ContextGradient = "full"
    checkpointed_layers: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(context + target for turns in self.conversations for context, target in turns)

    @property
    def num_trained(self) -> int:
        """Target tokens, but for the first of a conversation, which nothing comes before."""
        return sum(
            target - (index == 0 and context == 0 and target > 0)
            for turns in self.conversations
            for index, (context, target) in enumerate(turns)
        )


@dataclass(frozen=True, slots=True)
class Activations:
    """kept_bytes: at the end of the forward pass; casts_bytes: autocast's copies of weights, beside them.

    again_bytes: what the largest layer that is computed again keeps for as long as its backward takes. later_bytes: all
    that is kept when backward has done with the read tokens and computes a layer of unread ones again; else 0.
    scratch_bytes: what attention's backward writes in, the same for all runs and layers of the row.
    """

    kept_bytes: int
    casts_bytes: int
    again_bytes: int
    later_bytes: int
    scratch_bytes: int = 0


def kept_for_backward(
    shape: Shape,
    work: Work,
    precision: Precision,
    adapter: Adapter | None = None,
    token_rows: bool = False,
    cpu: bool = True,
) -> Activations:
    """Activations of one row through the decoder, with the last norm and without the loss.

    token_rows: an adapter run that trains rows of the embedding, so that gradients reach the first layer's input.
    """
    book = _Book(shape, precision, adapter, token_rows, cpu, work)
    unread, read = _pieces(work)
    if work.context_gradient == "full" or work.num_trained == 0:
        book.whole_row(unread, read)
    else:
        book.by_levels(unread, read)
    tape = book.tape
    return Activations(tape.kept_bytes, tape.casts_bytes, book.again_bytes, book.later_bytes, tape.scratch_bytes)


def _pieces(work: Work) -> tuple[list[list[Run]], list[list[Run]]]:
    """The unread and the read runs of each level, as levels.py cuts them; a row's last tokens are in none."""
    unread: list[list[Run]] = []
    read: list[list[Run]] = []
    for turns in work.conversations:
        seen = 0
        for depth, (context, target) in enumerate(turns):
            if depth == len(unread):
                unread.append([])
                read.append([])
            if target == 0:
                continue
            # the last token of a target is read by nothing: it opens the next context, whose own last token is read
            before = context - (depth == 0)
            if before > 0:
                unread[depth].append(Run(before, seen + before, joined=seen > 0))
                seen += before
            read_tokens = target - (before < 0)
            if read_tokens > 0:
                read[depth].append(Run(read_tokens, seen + read_tokens, joined=seen > 0))
                seen += read_tokens
    return unread, read


class _Book:
    """The passes of one row, and the one tape on which they keep."""

    def __init__(
        self, shape: Shape, precision: Precision, adapter: Adapter | None, token_rows: bool, cpu: bool, work: Work
    ) -> None:
        self.shape, self.precision, self.work, self.cpu = shape, precision, work, cpu
        self.adapter, self.token_rows = adapter, token_rows
        self.tape, self.longest = self._new_tape(), 0
        self.again_bytes, self.later_bytes, self.runs_again = 0, 0, False
        self._cast_layers: set[int] = set()

    def _new_tape(self) -> Tape:
        adapter = self.adapter
        if adapter is None:
            return Tape(self.precision)
        targets = None if adapter.targets is None else frozenset(adapter.targets)
        return Tape(self.precision, False, adapter.rank, targets, adapter.dropout > 0, self.token_rows)

    def whole_row(self, unread: list[list[Run]], read: list[list[Run]]) -> None:
        """One pass; the last layer for read tokens only, where that spares enough."""
        lengths = [sum(context + target for context, target in turns) for turns in self.work.conversations]
        num_read = sum(run.queries for level in read for run in level)
        spared = num_read > 0 and _WORTH * (self.work.num_tokens - num_read) >= self.work.num_tokens
        runs = tuple(Run(length, length) for length in lengths if length)
        self.longest = max(lengths)
        num_tokens = self._computed(self.work.num_tokens)
        x, angles = self._enter(num_tokens)
        for index, layer in enumerate(self.shape.layers):
            again = index < self.work.checkpointed_layers
            if spared and index == len(self.shape.layers) - 1:
                x = self._spared_layer(index, x, unread, read, again)
            else:
                x = self._layer(index, x, self._pass(runs, angles, layer), again)
        self._leave(x, self._computed(num_read) if spared else num_tokens)

    def by_levels(self, unread: list[list[Run]], read: list[list[Run]]) -> None:
        """Unread and read tokens of each level in turn, each pass given the keys and values that earlier ones left."""
        last_read = max(depth for depth, runs in enumerate(read) if runs)
        recorded_bytes, held_bytes, masks = 0, 0, self._new_tape()
        self.longest = max(run.keys for level in (*unread[: last_read + 1], *read) for run in level)
        for depth in range(last_read + 1):
            for is_read, runs in ((False, tuple(unread[depth])), (True, tuple(read[depth]))):
                if not runs:
                    continue
                num_again = self.work.checkpointed_layers if is_read else len(self.shape.layers)
                constant = not is_read and self.work.context_gradient == "detach"
                self.runs_again |= num_again > 0 and not constant
                again_bytes, self.again_bytes = self.again_bytes, 0
                self._level(runs, is_read, num_again, constant, masks)
                if not is_read:  # its turn comes when the read tokens' is over
                    self.later_bytes = max(self.later_bytes, self.tape.kept_bytes + self.again_bytes)
                    self.again_bytes = 0
                self.again_bytes = max(self.again_bytes, again_bytes)
                if num_again and not constant:  # what runs again holds on to the keys and values that it was given
                    held_bytes = recorded_bytes
                recorded_bytes += self._keys_values_bytes(runs)
        if self.runs_again:
            self.tape.take_shared(masks)
            self.tape.keep_held()
            self.tape.keep(Value(held_bytes, 1, False))

    def _keys_values_bytes(self, runs: tuple[Run, ...]) -> int:
        """What a pass leaves for later ones, in all layers."""
        tokens = self._of_runs(runs, (_NO_ANGLE, _NO_ANGLE))
        itemsize = tokens.attention_bytes(self.precision.product_bytes)
        return 2 * tokens.num_tokens * self.shape.key_width * itemsize * len(self.shape.layers)

    def _level(self, runs: tuple[Run, ...], is_read: bool, num_again: int, constant: bool, masks: Tape) -> None:
        num_tokens, num_layers = self._computed(sum(run.queries for run in runs)), len(self.shape.layers)
        if constant:  # nothing is kept but what it leaves for others: its masks as well
            own, self.tape = (self.tape, self._cast_layers), self._new_tape()
            self._cast_layers, num_again = set(), 0
        x, angles = self._enter(num_tokens)
        for index, layer in enumerate(self.shape.layers):
            last_unread = not is_read and index == num_layers - 1
            tokens = self._pass(runs, angles, layer)
            x = self._layer(index, x, tokens, again=index < num_again, keys_alone=last_unread)
        if is_read:
            self._leave(x, num_tokens)
        if constant:
            masks.take_shared(self.tape)
            self.tape, self._cast_layers = own

    def _enter(self, num_tokens: int) -> tuple[Value, dict[bool, tuple[Value, Value]]]:
        """Embeddings, and rotary angles: Gemma 3 has others for layers with a sliding window."""
        grad = self.adapter is None or self.token_rows
        if grad:
            self.tape.keep(Value(num_tokens, _INDEX_BYTES, False))
        kinds = {self._angle_kind(layer) for layer in self.shape.layers}
        angles = {kind: (self._angle(num_tokens), self._angle(num_tokens)) for kind in kinds}
        return Value(num_tokens * self.shape.hidden, self.precision.weight_bytes, grad), angles

    def _angle_kind(self, layer: Layer) -> bool:
        return self.shape.model_type == "gemma3_text" and layer.window is not None

    def _angle(self, num_tokens: int) -> Value:
        width = self.shape.head_dim // (2 if self.shape.model_type == "gpt_oss" else 1)
        return Value(num_tokens * width, self.precision.weight_bytes, False)

    def _pass(self, runs: tuple[Run, ...], angles: dict[bool, tuple[Value, Value]], layer: Layer) -> Pass:
        return self._of_runs(runs, angles[self._angle_kind(layer)])

    def _of_runs(self, runs: tuple[Run, ...], angles: tuple[Value, Value]) -> Pass:
        num_tokens = self._computed(sum(run.queries for run in runs))
        return Pass(runs, num_tokens, angles, self.cpu, self.longest)

    def _computed(self, num_tokens: int) -> int:
        """As `computed_tokens` of model/attention/layout.py has it."""
        return on_grid(num_tokens) if self.cpu and self.precision.product_bytes == HALF else num_tokens

    def _layer(self, index: int, x: Value, tokens: Pass, again: bool, keys_alone: bool = False) -> Value:
        layer = self.shape.layers[index]
        run = keys_only if keys_alone else run_layer
        if not again:
            casts = self.tape.casts_bytes
            out = run(self.tape, self.shape, layer, x, tokens)
            self._count_casts_once(index, casts)
            return out
        self.tape.keep(x, *tokens.angles)
        inner = self._new_tape()
        out = run(inner, self.shape, layer, x, tokens)
        self._run_again(inner, layer, tokens.num_tokens)
        return out

    def _spared_layer(self, index: int, x: Value, unread: list[list[Run]], read: list[list[Run]], again: bool) -> Value:
        """The last layer for read tokens; of the others it computes keys and values only."""
        layer = self.shape.layers[index]
        tape = self._new_tape() if again else self.tape
        casts, longest = tape.casts_bytes, max(run.keys for level in read for run in level)
        out = x
        for levels, run in ((unread, keys_only), (read, run_layer)):
            runs = tuple(each for level in levels for each in level)
            num_tokens = self._computed(sum(each.queries for each in runs))
            if num_tokens:
                chosen = Value(num_tokens * self.shape.hidden, x.itemsize, x.grad)
                tape.keep(Value(num_tokens, _INDEX_BYTES, False))
                angles = (self._angle(num_tokens), self._angle(num_tokens))
                tape.casts_bytes = casts  # the same weights again
                tokens = Pass(runs, num_tokens, angles, self.cpu, longest, spared=True)
                out = run(tape, self.shape, layer, chosen, tokens)
        if again:
            self.tape.keep(x)
            self._run_again(tape, layer, num_tokens, own_masks=True)
        else:
            self._count_casts_once(index, casts)
        return out

    def _run_again(self, inner: Tape, layer: Layer, num_tokens: int, own_masks: bool = False) -> None:
        """What a layer that backward computes again keeps then, and the gradients on their way through its MLP: of gate
        and up, while what was kept of their product is given back. The masks stay, for the next layer, but for those
        that a layer makes for itself.
        """
        if not own_masks:
            self.tape.take_shared(inner)
        self.tape.keep_held()
        width = layer.width if layer.experts is None else layer.experts.per_token * layer.experts.width
        flowing_bytes = 2 * num_tokens * width * self.precision.product_bytes
        self.again_bytes = max(self.again_bytes, inner.kept_bytes + inner.casts_bytes + flowing_bytes)

    def _count_casts_once(self, index: int, before: int) -> None:
        """Autocast copies each weight once, however many passes read it."""
        if index in self._cast_layers:
            self.tape.casts_bytes = before
        if self.tape.casts_bytes > before:
            self._cast_layers.add(index)

    def _leave(self, x: Value, num_tokens: int) -> None:
        norm(self.tape, self.shape.family.norm, x, num_tokens)
