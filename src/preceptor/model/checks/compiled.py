"""Proof that compiled layers give the loss and the gradient that the same layers give as they are written."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from preceptor.errors import ModelError
from preceptor.model.closeness import FAILURES, require_close
from preceptor.model.forward import Engine
from preceptor.model.parts import evaluating, has_dropout, model_type

_ADVICE = "Set `engine: efficient`."


def check_compiled(model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype) -> None:
    """Raises ModelError where it is not so, or where the layers cannot be compiled.

    loss: of some sequence, with a graph. dtype: in which the numbers are computed. Dropout, which is drawn otherwise in
    compiled layers, is off meanwhile. Gradients are left as they are: none.
    """
    state = Engine(model).state
    found = _measured(model, loss)
    state.optimisations.discard("compile")
    try:
        true = _measured(model, loss)
    finally:
        state.optimisations.add("compile")
    differs = f"{model_type(model)}: loss or gradient of compiled layers is another one"
    require_close(found, true, differs, _ADVICE, dtype)


def _measured(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """The loss, and the norm of the gradient of each parameter over all of them, so that each counts alike."""
    try:
        if has_dropout(model):
            with evaluating(model):
                own = loss()
        else:
            own = loss()
        own.backward()
    except (ModelError, torch.OutOfMemoryError):
        raise
    except FAILURES as error:
        words = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{model_type(model)}: torch.compile failed ({type(error).__name__}: {words}). {_ADVICE}"
        ) from error
    gradients: list[Any] = [p.grad for p in model.parameters() if p.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(each, dtype=torch.float32) for each in gradients])
    model.zero_grad(set_to_none=True)
    return torch.cat([own.detach().float().view(1), norms / norms.norm().clamp_min(1e-30)])
