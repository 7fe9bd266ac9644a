"""Batched greedy decoding, with the context tokens of training and the stop tokens of the saved model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Answer:
    """Generated tokens without the stop token, their text, and whether the model stopped by itself."""

    ids: tuple[int, ...]
    text: str
    stopped: bool


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    contexts: Sequence[Sequence[int]],
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[Answer]:
    """The greedy answer to each context, in the order given.

    Contexts go in batches of similar length, padded on the left; a KV cache is used. An answer ends before the first
    stop token, or after `max_new_tokens`.
    """
    if not contexts:
        return []
    stop = sorted(set(stop_token_ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop[0]
    order = sorted(range(len(contexts)), key=lambda index: len(contexts[index]))
    answers: dict[int, Answer] = {}
    with _evaluating(model):
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            ids_BT, mask_BT = _pad_left([contexts[index] for index in batch], pad, model.device)
            output_BT = model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                generation_config=_greedy(model, stop, pad, max_new_tokens),
            )
            for index, ids_T in zip(batch, output_BT[:, ids_BT.shape[1] :].tolist(), strict=True):
                answers[index] = _cut(ids_T, set(stop), tokenizer)
    return [answers[index] for index in range(len(contexts))]


def _greedy(model: Any, stop: list[int], pad: int, max_new_tokens: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop,
        pad_token_id=pad,
        bos_token_id=model.generation_config.bos_token_id,
        use_cache=True,
    )


def _pad_left(contexts: list[Sequence[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids in contexts)
    ids_BT = torch.full((len(contexts), longest), pad, dtype=torch.long)
    mask_BT = torch.zeros((len(contexts), longest), dtype=torch.long)
    for row, ids in enumerate(contexts):
        ids_BT[row, longest - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        mask_BT[row, longest - len(ids) :] = 1
    return ids_BT.to(device), mask_BT.to(device)


def _cut(ids: list[int], stop: set[int], tokenizer: Any) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in stop), None)
    kept = ids if end is None else ids[:end]
    return Answer(tuple(kept), tokenizer.decode(kept), stopped=end is not None)
