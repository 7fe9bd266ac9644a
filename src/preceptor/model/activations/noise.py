"""Uniform noise on the input embeddings (NEFTune: Jain et al. 2023, arXiv:2310.05914).

Each token's embedding gets `alpha / sqrt(L D)` times uniform numbers of (-1, 1), L the tokens of its conversation. They
are a function of seed, step, the conversation's tokens and the place in it: the same however conversations are packed,
on every rank and after any stop. Evaluation has no step, and so no noise.

Legend: T tokens of a sequence, M tokens of a pass, D hidden size.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from preceptor.data.forest import PackedSequence
from preceptor.model.random_bits import random_bits, random_key


@dataclass(frozen=True, slots=True)
class EmbeddingNoise:
    """Of one optimizer step."""

    alpha: float
    seed: int
    step: int

    def of(self, sequence: PackedSequence, embedding: nn.Module) -> Tensor:
        """(T, D), float32."""
        weight_VD: Tensor = embedding.weight  # type: ignore[assignment]
        hidden_size = weight_VD.shape[1]
        parts = []
        for start, end in _trees(sequence):
            ids = sequence.ids_T[start:end]
            key = random_key(self.seed, self.step, zlib.crc32(ids.tobytes()))
            bits = random_bits(key, 0, len(ids) * hidden_size, weight_VD.device).view(len(ids), hidden_size)
            parts.append(bits.float().mul_(self.alpha / (len(ids) * hidden_size) ** 0.5 / (1 << 31)))
        return torch.cat(parts)


def _trees(sequence: PackedSequence) -> Iterator[tuple[int, int]]:
    """Where each conversation begins and ends."""
    starts = [
        span.start
        for before, span in zip((None, *sequence.spans), sequence.spans, strict=False)
        if before is None or before.tree != span.tree
    ]
    return zip(starts, [*starts[1:], sequence.num_tokens], strict=True)


@contextmanager
def noisy(embedding: nn.Module, noise_MD: Tensor | None) -> Iterator[None]:
    """Within the block the embedding adds the noise of its tokens; those behind them get none."""
    if noise_MD is None:
        yield
        return

    def add(module: nn.Module, args: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        missing = embedded.shape[-2] - len(noise_MD)
        return embedded + pad(noise_MD, (0, 0, 0, missing)).to(embedded.dtype)

    hook = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
