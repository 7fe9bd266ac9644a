"""Proofs, on the user's own model, that packing and memory saving change nothing.

Legend: T tokens, D hidden size, N tokens with logits, V vocabulary.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from preceptor.data.forest import Segment, Tree, pack_trees
from preceptor.errors import ModelError, first_line, is_out_of_memory
from preceptor.model.activations.inputs import SequenceInputs, phases
from preceptor.model.activations.modules import fused_trial, fusible
from preceptor.model.activations.passes import decode_phases, decode_whole
from preceptor.model.attention.cuda import replaceable_kernels
from preceptor.model.attention.runs import attention_implementation
from preceptor.model.forward import Engine
from preceptor.model.loss.linear_cross_entropy import Head, linear_cross_entropy, output_head
from preceptor.model.loss.softmax import block_tokens_of
from preceptor.model.numerics import FAILURES, random_bits, random_key, relative_error, require_close, rounding
from preceptor.model.optimisations import install, probe_sequence
from preceptor.model.options import ActivationPolicy, LossOptions
from preceptor.model.parts import (
    causal_lm,
    decoder_of,
    device_of,
    evaluating,
    exact_routing,
    has_dropout,
    model_type,
    path_mixers,
)
from preceptor.model.sizes import device_type_of

_PROBE_TOKENS = {"cpu": 24, "cuda": 64}  # of a segment; there four of them are enough for flex (attention/cuda.py)
_MIXING = (
    "Its layers mix tokens outside attention (recurrence or convolution), so conversations cannot share a sequence. "
    "Use a model with attention only."
)


@torch.no_grad()
def check_isolation(model: nn.Module) -> None:
    """Raises ModelError where a packed sequence does not keep its trees and branches apart, or changes anything else.

    First `check_visibility`. Then the tokens of document 1, and those of one branch of document 2, are replaced: no
    hidden state that must not see them may move by more than rounding. Last, the other branch of document 2 must be the
    same in a sequence of its own, and document 1 what the model gives without the engine.
    """
    # a layer that builds on the mask itself meets none here: the sparse attention of DeepSeek V3.2
    where = f"{model_type(model)}: a layer fails on a sequence of several conversations"
    with _failures_said(where), evaluating(model), exact_routing(model):
        check_visibility(model)
        _check_probes(model)


@contextmanager
def _failures_said(where: str, advice: str = "Use another model type.") -> Iterator[None]:
    """Raises ModelError for a layer that does not support its inputs; not where another kernel may."""
    try:
        yield
    except ModelError:
        raise
    except FAILURES as error:
        if is_out_of_memory(error) or replaceable_kernels():
            raise
        raise ModelError(f"{where} ({type(error).__name__}: {error}). {advice}") from error


def _check_probes(model: nn.Module) -> None:
    """Document 1, and document 2 with two branches after its context."""
    vocab_size, n = output_head(model).weight_VD.shape[0], _probe_tokens(model)
    rng = np.random.default_rng(0)
    first, context, left, right, other_first, other_left = (
        tuple(rng.integers(vocab_size, size=n).tolist()) for _ in range(6)
    )

    def hidden(document: tuple[int, ...] | None, *branches: tuple[int, ...]) -> Tensor:
        one = [] if document is None else [Tree("probe:1", (Segment("target", document, None),))]
        targets = (Segment("target", branch, 0) for branch in branches)
        other = Tree("probe:2", (Segment("context", context, None), *targets))
        return Engine(model).hidden_states(pack_trees([*one, other]))

    before_TD = hidden(first, left, right)
    moved = f"{model_type(model)}: hidden states move"
    changes = f"{moved} when another conversation of their sequence changes"
    require_close(hidden(other_first, left, right)[n:], before_TD[n:], changes, _MIXING)
    changes = f"{moved} when another branch of their tree changes"
    require_close(hidden(first, other_left, right)[3 * n :], before_TD[3 * n :], changes, _MIXING)
    second_TD = torch.cat([before_TD[n : 2 * n], before_TD[3 * n :]])
    differs = f"{moved} between a conversation alone and behind others: its positions are lost"
    require_close(second_TD, hidden(None, right), differs)
    ids = torch.tensor([first], device=before_TD.device)
    _require_own(model, ids, before_TD[:n], f"{moved} between the model's own attention and ours")


def _probe_tokens(model: nn.Module) -> int:
    return _PROBE_TOKENS.get(device_type_of(device_of(model)), _PROBE_TOKENS["cpu"])


# The attention of the authors -----------------------------------------------------------------------------------------

# Eager is what they wrote; sdpa leaves Gemma 2's soft-cap out in transformers 5.17. In half precision it rounds scores
# before the softmax, which the kernels do not: where keys are large (the biases of Qwen 2) it is the less exact one. So
# it may be right in either way: as it is, or given float32 tensors.

_WIDE = "preceptor_wide_eager"


def _wide_eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    eager = sys.modules[type(module).__module__].eager_attention_forward
    output = eager(module, query.float(), key.float(), value.float(), attention_mask, **named)[0]
    return output.to(query.dtype), None


AttentionInterface.register(_WIDE, _wide_eager)
AttentionMaskInterface.register(_WIDE, eager_mask)


def _require_own(model: nn.Module, ids: Tensor, found_TD: Tensor, problem: str) -> None:
    """Raises ModelError, with `problem`, where these are not the hidden states by eager attention in either way."""
    decoder = decoder_of(model)

    def own(implementation: str) -> Tensor:
        with attention_implementation(decoder, implementation):
            states: Tensor = decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
        return states

    own_TD = own("eager")
    if found_TD.dtype.itemsize == 2 and not relative_error(found_TD, own_TD) <= rounding(found_TD.dtype):
        with suppress(AttributeError):  # of authors who call it by another name
            own_TD = own(_WIDE)
    require_close(found_TD, own_TD, problem)


# What each layer sees -------------------------------------------------------------------------------------------------

# transformers puts sliding windows, chunks and bidirectional spans into masks, and models hand only some of that to the
# attention function. So the model is run once with a mask function that asks transformers' own rule, at positions that
# lie far apart as well as side by side, and with an attention function that compares the answer with the rule that
# `attend_runs` follows. This costs one forward pass of about a hundred tokens, whatever the length of the window.

_PROBE = "preceptor_visibility_probe"
_LARGEST_POWER = 20  # positions up to 2^20, beyond any window in use


@torch.no_grad()
def check_visibility(model: nn.Module) -> None:
    """Raises ModelError, naming the layer, where the forest would show a layer other tokens than transformers does."""
    decoder = decoder_of(model)
    positions = _probe_positions(decoder.config)
    probed: list[str] = []
    device = decoder.get_input_embeddings().weight.device
    ids = torch.zeros(1, len(positions), dtype=torch.long, device=device)
    with evaluating(model), attention_implementation(decoder, _PROBE):
        decoder(input_ids=ids, use_cache=False, probe_positions=positions, probed=probed)
    if not probed and not path_mixers(model):
        raise ModelError(
            f"{model_type(model)}: no layer looks its attention up in transformers' AttentionInterface, so "
            f"conversations cannot be kept apart in one sequence. Use another model type."
        )


def _probe_positions(config: object) -> list[int]:
    """Neighbours of the powers of two, and of the window or chunk that the config names; ascending."""
    edges = [2**power for power in range(1, _LARGEST_POWER + 1)]
    for name in ("sliding_window", "attention_chunk_size"):
        edge = getattr(config, name, None)
        if isinstance(edge, int):
            edges.append(edge)
    return sorted({0, *(edge + step for edge in edges for step in (-1, 0, 1))})


def _probe_mask(mask_function: Callable[..., Tensor], config: object, device: torch.device, **_: Any) -> Tensor:
    """transformers' rule at the probe's positions, (1, 1, P, P) bool, in place of the mask of P neighbours."""
    position_P = torch.tensor(_probe_positions(config), device=device)
    zero = torch.zeros((), dtype=torch.long, device=device)
    visible_PP: Tensor = mask_function(zero, zero, position_P[:, None], position_P[None, :])
    return visible_PP[None, None]


def _probe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    probe_positions: list[int] | None = None,
    probed: list[str] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compare the layer's mask with what the forest would show it; the output is any finite values."""
    name = f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')}"
    if probe_positions is None or probed is None:
        raise ModelError(
            f"{name} drops keyword arguments on the way to attention, so it cannot be told a sequence's layout"
        )
    position_P = torch.tensor(probe_positions, device=query.device)
    distance_PP = position_P[:, None] - position_P[None, :]
    expected_PP = distance_PP >= 0
    if sliding_window is not None:
        expected_PP &= distance_PP < sliding_window
    if attention_mask is None or not torch.equal(attention_mask[0, 0].bool(), expected_PP):
        window = "no sliding window" if sliding_window is None else f"a sliding window of {sliding_window}"
        raise ModelError(
            f"{name} asks attention for {window}, but its mask shows it other tokens than that (chunked or "
            f"bidirectional attention, or no mask at all). Use a model whose layers attend causally."
        )
    probed.append(name)
    output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_PROBE, _probe_attention)
AttentionMaskInterface.register(_PROBE, _probe_mask)


# One conversation at a time -------------------------------------------------------------------------------------------


@torch.no_grad()
def check_sequential(model: nn.Module) -> None:
    """Prove on random tokens that each reads the tokens before it only, by the attention that its authors wrote.

    Raises ModelError if a token's hidden state follows a later token, or differs under eager attention.
    """
    decoder = decoder_of(model)
    weight_VD = decoder.get_input_embeddings().weight
    n, generator = _probe_tokens(model), torch.Generator().manual_seed(0)
    ids_2T = torch.randint(len(weight_VD), (2, 2 * n), generator=generator).to(weight_VD.device)
    ids_2T[1, :n] = ids_2T[0, :n]
    with evaluating(model):
        first_TD, second_TD = (decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in ids_2T)
        follows = f"{model_type(model)}: its hidden states follow later tokens: it is no causal model"
        require_close(second_TD[:n], first_TD[:n], follows)
        if decoder._can_set_attn_implementation():  # else it has no other attention than its own
            own = f"`{decoder.config._attn_implementation}` attention is not the eager one"
            _require_own(model, ids_2T[:1], first_TD, f"{model_type(model)}: {own}")


# The output head ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Prove on random tokens that the output head gives the model's own logits. Raises ModelError if it is not so."""
    bare, head = causal_lm(model), output_head(model)
    weight_VD = head.weight_VD
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(weight_VD.shape[0], (1, 8), generator=generator).to(weight_VD.device)
    with evaluating(model):
        expected_NV = bare(input_ids=ids, use_cache=False).logits[0]
        hidden_ND = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    if hidden_ND.shape[-1] != weight_VD.shape[-1]:
        raise ModelError(
            f"{model_type(model)}: the output embedding reads {weight_VD.shape[-1]} values per token, hidden states "
            f"have {hidden_ND.shape[-1]}: this model does more between them than is known here, so its loss would be "
            f"wrong. Use another model type."
        )
    require_close(
        replace(head, weight_VD=weight_VD.double()).logits(hidden_ND.double()),
        expected_NV.double(),
        f"{model_type(model)}: the logits from the output embedding differ from the model's own, as this model does "
        f"more to its logits than is known here, so its loss would be wrong",
        # a head that an adapter trains whole is float32 beside a decoder in bfloat16
        dtype=max(weight_VD.dtype, hidden_ND.dtype, expected_NV.dtype, key=rounding),
    )


# Phases ---------------------------------------------------------------------------------------------------------------

_WITHOUT_PHASES = "Set memory.context_gradient to `full`."


@torch.no_grad()
def check_phases(model: nn.Module, policy: ActivationPolicy) -> None:
    """Raises ModelError where hidden states that a loss reads move phase by phase; nothing is proved without phases."""
    state = install(model)
    if policy.context_gradient == "full" or "attention" not in state.optimisations:
        return
    sequence = probe_sequence(model)
    # LongCat's layers have two attentions each, of which only the first leaves its keys
    where = f"{model_type(model)}: a layer fails when a sequence goes through the model phase by phase"
    with _failures_said(where, _WITHOUT_PHASES), evaluating(model):
        inputs = SequenceInputs.of(model, sequence, phases(sequence))
        found_ND = decode_phases(model, state, inputs, policy)[inputs.source_N]
        true_TD = decode_whole(model, state, SequenceInputs.of(model, sequence))
    moved = f"{model_type(model)}: hidden states move when a sequence goes through the model phase by phase"
    require_close(found_ND, true_TD[sequence.source_N], moved, _WITHOUT_PHASES)


# Compiled layers ------------------------------------------------------------------------------------------------------

_NOT_COMPILED = "Set `engine: efficient`."
_ROOTS = (1, 1 / 2, 1 / 4)
"""Powers of the rounding, by which loss, norms and directions may differ: a model of random weights amplifies that of
its first layers, in bfloat16 to directions that differ by a third. What is negated or permuted differs by about 1."""
_PART = 2**24  # elements of a gradient that are looked at together


def check_compiled(model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype) -> None:
    """Raises ModelError where loss or gradient of compiled layers is another one, or where they cannot be compiled.

    loss: of some sequence, with a graph. dtype: in which the numbers are computed. Dropout, which is drawn otherwise in
    compiled layers, is off meanwhile. Gradients are left as they are: none.
    """
    state = Engine(model).state
    state.optimisations.discard("compile")
    try:
        true = _measured(model, loss)  # first: what fails here too is no fault of compiling
    finally:
        state.optimisations.add("compile")
    try:
        found = _measured(model, loss)
    except ModelError:
        raise
    except Exception as error:  # Triton's own errors are of no common kind
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{model_type(model)}: torch.compile failed ({type(error).__name__}: {first_line(error)}). {_NOT_COMPILED}"
        ) from error
    differs = f"{model_type(model)}: loss or gradient of compiled layers is another one"
    for own, expected, root in zip(found, true, _ROOTS, strict=True):
        require_close(own, expected, differs, _NOT_COMPILED, bound=rounding(dtype) ** root)


def check_fused(model: nn.Module, options: LossOptions, dtype: torch.dtype) -> None:
    """Raises ModelError where a norm, a gated unit or the loss gives something else compiled, or cannot be compiled.

    By itself and on random numbers: of the types of the weights and `dtype`, in which the model computes. The rounding
    of a whole model could send tokens to other experts. Of the loss two blocks of logits, by the model's own head but
    for its weight.
    """
    device, head = device_of(model), output_head(model)
    vocab_size = len(head.weight_VD)
    num = block_tokens_of(device, vocab_size) + 3

    def loss(dtype: torch.dtype, fused: bool) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)
        hidden_ND, weight_VD = (
            torch.randn(size, 16, generator=generator, device=device).to(dtype).requires_grad_()
            for size in (num, vocab_size)
        )
        own = Head(weight_VD, softcap=head.softcap, logit_scale=head.logit_scale)
        places, weight_N = torch.arange(num, device=device), torch.full((num,), 1 / num, device=device)
        target_N = places % vocab_size
        found = linear_cross_entropy(hidden_ND, own, places, target_N, weight_N, options=options, compiled=fused)
        return found.detach(), *torch.autograd.grad(found, (hidden_ND, weight_VD))

    trials = [("loss", loss)] + [
        (type(module).__name__, partial(fused_trial, module, device)) for module in fusible(decoder_of(model))
    ]
    for name, trial in trials:
        for each in {dtype, causal_lm(model).dtype}:
            true = trial(each, fused=False)
            try:
                found = trial(each, fused=True)
            except Exception as error:  # Triton's own errors are of no common kind
                if is_out_of_memory(error):
                    raise
                raise ModelError(
                    f"{name}: torch.compile failed ({type(error).__name__}: {first_line(error)})"
                ) from error
            rounded = dtype if trial is loss else each  # autocast has logits and their gradient in `dtype`
            for own, expected in zip(found, true, strict=True):
                require_close(own, expected, f"{name}: compiled in {each}, it gives something else", "", dtype=rounded)


def _measured(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; the norm of each parameter's gradient; the same with its sum with signs, which depends on direction."""
    with evaluating(model) if has_dropout(model) else nullcontext():
        own = loss()
        own.backward()  # layers that run again in it are to do the same
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = torch.stack([torch.linalg.vector_norm(each, dtype=torch.float32) for each in gradients.values()])
    sums = torch.stack([_signed_sum(name, gradient) for name, gradient in gradients.items()])
    model.zero_grad(set_to_none=True)
    return own.detach().float().view(1), norms, torch.cat([norms, sums])


def _signed_sum(name: str, gradient: Tensor) -> Tensor:
    """The sum of all elements, each with a fixed sign of its place: another one where they are negated or permuted."""
    total, parts = gradient.new_zeros((), dtype=torch.float32), gradient.flatten().split(_PART)
    for at, part in enumerate(parts):
        signs = random_bits(random_key(name), at * _PART, len(part), part.device) < 0
        total += torch.where(signs, -part, part).sum(dtype=torch.float32)
    return total
