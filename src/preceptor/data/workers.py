"""Rendering in several processes: results in the order of the examples, memory flat in their number.

The calling process renders too, and `num_processes` counts it. The others are forked where that is safe: on Linux, from
a process in which no other Python thread runs, no device is in use and no process group is open; they start in no time.
Elsewhere they are fresh interpreters (`spawn`), which take a second or two. None is started for an input that is
rendered by then, and the calling process goes on by itself until they are ready.

    examples ─> chunk chunk chunk chunk ...      in order
                 │     │     │     └ rendered here while all others are busy
                 │     └─────┴ sent to other processes, at most _BACKLOG each
                 └ the first not handed out yet: what is done behind it waits

What is sent either way is packed: examples as tuples, trees as their records. As with anything that starts
processes, the script that calls this must be importable: its own work belongs under `if __name__ == "__main__"`.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from typing import Any, Literal, Protocol

from preceptor.data.examples import Conversation, Example, Message, Rejection, num_characters
from preceptor.data.forest import Tree
from preceptor.data.records import decode_tree, encode_tree
from preceptor.errors import PreceptorError

Chunk = list[Example | Rejection]
Outcomes = list[Tree | Rejection]
Targets = Literal["assistant", "last", "all"]
Sent = list[tuple[str, bytes] | Rejection]  # place and record of each tree, which is faster to send than the objects

_CHUNK_CHARACTERS = 1 << 18  # some 0.05 s of rendering: sending it costs little, and a progress bar still moves
_SMALL_CHARACTERS = {"fork": 1 << 19, "spawn": 1 << 22}  # rendered in the time in which another process starts
_EXAMPLE_CHARACTERS = 200  # what an example costs besides its text
_GARBAGE_THRESHOLDS = (50_000, 20, 20)
_LOOK_SECONDS = 1.0  # between two looks whether the calling process is still there
_SWITCH_SECONDS = 2e-4  # in which the pool's threads get their turn, which send and receive while this one renders
_BACKLOG = 3  # chunks that another process has before it: one that it renders, two on their way


class ExampleCounts(Protocol):
    """What is counted of the examples that are trained, beside their trees: `chat.thinking.TrainedCounts`."""

    def add(self, example: Example, tree: Tree) -> None: ...

    def of_table(self, name: str) -> Any:
        """All counts as values that JSON can spell, without the name of the table whose examples were counted."""

    def include(self, counted: Any, name: str) -> None:
        """Add what `of_table` gave, for a table of this name."""


class ExampleRenderer(Protocol):
    """What makes trees of examples: `chat.render.Renderer`. It can be pickled."""

    targets: Targets

    @property
    def key(self) -> str | None:
        """A hash of everything that rendering depends on but the example; None where that cannot be told."""

    def render(self, example: Example) -> Tree | Rejection: ...

    def new_counts(self) -> ExampleCounts:
        """Of no examples yet."""


def render_all(
    renderer: ExampleRenderer, examples: Iterable[Example | Rejection], num_processes: int = 1
) -> Iterator[Tree | Rejection]:
    """What becomes of each example, in order; what is a Rejection already stays one.

    Examples are read a bounded number ahead of what is handed out. Raises what reading and rendering raise, and
    PreceptorError if a process was killed.
    """
    chunks = _chunks(examples)
    method = start_method()
    first: list[Chunk] = []
    num_characters = 0
    if num_processes > 1:
        for chunk in chunks:
            first.append(chunk)
            num_characters += sum(map(cost_of, chunk))
            if num_characters >= _SMALL_CHARACTERS[method]:
                break
    chunks = chain(first, chunks)
    if num_characters < _SMALL_CHARACTERS[method]:
        for chunk in chunks:
            yield from _outcomes(renderer, chunk)
        return
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(num_processes - 1, context, initializer=_begin, initargs=(renderer,))
    gc.freeze()  # what was there before (torch, transformers) need not be looked through while trees are made
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.set_threshold(*_GARBAGE_THRESHOLDS)
    try:
        yield from _shared_out(renderer, chunks, pool, num_processes - 1)
    except BrokenProcessPool as error:
        for process in list((pool._processes or {}).values()):
            process.kill()  # those that ignore what the pool sends them would be waited for
        raise PreceptorError(
            "a process that renders the data ended before its work was done, often for want of memory: use fewer "
            f"processes than {num_processes} (1 needs no others). A script that calls this needs its own work under "
            '`if __name__ == "__main__":`'
        ) from error
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        # While its threads live, the next input could not be forked for; fresh interpreters may take seconds to end.
        pool.shutdown(wait=method == "fork", cancel_futures=True)


def _shared_out(
    renderer: ExampleRenderer, chunks: Iterable[Chunk], pool: ProcessPoolExecutor, num_workers: int
) -> Iterator[Tree | Rejection]:
    """The outcomes of all chunks, in order."""
    with warnings.catch_warnings():
        # Python 3.12 warns of threads of native libraries too. Those that wait hold nothing, and what the forked
        # process runs (Python, Jinja, regex, tokenizers told to use no threads) asks nothing of them.
        warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
        ready = pool.submit(_ready)
    pending: deque[Future[Sent] | Outcomes] = deque()
    for chunk in chunks:
        num_running = sum(map(_runs, pending))
        if ready.done() and num_running < _BACKLOG * num_workers:
            ready.result()
            pending.append(pool.submit(_render_chunk, [_as_sent(example) for example in chunk]))
        else:
            pending.append(_outcomes(renderer, chunk))
        while pending and (len(pending) > 2 * _BACKLOG * num_workers or not _runs(pending[0])):
            yield from _taken(pending.popleft())
    while pending:
        yield from _taken(pending.popleft())


def start_method() -> Literal["fork", "spawn"]:
    """How other processes are started; torch is asked only where it is loaded already."""
    if sys.platform != "linux" or threading.active_count() > 1:
        return "spawn"
    torch = sys.modules.get("torch")
    if torch is None:
        return "fork"
    has_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return "spawn" if torch.cuda.is_initialized() or has_group else "fork"


def _runs(outcomes: Future[Sent] | Outcomes) -> bool:
    return isinstance(outcomes, Future) and not outcomes.done()


def _taken(outcomes: Future[Sent] | Outcomes) -> Outcomes:
    if not isinstance(outcomes, Future):
        return outcomes
    return [each if isinstance(each, Rejection) else decode_tree(each[1], each[0]) for each in outcomes.result()]


def _outcomes(renderer: ExampleRenderer, chunk: Chunk) -> Outcomes:
    """What becomes of each example. Meanwhile no garbage is collected: it would go through all trees made so far."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return [example if isinstance(example, Rejection) else renderer.render(example) for example in chunk]
    finally:
        if collects:
            gc.enable()


def _chunks(examples: Iterable[Example | Rejection]) -> Iterator[Chunk]:
    chunk: Chunk = []
    num_characters = 0
    for example in examples:
        chunk.append(example)
        num_characters += cost_of(example)
        if num_characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk


def cost_of(example: Example | Rejection) -> int:
    """About how many characters there are to render."""
    return _EXAMPLE_CHARACTERS + (0 if isinstance(example, Rejection) else num_characters(example))


def _as_sent(example: Example | Rejection) -> Any:
    """A conversation as tuples: three times as fast to send and to read as the objects; other examples as they are."""
    if not isinstance(example, Conversation):
        return example
    messages = [(message.given, message.train, message.weight) for message in example.messages]
    return example.source, messages, example.tools, example.template_kwargs


def _as_given(sent: Any) -> Example | Rejection:
    if not isinstance(sent, tuple):
        return sent  # type: ignore[no-any-return]
    source, messages, tools, kwargs = sent
    return Conversation(source, tuple([Message(*message) for message in messages]), tools, kwargs)


# In the other processes

_renderer: ExampleRenderer


def _begin(renderer: ExampleRenderer) -> None:
    global _renderer
    _renderer = renderer
    gc.freeze()  # what lives as long as the process need not be looked at again; worth 5 to 10 % of the time
    gc.set_threshold(*_GARBAGE_THRESHOLDS)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the calling process ends the work
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """A calling process that is killed cannot end this one, which would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


def _ready() -> None:
    """Runs as soon as one process has begun."""


def _render_chunk(chunk: list[Any]) -> Sent:
    return [
        each if isinstance(each, Rejection) else (each.source, encode_tree(each, with_texts=True))
        for each in _outcomes(_renderer, list(map(_as_given, chunk)))
    ]
