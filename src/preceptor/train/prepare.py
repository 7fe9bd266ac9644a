"""Everything that a run needs before a model is loaded: chat format, trees, tasks, and what was rejected.

Whatever can be found wrong with a run is found here, in seconds, with nothing written but the cache of rendered trees
(data/cache.py). The processes of one run may prepare it at once: one renders, the others wait for it and read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np

from preceptor import config
from preceptor.chat.format import ChatFormat, load_chat_format
from preceptor.chat.thinking import TrainedCounts
from preceptor.config.code import HeldCode, load_code
from preceptor.console import example_progress, say
from preceptor.data.cache import Cache, cache_folder
from preceptor.data.dataset import Dataset, TokenCounts, draw_replay, mix
from preceptor.data.examples import Rejection, RejectionCounts, check_codes
from preceptor.data.loader import Loader, StreamLoader
from preceptor.data.reading import SourceReader
from preceptor.data.sources import OpenSource, holds_out_nothing, open_sources, require_no_pipe
from preceptor.data.stream import Window, WindowReader, Windows
from preceptor.data.table_trees import TableTrees
from preceptor.data.truncation import ExampleTree, Fitter, Shortened
from preceptor.data.workers import start_method
from preceptor.errors import ConfigError, DataError
from preceptor.evaluate.harness import open_task
from preceptor.evaluate.run import METRICS
from preceptor.evaluate.tasks import Task
from preceptor.world import ONE, World


@dataclass(frozen=True)
class Prepared:
    """A run that can start. Of a stream: what is known of its training data is that of the first window."""

    run: config.Run
    chat: ChatFormat  # as it is saved: its template's defaults are what the turns were trained with
    sources: Mapping[str, Sequence[OpenSource]]  # by use: `train`, `held out`, `replay`
    train: Dataset  # each source's examples `weight` times, and those that are replayed
    held_out: list[ExampleTree]
    tasks: list[Task]
    rejections: list[Rejection]
    num_examples: int  # of all sources, rejected ones included
    num_measured: tuple[int, int]  # examples of the held-out sources, and how many of them are rejected
    examples_per_epoch: int
    tokens: TokenCounts  # of an epoch
    shortened: Shortened  # what was done to examples that were too long
    formats: Mapping[str, Mapping[str, int]]  # of each file: how many examples have each format
    counts: TrainedCounts  # of the conversations that are trained
    cache: Cache | None
    stream: "Stream | None" = None

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """At the end of the block nothing is rendered ahead any more."""
        try:
            yield
        finally:
            if self.stream is not None:
                self.stream.windows.close()

    @property
    def rejections_beside(self) -> list[Rejection]:
        """Without those of the first window of a stream, which are recorded when it begins."""
        return self.rejections[: len(self.rejections) - (self.stream.num_rejected if self.stream else 0)]

    @property
    def num_examples_beside(self) -> int:
        return self.num_examples - (self.stream.num_examples if self.stream else 0)

    def loader(self) -> Loader | StreamLoader:
        run = self.run
        settings = run.data.max_length, run.train.batch_size, run.train.seed
        if self.stream is None:
            return Loader(self.train, *settings)
        longest = min(run.data.max_length, self.chat.num_positions or run.data.max_length)
        return StreamLoader(self.stream.windows, self.train, self.stream.opened, longest, *settings)


@dataclass(frozen=True)
class Stream:
    """The windows of a run's stream, and what makes a dataset of one: None where no example of it can be trained.

    num_examples, num_rejected: of the first window.
    """

    windows: Windows
    opened: Callable[[Window], Dataset | None]
    num_examples: int
    num_rejected: int


def prepare(run: config.Run, num_processes: int = 1, date: datetime | None = None, world: World = ONE) -> Prepared:
    """Read, render and check all data of a run, of a stream the first window, with a progress bar on a terminal.

    date: for chat templates that write it (absent: now); that of its first start for a run that goes on. world: not
    connected yet; one process of each machine renders a stream for all. num_processes: that render large inputs (see
    data/workers.py). Raises DataError if a file cannot be read, nothing is left to train, or more is rejected than
    `data.max_rejected`; ModelError and TemplateError as `load_chat_format`.
    """
    check_codes(run.data.allow_rejected)
    tasks = [open_task(path).limited(run.eval.limit, run.train.seed) for path in run.eval.tasks]
    if run.eval.code is not None:
        tasks = _with_own(tasks, run.eval.code)
    sources = dict(zip(("train", "held out"), open_sources(run.data), strict=True))
    sources["replay"] = [OpenSource(source) for source in run.replay.data] if run.replay else []
    whole = [each for use, of_use in sources.items() if use != "train" or not run.data.streaming for each in of_use]
    require_no_pipe(whole, run.data.streaming)
    date = date or datetime.now().astimezone()
    chat = load_chat_format(run.model, run.data, [*sources["train"], *sources["held out"]], date)
    longest, renderer = chat.num_positions, chat.renderer(run.data)
    fitter = Fitter(renderer, run.data.max_length, run.data.overflow, longest)
    folder = cache_folder(run.data.cache)
    cache = None if folder is None else Cache(folder, lambda line: say(line, error=True))
    windows = _windows(run, sources["train"], fitter, cache, num_processes, world) if run.data.streaming else None
    read = [table for source in whole for table in source.tables]
    with example_progress(read, "reading and rendering") as on_example:
        reader = SourceReader(fitter, cache, num_processes, on_example)
        train = [] if run.data.streaming else [reader.read(source) for source in sources["train"]]
        held_out = [(reader.read_held_out(source), source.source) for source in sources["held out"]]
        replay = [reader.read(source, "replay") for source in sources["replay"]]
    if windows is None:
        stream, (tables, tuning_N) = None, _drawn(train, run.data.train, run.train.seed)
    else:
        stream, tables, tuning_N = _first_window(windows, reader, partial(_opened, run, chat, replay))
    counts = _few_rejected(run, reader)
    if not len(tuning_N):
        why = "; weight too small" if sum(map(len, tables)) else "; data.eval_size holds all of them out"
        raise DataError("data.train: no example is left to train" + (f":\n{counts}" if str(counts) else why))
    dataset = _dataset(run, chat, _mixture(run, tables, tuning_N, replay))
    found = reader.counts
    assert isinstance(found, TrainedCounts)
    return Prepared(
        run=run,
        sources=sources,
        train=dataset,
        examples_per_epoch=len(dataset.chosen_N),
        tokens=TokenCounts.of(dataset),
        held_out=_held_out(held_out, run, counts),
        chat=chat.trained_with(found),
        tasks=tasks,
        rejections=reader.rejections,
        num_examples=reader.num_examples,
        num_measured=(reader.num_held_out, reader.num_held_out_rejected),
        shortened=reader.shortened,
        formats=reader.formats,
        counts=found,
        cache=cache,
        stream=stream,
    )


def _few_rejected(run: config.Run, reader: SourceReader) -> RejectionCounts:
    """All rejections, counted. Raises DataError for too many among what is trained, replayed, or read at all."""
    by_use = [(reader.rejected_by_use[use], reader.num_by_use[use]) for use in ("train", "replay")]
    for rejections, num_examples in [*by_use, (reader.rejections, reader.num_examples)]:
        counts = RejectionCounts(run.data.allow_rejected, rejections)
        counts.require_few(counts.num_not_allowed, num_examples, run.data.max_rejected)
    return counts


def _with_own(tasks: list[Task], code: str) -> list[Task]:
    """The tasks, those with answers with the user's own metric. Raises ConfigError where there are none."""
    own = load_code(code, "eval.code")
    if own.name in METRICS["generation"]:
        raise ConfigError(f"eval.code: a figure is named {own.name!r} already; give the function another name")
    if not any(task.kind == "generation" for task in tasks):
        raise ConfigError("eval.code: measures answers, and no task of eval.tasks has any: name a generation task")
    return [replace(task, own=own) if task.kind == "generation" else task for task in tasks]


def _windows(
    run: config.Run,
    sources: Sequence[OpenSource],
    fitter: Fitter,
    cache: Cache | None,
    num_processes: int,
    world: World,
) -> Windows:
    """The windows of `data.train`, which the first process of each machine has rendered."""
    for source in sources:
        source.close()  # another process reads it from the start
        if isinstance(source.source.code, HeldCode) and start_method() == "spawn":
            raise ConfigError(
                f"{source.source.path}: {source.source.code}: a stream is read by another process, which cannot have a "
                "function that this program holds; write it to a file and name it: code: FILE.py:FUNCTION"
            )
    node = f"stream of the machine of process {world.rank - world.local_rank}"  # not all may have as many processes
    if world.local_rank:
        return Windows(Path(world.published(node)))
    folder = None if cache is None else cache.folder
    reader = WindowReader(run.data.train, run.data.window, fitter, folder, num_processes)
    windows = Windows.rendered(reader)
    world.publish(node, str(windows.spool))
    return windows


def _first_window(
    windows: Windows, reader: SourceReader, opened: Callable[[Window], Dataset | None]
) -> tuple[Stream, list[TableTrees], np.ndarray]:
    """The stream, the tables of its first window, which the reader counts with the other sources, and their trees."""
    num_beside = len(reader.rejections)
    first = windows.get(0, is_trained=False)
    reader.include(first.tables)
    stream = Stream(windows, opened, first.num_examples, len(reader.rejections) - num_beside)
    return stream, first.tables, _each_once(first.tables)


def _opened(run: config.Run, chat: ChatFormat, replay: Sequence[list[TableTrees]], window: Window) -> Dataset | None:
    """The trees of a window, each once, and those that are replayed beside them."""
    tuning_N = _each_once(window.tables)
    if not len(tuning_N):
        return None
    return _dataset(run, chat, _mixture(run, window.tables, tuning_N, replay, window.number))


def _dataset(run: config.Run, chat: ChatFormat, mixture: Dataset) -> Dataset:
    if chat.without_row(mixture.token_ids):
        chat.require_rows(mixture)
    shares = run.data.share_prefixes
    return mixture.with_shared_prefixes(run.data.max_length, run.train.seed) if shares else mixture


def _held_out(
    per_source: Sequence[tuple[list[ExampleTree], config.Source]], run: config.Run, rejected: RejectionCounts
) -> list[ExampleTree]:
    """Raises DataError where `data.eval_size` holds nothing out that is not rejected."""
    trees, sources = [own for own, _ in per_source], [source for _, source in per_source]
    if run.data.eval_size is not None and not any(trees[len(run.data.eval) :]):
        raise DataError("\n".join(filter(None, [holds_out_nothing(run.data.eval_size), str(rejected)])))
    every = [each for own in trees for each in own]
    return [every[index] for index in mix(map(len, trees), sources, run.train.seed).tolist()]


def _drawn(
    per_source: Sequence[list[TableTrees]], sources: Sequence[config.Source], seed: int
) -> tuple[list[TableTrees], np.ndarray]:
    """The tables of all sources, and which of their trees an epoch has."""
    tables = [table for of_source in per_source for table in of_source]
    return tables, mix([sum(map(len, of_source)) for of_source in per_source], sources, seed)


def _each_once(tables: Sequence[TableTrees]) -> np.ndarray:
    """The numbers of all trees of a window."""
    return np.arange(sum(map(len, tables)), dtype=np.int32)


def _mixture(
    run: config.Run,
    tables: Sequence[TableTrees],
    tuning_N: np.ndarray,
    replay: Sequence[list[TableTrees]],
    window: int = 0,
) -> Dataset:
    """The trees of an epoch or a window, with those that are replayed. tuning_N: those of `tables` that are trained."""
    tuning = Dataset(tables, tuning_N, run.loss.reduction)
    if run.replay is None:
        return tuning
    seed = run.train.seed + (window << 31)  # seeds of runs are below
    replayed = Dataset(*_drawn(replay, run.replay.data, run.train.seed), run.loss.reduction)
    num_tuned = int(tuning.num_trained.sum(dtype=np.int64))
    drawn_N = replayed.chosen_N[draw_replay(replayed.num_trained, num_tuned, run.replay.share, seed)]
    chosen_N = np.concatenate([tuning_N, drawn_N + sum(map(len, tables))])
    return Dataset([*tables, *replayed.tables], chosen_N, run.loss.reduction)
