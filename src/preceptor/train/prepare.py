"""Everything that a run needs before a model is loaded: chat format, trees, tasks, and what was rejected.

Whatever can be found wrong with a run is found here, in seconds, with nothing written.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from preceptor import config
from preceptor.chat.format import ChatFormat, load_chat_format
from preceptor.chat.left_out import LeftOut
from preceptor.chat.render import Renderer
from preceptor.chat.thinking import TrainedArguments
from preceptor.console import example_progress
from preceptor.data.dataset import Dataset, TokenCounts, read_trees
from preceptor.data.examples import Conversation, Example, Rejection
from preceptor.data.forest import Tree
from preceptor.data.loader import Loader
from preceptor.data.mixture import draw_replay, mix, weigh
from preceptor.data.prefix_sharing import share_prefixes
from preceptor.data.rejections import RejectionCounts, check_codes
from preceptor.data.sources import OpenSource
from preceptor.data.truncation import ExampleTree, Fitter, Shortened
from preceptor.errors import DataError, ModelError
from preceptor.evaluate.tasks import Task, read_task


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
    arguments: TrainedArguments  # of the chat template, as the turns were trained with them
    system_prompts: Mapping[str, int]  # "" for none: in how many conversations
    left_out: LeftOut  # of the contexts, by the chat template

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
    tasks = [read_task(path).limited(run.eval.limit, run.train.seed) for path in run.eval.tasks]
    named = {"train": run.data.train, "held out": run.data.eval, "replay": run.replay.data if run.replay else []}
    sources = {use: [OpenSource(source) for source in of_use] for use, of_use in named.items()}
    chat = load_chat_format(run.model, run.data, [*sources["train"], *sources["held out"]])
    chat = chat.at(date or datetime.now().astimezone())
    renderer = chat.renderer(run.data)
    arguments = TrainedArguments(renderer.switch, renderer.template_kwargs)
    fitter = Fitter(renderer, run.data.max_length, run.data.overflow, chat.num_positions)
    tables = [table for of_use in sources.values() for source in of_use for table in source.tables]
    with example_progress(tables, "reading and rendering") as on_example:
        reader = _SourceReader(renderer, fitter, num_processes, arguments, on_example)
        train = [([tree for _, tree in reader.read(source)], source.source) for source in sources["train"]]
        held_out = [(list(reader.read(source, trained=False)), source.source) for source in sources["held out"]]
        replay = [([tree for _, tree in reader.read(source)], source.source) for source in sources["replay"]]
    counts = RejectionCounts(run.data.allow_rejected, reader.rejections)
    _require_few_rejected(counts, reader.num_examples, run.data.max_rejected)
    trees = _mixture(run, mix(train, run.train.seed), mix(replay, run.train.seed), str(counts))
    _require_rows(chat, trees)
    shared = share_prefixes(trees, run.data.max_length, run.train.seed) if run.data.share_prefixes else trees
    return Prepared(
        run=run,
        chat=chat.trained_with(arguments),
        sources=sources,
        train=Dataset(shared),
        held_out=mix(held_out, run.train.seed),
        tasks=tasks,
        rejections=reader.rejections,
        num_examples=reader.num_examples,
        examples_per_epoch=len(trees),
        tokens=TokenCounts.of(trees, shared, whole=run.data.train_on == "all"),
        shortened=fitter.shortened,
        formats=reader.formats,
        arguments=arguments,
        system_prompts=reader.system_prompts,
        left_out=reader.left_out,
    )


class _SourceReader:
    """Reads sources, and keeps what is found beside their trees."""

    def __init__(
        self,
        renderer: Renderer,
        fitter: Fitter,
        num_processes: int,
        arguments: TrainedArguments,
        on_example: Callable[[], None],
    ) -> None:
        self._renderer, self._fitter, self._num_processes = renderer, fitter, num_processes
        self._arguments, self._on_example = arguments, on_example
        self.rejections: list[Rejection] = []
        self.formats: dict[str, Counter[str]] = {}
        self.system_prompts: Counter[str] = Counter()
        self.left_out = LeftOut()

    @property
    def num_examples(self) -> int:
        return sum(counts.total() for counts in self.formats.values())

    def read(self, source: OpenSource, trained: bool = True) -> Iterator[ExampleTree]:
        for entry, found in read_trees(source, self._renderer, self._fitter, self._num_processes):
            self.formats.setdefault(entry.table, Counter())[entry.format] += 1
            if isinstance(found, Rejection):
                self.rejections.append(found)
            else:
                for example, tree in found:
                    if trained:
                        self._arguments.add(example, tree)
                        self._count_system_prompt(example)
                        self.left_out.add(tree)
                    yield example, tree
            self._on_example()

    def _count_system_prompt(self, example: Example) -> None:
        if isinstance(example, Conversation):
            first = example.messages[0]
            self.system_prompts[first.content if first.role in ("system", "developer") else ""] += 1


def _require_rows(chat: ChatFormat, trees: Sequence[Tree]) -> None:
    """Raises ModelError for an ordinary token of the data that the model has no row for: only added ones get one."""
    limits = chat.limits
    if limits is None or limits.num_rows is None or len(chat.tokenizer) <= limits.num_rows:
        return
    added = {*chat.tokenizer.added_tokens_decoder, *chat.added.values()}
    for tree in trees:
        for segment in tree.segments:
            for id_ in segment.ids:
                if id_ >= limits.num_rows and id_ not in added:
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


def _mixture(run: config.Run, tuning: Sequence[Tree], replay: Sequence[Tree], rejected: str) -> list[Tree]:
    """The trees of an epoch, weighed, with those that are replayed. Raises DataError if there are none."""
    trees = [weigh(tree, run.loss.reduction) for tree in tuning]
    if not trees:
        raise DataError(f"data.train: no example is left to train; {rejected or 'weight too small'}")
    if run.replay is not None:
        weighed = [weigh(tree, run.loss.reduction) for tree in replay]
        trees += draw_replay(weighed, trees, run.replay.share, run.train.seed)
    return trees
