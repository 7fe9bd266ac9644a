"""Batched generation from context tokens, greedy or sampled."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from preceptor.errors import ModelError, is_out_of_memory
from preceptor.model.parts import evaluating

NOT_FINITE = "the model's logits are not finite: its weights are damaged, or the learning rate was far too high"
_UNTIL_EVERY_TOKENS = 4  # decoding all answers after each token would cost more than a few surplus tokens
_KEYS_AND_VALUES = ("DynamicLayer", "DynamicSlidingWindowLayer")  # layers of a cache whose rows can be taken
_SMALL_BATCH = 8  # below which a step takes hardly less time for fewer answers
# Settings of a model's own that count from the beginning of the answer, or from its prompt, and a choice of cache.
_OF_ONE_PASS = (
    *("min_new_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty", "guidance_scale"),
    *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "cache_implementation"),
)
# Settings of a model's own that are not taken: tokens that are never drawn, and other answers than one per context that
# ends at a stop token.
_NOT_TAKEN = (
    *("top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("stop_strings", "token_healing", "num_return_sequences", "prompt_lookup_num_tokens"),
)


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """The answer of a model to one context."""

    ids: tuple[int, ...]  # without the stop token
    text: str
    stopped: bool  # by a stop token; otherwise the length limit ended it
    stop_id: int | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """Tokens are drawn from softmax(logits / temperature) by `seed`; the global random state is left unchanged.

    The model's own penalties change the logits before; its top_p and other cuts are not taken.
    """

    temperature: float
    seed: int


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    contexts: Sequence[Sequence[int]],
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int = 64,
    sampling: Sampling | None = None,
    until: Sequence[Sequence[str]] = (),
    in_step: bool = False,
) -> list[GeneratedAnswer]:
    """The answer to each context, in order: greedy, or sampled.

    Contexts are batched by length and padded on the left; a KV cache is used. An answer ends before the first stop
    token, after `max_new_tokens`, or a few tokens after the first of its `until` texts (one list per context). Where
    memory runs out, the batch is halved. Once half of a batch's greedy answers have ended, the others go on without
    them, with their rows of the cache. Raises ModelError where a single answer does not fit, and where logits are not
    finite. in_step: processes that share the model's weights generate at the same time, as many contexts each; they go
    on until the last answer ends, and no batch is halved.
    """
    if not contexts:
        return []
    stop = sorted(set(stop_token_ids))
    rows = model.get_input_embeddings().weight.shape[0]  # a tokenizer may have more tokens, also its pad token
    pad = next((id_ for id_ in (tokenizer.pad_token_id, *stop) if id_ is not None and id_ < rows), 0)
    order = sorted(range(len(contexts)), key=lambda index: len(contexts[index]))
    answer = _Batches(model, tokenizer, contexts, stop, pad, max_new_tokens, sampling, until, in_step)
    with evaluating(model), _seeded(model, sampling), _own_settings(model):
        while order:
            batch = order[:batch_size]
            if _fits(answer, batch):
                del order[:batch_size]
                continue
            if len(batch) == 1 or in_step:
                raise ModelError(
                    f"{len(batch)} at a time, answers of {max_new_tokens} tokens to prompts of "
                    f"{len(contexts[batch[-1]]):,} tokens do not fit in memory: lower the number of new tokens "
                    "(eval.max_new_tokens, --max-new-tokens), or leave the longest prompts out"
                )
            batch_size = len(batch) // 2
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
    return [answer.answers[index] for index in range(len(contexts))]


@dataclass(frozen=True, eq=False)
class _Batches:
    """Answers batches of contexts, which are named by their index; arguments as those of `generate`."""

    model: Any
    tokenizer: Any
    contexts: Sequence[Sequence[int]]
    stop: list[int]
    pad: int
    max_new_tokens: int
    sampling: Sampling | None
    until: Sequence[Sequence[str]]
    in_step: bool
    answers: dict[int, GeneratedAnswer] = field(default_factory=dict)

    def __call__(self, batch: Sequence[int]) -> None:
        """In passes over those that have not ended, which have equally many tokens so far."""
        left, num_so_far, cache = list(batch), 0, None
        contexts = [torch.tensor(self.contexts[index], dtype=torch.long) for index in left]
        ids_BT, mask_BT = (
            pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left").to(self.model.device)
            for rows, value in ((contexts, self.pad), ([torch.ones_like(ids_T) for ids_T in contexts], 0))
        )
        begin = ids_BT.shape[1]
        stop_S = torch.tensor(self.stop, dtype=torch.long, device=self.model.device)
        in_passes = self.sampling is None and not self.in_step and _takes_passes(self.model)
        while left:
            until = [self.until[index] for index in left] if self.until else []
            early = in_passes and len(left) >= _SMALL_BATCH
            ends = _Ends(self.tokenizer, until, begin, stop_S if early else None)
            num_left, finite = self.max_new_tokens - num_so_far, _Finite()
            output = self.model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                generation_config=_settings(self.model, self.stop, self.pad, num_left, self.sampling),
                synced_gpus=self.in_step,
                stopping_criteria=[ends] if until or early else None,
                logits_processor=[finite],
                **({} if cache is None else {"past_key_values": cache}),
            )
            finite.require()
            going = []
            num_so_far = output.sequences.shape[1] - begin
            for row, ids_T in enumerate(output.sequences[:, begin:].tolist()):
                answer = _cut(ids_T[: ends.lengths.get(row)], self.stop, self.tokenizer)
                if row in ends.lengths or answer.stopped or num_so_far >= self.max_new_tokens:
                    self.answers[left[row]] = answer
                else:
                    going.append(row)
            left = [left[row] for row in going]
            ids_BT, cache = output.sequences[going], _rows_of(output.past_key_values, going) if going else None
            mask_BT = torch.nn.functional.pad(mask_BT[going], (0, ids_BT.shape[1] - mask_BT.shape[1]), value=1)


def _fits(answer: Callable[[Sequence[int]], None], batch: Sequence[int]) -> bool:
    """Answer a batch; False where memory runs out. What was allocated for it is free again when this returns."""
    try:
        answer(batch)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


@contextmanager
def _seeded(model: Any, sampling: Sampling | None) -> Iterator[None]:
    """Draw random numbers from the seed, and restore the generators."""
    if sampling is None:
        yield
        return
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        yield


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Without those of the model's settings that are not taken: transformers fills in what `_settings` leaves unset."""
    own = model.generation_config
    kept = {name: getattr(own, name) for name in _NOT_TAKEN if hasattr(own, name)}
    try:
        for name in kept:
            setattr(own, name, None)
        yield
    finally:
        for name, value in kept.items():
            setattr(own, name, value)


def _settings(model: Any, stop: list[int], pad: int, max_new_tokens: int, sampling: Sampling | None) -> Any:
    from transformers import GenerationConfig

    # top_k 0: transformers would otherwise draw from the 50 most likely tokens only
    sampled = {"do_sample": False} if sampling is None else {"temperature": sampling.temperature, "top_k": 0}
    return GenerationConfig(
        **{"do_sample": True, "num_beams": 1, **sampled},
        max_new_tokens=max_new_tokens,
        eos_token_id=stop or None,
        pad_token_id=pad,
        bos_token_id=model.generation_config.bos_token_id,
        use_cache=True,
        return_dict_in_generate=True,
    )


class _Finite:
    """A logits processor of transformers: whether the largest logit was finite for each token of each answer.

    Of NaN, the first token of the vocabulary would be the likeliest. Where the largest is not finite, zeros take the
    place of the logits: from others torch cannot draw.
    """

    def __init__(self) -> None:
        self._all: torch.Tensor | None = None  # on the device, so that no step waits for it

    def __call__(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        finite_B1 = logits_BV.amax(dim=-1, keepdim=True).isfinite()
        self._all = finite_B1.all() if self._all is None else self._all & finite_B1.all()
        return logits_BV.where(finite_B1, 0)

    def require(self) -> None:
        """Raises ModelError."""
        if self._all is not None and not self._all:
            raise ModelError(NOT_FINITE)


class _Ends:
    """A stopping criterion of transformers: ends an answer that contains one of its `until` texts, where there are any.

    stop_S: the tokens that end an answer, for a pass that is to end when half of its answers have ended.
    """

    def __init__(self, tokenizer: Any, until: Sequence[Sequence[str]], num_context: int, stop_S: Any) -> None:
        self.lengths: dict[int, int] = {}  # tokens, of the answers that a text has ended
        self._tokenizer, self._until, self._num_context, self._stop_S = tokenizer, until, num_context, stop_S
        self._ended_B: torch.Tensor | bool = False

    def __call__(self, ids_BT: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        length = ids_BT.shape[1] - self._num_context
        if self._until and length % _UNTIL_EVERY_TOKENS == 0:
            for row, ids in enumerate(ids_BT[:, self._num_context :].tolist()):
                if row not in self.lengths and self._until[row]:
                    text = self._tokenizer.decode(ids)
                    if any(end in text for end in self._until[row]):
                        self.lengths[row] = length
        by_text_B = torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
        if self.lengths:
            by_text_B[list(self.lengths)] = True
        if self._stop_S is None:
            return by_text_B
        self._ended_B = by_text_B | torch.isin(ids_BT[:, -1], self._stop_S) | self._ended_B
        return by_text_B | (2 * self._ended_B.sum() >= len(by_text_B))


def _takes_passes(model: Any) -> bool:
    """Whether a second pass over some of a batch continues the first: no setting counts from its start, and the model
    keeps nothing of the batch beside the cache (`rope_deltas` of Qwen2-VL and others).
    """
    settings = model.generation_config
    counts = any(getattr(settings, name, None) not in (None, 1, 0) for name in _OF_ONE_PASS)
    return not counts and not any(hasattr(module, "rope_deltas") for module in model.modules())


def _rows_of(cache: Any, rows: list[int]) -> Any:
    """Those rows of a KV cache; None where a layer keeps something else, and the tokens are to be read again."""
    layers = getattr(cache, "layers", None)
    if not layers or not all(type(layer).__name__ in _KEYS_AND_VALUES for layer in layers):
        return None
    if any(layer.keys is None for layer in layers):  # of a model that fills no cache
        return None
    cache.batch_select_indices(torch.tensor(rows, device=layers[0].keys.device))
    return cache


def _cut(ids: list[int], stop: list[int], tokenizer: Any) -> GeneratedAnswer:
    end = next((place for place, token in enumerate(ids) if token in stop), None)
    kept = ids[:end]
    return GeneratedAnswer(tuple(kept), tokenizer.decode(kept), end is not None, None if end is None else ids[end])
