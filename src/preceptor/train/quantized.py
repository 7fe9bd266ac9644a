"""The quantized base of a run: made, and its loss compared with the unquantized one's; and what is saved of the run."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from preceptor.data.forest import Tree
from preceptor.data.loader import Loader, StreamLoader, pack
from preceptor.errors import is_out_of_memory
from preceptor.files import readable_bytes
from preceptor.model.forward import Engine
from preceptor.model.numerics import autocast
from preceptor.model.optimisations import remove
from preceptor.model.options import Quantization
from preceptor.model.parts import evaluating
from preceptor.model.quantization import quantizable, quantize

_SAMPLE_TOKENS = 1024  # of the run's data, on which losses are compared; one conversation at least
_SAMPLE_SEQUENCES = 16
_ROOM = 1.5  # free memory of a GPU over the bytes of the unquantized model, for it to be tried there


def quantize_base(
    model: Any,
    kind: Quantization,
    double: bool,
    loader: Loader | StreamLoader,
    precision: str,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Quantize a model that is on the CPU, and bring it to `device`. `say` gets its size and what the loss says of it.

    The unquantized model is run on the device where it fits there, else on the CPU.
    """
    trees, num_bytes = _sample(loader), _num_bytes(model)
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > _ROOM * num_bytes:
        model.to(device)
    before = _mean_loss(model, trees, precision)
    num_weights = sum(layer.weight.numel() for layer in quantizable(model).values())
    num_layers = quantize(model, kind, double, device)
    say(
        f"quantized to {kind}: {num_layers} linear layers ({num_weights:,} weights); "
        f"the model takes {readable_bytes(_num_bytes(model))} instead of {readable_bytes(num_bytes)}"
    )
    after = None if before is None else _mean_loss(model, trees, precision)
    num_tokens = sum(tree.num_tokens for tree in trees)
    if before is None or after is None:
        say("the loss of the unquantized model is not compared: memory does not suffice to run it")
    else:
        what = f"{len(trees)} conversation{'s' * (len(trees) != 1)} of this run, {num_tokens:,} tokens"
        say(
            f"loss of the base ({what}): quantized {after:.4f}, unquantized {before:.4f}, "
            f"difference {after - before:+.4f}"
        )


def _num_bytes(model: Any) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _sample(loader: Loader | StreamLoader) -> list[Tree]:
    """The shortest conversations of the first sequences, one at least."""
    planned = [tree for trees in loader.trees(0, _SAMPLE_SEQUENCES) for tree in trees]
    planned.sort(key=lambda tree: tree.num_tokens)
    ends = np.cumsum([tree.num_tokens for tree in planned])
    return planned[: max(1, int((ends <= _SAMPLE_TOKENS).sum()))]


@torch.no_grad()
def _mean_loss(model: Any, trees: Sequence[Tree], precision: str) -> float | None:
    """Nats per trained token, each conversation by itself; None where memory runs out."""
    engine = Engine(model)
    try:
        with evaluating(model), autocast(model.device, precision):
            sequences = pack(trees, alone=True)
            total = sum(engine(sequence).item() for sequence in sequences)
            return total / max(1.0, sum(float(sequence.weight_N.sum()) for sequence in sequences))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        remove(model)


@torch.no_grad()
def take_adapter(twin: Any, model: Any) -> None:
    """Give an adapter on the unquantized base the values of that on the quantized one."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in twin.named_parameters():
        if p.requires_grad:
            p.copy_(trained.pop(name))
    assert not trained, f"not of the unquantized model: {', '.join(trained)}"
