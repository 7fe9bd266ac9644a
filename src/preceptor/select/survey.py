"""A survey of a pool: rejected examples, repeated ones, and the signals of the others.

The pool is read twice: for fingerprints (data/duplicates.py), then for the signals of the examples that repeat no other
exactly; only those take a forward pass. No text is kept: an example takes about 750 bytes in memory
(benchmarks/select_cost.py) and 2 E bytes of a memory-mapped file for its embedding.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preceptor.data.duplicates import NEAR, Fingerprints, repeats
from preceptor.data.examples import Rejection
from preceptor.errors import DataError
from preceptor.select.measure import SCORES, BaseScorer, answers_of, said_in
from preceptor.select.pool import Pool
from preceptor.select.quality import TextSignals, text_signals


@dataclass(frozen=True, eq=False)
class ModelSignals:
    """The base model's scores of N examples: the numbers of each, by name, and the embeddings (N, E), float16."""

    score_N: np.ndarray  # of dtype SCORES
    embedding_NE: np.ndarray


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
    """Read the pool, with a model or without. folder: for the file of the embeddings; None: the system's own.

    `on_example` is called after each example of both passes. Raises DataError if no example is left.
    """
    sources, rejected, numbers, prints = _fingerprinted(pool, on_example)
    matches = repeats(prints)
    distinct = numbers[matches.exact_N < 0]
    signals: list[TextSignals] = []
    kept = np.zeros(len(distinct), bool)
    model = None if scorer is None else _no_signals(len(distinct), scorer.embedding_size, folder)
    examples = pool.chosen(frozenset(distinct.tolist()))
    scored = ((number, example, None) for number, example in examples) if scorer is None else scorer.score(examples)
    for place, (number, example, scores) in enumerate(scored):
        on_example()
        if isinstance(scores, Rejection):
            rejected[number] = scores
            continue
        if model is not None and scores is not None:
            model.score_N[len(signals)], model.embedding_NE[len(signals)] = scores[:-1], scores.embedding_E
        signals.append(text_signals(answers_of(example), said_in(example)))
        kept[place] = True
    if not signals:
        some = next(iter(rejected.values()))
        raise DataError(f"no example to choose from; {some.source}: {some.message}")
    number_N = distinct[kept]
    place_of = {number: place for place, number in enumerate(number_N.tolist())}
    representative_N = np.arange(len(number_N))
    for index, of in _near_representatives(prints, matches.near_N, np.isin(numbers, number_N)).items():
        representative_N[place_of[int(numbers[index])]] = place_of[int(numbers[of])]
    repeated = matches.exact_N >= 0
    return Survey(
        sources=sources,
        rejected=rejected,
        exact=dict(zip(numbers[repeated].tolist(), numbers[matches.exact_N[repeated]].tolist(), strict=True)),
        number_N=number_N,
        representative_N=representative_N,
        signals=signals,
        model=model and ModelSignals(model.score_N[: len(signals)], model.embedding_NE[: len(signals)]),
    )


def _fingerprinted(
    pool: Pool, on_example: Callable[[], None]
) -> tuple[list[str], dict[int, Rejection], np.ndarray, Fingerprints]:
    """The places of all examples, the rejected ones, the numbers of the others, and their fingerprints."""
    sources: list[str] = []
    rejected: dict[int, Rejection] = {}
    prints = Fingerprints()
    for number, example in enumerate(pool.examples()):
        sources.append(example.source)
        if isinstance(example, Rejection):
            rejected[number] = example
        else:
            prints.add(example)
        on_example()
    numbers = np.setdiff1d(np.arange(len(sources)), np.fromiter(rejected, np.int64), assume_unique=True)
    return sources, rejected, numbers, prints


def _near_representatives(prints: Fingerprints, near_N: np.ndarray, is_kept_N: np.ndarray) -> dict[int, int]:
    """Example -> the example that it nearly repeats, which itself repeats none; by their places in `prints`; kept ones.

    This is not transitive: an example that nearly repeats another one that has a representative must nearly repeat the
    representative too, or becomes a representative itself. For one that is not kept stands the first that is.
    """
    signature_NK = prints.signature_NK

    def is_near(k: int, first: int) -> bool:
        return bool((signature_NK[k] == signature_NK[first]).mean() >= NEAR)

    representative_of: dict[int, int] = {}
    for k in np.flatnonzero(near_N >= 0).tolist():
        like = int(near_N[k])
        first = representative_of.get(like, like)
        if first == like or is_near(k, first):
            representative_of[k] = first
    kept = {k: first for k, first in representative_of.items() if is_kept_N[k]}
    stands_for: dict[int, int] = {}
    for k, first in kept.items():
        kept[k] = first if is_kept_N[first] else stands_for.setdefault(first, k)
    return {k: first for k, first in kept.items() if k != first and is_near(k, first)}


def _no_signals(num_examples: int, embedding_size: int, folder: Path | None) -> ModelSignals:
    """Room for the signals of so many examples."""
    shape = (max(1, num_examples), embedding_size)  # a file without a byte cannot be mapped
    with tempfile.TemporaryFile(dir=folder) as file:  # the map goes on when it is closed
        return ModelSignals(np.zeros(num_examples, SCORES), np.memmap(file, np.float16, "w+", shape=shape))
