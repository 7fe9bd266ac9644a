"""Equality of two results up to the rounding of their number type."""

import torch
from torch import Tensor

from preceptor.errors import ModelError

FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
"""Exceptions by which a layer shows that it does not support its inputs. Running out of memory, a RuntimeError too,
is not meant."""


def rounding(dtype: torch.dtype) -> float:
    """The relative error that the rounding of many layers may add up to: 6e-6 for float32, 0.03 for bfloat16."""
    return float(torch.finfo(dtype).eps ** 0.75)


def relative_error(found: Tensor, true: Tensor) -> float:
    return float((found - true).double().norm() / true.double().norm().clamp_min(1e-30))


def require_close(
    found: Tensor,
    true: Tensor,
    problem: str,
    advice: str = "Use another model type.",
    dtype: torch.dtype | None = None,
    bound: float | None = None,
) -> None:
    """Raise ModelError, with `problem` and `advice`, where the two differ by more than the rounding of `dtype`.

    dtype: in which the numbers were computed; by default that of `true`. bound: of the relative error, instead.
    """
    error, bound = relative_error(found, true), bound or rounding(dtype or true.dtype)
    if not error <= bound:
        raise ModelError(f"{problem}: a relative difference of {error:.1e}, rounding allows {bound:.1e}. {advice}")
