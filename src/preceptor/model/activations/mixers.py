"""Layers that carry a state from token to token (state-space layers, linear attention, convolutions), run by run.

No mask stops such a state at the border of two conversations. So the layer runs over each run of a packed sequence by
itself, behind the tokens of its path, from an empty state; what it gives for the path belongs to the runs before. All
else of the model (attention, experts, norms, the head) takes the whole sequence. Tokens that several runs share go
through the layer once for each, and once more in backward, so that memory does not grow with the number of branches.

Such a layer is told by its convolution, which nearly all kinds have; that the model then keeps conversations apart is
proved before each run (checks/isolation.py).
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from preceptor.errors import ModelError
from preceptor.model.activations.context import DecoderPass
from preceptor.model.attention.layout import AttentionRun


class PathMixer(nn.Module):
    """A module that takes hidden states (1, T, D) to such; `engine_settings` is None."""

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        module: Any = self
        this = module.engine_state.current
        if this is None or this.runs is None:
            return super().forward(hidden_states, *arguments, **named)
        num_tokens, num_computed = this.runs[-1][1], hidden_states.shape[1]
        if num_computed not in (num_tokens, this.ids.shape[1]):
            raise ModelError("a layer that carries a state from token to token is given some of the tokens alone")
        named.pop("forest", None)  # is for attention
        outputs = []
        for run in this.runs:
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
        of_run = [_taken(value, run, num_tokens) for value in arguments]
        with nullcontext() if state.current is this else state.running(this):
            output = super().forward(*of_run, **{name: _taken(named[name], run, num_tokens) for name in named})
        if not isinstance(output, Tensor):
            raise ModelError("a layer that carries a state from token to token returns more than hidden states")
        return output[:, run[0] - run[1] :]


def _taken(value: Any, run: AttentionRun, num_tokens: int) -> Any:
    """Of what is laid out by token, (1, T, ...), the tokens of the run behind those of its path."""
    if isinstance(value, list | tuple):
        return type(value)(_taken(inner, run, num_tokens) for inner in value)
    if not isinstance(value, Tensor):
        return value
    if value.shape[:2] != (1, num_tokens):
        raise ModelError("a layer that carries a state from token to token takes more than what is laid out by token")
    start, end, path = run
    ranges = [value[:, a:b] for a, b in (*path, (start, end))]
    return torch.cat(ranges, 1) if path else ranges[0]
