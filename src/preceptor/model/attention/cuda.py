"""Attention over a forest by CUDA's fused kernels: same signature and result as `attend_runs`, few launches a layer.

    tokens go through the layers       kernel                       work and memory
    chains, or a phase of a sequence   `varlen_attn` (flash)        one launch; keys of a branch are copied per path
    a whole sequence with branches     `flex_attention` (Triton)    one launch over blocks of 128 x 128 tokens, of which
                                                                    those that nothing sees are left out; no copies

`fast_path` alone chooses. What it chooses neither for goes run by run: any other device or dtype, phases with soft-cap
or sinks, heads that a kernel does not take, a kernel that failed before step 1. Flex honours soft-cap as a change of
the scores, and sinks afterwards: with L = logsumexp of a query's scores, a sink s scales its output by
exp(L) / (exp(L) + exp(s)) = sigmoid(L - s).

For flex a sequence is padded to whole blocks, by a conversation of its own behind the others: with a soft-cap,
gradients of a last block that is not full were NaN (pytorch#153799), and other lengths are compiled for again.

Legend: T tokens of a sequence, H query heads, K key-value heads, D head size, P keys of all paths joined, B blocks of
a sequence.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import attention
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad

from preceptor.errors import ModelError, PreceptorError, first_line, is_out_of_memory
from preceptor.model import compiled
from preceptor.model.attention.layout import (
    AttentionOptions,
    ForestLayout,
    KeysValues,
    RangesSeen,
    on_device,
    path_lengths,
    product_dtype,
)
from preceptor.model.sizes import device_type_of, is_dry_run

Attend = Callable[..., Tensor]
T = TypeVar("T")

BLOCK = 128  # tokens a side; flex's own, and the shortest sequence for which it takes its kernel for training
_SMALLEST_FLEX_HEAD = 16
_LARGEST_FLASH_HEAD = 256
_FLASH_CAPABILITY = (8, 0)
_MOST_FORMS = 256  # compiled forms of flex: 2 windows, with and without gradients, at 2 kinds of length are torch's 8;
# older versions may make one for a length too, and more forms than this end the run
FLEX = "flex_attention"
_FLASHES = {9: ("FA3", "FA4"), 10: ("FA4",)}  # by a GPU's capability, the fastest first
_in_use: set[str] = set()  # kernels that another can take the place of, and that have run in this process
_given_up: dict[str, str] = {}  # and those that failed, with the error


def fast_path(
    query: Tensor, key: Tensor, value: Tensor, layout: ForestLayout, options: AttentionOptions
) -> Attend | None:
    """The fastest function that computes exactly this; None: `attend_runs`."""
    if not _is_half_on_cuda(value):
        return None
    by_varlen = options.is_plain and _varlen_takes(query, key, value)
    by_flex = layout.subtree_end_T is not None and FLEX not in _given_up and _flex_takes(query, value)
    copies = any(ancestors for _, _, ancestors in layout.runs)
    if by_varlen and not (by_flex and copies):
        return attend_varlen
    layout.whole_alone = layout.whole_alone or (by_flex and not by_varlen)
    return attend_flex if by_flex else None


def _is_half_on_cuda(value: Tensor) -> bool:
    return device_type_of(value.device) == "cuda" and product_dtype(value) in (torch.float16, torch.bfloat16)


def _varlen_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    head_size = query.shape[-1]
    return (
        head_size == key.shape[-1] == value.shape[-1]
        and head_size % 8 == 0
        and head_size <= _LARGEST_FLASH_HEAD
        and (is_dry_run() or _has_flash(query.device))
    )


@lru_cache
def _arguments_of(function: Callable[..., Any]) -> frozenset[str]:
    """Once for each function: looked up for every layer, a signature takes milliseconds a sequence."""
    return frozenset(signature(function).parameters)


@lru_cache
def _has_flash(device: torch.device) -> bool:
    available: bool = torch.backends.cuda.is_flash_attention_available()
    return available and torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY


def _flex_takes(query: Tensor, value: Tensor) -> bool:
    smallest = min(query.shape[-1], value.shape[-1])
    return smallest >= _SMALLEST_FLEX_HEAD and query.shape[2] >= BLOCK and (is_dry_run() or _has_triton())


@lru_cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def replaceable_kernels() -> list[str]:
    """Those that have run in this process and that another can take the place of, the least loss first."""
    return sorted(_in_use - {*_given_up})


def give_up_kernel(error: str) -> str | None:
    """Use the first of them no more; which it was."""
    for name in replaceable_kernels():
        _given_up[name] = error
        if name != FLEX:
            attention.restore_flash_attention_impl()
        return name
    return None


def with_kernels_that_run(
    run: Callable[[], T],
    gave_up: Callable[[str, str], None] = lambda kernel, error: None,
    may_repeat: Callable[[], bool] = lambda: True,
    compares: bool = False,
) -> T:
    """What `run` gives; run again without the kernel that fails, of which `gave_up` hears, where there is another.

    Triton may have none for heads of this size on this GPU, in forward or in backward alone. Where `run` fails without
    the kernels too, they are not the cause: they are used again. may_repeat: asked after a failure, before `run` is run
    again. compares: a ModelError of `run` is that of numbers which differ, perhaps a kernel's; it is the one that is
    raised then, whatever fails without the kernels.
    """
    given_up: dict[str, str] = {}
    first: Exception | None = None
    while True:
        try:
            result = run()
        except Exception as error:  # Triton's own errors are of no common kind
            words = f"{type(error).__name__}: {first_line(error)}"
            differs = compares and isinstance(error, ModelError)
            is_other = is_out_of_memory(error) or (isinstance(error, PreceptorError) and not differs)
            kernel = None if is_other or not replaceable_kernels() or not may_repeat() else give_up_kernel(words)
            if kernel is None:
                for name in given_up:
                    del _given_up[name]
                    if name != FLEX:
                        attention.activate_flash_attention_impl(name)
                if first is not None:
                    raise first from None
                raise
            given_up[kernel] = words
            if differs:
                first = first or error.with_traceback(None)  # its frames hold tensors
        else:
            for name, words in given_up.items():
                gave_up(name, words)
            return result


def kernels() -> dict[str, Any]:
    """Of attention, for the record of a run: which flash, where it is not torch's own, and what has failed."""
    flash = attention.current_flash_attention_impl()
    return {**({"flash": flash} if flash else {}), **({"kernels_given_up": dict(_given_up)} if _given_up else {})}


@lru_cache
def _use_newest_flash(device: torch.device) -> None:
    """Let `varlen_attn` run FlashAttention 3 or 4 where it is installed, made for this GPU and known to torch.

    By torch's own switch, for the process. What a program has switched to by itself stays.
    """
    if device.type != "cuda" or attention.current_flash_attention_impl() is not None:
        return
    for name in _FLASHES.get(torch.cuda.get_device_capability(device)[0], ()):
        try:
            attention.activate_flash_attention_impl(name)
        except ModuleNotFoundError:
            continue
        except Exception as error:  # made for another torch or CUDA, and so without the symbols that it looks for
            _given_up[name] = f"{type(error).__name__}: {error}"
            continue
        _in_use.add(name)
        return


# Chains and phases ---------------------------------------------------------------------------------------------------


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ForestLayout,
    options: AttentionOptions,
    seen: RangesSeen | None = None,
) -> Tensor:
    """As `attend_runs`, without soft-cap and sinks: each run's queries against the keys of its path.

    Flash aligns causality and windows at the end of a path, so a run's tokens are its last queries; their number need
    not be that of the keys. A window (left, right) counts the tokens beside a query, so W tokens are (W - 1, 0).
    """
    assert options.is_plain
    _use_newest_flash(query.device)
    dtype = product_dtype(value)
    key, value = key.to(dtype), value.to(dtype)
    if layout.lengths is None:
        lengths = path_lengths(layout.runs)
        begins = on_device({place: np.cumsum([0, *each]) for place, each in enumerate(lengths)}, query.device)
        layout.lengths = begins[0].to(torch.int32), begins[1].to(torch.int32), max(lengths[0]), max(lengths[1])
    cu_query, cu_key, longest_run, longest_path = layout.lengths
    path_key, path_value = _join_paths(key, value, layout, {} if seen is None else seen)
    window = options.window_among(longest_path)
    # the kernel shares key heads among query heads by itself; torch 2.13 wants to be told, 2.11 has no word for it
    told = query.shape[1] != key.shape[1] and "enable_gqa" in _arguments_of(varlen_attn)
    grouped: dict[str, Any] = {"enable_gqa": True} if told else {}
    with torch.autocast(query.device.type, enabled=False):
        output_THD = varlen_attn(
            query[0].to(dtype).transpose(0, 1),
            path_key[0].transpose(0, 1),
            path_value[0].transpose(0, 1),
            cu_query,
            cu_key,
            longest_run,
            longest_path,
            scale=options.scale,
            window_size=(-1, 0) if window is None else (window - 1, 0),
            **grouped,
        )
    return cast(Tensor, output_THD).transpose(0, 1)[None]


def _join_paths(key: Tensor, value: Tensor, layout: ForestLayout, seen: RangesSeen) -> KeysValues:
    """Keys and values of all paths, one after the other, (1, K, P, D) each; the runs' own are put into `seen`."""
    lengths = [end - start for start, end, _ in layout.runs]
    assert sum(lengths) == key.shape[2], "runs cover the tokens"
    pieces = zip(key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    seen.update({(start, end): piece for (start, end, _), piece in zip(layout.runs, pieces, strict=True)})
    if not any(ancestors for _, _, ancestors in layout.runs):
        return key, value
    path = [seen[each] for start, end, ancestors in layout.runs for each in (*ancestors, (start, end))]
    keys, values = zip(*path, strict=True)
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)


# Trees ---------------------------------------------------------------------------------------------------------------


def attend_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ForestLayout,
    options: AttentionOptions,
    seen: RangesSeen | None = None,
) -> Tensor:
    """As `attend_runs` for a whole sequence. seen: not used, as a whole sequence sees nothing else."""
    if query.device.type == "cuda":
        _in_use.add(FLEX)
    dtype = product_dtype(value)
    num_tokens = query.shape[2]
    added = -num_tokens % BLOCK
    if ("flex", options.window) not in layout.made:
        layout.made["flex", options.window] = block_mask(layout, options.window)
    with torch.autocast(query.device.type, enabled=False):
        flex: Callable[..., Any] = _flex_without_values if is_dry_run() else _flex(query.device.type)
        output, aux = flex(
            *(pad(part.to(dtype), (0, 0, 0, added)) for part in (query, key, value)),
            score_mod=None if options.softcap is None else _softcapped(options.softcap),
            block_mask=layout.made["flex", options.window],
            scale=options.scale,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=options.sinks is not None),
        )
        if options.sinks is not None:
            share = torch.sigmoid(aux.lse - options.sinks.to(aux.lse.dtype)[None, :, None])
            output = (output * share[..., None]).to(dtype)
    return cast(Tensor, output[:, :, :num_tokens])


@lru_cache
def _flex(device_type: str) -> Callable[..., Any]:
    """Flex compiled once, on CUDA; elsewhere, for tests, as it is: the scores written out.

    Each form (with a window, with sinks, without gradients) is traced for the first length and, at the second, for all
    lengths. Not `dynamic=True`: it makes soft-cap and window variables too, and then the backward of soft-cap fails
    (torch 2.11 to 2.13). So it does at the second soft-cap of a process without `specialize_float`. `fullgraph`: what
    cannot be compiled is an error, never T x T scores; those would give soft-cap a wrong gradient under activation
    checkpointing besides, as it is traced among the layer's saved tensors.
    """
    if device_type != "cuda":
        return cast(Callable[..., Any], flex_attention)
    compiled.watch()
    settings: Any = import_module("torch._dynamo").config
    flex: Callable[..., Any] = torch.compile(flex_attention, backend=compiled.BACKEND, fullgraph=True)

    def run(*tensors: Tensor, **named: Any) -> Any:
        """With settings of this thread: each has its own, and layers run again in the one of backward."""
        limit = max(settings.recompile_limit, _MOST_FORMS)
        with settings.patch(specialize_float=True, recompile_limit=limit):
            return flex(*tensors, **named)

    return run


def _flex_without_values(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> tuple[Tensor, AuxOutput]:
    """What flex keeps for backward, for a dry run: its arguments, its result and a number per query."""
    output, logsumexp = _KeptByFlex.apply(query, key, value)
    return output, AuxOutput(lse=logsumexp)


class _KeptByFlex(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output, logsumexp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(part) for part in ctx.saved_tensors[:3])


@lru_cache
def _softcapped(softcap: float) -> Callable[..., Tensor]:
    """One function for each value, as another one would be compiled again."""

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def block_mask(layout: ForestLayout, sliding_window: int | None = None) -> BlockMask:
    """Which blocks of the sequence's T x T scores are computed, and which of these need the mask of single tokens.

    T is that of the sequence padded to whole blocks; what is added sees itself alone. By the extremes of each block, so
    that no T x T mask is ever made: with a key block's tokens j and a query block's tokens i, some are visible iff the
    blocks are in order and min i < max subtree_end[j]; all are if besides max i < min subtree_end[j]. A window W leaves
    out blocks with min position[i] - max position[j] >= W, so that some that nothing sees may stay; their mask is
    empty.
    """
    end_T, position_T = layout.subtree_end_T.to(torch.int32), layout.position_T.to(torch.int32)
    added = -len(end_T) % BLOCK
    num_tokens = len(end_T) + added
    end_T = pad(end_T, (0, added), value=num_tokens)
    position_T = torch.cat([position_T, torch.arange(added, dtype=torch.int32, device=end_T.device)])
    begin_B = torch.arange(0, num_tokens, BLOCK, device=end_T.device)
    last_B = begin_B + BLOCK - 1
    lowest_end_B, highest_end_B = _extremes(end_T)
    some_BB = (begin_B[None, :] <= begin_B[:, None]) & (begin_B[:, None] < highest_end_B[None, :])
    all_BB = (last_B[None, :] <= begin_B[:, None]) & (last_B[:, None] < lowest_end_B[None, :])
    if sliding_window is not None:
        lowest_B, highest_B = _extremes(position_T)
        some_BB &= lowest_B[:, None] - highest_B[None, :] < sliding_window
        all_BB &= highest_B[:, None] - lowest_B[None, :] < sliding_window

    def mask_mod(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        visible = (j <= i) & (i < end_T[j])
        return visible if sliding_window is None else visible & (position_T[i] - position_T[j] < sliding_window)

    masks = (*_ordered(some_BB & ~all_BB), *_ordered(all_BB))
    return BlockMask.from_kv_blocks(*masks, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(num_tokens, num_tokens))


def _extremes(value_T: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest of each block, (B,) each."""
    value_BB = value_T.view(-1, BLOCK)
    return value_BB.amin(dim=1), value_BB.amax(dim=1)


def _ordered(chosen_BB: Tensor) -> tuple[Tensor, Tensor]:
    """Flex's form: how many key blocks each query block has, (1, 1, B), and which, those first, (1, 1, B, B)."""
    which_BB = torch.argsort(chosen_BB.to(torch.int8), dim=1, descending=True, stable=True)
    return chosen_BB.sum(dim=1, dtype=torch.int32)[None, None], which_BB.to(torch.int32)[None, None]
