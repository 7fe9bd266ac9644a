"""A row through the decoder with no more kept for backward, and no more computed, than was asked for.

    full        all tokens in one pass
    recompute   level by level (levels.py): of unread tokens only each layer's input, keys and values are kept; the
                rest of a layer is computed again when backward comes to it. The exact gradient
    detach      level by level: keys and values of unread tokens are constants (TokenTune, Simoulin et al. 2024), so
                nothing else of them is kept and backward never comes to them

In each, the last layer gives no output for unread tokens, only keys and values. A token is read if a loss reads its
hidden state, so with `detach` the gradient of each trained token flows through all of the computation that predicts it,
the last token of its context included, and stops at the keys and values of the context's other tokens.

Layers are reached by wrapping their `forward` for the time of a pass: their own code runs, unchanged, on the tokens
that they are given.

Legend: T tokens of a row, M tokens whose hidden states are asked for, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from preceptor.data.forest import PackedSequence
from preceptor.errors import ModelError
from preceptor.model.activations.levels import Level, levels
from preceptor.model.activations.modules import lean_modules
from preceptor.model.attention.layout import ForestLayout, KeysValues, PassLayout, PathMasks, Range, computed_tokens
from preceptor.model.attention.runs import KeysKept, attention_implementation, decoder_of, forest_attention

Forward = Callable[..., Any]
Wrap = Callable[[int, int, Forward], Forward]
"""Layer's index, number of layers and own `forward` -> the `forward` to call in its place."""


@dataclass(frozen=True, slots=True)
class Keep:
    """What a forward pass keeps for its backward: the keys of the run file's section `memory`."""

    context_gradient: Literal["full", "recompute", "detach"] = "full"
    activation_checkpointing: Literal["none", "all"] | int = "none"

    def checkpointed_layers(self, num_layers: int) -> int:
        """How many layers, from the first on, are computed again in backward. Raises ModelError if there are fewer."""
        if isinstance(self.activation_checkpointing, int):
            if self.activation_checkpointing > num_layers:
                raise ModelError(
                    f"memory.activation_checkpointing: {self.activation_checkpointing} layers, but the model has "
                    f"{num_layers}; set it to `all` or at most {num_layers}"
                )
            return self.activation_checkpointing
        return num_layers if self.activation_checkpointing == "all" else 0


KEEP_ALL = Keep()


def decode(model: nn.Module, row: PackedSequence, index_M: Tensor | None, layout: ForestLayout | PassLayout) -> Tensor:
    """Last hidden states (M, D) of the row's tokens `index_M` (None: all), which go through the decoder together.

    More may come behind them, see `computed_tokens`.
    """
    decoder = decoder_of(model)
    device = decoder.get_input_embeddings().weight.device
    ids_M, position_M = torch.from_numpy(row.ids_T).to(device), torch.from_numpy(row.position_T).to(device)
    if index_M is not None:
        ids_M, position_M = ids_M[index_M], position_M[index_M]
    added = computed_tokens(len(ids_M), decoder.get_input_embeddings().weight) - len(ids_M)
    ids_M, position_M = pad(ids_M, (0, added)), pad(position_M, (0, added))
    with lean_modules(model):
        output = decoder(input_ids=ids_M[None], position_ids=position_M[None], use_cache=False, forest=layout)
    hidden_MD: Tensor = output.last_hidden_state[0]
    return hidden_MD


def decode_whole(model: nn.Module, row: PackedSequence, keep: Keep, parts: tuple[Level, Level] | None = None) -> Tensor:
    """Hidden states of a whole row in one pass: of all tokens (T, D), or with `parts` = (unread, read) of the read."""
    layout = ForestLayout.from_row(row, decoder_of(model).get_input_embeddings().weight.device)
    with forest_attention(model), recomputing(model, keep, parts):
        return decode(model, row, None, layout)[: row.num_tokens if parts is None else parts[1].num_tokens]


def recomputing(model: nn.Module, keep: Keep, parts: tuple[Level, Level] | None = None) -> AbstractContextManager[None]:
    """Within the block, the layers run as `keep` says; with `parts`, the last one returns read tokens only."""
    device = decoder_of(model).get_input_embeddings().weight.device

    def wrap(index: int, num_layers: int, forward: Forward) -> Forward:
        if parts is not None and index == num_layers - 1:
            forward = _for_read_tokens(forward, *parts, device)
        return _checkpointed(model, forward) if index < keep.checkpointed_layers(num_layers) else forward

    return nullcontext() if parts is None and keep.activation_checkpointing == "none" else _layers_through(model, wrap)


def decode_levels(model: nn.Module, row: PackedSequence, keep: Keep) -> tuple[Tensor, np.ndarray]:
    """Hidden states of the row's read tokens, (M, D), level by level; and where in the row they are, (M,)."""
    device = decoder_of(model).get_input_embeddings().weight.device
    kept: Mapping[nn.Module, Mapping[Range, KeysValues]] = {}
    hidden, index = [], []
    plan = levels(row)
    masks = PathMasks(run for level in plan for run in level.runs)
    with lean_modules(model):  # one for all levels, which read the same weights
        for level in plan:
            layout = PassLayout(level.runs, kept, None if level is plan[-1] else {}, masks)
            index_M = level.index_T()
            constant = keep.context_gradient == "detach" and not level.read
            with (
                forest_attention(model),
                _layers_through(model, _wrap_for(model, level, keep)),
                torch.no_grad() if constant else nullcontext(),
            ):
                hidden_MD = decode(model, row, torch.from_numpy(index_M).to(device), layout)[: level.num_tokens]
            if level.read:
                hidden.append(hidden_MD)
                index.append(index_M)
            # a layer that runs again must not leave its keys a second time, nor hold on to those of later levels
            kept, layout.recorded = layout.recorded or {}, None
    return torch.cat(hidden), np.concatenate(index)


def _wrap_for(model: nn.Module, level: Level, keep: Keep) -> Wrap:
    def wrap(index: int, num_layers: int, forward: Forward) -> Forward:
        if not level.read and index == num_layers - 1:
            forward = _keys_only(forward)
        recomputed = keep.checkpointed_layers(num_layers) if level.read else num_layers
        return _checkpointed(model, forward) if index < recomputed else forward

    return wrap


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers in order. Raises ModelError for a decoder that does not say which modules they are."""
    decoder: PreTrainedModel = decoder_of(model)
    layers: list[nn.Module] = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(decoder).__name__} does not say which of its modules are layers (transformers' "
            f"GradientCheckpointingLayer), so none can be run again. Set memory.context_gradient to `full` and "
            f"memory.activation_checkpointing to `none`."
        )
    return layers


@contextmanager
def _layers_through(model: nn.Module, wrap: Wrap) -> Iterator[None]:
    """Within the block, each decoder layer's `forward` is what `wrap` makes of it."""
    layers = decoder_layers(model)
    if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        raise ModelError(
            "the model has transformers' gradient checkpointing switched on, which would run layers again in a way "
            "of its own. Call gradient_checkpointing_disable() and set memory.activation_checkpointing."
        )
    former = [layer.__dict__.get("forward") for layer in layers]
    for index, layer in enumerate(layers):
        layer.__dict__["forward"] = wrap(index, len(layers), layer.forward)
    try:
        yield
    finally:
        for layer, own in zip(layers, former, strict=True):
            if own is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = own


def _checkpointed(model: nn.Module, forward: Forward) -> Forward:
    """The same function, of which only the inputs are kept; it draws the same dropout when it runs again."""
    attention = decoder_of(model).config._attn_implementation

    def run(*arguments: Any, **named: Any) -> Any:
        with attention_implementation(model, attention), lean_modules(model):  # when it runs again, nothing else has
            return forward(*arguments, **named)

    def checkpointed(*arguments: Any, **named: Any) -> Any:
        return checkpoint(run, *arguments, use_reentrant=False, **named)

    return checkpointed


def _keys_only(forward: Forward) -> Forward:
    """A layer up to its keys and values, which its attention puts on record; what it returns is not to be read."""

    def keys_only(hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
        try:
            forward(hidden, *arguments, forest_keys_only=True, **named)
        except KeysKept:
            return hidden
        raise ModelError("the last layer does not hand keyword arguments on to its attention")

    return keys_only


def _for_read_tokens(forward: Forward, unread: Level, read: Level, device: torch.device) -> Forward:
    """A layer that takes all tokens and returns the read ones: of the others it computes keys and values only."""
    masks = PathMasks(read.runs)

    def for_read_tokens(hidden: Tensor, *rest: Any, forest: ForestLayout, **named: Any) -> Any:
        def of(part: Level) -> Any:
            added = computed_tokens(part.num_tokens, hidden) - part.num_tokens
            index_M = pad(torch.from_numpy(part.index_T()).to(device), (0, added))
            return _choose(((hidden, *rest), named), index_M, hidden.shape[1])

        masks.scratch = forest.masks.scratch
        before = PassLayout(unread.runs, {}, {}, masks)
        if unread.runs:
            chosen, chosen_named = of(unread)
            _keys_only(forward)(*chosen, forest=before, **chosen_named)
        chosen, chosen_named = of(read)
        return forward(*chosen, forest=PassLayout(read.runs, before.recorded or {}, None, masks), **chosen_named)

    return for_read_tokens


def _choose(value: Any, index_M: Tensor, num_tokens: int) -> Any:
    """Tokens `index_M` of whatever is laid out by token, (1, T, ...): hidden states, positions, rotary angles."""
    if isinstance(value, Tensor):
        return value.index_select(1, index_M) if value.shape[:2] == (1, num_tokens) else value
    if isinstance(value, dict):
        return {name: _choose(inner, index_M, num_tokens) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_choose(inner, index_M, num_tokens) for inner in value)
    return value
