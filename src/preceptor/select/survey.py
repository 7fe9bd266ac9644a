"""A survey of a pool: rejected examples, repeated ones, and the signals of the others.

The pool is read twice: for fingerprints (data/duplicates.py), then for the signals of the examples that repeat no other
exactly; only those take a forward pass. No text is kept: an example takes about 750 bytes in memory
(benchmarks/select_cost.py) and 2 E bytes for its embedding, in a memory-mapped file if a folder is given for it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from preceptor.data.duplicates import NEAR, Fingerprints, repeats
from preceptor.data.examples import Rejection
from preceptor.errors import DataError
from preceptor.select.measure import BaseScorer, ModelScores, answers_of
from preceptor.select.pool import AnsweredExample, Pool
from preceptor.select.quality import TextSignals, text_signals


@dataclass(frozen=True, eq=False)
class ModelSignals:
    """The base model's scores of N examples: float64 and int64 (N,), and the embeddings (N, E), float16."""

    loss_N: np.ndarray
    loss_alone_N: np.ndarray
    loss_rest_N: np.ndarray
    prompt_tokens_N: np.ndarray
    answer_tokens_N: np.ndarray
    embedding_NE: np.ndarray

    @property
    def difficulty_N(self) -> np.ndarray:
        ratio_N: np.ndarray = self.loss_N / np.maximum(self.loss_alone_N, 1e-9)
        return ratio_N


@dataclass(frozen=True, eq=False)
class Survey:
    """The examples of a pool, by number."""

    sources: list[str]  # of every example
    rejected: Mapping[int, Rejection]  # those that cannot be trained, or are too long for the model
    exact: Mapping[int, int]  # those that repeat an earlier one exactly -> that one
    number_N: np.ndarray  # the N others
    representative_N: np.ndarray  # for each, the place in number_N of the one it nearly repeats, or its own place
    signals: list[TextSignals]
    model: ModelSignals | None  # None: without a model


def survey(
    pool: Pool, scorer: BaseScorer | None, folder: Path | None, on_example: Callable[[], None] = lambda: None
) -> Survey:
    """Read the pool, with a model or without. folder: for the file of the embeddings; None: in memory.

    `on_example` is called after each example of both passes. Raises DataError if no example is left.
    """
    first = _first_pass(pool, on_example)
    distinct = np.array([first.number[k] for k in np.flatnonzero(first.exact_N < 0).tolist()], np.int64)
    rejected = dict(first.rejected)
    signals: list[TextSignals] = []
    kept = np.zeros(len(distinct), bool)
    table = _SignalTable(len(distinct), scorer.embedding_size, folder) if scorer is not None else None
    examples = pool.chosen(frozenset(distinct.tolist()))
    for place, (number, example, scores) in enumerate(_scored(examples, scorer)):
        on_example()
        if isinstance(scores, Rejection):
            rejected[number] = scores
            continue
        if table is not None and scores is not None:
            table.set(len(signals), scores)
        signals.append(text_signals(answers_of(example)))
        kept[place] = True
    if not signals:
        some = next(iter(rejected.values()))
        raise DataError(f"no example to choose from; {some.source}: {some.message}")
    number_N = distinct[kept]
    place_of = {number: place for place, number in enumerate(number_N.tolist())}
    representative_N = np.arange(len(number_N))
    for number, representative in first.near_representatives().items():
        if number in place_of and representative in place_of:
            representative_N[place_of[number]] = place_of[representative]
    return Survey(
        sources=first.sources,
        rejected=rejected,
        exact={
            first.number[k]: first.number[int(first.exact_N[k])] for k in np.flatnonzero(first.exact_N >= 0).tolist()
        },
        number_N=number_N,
        representative_N=representative_N,
        signals=signals,
        model=None if table is None else table.finished(len(signals)),
    )


@dataclass
class _FirstPass:
    """Sources, rejections and fingerprints of all examples, and which of them repeat which."""

    sources: list[str] = field(default_factory=list)
    rejected: dict[int, Rejection] = field(default_factory=dict)
    number: list[int] = field(default_factory=list)
    prints: Fingerprints = field(default_factory=Fingerprints)
    exact_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    near_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def near_representatives(self) -> dict[int, int]:
        """Example -> the example that it nearly repeats, which itself repeats none.

        This is not transitive: an example that nearly repeats another one that has a representative must nearly repeat
        the representative too, or becomes a representative itself.
        """
        signature_NK = self.prints.signature_NK
        representative_of: dict[int, int] = {}
        for k in np.flatnonzero(self.near_N >= 0).tolist():
            like = int(self.near_N[k])
            first = representative_of.get(like, like)
            if first == like or (signature_NK[k] == signature_NK[first]).mean() >= NEAR:
                representative_of[k] = first
        return {self.number[k]: self.number[first] for k, first in representative_of.items()}


def _first_pass(pool: Pool, on_example: Callable[[], None]) -> _FirstPass:
    found = _FirstPass()
    for number, example in enumerate(pool.examples()):
        found.sources.append(example.source)
        if isinstance(example, Rejection):
            found.rejected[number] = example
        else:
            found.number.append(number)
            found.prints.add(example)
        on_example()
    if not found.number:
        some = next(iter(found.rejected.values()))
        raise DataError(f"no example to choose from; {some.source}: {some.message}")
    matches = repeats(found.prints)
    found.exact_N, found.near_N = matches.exact_N, matches.near_N
    return found


def _scored(
    examples: Iterator[tuple[int, AnsweredExample]], scorer: BaseScorer | None
) -> Iterator[tuple[int, AnsweredExample, ModelScores | Rejection | None]]:
    if scorer is not None:
        yield from scorer.score(examples)
    else:
        yield from ((number, example, None) for number, example in examples)


class _SignalTable:
    """The model's signals, filled example by example."""

    def __init__(self, num_examples: int, embedding_size: int, folder: Path | None) -> None:
        shape = (num_examples, embedding_size)
        self._embedding_NE: np.ndarray = (
            np.zeros(shape, np.float16)
            if folder is None
            else np.memmap(folder / "embeddings.float16", np.float16, "w+", shape=shape)
        )
        self._loss_N3 = np.zeros((num_examples, 3))
        self._tokens_N2 = np.zeros((num_examples, 2), np.int64)

    def set(self, at: int, scores: ModelScores) -> None:
        self._embedding_NE[at] = scores.embedding_E
        self._loss_N3[at] = scores.loss, scores.loss_alone, scores.loss_rest
        self._tokens_N2[at] = scores.num_prompt_tokens, scores.num_answer_tokens

    def finished(self, num_examples: int) -> ModelSignals:
        loss_N3, tokens_N2 = self._loss_N3[:num_examples], self._tokens_N2[:num_examples]
        return ModelSignals(
            loss_N=loss_N3[:, 0],
            loss_alone_N=loss_N3[:, 1],
            loss_rest_N=loss_N3[:, 2],
            prompt_tokens_N=tokens_N2[:, 0],
            answer_tokens_N=tokens_N2[:, 1],
            embedding_NE=self._embedding_NE[:num_examples],
        )
