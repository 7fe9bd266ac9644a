"""Decoder layers that keep, and compute, what the running pass asks for.

    checkpointed   only the layer's input is kept; the layer runs again in backward, with the same dropout
    keys only      the last layer of context-only tokens, of which only keys and values are read: its attention stops it
                   by KeysRecorded, unless routers behind it are to be balanced. The exception is caught here, inside
                   the layer's `forward`, so that hooks on the layer run as always; only the attention's own hooks after
                   `forward` do not
    parts          the last layer takes all tokens and returns the loss-bearing ones; of the others it computes keys and
                   values only. Its arguments are cut by token, those named in CUT alone. Where attention has no fused
                   kernel for parts (soft-cap and sinks on a GPU) it runs whole, and its output is cut

The layer's own code runs, unchanged, on the tokens that it is given.

Parts of layers that carry a state from token to token (state-space layers, linear attention, convolutions) go run by
run. No mask stops such a state at the border of two conversations. So they run over each run of a packed sequence by
itself, behind the tokens of its path, from an empty state; what they give for the path belongs to the runs before. All
else of the model takes the whole sequence. Tokens that several runs share go through them once for each, and once more
in backward, so that memory does not grow with the number of branches. They are told by their convolution, which nearly
all kinds have; that the model then keeps conversations apart is proved before each run (checks.py).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from preceptor.data.forest import AttentionRun
from preceptor.errors import ModelError
from preceptor.model.activations.inputs import SplitPart
from preceptor.model.activations.passes import DecoderPass
from preceptor.model.attention.layout import ForestLayout, computed_tokens
from preceptor.model.attention.runs import KeysRecorded, attention_implementation
from preceptor.model.compiled import run_compiled

CUT = frozenset(
    {"hidden_states", "position_ids", "position_embeddings", "position_embeddings_global", "position_embeddings_local"}
    | {"per_layer_input", "input_ids", "ple_input_ids"}
)
"""Arguments of a decoder layer that are laid out by token, (1, T, ...), or are tuples or dicts of such."""


class EngineLayer(nn.Module):
    """A decoder layer; `engine_settings`: (its index, the number of layers)."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        layer: Any = self
        this = layer.engine_state.current
        if this is None:
            return super().forward(*arguments, **named)
        if layer.gradient_checkpointing and layer.training:
            raise ModelError(
                "the model has transformers' gradient checkpointing switched on, which would run layers again in a way "
                "of its own. Call gradient_checkpointing_disable() and set memory.activation_checkpointing."
            )
        if layer.engine_settings[0] < this.num_checkpointed:
            return checkpoint(self._run_again, this, *arguments, use_reentrant=False, **named)
        return self._run(this, *arguments, **named)

    def _run_again(self, this: DecoderPass, *arguments: Any, **named: Any) -> Any:
        """What checkpoint calls: now, within the pass, and in backward, where nothing else has the pass run."""
        state: Any = self.engine_state
        if state.current is this:
            return self._run(this, *arguments, **named)
        with state.running(this), attention_implementation(this.decoder, this.attention):
            return self._run(this, *arguments, **named)

    def _run(self, this: DecoderPass, *arguments: Any, **named: Any) -> Any:
        layer: Any = self
        index, num_layers = layer.engine_settings
        routed, keys_only = this.group.routed, not this.group.loss_bearing
        if index == num_layers - 1:
            if keys_only and routed is None:
                forest = copy(named["forest"])
                forest.keys_only = True
                self._record_keys(*arguments, **{**named, "forest": forest})
                _gather_before_backward(layer, forest)
                return (arguments[0] if arguments else named["hidden_states"]).detach()  # nothing reads it
            if this.parts:
                return self._run_parts(*this.parts, *arguments, **named)
        recorded = [] if routed is None else routed.routing.probability_sums
        before = len(recorded)
        output = self._forward(*arguments, **named)
        if keys_only:
            _gather_before_backward(layer, named["forest"], recorded[before:])
        return output

    def _forward(self, *arguments: Any, **named: Any) -> Any:
        """The authors' own code, compiled or not."""
        layer: Any = self
        if layer.engine_state.compiles and (layer.training or torch.is_grad_enabled()):
            cls: Any = type(layer)
            return run_compiled(layer, _authors_forward(cls)[0], arguments, named)
        return super().forward(*arguments, **named)

    def _record_keys(self, *arguments: Any, **named: Any) -> None:
        try:
            self._forward(*arguments, **named)
        except KeysRecorded:
            return
        raise ModelError("the last layer does not hand keyword arguments on to its attention")

    def _run_parts(
        self, context: SplitPart, bearing: SplitPart, *given: Any, forest: ForestLayout, **named: Any
    ) -> Any:
        cls: Any = type(self)
        _, names = _authors_forward(cls)
        if len(given) > len(names):
            raise ModelError("the last layer takes arguments without a name, so they cannot be cut by token")
        every = {**dict(zip(names, given, strict=False)), **named}
        hidden: Tensor = every[names[0]]

        def cut(index_M: Tensor) -> tuple[Tensor, dict[str, Any]]:
            index_M = pad(index_M, (0, computed_tokens(len(index_M), hidden) - len(index_M)))
            cut_names = CUT | {names[0]}
            found = {
                name: _cut(value, index_M, hidden.shape[1]) if name in cut_names else _whole(name, value, hidden)
                for name, value in every.items()
            }
            return found.pop(names[0]), found  # given as other layers are given it: else it is compiled again

        (context_M, before), (bearing_M, after) = ((at_M, layout.for_pass()) for at_M, layout in (context, bearing))
        before.keys_only, before.recorded = True, {}
        after.masks.scratch = forest.masks.scratch
        if forest.whole_alone:
            return _cut(self._forward(*given, forest=forest, **named), bearing_M, hidden.shape[1])
        if before.runs:
            hidden_MD, others = cut(context_M)
            self._record_keys(hidden_MD, forest=before, **others)
        after.kept = before.recorded
        hidden_MD, others = cut(bearing_M)
        return self._forward(hidden_MD, forest=after, **others)


def _gather_before_backward(layer: Any, forest: ForestLayout, of_routers: Sequence[Tensor] = ()) -> None:
    """Have a sharded layer gathered before backward comes to the keys and values that this phase recorded, and to what
    its routers gave.

    FSDP2 does so when backward comes to what a layer returns. Of the last layer nothing reads that here, nor of others
    whose keys are those of all layers behind them (Gemma 3n).
    """
    if not layer.engine_state.regathers:
        return
    for tensor in of_routers:
        if tensor.requires_grad:
            tensor.register_hook(lambda _: layer.unshard())
    if forest.recorded is None:
        return
    for module in layer.modules():
        seen = forest.recorded.get(module, {})
        for tensor in (each for start, end, _ in forest.runs for each in seen.get((start, end), ())):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: layer.unshard())


@cache
def _authors_forward(cls: Any) -> tuple[Any, list[str]]:
    """Of the class of a layer before the engine's came upon it; and the names of its arguments."""
    forward = cls.__mro__[cls.__mro__.index(EngineLayer) + 1].forward
    return forward, list(signature(forward).parameters)[1:]


def _cut(value: Any, index_M: Tensor, num_tokens: int) -> Any:
    """Tokens `index_M` of what is laid out by token."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor.index_select(1, index_M) if tensor.shape[:2] == (1, num_tokens) else tensor

    return tree_map_only(Tensor, cut, value)


def _whole(name: str, value: Any, hidden: Tensor) -> Any:
    """An argument that is handed on as it is. Raises ModelError where it looks as if it were laid out by token."""
    if isinstance(value, Tensor) and value.shape[:2] == hidden.shape[:2] and value.dim() > 1:
        raise ModelError(f"the last layer takes `{name}` by token, which is not among the arguments that can be cut")
    return value


class PathMixer(nn.Module):
    """A module that takes hidden states (1, T, D) to such; `engine_settings` is None."""

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        module: Any = self
        this = module.engine_state.current
        if this is None or not this.efficient:
            return super().forward(hidden_states, *arguments, **named)
        runs = this.group.layout.runs
        num_tokens, num_computed = runs[-1][1], hidden_states.shape[1]
        if num_computed not in (num_tokens, this.group.ids.shape[1]):
            raise ModelError("a layer that carries a state from token to token is given some of the tokens alone")
        named.pop("forest", None)  # is for attention
        outputs = []
        for run in runs:
            given = this, run, (hidden_states, *arguments), named
            # the tokens of its path are in other runs too: what is computed for them again is not kept
            again = bool(run[2]) and torch.is_grad_enabled()
            outputs.append(checkpoint(self._of_run, *given, use_reentrant=False) if again else self._of_run(*given))
        together = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
        return pad(together, (0, 0, 0, num_computed - num_tokens))

    def _of_run(
        self, this: DecoderPass, run: AttentionRun, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Tensor:
        """What the layer gives for the tokens of a run; also in backward, where nothing else has the pass run."""
        state: Any = self.engine_state
        num_tokens = arguments[0].shape[1]
        given, named = tree_map_only(Tensor, lambda each: _taken(each, run, num_tokens), (arguments, named))
        with nullcontext() if state.current is this else state.running(this):
            output = super().forward(*given, **named)
        if not isinstance(output, Tensor):
            raise ModelError("a layer that carries a state from token to token returns more than hidden states")
        return output[:, run[0] - run[1] :]


def _taken(tensor: Tensor, run: AttentionRun, num_tokens: int) -> Tensor:
    """Of what is laid out by token, (1, T, ...), the tokens of the run behind those of its path."""
    if tensor.shape[:2] != (1, num_tokens):
        raise ModelError("a layer that carries a state from token to token takes more than what is laid out by token")
    start, end, path = run
    ranges = [tensor[:, a:b] for a, b in (*path, (start, end))]
    return torch.cat(ranges, 1) if path else ranges[0]
