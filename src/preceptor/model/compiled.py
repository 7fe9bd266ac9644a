"""Decoder layers and the loss compiled by torch.compile, attention outside of what is compiled.

What is compiled: the authors' `forward` of each class of layer, once for all layers of that class, from the layer's
input to attention and from there to its output: norms, rotary embeddings, gated units, residuals and casts become a few
kernels. Attention has kernels of its own (attention/cuda.py). A graph is made for the first length of a sequence and
one for all others; further ones for other types, with and without gradients.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from preceptor.model.parts import decoder_layers, has_experts
from preceptor.model.sizes import device_type_of, is_dry_run

BACKEND = "inductor"
_MOST_FORMS = 64  # graphs of one function; beyond, torch would run it uncompiled, without a word
_CAPABILITY = (7, 0)  # of GPUs for which Triton compiles


def why_not(model: nn.Module, device: torch.device) -> str | None:
    """Why `engine: auto` does not compile the layers of a model; None: it does."""
    if device_type_of(device) != "cuda" or is_dry_run():
        return "on a GPU only"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return "the GPU is older than Triton compiles for"
    if has_experts(model):
        return "the number of tokens of each expert is another one in each sequence"
    return None if decoder_layers(model) else "the model does not say which of its modules are layers"


def run_compiled(layer: Any, forward: Callable[..., Any], arguments: Any, named: dict[str, Any]) -> Any:
    """What `forward` of a layer's class gives."""
    for tensor in _of_tokens((arguments, named)):
        torch._dynamo.maybe_mark_dynamic(tensor, 1)
    return _compiled(forward, BACKEND)(layer, *arguments, **named)


def compiled_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors, compiled as a whole for any number of tokens."""
    return _compiled(function, BACKEND, fullgraph=True, dynamic=True)


def compile_seconds() -> float:
    """What compiling has taken in this process so far."""
    if not _is_loaded():
        return 0.0
    times: dict[str, float] = import_module("torch._dynamo.utils").calculate_time_spent()
    return times.get("total_wall_time", 0.0)


def num_graphs() -> int:
    """Graphs that were made in this process so far."""
    return int(import_module("torch._dynamo.utils").counters["stats"]["unique_graphs"]) if _is_loaded() else 0


def is_compile_error(error: BaseException) -> bool:
    """Whether torch could not compile something, rather than run it."""
    return _is_loaded() and isinstance(error, import_module("torch._dynamo.exc").TorchDynamoException)


def _is_loaded() -> bool:
    return _compiled.cache_info().currsize > 0


@lru_cache
def _compiled(function: Callable[..., Any], backend: str, **settings: Any) -> Callable[..., Any]:
    dynamo: Any = import_module("torch._dynamo").config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MOST_FORMS)
    return torch.compile(function, backend=backend, **settings)


def _of_tokens(given: Any) -> list[Tensor]:
    """Tensors that are laid out by token, (1, T, ...)."""
    if isinstance(given, Tensor):
        return [given] if given.dim() >= 2 and len(given) == 1 and given.shape[1] > 1 else []
    if isinstance(given, dict):
        given = given.values()
    elif not isinstance(given, list | tuple):
        return []
    return [tensor for each in given for tensor in _of_tokens(each)]
