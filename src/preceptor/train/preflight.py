"""Proofs on the user's own model before step 1, each a fraction of a second."""

from typing import Any

import torch

from preceptor.model.forward import check_head, check_isolation


def preflight(model: Any) -> None:
    """Raises ModelError if the loss would not be the model's own, or conversations of a row would see each other."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        check_head(model)
        check_isolation(model)
    model.train(was_training)
