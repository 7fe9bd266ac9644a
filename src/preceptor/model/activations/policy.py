"""What a forward pass keeps for its backward: the keys `memory.context_gradient` and `memory.activation_checkpointing`.

    full        all tokens in one pass
    recompute   phase by phase (phases.py): of context-only tokens only each layer's input, keys and values are kept;
                the rest of a layer is computed again when backward comes to it. The exact gradient
    detach      phase by phase: keys and values of context-only tokens are constants (TokenTune, Simoulin et al. 2024),
                so nothing else of them is kept and backward never comes to them

A token is loss-bearing if a loss reads its hidden state, so with `detach` the gradient of each trained token flows
through all of the computation that predicts it, the last token of its context included, and stops at the keys and
values of the context's other tokens.
"""

from dataclasses import dataclass
from typing import Literal

from preceptor.errors import ModelError


@dataclass(frozen=True, slots=True)
class ActivationPolicy:
    """activation_checkpointing: no layer, all, or the first n keep only their input and run again in backward."""

    context_gradient: Literal["full", "recompute", "detach"] = "full"
    activation_checkpointing: Literal["none", "all"] | int = "none"

    def checkpointed_layers(self, num_layers: int) -> int:
        """How many layers, from the first on, are computed again in backward. Raises ModelError if there are fewer."""
        asked = self.activation_checkpointing
        if isinstance(asked, int):
            if asked > num_layers:
                raise ModelError(
                    f"memory.activation_checkpointing: {asked} layers, but the model has {num_layers}; set it "
                    f" to `all` or at most {num_layers}"
                )
            return asked
        return num_layers if asked == "all" else 0


KEEP_ALL = ActivationPolicy()
