"""Proof on the model itself that going through it phase by phase changes no hidden state that a loss reads."""

import torch
from torch import nn

from preceptor.errors import ModelError, is_out_of_memory
from preceptor.model.activations.inputs import SequenceInputs, phases
from preceptor.model.activations.passes import decode_phases, decode_whole
from preceptor.model.attention.cuda import replaceable_kernels
from preceptor.model.forward import gathered
from preceptor.model.numerics import FAILURES, require_close
from preceptor.model.optimisations import install, probe_sequence
from preceptor.model.options import ActivationPolicy
from preceptor.model.parts import evaluating, model_type

_ADVICE = "Set memory.context_gradient to `full`."


@gathered
@torch.no_grad()
def check_phases(model: nn.Module, policy: ActivationPolicy) -> None:
    """Raises ModelError where it is not so. Nothing to prove where the policy has no phases."""
    state = install(model)
    if policy.context_gradient == "full" or "attention" not in state.optimisations:
        return
    sequence = probe_sequence(model)
    try:
        with evaluating(model):
            inputs = SequenceInputs.of(model, sequence, phases(sequence))
            found_MD, index_M = decode_phases(model, state, inputs, policy)
            true_TD = decode_whole(model, state, SequenceInputs.of(model, sequence))
    except ModelError:
        raise
    except FAILURES as error:  # LongCat's layers have two attentions each, of which only the first leaves its keys
        if is_out_of_memory(error) or replaceable_kernels():
            raise
        raise ModelError(
            f"{model_type(model)}: a layer fails when a sequence goes through the model phase by phase "
            f"({type(error).__name__}: {error}). {_ADVICE}"
        ) from error
    moved = f"{model_type(model)}: hidden states move when a sequence goes through the model phase by phase"
    require_close(found_MD, true_TD[index_M], moved, _ADVICE)
