"""Rendering in several processes: results in the order of the records, memory flat in their number.

The calling process renders too, and `num_processes` counts it. The others are fresh interpreters (`spawn`: safe beside
torch's threads, which a fork would copy halfway through whatever they hold). One takes a second or two to start, so
none is started for an input that is rendered by then, and the calling process goes on by itself until they are ready.

    records ─> chunk chunk chunk chunk ...      in order
                 │     │     │     └ rendered here while all others are busy
                 │     └─────┴ sent to other processes, at most _BACKLOG each
                 └ the first not handed out yet: what is done behind it waits

As with anything that starts processes, the script that calls this must be importable: its own work belongs under
`if __name__ == "__main__"`.
"""

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from typing import Protocol, TypeVar

from preceptor.data.conversation import Completion, Conversation, Document, Record, Refusal
from preceptor.data.forest import Tree
from preceptor.errors import PreceptorError

Given = TypeVar("Given", bound=Record | Refusal)
Outcomes = list[Tree | Refusal]

_CHUNK_CHARACTERS = 1 << 16  # some 0.1 s of rendering: sending it costs little, and a progress bar still moves
_SMALL_CHARACTERS = 1 << 20  # rendered in the time in which another process starts
_RECORD_CHARACTERS = 200  # what a record costs besides its text
_BACKLOG = 2  # chunks that another process has before it: one that it renders, one to go on with


class Renders(Protocol):
    """What renders: a `render.Renderer`, or anything that can be pickled and has its method."""

    def render(self, record: Record) -> Tree | Refusal: ...


def render_all(
    renderer: Renders, records: Iterable[Given], num_processes: int = 1
) -> Iterator[tuple[Given, Tree | Refusal]]:
    """Each record with what became of it, in order; what is a Refusal already stays one.

    Records are read a bounded number ahead of what is handed out. Raises what reading and rendering raise, and
    PreceptorError if a process was killed.
    """
    chunks = _chunks(records)
    first: list[list[Given]] = []
    num_characters = 0
    if num_processes > 1:
        for chunk in chunks:
            first.append(chunk)
            num_characters += sum(map(_num_characters, chunk))
            if num_characters >= _SMALL_CHARACTERS:
                break
    chunks = chain(first, chunks)
    if num_characters < _SMALL_CHARACTERS:
        for chunk in chunks:
            for record in chunk:
                yield record, _outcome(renderer, record)
        return
    pool = ProcessPoolExecutor(
        num_processes - 1, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(renderer,)
    )
    try:
        for chunk, outcomes in _shared_out(renderer, chunks, pool, num_processes - 1):
            yield from zip(chunk, outcomes, strict=True)
    except BrokenProcessPool as error:
        raise PreceptorError(
            "a process that renders the data ended before its work was done, often for want of memory: use fewer "
            f"processes than {num_processes} (1 needs no others)"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _shared_out(
    renderer: Renders, chunks: Iterable[list[Given]], pool: ProcessPoolExecutor, num_workers: int
) -> Iterator[tuple[list[Given], Outcomes]]:
    """Each chunk with its outcomes, in order."""
    ready = pool.submit(_ready)
    pending: deque[tuple[list[Given], Future[Outcomes] | Outcomes]] = deque()
    for chunk in chunks:
        num_running = sum(isinstance(outcomes, Future) and not outcomes.done() for _, outcomes in pending)
        if ready.done() and num_running < _BACKLOG * num_workers:
            ready.result()
            pending.append((chunk, pool.submit(_render_chunk, chunk)))
        else:
            pending.append((chunk, [_outcome(renderer, record) for record in chunk]))
        while pending and (len(pending) > 2 * _BACKLOG * num_workers or _is_done(pending[0][1])):
            yield _taken(*pending.popleft())
    while pending:
        yield _taken(*pending.popleft())


def _is_done(outcomes: Future[Outcomes] | Outcomes) -> bool:
    return not isinstance(outcomes, Future) or outcomes.done()


def _taken(chunk: list[Given], outcomes: Future[Outcomes] | Outcomes) -> tuple[list[Given], Outcomes]:
    return chunk, outcomes.result() if isinstance(outcomes, Future) else outcomes


def _outcome(renderer: Renders, record: Record | Refusal) -> Tree | Refusal:
    return record if isinstance(record, Refusal) else renderer.render(record)


def _chunks(records: Iterable[Given]) -> Iterator[list[Given]]:
    chunk: list[Given] = []
    num_characters = 0
    for record in records:
        chunk.append(record)
        num_characters += _num_characters(record)
        if num_characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk


def _num_characters(record: Record | Refusal) -> int:
    num = _RECORD_CHARACTERS
    if isinstance(record, Conversation):
        num += sum(len(message.content) for message in record.messages)
    elif isinstance(record, Completion):
        num += len(record.prompt) + len(record.completion)
    elif isinstance(record, Document):
        num += len(record.text)
    return num


# In the other processes ----------------------------------------------------------------------------------------------

_renderer: Renders


def _begin(renderer: Renders) -> None:
    global _renderer
    _renderer = renderer
    gc.freeze()  # what lives as long as the process need not be looked at again; worth 5 to 10 % of the time
    gc.set_threshold(50_000, 20, 20)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the calling process ends the work


def _ready() -> None:
    """Runs as soon as one process has begun."""


def _render_chunk(chunk: Sequence[Record | Refusal]) -> Outcomes:
    return [_outcome(_renderer, record) for record in chunk]
