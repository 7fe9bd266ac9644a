"""Decoder layers and the loss compiled by torch.compile, attention outside of what is compiled.

What is compiled: the authors' `forward` of each class of layer, once for all layers of that class, from the layer's
input to attention and from there to its output: norms, rotary embeddings, gated units, residuals and casts become a few
kernels. Attention has kernels of its own (attention/cuda.py). A graph is made for the first length of a sequence and
one for all others; further ones for other types, with and without gradients.

Layers that are not compiled (mixtures of experts, hybrids, sharded models) have their norms and gated units, and the
loss, compiled each by itself: forward and backward are a kernel or two (activations/modules.py).
"""

import time
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from preceptor.model.parts import decoder_layers, has_experts, path_mixers
from preceptor.model.sizes import device_type_of, is_dry_run

BACKEND = "inductor"
CARRIES = "its layers carry a state from token to token, and each sequence has other runs"
ADAPTED_EXPERTS = "its experts are adapted, which peft sets up again in each pass, so that torch compiles without end"
_MOST_FORMS = 64  # graphs of one function; beyond, torch would run it uncompiled, without a word, or end the run
_CAPABILITY = (7, 0)  # of GPUs for which Triton compiles


def no_compiler(device: torch.device) -> str | None:
    """Why nothing is compiled for a device; None: it can be."""
    if device_type_of(device) != "cuda" or is_dry_run():
        return "on a GPU only"
    if find_spec("triton") is None:
        return "Triton is not installed"
    return (
        "the GPU is older than Triton compiles for" if torch.cuda.get_device_capability(device) < _CAPABILITY else None
    )


def why_not(model: nn.Module, device: torch.device) -> str | None:
    """Why `engine: auto` does not compile the layers of a model; None: it does."""
    if (reason := no_compiler(device)) is not None:
        return reason
    if adapts_experts(model):
        return ADAPTED_EXPERTS
    if has_experts(model):
        return "the number of tokens of each expert is another one in each sequence"
    if path_mixers(model):
        return CARRIES
    return None if decoder_layers(model) else "the model does not say which of its modules are layers"


def adapts_experts(model: nn.Module) -> bool:
    """Whether an adapter is on experts that are one tensor: peft parametrizes it before a pass, and undoes that."""
    return any(isinstance(module, ParamWrapper) for module in model.modules())


def run_compiled(layer: Any, forward: Callable[..., Any], arguments: Any, named: dict[str, Any]) -> Any:
    """What `forward` of a layer's class gives."""
    dynamo = import_module("torch._dynamo")
    for each in tree_leaves((arguments, named)):
        if isinstance(each, Tensor) and each.dim() >= 2 and len(each) == 1 and each.shape[1] > 1:  # (1, T, ...)
            dynamo.maybe_mark_dynamic(each, 1)
    return _form_of(forward)(layer, *arguments, **named)


def compiled_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors, compiled as a whole for any number of tokens."""
    return _form_of(function, fullgraph=True, dynamic=True)


def run_rowwise(function: Callable[..., Any], *given: Any) -> Any:
    """What a function of tensors (..., D) gives, compiled as a whole for any number of rows, but for each D."""
    dynamo = import_module("torch._dynamo")
    for each in given:
        if isinstance(each, Tensor):
            dynamo.mark_static(each, each.dim() - 1)
            rows = next((at for at, size in enumerate(each.shape[:-1]) if size > 1), None)
            if rows is not None:
                dynamo.maybe_mark_dynamic(each, rows)
    return _form_of(function, fullgraph=True)(*given)


class _Watch:
    """The time that torch spends on compiling, wherever it does so."""

    def __init__(self) -> None:
        self.seconds = self._began = 0.0

    def start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._began


@lru_cache
def watch() -> _Watch:
    """Begin to take the time, before anything is compiled."""
    watching, handler = _Watch(), import_module("torch._dynamo.callback").callback_handler
    handler.register_start_callback(watching.start)
    handler.register_end_callback(watching.end)
    return watching


def compile_seconds() -> float:
    """What compiling has taken in this process so far."""
    return watch().seconds if watch.cache_info().currsize else 0.0


def num_graphs() -> int:
    """Graphs that were made in this process so far."""
    if not watch.cache_info().currsize:
        return 0
    return int(import_module("torch._dynamo.utils").counters["stats"]["unique_graphs"])


def _form_of(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """To be called in this thread: each has a limit of its own, and a GPU's backward pass runs in another one."""
    dynamo: Any = import_module("torch._dynamo").config
    if dynamo.recompile_limit < _MOST_FORMS:
        dynamo.recompile_limit = _MOST_FORMS
    return _compiled(function, BACKEND, **settings)


@lru_cache
def _compiled(function: Callable[..., Any], backend: str, **settings: Any) -> Callable[..., Any]:
    watch()
    return torch.compile(function, backend=backend, **settings)
