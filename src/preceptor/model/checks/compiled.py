"""Proof that compiled layers give the loss and the gradient that the same layers give as they are written."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from preceptor.errors import ModelError, first_line
from preceptor.model.closeness import FAILURES, require_close, rounding
from preceptor.model.forward import Engine
from preceptor.model.out_of_memory import is_out_of_memory
from preceptor.model.parts import evaluating, has_dropout, model_type
from preceptor.model.random_bits import random_bits, random_key

_ADVICE = "Set `engine: efficient`."
_ROOTS = (1, 1 / 2, 1 / 4)
"""Powers of the rounding, by which loss, norms and directions may differ: a model of random weights amplifies that of
its first layers, in bfloat16 to directions that differ by a third. What is negated or permuted differs by about 1."""
_PART = 2**24  # elements of a gradient that are looked at together


def check_compiled(model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype) -> None:
    """Raises ModelError where it is not so, or where the layers cannot be compiled.

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
    except FAILURES as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{model_type(model)}: torch.compile failed ({type(error).__name__}: {first_line(error)}). {_ADVICE}"
        ) from error
    differs = f"{model_type(model)}: loss or gradient of compiled layers is another one"
    for own, expected, root in zip(found, true, _ROOTS, strict=True):
        require_close(own, expected, differs, _ADVICE, bound=rounding(dtype) ** root)


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
