"""Reading a pool once and for all: what is rejected, what repeats, and every signal of the rest.

The pool is read twice: for fingerprints (data/duplicates.py), then for the signals of the rows that repeat no other
exactly; only those cost a forward pass. Nothing of a row's text is kept: some 750 bytes a row in memory
(benchmarks/select_cost.py), and 2 E bytes for its embedding, in a memory-mapped file where a folder is given for it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from preceptor.data.duplicates import NEAR, Fingerprints, repeats
from preceptor.data.examples import Rejection
from preceptor.errors import DataError
from preceptor.select.measure import BaseReader, Measures, answers_of
from preceptor.select.pool import Answered, Pool
from preceptor.select.signals import TextSignals, text_signals


@dataclass(frozen=True, eq=False)
class ModelSignals:
    """What the base model made of N rows: float64 and int64 (N,), and the embeddings (N, E), float16."""

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
    """A pool's rows, by number.

    sources: of every row. rejected: those that are no conversation, or too long for the model. exact: rows that repeat
    an earlier one, and which. number_N: the others, N of them; head_N: for each of them the place in number_N of the
    row that it nearly repeats, its own place if none. signals: N; model: None if none read them.
    """

    sources: list[str]
    rejected: Mapping[int, Rejection]
    exact: Mapping[int, int]
    number_N: np.ndarray
    head_N: np.ndarray
    signals: list[TextSignals]
    model: ModelSignals | None


def survey(
    pool: Pool, reader: BaseReader | None, folder: Path | None, on_row: Callable[[], None] = lambda: None
) -> Survey:
    """Read the pool, with a model or without. folder: where the embeddings' file is made; None: in memory.

    `on_row` is called once a row and pass. Raises DataError if no row is left.
    """
    first = _first_pass(pool, on_row)
    distinct = np.array([first.number[k] for k in np.flatnonzero(first.exact_N < 0).tolist()], np.int64)
    rejected = dict(first.rejected)
    signals: list[TextSignals] = []
    kept = np.zeros(len(distinct), bool)
    table = _Table(len(distinct), reader.embedding_size, folder) if reader is not None else None
    rows = pool.chosen(frozenset(distinct.tolist()))
    for place, (number, record, measured) in enumerate(_measured(rows, reader)):
        on_row()
        if isinstance(measured, Rejection):
            rejected[number] = measured
            continue
        if table is not None and measured is not None:
            table.set(len(signals), measured)
        signals.append(text_signals(answers_of(record)))
        kept[place] = True
    if not signals:
        some = next(iter(rejected.values()))
        raise DataError(f"not a single row to choose from; {some.source}: {some.message}")
    number_N = distinct[kept]
    place_of = {number: place for place, number in enumerate(number_N.tolist())}
    head_N = np.arange(len(number_N))
    for number, head in first.near_heads().items():
        if number in place_of and head in place_of:
            head_N[place_of[number]] = place_of[head]
    return Survey(
        sources=first.sources,
        rejected=rejected,
        exact={
            first.number[k]: first.number[int(first.exact_N[k])] for k in np.flatnonzero(first.exact_N >= 0).tolist()
        },
        number_N=number_N,
        head_N=head_N,
        signals=signals,
        model=None if table is None else table.finished(len(signals)),
    )


@dataclass
class _FirstPass:
    """Every row's place, the rejected ones, and which of the others (by fingerprint) repeat which."""

    sources: list[str] = field(default_factory=list)
    rejected: dict[int, Rejection] = field(default_factory=dict)
    number: list[int] = field(default_factory=list)
    prints: Fingerprints = field(default_factory=Fingerprints)
    exact_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    near_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def near_heads(self) -> dict[int, int]:
        """Row -> the row that it nearly repeats, which itself repeats none.

        Likeness is not handed on: a row that is like one of a head's followers must be like the head too, or becomes
        a head itself.
        """
        signature_NK = self.prints.signature_NK
        head_of: dict[int, int] = {}
        for k in np.flatnonzero(self.near_N >= 0).tolist():
            like = int(self.near_N[k])
            head = head_of.get(like, like)
            if head == like or (signature_NK[k] == signature_NK[head]).mean() >= NEAR:
                head_of[k] = head
        return {self.number[k]: self.number[head] for k, head in head_of.items()}


def _first_pass(pool: Pool, on_row: Callable[[], None]) -> _FirstPass:
    found = _FirstPass()
    for number, record in enumerate(pool.records()):
        found.sources.append(record.source)
        if isinstance(record, Rejection):
            found.rejected[number] = record
        else:
            found.number.append(number)
            found.prints.add(record)
        on_row()
    if not found.number:
        some = next(iter(found.rejected.values()))
        raise DataError(f"not a single row to choose from; {some.source}: {some.message}")
    matches = repeats(found.prints)
    found.exact_N, found.near_N = matches.exact_N, matches.near_N
    return found


def _measured(
    rows: Iterator[tuple[int, Answered]], reader: BaseReader | None
) -> Iterator[tuple[int, Answered, Measures | Rejection | None]]:
    if reader is not None:
        yield from reader.measure(rows)
    else:
        yield from ((number, record, None) for number, record in rows)


class _Table:
    """The model's signals while they come in."""

    def __init__(self, num_rows: int, embedding_size: int, folder: Path | None) -> None:
        shape = (num_rows, embedding_size)
        self._embedding_NE: np.ndarray = (
            np.zeros(shape, np.float16)
            if folder is None
            else np.memmap(folder / "embeddings.float16", np.float16, "w+", shape=shape)
        )
        self._loss_N3 = np.zeros((num_rows, 3))
        self._tokens_N2 = np.zeros((num_rows, 2), np.int64)

    def set(self, row: int, measured: Measures) -> None:
        self._embedding_NE[row] = measured.embedding_E
        self._loss_N3[row] = measured.loss, measured.loss_alone, measured.loss_rest
        self._tokens_N2[row] = measured.num_prompt_tokens, measured.num_answer_tokens

    def finished(self, num_rows: int) -> ModelSignals:
        loss_N3, tokens_N2 = self._loss_N3[:num_rows], self._tokens_N2[:num_rows]
        return ModelSignals(
            loss_N=loss_N3[:, 0],
            loss_alone_N=loss_N3[:, 1],
            loss_rest_N=loss_N3[:, 2],
            prompt_tokens_N=tokens_N2[:, 0],
            answer_tokens_N=tokens_N2[:, 1],
            embedding_NE=self._embedding_NE[:num_rows],
        )
