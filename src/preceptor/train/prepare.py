"""Everything that a run needs before a model is loaded: chat format, trees, tasks, and what was rejected.

Whatever can be found wrong with a run is found here, in seconds, with nothing written but the cache of rendered trees
(data/cache.py). The processes of one run may prepare it at once: one renders, the others wait for it and read.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np

from preceptor import config
from preceptor.chat.format import ChatFormat, load_chat_format
from preceptor.chat.left_out import LeftOut
from preceptor.chat.render import Renderer
from preceptor.chat.thinking import TrainedArguments
from preceptor.chat.trained_counts import TrainedCounts
from preceptor.config.code import load_code
from preceptor.console import example_progress, say
from preceptor.data.cache import Cache, cache_folder
from preceptor.data.dataset import Dataset, TokenCounts, TreeStore, with_shared_prefixes
from preceptor.data.examples import Rejection
from preceptor.data.loader import Loader
from preceptor.data.mixture import draw_replay, mix
from preceptor.data.reading import TableReader, read_trees
from preceptor.data.rejections import RejectionCounts, check_codes
from preceptor.data.sources import OpenSource
from preceptor.data.table_trees import TableTrees
from preceptor.data.truncation import ExampleTree, Fitter, Shortened
from preceptor.errors import ConfigError, DataError, ModelError
from preceptor.evaluate.harness import open_task
from preceptor.evaluate.run import METRICS
from preceptor.evaluate.tasks import Task


@dataclass(frozen=True)
class Prepared:
    """A run that can start."""

    run: config.Run
    chat: ChatFormat  # as it is saved: its template's defaults are what the turns were trained with
    sources: Mapping[str, Sequence[OpenSource]]  # by use: `train`, `held out`, `replay`
    train: Dataset  # each source's examples `weight` times, and those that are replayed
    held_out: list[ExampleTree]
    tasks: list[Task]
    rejections: list[Rejection]
    num_examples: int  # of all sources, rejected ones included
    examples_per_epoch: int
    tokens: TokenCounts  # of an epoch
    shortened: Shortened  # what was done to examples that were too long
    formats: Mapping[str, Mapping[str, int]]  # of each file: how many examples have each format
    counts: TrainedCounts  # of the conversations that are trained
    cache: Cache | None

    @property
    def arguments(self) -> TrainedArguments:
        """Of the chat template, as the turns were trained with them."""
        return self.counts.arguments

    @property
    def left_out(self) -> LeftOut:
        """Of the contexts, by the chat template."""
        return self.counts.left_out

    def loader(self) -> Loader:
        run = self.run
        return Loader(self.train, run.data.max_length, run.train.batch_size, run.train.seed)


def prepare(run: config.Run, num_processes: int = 1, date: datetime | None = None) -> Prepared:
    """Read, render and check all data of a run, with a progress bar on a terminal.

    date: for chat templates that write it (absent: now); that of its first start for a run that goes on.
    With more than one process, large inputs are rendered in several (data/workers.py says what the caller must heed).
    Raises DataError if a file cannot be read, nothing is left to train, or more than `data.max_rejected` of the
    examples are rejected; ModelError and TemplateError as `load_chat_format`.
    """
    check_codes(run.data.allow_rejected)
    tasks = _with_own([open_task(path).limited(run.eval.limit, run.train.seed) for path in run.eval.tasks], run.eval)
    named = {"train": run.data.train, "held out": run.data.eval, "replay": run.replay.data if run.replay else []}
    sources = {use: [OpenSource(source) for source in of_use] for use, of_use in named.items()}
    chat = load_chat_format(run.model, run.data, [*sources["train"], *sources["held out"]])
    chat = chat.at(date or datetime.now().astimezone())
    renderer = chat.renderer(run.data)
    fitter = Fitter(renderer, run.data.max_length, run.data.overflow, chat.num_positions)
    cache = open_cache(run.data.cache)
    tables = [table for of_use in sources.values() for source in of_use for table in source.tables]
    with example_progress(tables, "reading and rendering") as on_example:
        reader = _SourceReader(run, renderer, fitter, cache, num_processes, on_example)
        train = [reader.read(source) for source in sources["train"]]
        held_out = [reader.read_held_out(source) for source in sources["held out"]]
        replay = [reader.read(source) for source in sources["replay"]]
    counts = RejectionCounts(run.data.allow_rejected, reader.rejections)
    _require_few_rejected(counts, reader.num_examples, run.data.max_rejected)
    store = _mixture(run, train, replay, str(counts))
    _require_rows(chat, store)
    shares = run.data.share_prefixes
    dataset = with_shared_prefixes(store, run.data.max_length, run.train.seed) if shares else Dataset(store)
    return Prepared(
        run=run,
        chat=chat.trained_with(reader.counts.arguments),
        sources=sources,
        train=dataset,
        held_out=_held_out(held_out, run),
        tasks=tasks,
        rejections=reader.rejections,
        num_examples=reader.num_examples,
        examples_per_epoch=len(store),
        tokens=TokenCounts.of(dataset, store),
        shortened=reader.shortened,
        formats=reader.formats,
        counts=reader.counts,
        cache=cache,
    )


def _with_own(tasks: list[Task], settings: config.Eval) -> list[Task]:
    """The tasks, those with answers with the user's own metric. Raises ConfigError where there are none."""
    if settings.code is None:
        return tasks
    own = load_code(settings.code, "eval.code")
    if own.name in METRICS["generation"]:
        raise ConfigError(f"eval.code: a figure is named {own.name!r} already; give the function another name")
    if not any(task.kind == "generation" for task in tasks):
        raise ConfigError("eval.code: measures answers, and no task of eval.tasks has any: name a generation task")
    return [replace(task, own=own) if task.kind == "generation" else task for task in tasks]


def open_cache(setting: str | None) -> Cache | None:
    """The cache of rendered trees; None where there is to be none. setting: `data.cache`."""
    folder = cache_folder(setting)
    return None if folder is None else Cache(folder, lambda line: say(line, error=True))


class _SourceReader:
    """Reads sources, and keeps what is found beside their trees."""

    def __init__(
        self,
        run: config.Run,
        renderer: Renderer,
        fitter: Fitter,
        cache: Cache | None,
        num_processes: int,
        on_example: Callable[[], None],
    ) -> None:
        self._renderer, self._fitter, self._cache = renderer, fitter, cache
        self._num_processes, self._on_example = num_processes, on_example
        whole = run.data.train_on == "all"
        self._tables = TableReader(renderer, fitter, self._new_counts, whole, cache, num_processes, on_example)
        self.rejections: list[Rejection] = []
        self.formats: dict[str, Counter[str]] = {}
        self.counts, self.shortened = self._new_counts(), Shortened()

    def _new_counts(self) -> TrainedCounts:
        return TrainedCounts(TrainedArguments(self._renderer.switch, self._renderer.template_kwargs))

    @property
    def num_examples(self) -> int:
        return sum(counts.total() for counts in self.formats.values())

    def read(self, source: OpenSource) -> list[TableTrees]:
        """The trees of a source that is trained on."""
        found = self._tables.read(source)
        for table in found:
            self.formats.setdefault(table.name, Counter()).update(table.about["formats"])
            self.rejections += table.rejections
            self.counts.include(table.about["counts"], table.name)
            self.shortened.add(Shortened(**table.about["shortened"]))
        return found

    def read_held_out(self, source: OpenSource) -> list[ExampleTree]:
        """The examples of a source that is held out, each with its tree."""
        found: list[ExampleTree] = []
        self._fitter.shortened = self.shortened
        read = read_trees(source, self._renderer, self._fitter, self._num_processes, self._cache, with_texts=True)
        for entry, fitted in read:
            self.formats.setdefault(entry.table, Counter())[entry.format] += 1
            if isinstance(fitted, Rejection):
                self.rejections.append(fitted)
            else:
                found += fitted
            self._on_example()
        return found


def _held_out(per_source: Sequence[list[ExampleTree]], run: config.Run) -> list[ExampleTree]:
    chosen = mix([(len(own), source) for own, source in zip(per_source, run.data.eval, strict=True)], run.train.seed)
    every = [each for own in per_source for each in own]
    return [every[index] for index in chosen.tolist()]


def _require_rows(chat: ChatFormat, store: TreeStore) -> None:
    """Raises ModelError for an ordinary token of the data that the model has no row for: only added ones get one."""
    limits = chat.limits
    if limits is None or limits.num_rows is None or len(chat.tokenizer) <= limits.num_rows:
        return
    added = {*chat.tokenizer.added_tokens_decoder, *chat.added.values()}
    missing = {id_ for id_ in store.token_ids if id_ >= limits.num_rows and id_ not in added}
    for index in range(len(store)) if missing else ():
        tree = store.tree(index)
        for segment in tree.segments:
            for id_ in segment.ids:
                if id_ in missing:
                    raise ModelError(
                        f"{limits.model}: the model has {limits.num_rows:,} embeddings and its tokenizer "
                        f"{len(chat.tokenizer):,} tokens; {chat.tokenizer.convert_ids_to_tokens(id_)!r} ({id_}), which "
                        f"{tree.source} holds, has none. Tokenizer and model do not belong together"
                    )


def _require_few_rejected(counts: RejectionCounts, num_examples: int, max_rejected: float) -> None:
    if counts.num_not_allowed > max_rejected * num_examples:
        raise DataError(
            f"{counts.num_not_allowed} of {num_examples} examples cannot be trained "
            f"({counts.num_not_allowed / num_examples:.1%}; data.max_rejected allows {max_rejected:.1%}):\n{counts}"
        )


def _mixture(
    run: config.Run, train: Sequence[list[TableTrees]], replay: Sequence[list[TableTrees]], rejected: str
) -> TreeStore:
    """The trees of an epoch, with those that are replayed. Raises DataError if there are none."""
    seed = run.train.seed
    tuning_N = mix(_with_numbers(train, run.data.train), seed)
    if not len(tuning_N):
        raise DataError(f"data.train: no example is left to train; {rejected or 'weight too small'}")
    tables = list(_tables(train))
    chosen_N = tuning_N
    if run.replay is not None:
        replayed = TreeStore(_tables(replay), mix(_with_numbers(replay, run.replay.data), seed), run.loss.reduction)
        num_tuned = int(TreeStore(tuple(tables), tuning_N).num_trained.sum(dtype=np.int64))
        drawn_N = replayed.chosen_N[draw_replay(replayed.num_trained, num_tuned, run.replay.share, seed)]
        chosen_N = np.concatenate([tuning_N, drawn_N + sum(map(len, tables))])
        tables += _tables(replay)
    return TreeStore(tuple(tables), chosen_N, run.loss.reduction)


def _tables(per_source: Iterable[list[TableTrees]]) -> tuple[TableTrees, ...]:
    return tuple(table for own in per_source for table in own)


def _with_numbers(
    per_source: Sequence[list[TableTrees]], sources: Sequence[config.Source]
) -> Iterator[tuple[int, config.Source]]:
    """Each source with the number of its trees."""
    for own, source in zip(per_source, sources, strict=True):
        yield sum(map(len, own)), source
