"""Proof on the model itself that a packed sequence keeps its trees and branches apart, and changes nothing else."""

import numpy as np
import torch
from torch import nn

from preceptor.data.forest import PackedSequence, Segment, Tree, pack_trees
from preceptor.errors import ModelError, is_out_of_memory
from preceptor.model.attention.cuda import replaceable_kernels
from preceptor.model.attention.runs import attention_implementation
from preceptor.model.checks.visibility import check_visibility
from preceptor.model.forward import Engine, gathered
from preceptor.model.loss.linear_cross_entropy import output_head
from preceptor.model.numerics import FAILURES, require_close
from preceptor.model.parts import decoder_of, evaluating, exact_routing, model_type

_PROBE_TOKENS = 24
_MIXING = (
    "Its layers mix tokens outside attention (recurrence or convolution), so conversations cannot share a sequence. "
    "Use a model with attention only."
)


@gathered
@torch.no_grad()
def check_isolation(model: nn.Module) -> None:
    """Raises ModelError where it is not so.

    First `check_visibility`. Then the tokens of document 1, and those of one branch of document 2, are replaced: no
    hidden state that must not see them may move by more than rounding. Last, the other branch of document 2 must be the
    same in a sequence of its own, and document 1 what the model gives without the engine.
    """
    try:
        with evaluating(model), exact_routing(model):
            check_visibility(model)
            _check_probes(model)
    except ModelError:
        raise
    except FAILURES as error:
        if is_out_of_memory(error) or replaceable_kernels():
            raise
        # a layer that builds on the mask itself meets none here: the sparse attention of DeepSeek V3.2
        raise ModelError(
            f"{model_type(model)}: a layer fails on a sequence of several conversations ({type(error).__name__}: "
            f"{error}). Use another model type."
        ) from error


def _check_probes(model: nn.Module) -> None:
    vocab_size = output_head(model).weight_VD.shape[0]
    rng = np.random.default_rng(0)
    n = _PROBE_TOKENS
    first, context, left, right, other_first, other_left = (
        tuple(rng.integers(vocab_size, size=n).tolist()) for _ in range(6)
    )
    engine = Engine(model)
    before_TD = engine.hidden_states(_probe(first, context, left, right))
    document_TD = engine.hidden_states(_probe(other_first, context, left, right))
    branch_TD = engine.hidden_states(_probe(first, context, other_left, right))
    moved = f"{model_type(model)}: hidden states move"
    changes = f"{moved} when another conversation of their sequence changes"
    require_close(document_TD[n:], before_TD[n:], changes, _MIXING)
    changes = f"{moved} when another branch of their tree changes"
    require_close(branch_TD[3 * n :], before_TD[3 * n :], changes, _MIXING)
    second = Tree("probe:2", (Segment("context", context, None), Segment("target", right, 0)))
    alone_TD = engine.hidden_states(pack_trees([second]))
    second_TD = torch.cat([before_TD[n : 2 * n], before_TD[3 * n :]])
    differs = f"{moved} between a conversation alone and behind others: its positions are lost"
    require_close(second_TD, alone_TD, differs)
    ids = torch.tensor([first], device=before_TD.device)
    decoder = decoder_of(model)
    # eager is what the model's authors wrote; sdpa leaves Gemma 2's soft-cap out in transformers 5.17
    with attention_implementation(decoder, "eager"):
        own_TD = decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
    require_close(before_TD[:n], own_TD, f"{moved} between the model's own attention and ours")


def _probe(
    first: tuple[int, ...], context: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...]
) -> PackedSequence:
    """Document 1, and document 2 with two branches after its context."""
    document = Tree("probe:1", (Segment("target", first, None),))
    segments = (Segment("context", context, None), Segment("target", left, 0), Segment("target", right, 0))
    return pack_trees([document, Tree("probe:2", segments)])
