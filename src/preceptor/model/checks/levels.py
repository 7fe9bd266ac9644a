"""Proofs on the model itself that taking a row apart changes no hidden state that a loss reads."""

from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from preceptor.data.forest import PackedSequence, Segment, Tree, pack_trees
from preceptor.errors import ModelError
from preceptor.model.activations.levels import split
from preceptor.model.activations.passes import KEEP_ALL, Keep, decode_levels, decode_whole
from preceptor.model.attention.runs import causal_lm, decoder_of

FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
"""What a layer may raise that does not like what it is handed; running out of memory, a RuntimeError too, is none."""

_PROVED: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def rounding(dtype: torch.dtype) -> float:
    """The relative error that many layers' rounding may add up to: 6e-6 for float32, 0.03 for bfloat16."""
    return float(torch.finfo(dtype).eps ** 0.75)


def relative_error(found: Tensor, true: Tensor) -> float:
    return float((found - true).double().norm() / true.double().norm().clamp_min(1e-30))


def spares_the_last_layer(model: nn.Module) -> bool:
    """Whether the last layer can be run for read tokens only: tried on a few tokens, once for each model.

    Not so where the layer wants more than what is laid out by token, or where what transformers calls a layer is not
    what runs last; then the last layer runs for all tokens.
    """
    bare = causal_lm(model)
    if bare not in _PROVED:
        try:
            _PROVED[bare] = _error_of_last_layer(model) <= rounding(next(bare.parameters()).dtype)
        except (ModelError, *FAILURES):
            _PROVED[bare] = False  # whatever a layer does not like about fewer tokens: it then gets all of them
    return _PROVED[bare]


@torch.no_grad()
def _error_of_last_layer(model: nn.Module) -> float:
    row = _probe_row(model)
    parts = split(row)
    was_training = model.training
    model.eval()
    try:
        found_MD = decode_whole(model, row, KEEP_ALL, parts)
        true_TD = decode_whole(model, row, KEEP_ALL)
    finally:
        model.train(was_training)
    return relative_error(found_MD, true_TD[parts[1].index_T()])


@torch.no_grad()
def check_levels(model: nn.Module, keep: Keep) -> None:
    """Prove that the model's hidden states are the same level by level. Raises ModelError if they are not."""
    if keep.context_gradient == "full":
        return
    row = _probe_row(model)
    was_training = model.training
    model.eval()
    try:
        found_MD, index_M = decode_levels(model, row, keep)
        true_TD = decode_whole(model, row, KEEP_ALL)
    except (ModelError, torch.OutOfMemoryError):
        raise
    except FAILURES as error:  # LongCat's layers have two attentions each, of which only the first leaves its keys
        raise ModelError(
            f"{causal_lm(model).config.model_type}: a layer fails when a row goes through the model level by level "
            f"({type(error).__name__}: {error}). Set memory.context_gradient to `full`."
        ) from error
    finally:
        model.train(was_training)
    moved, bound = relative_error(found_MD, true_TD[index_M]), rounding(found_MD.dtype)
    if not moved <= bound:
        raise ModelError(
            f"{causal_lm(model).config.model_type}: hidden states move by a relative {moved:.1e} (rounding allows "
            f"{bound:.1e}) when a row goes through the model level by level. Set memory.context_gradient to `full`."
        )


def _probe_row(model: nn.Module) -> PackedSequence:
    """A two-turn conversation and a tree with a branch, of random tokens."""
    embedding: nn.Embedding = decoder_of(model).get_input_embeddings()
    rng = np.random.default_rng(0)

    def segment(target: bool, length: int, parent: int | None) -> Segment:
        ids = tuple(rng.integers(embedding.weight.shape[0], size=length).tolist())
        return Segment("target" if target else "context", ids, parent)

    chain = [segment(place % 2 == 1, 12, place - 1 if place else None) for place in range(4)]
    tree = [segment(False, 9, None), segment(True, 7, 0), segment(False, 5, 0), segment(True, 8, 2)]
    return pack_trees([Tree("probe:1", tuple(chain)), Tree("probe:2", tuple(tree))])
