"""Sources -> trees: examples rendered once, through the cache where there is one, and what is found beside the trees.

Examples are cached in *portions*, some megabytes of text each. Where a portion ends depends on the content of its last
example, and its name on the content of all its examples and on everything that rendering depends on. So the same
conversations are found again in a file that grew, in another file, or under another mixture, and of a file that changed
in the middle one or two portions are rendered again. What depends on `max_length` comes after the cache.
"""

import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice

import numpy as np

from preceptor.data.cache import Cache, key_of
from preceptor.data.examples import Example, Rejection
from preceptor.data.forest import Tree
from preceptor.data.formats.tables import DataTable
from preceptor.data.records import FlatFile, decode_tree, digest, encode_tree
from preceptor.data.sources import Entry, OpenSource
from preceptor.data.table_trees import RenderedExample, StoredRecord, TableBuilder, TableTrees
from preceptor.data.truncation import ExampleTree, Fitter, Shortened
from preceptor.data.workers import ExampleRenderer, cost_of, render_all
from preceptor.errors import DataError

_SMALL_BYTES = 1 << 20  # of a source's files; what is rendered in the time in which a cache is read and written
_SMALL_CHARACTERS, _LARGE_CHARACTERS = 1 << 20, 1 << 24  # of a portion: the fewest (but the last) and the most
_MEAN_CHARACTERS = 3 << 20  # after the fewest, by chance that depends on the content
_HEARTBEAT = 500  # examples between two signs that this process still renders


def read_trees(
    source: OpenSource,
    fitter: Fitter,
    num_processes: int = 1,
    cache: Cache | None = None,
    with_texts: bool = False,
    most: int | None = None,
) -> Iterator[tuple[Entry, list[ExampleTree] | Rejection]]:
    """Each entry of a source with the examples that are trained for it, each with its tree, or with its rejection.

    With more than one process, large sources are rendered in several (workers.py says what the caller must heed).
    most: so many entries, the first. with_texts: segments have their texts; without, they may have. Raises DataError
    if a file cannot be read.
    """
    cache = _cache_for(source, cache)
    for each in rendered_examples(islice(source.entries(), most), fitter, num_processes, cache, with_texts):
        yield each.entry, fitter.fit(each.content, each.outcome)


class SourceReader:
    """Reads the sources of a run, one after the other; what renders is in `fitter`.

    Of all sources so far: the number of examples and the rejections, both also by use (`train`, with its side that is
    held out, `held out`, `replay`); `formats` (of each file: how many examples have each format), `counts` of what is
    trained, what was shortened; of those that are held out the examples and how many were rejected.
    """

    def __init__(
        self,
        fitter: Fitter,
        cache: Cache | None = None,
        num_processes: int = 1,
        on_example: Callable[[], None] = lambda: None,
    ) -> None:
        self._fitter, self._cache, self._num_processes, self._on_example = fitter, cache, num_processes, on_example
        self.rejections: list[Rejection] = []
        self.num_by_use: Counter[str] = Counter()
        self.rejected_by_use: defaultdict[str, list[Rejection]] = defaultdict(list)
        self.formats: dict[str, Counter[str]] = {}
        self.counts, self.shortened = fitter.renderer.new_counts(), Shortened()
        self.num_examples = self.num_held_out = self.num_held_out_rejected = 0

    def _count(self, use: str, num_examples: int, rejections: Sequence[Rejection]) -> None:
        self.num_examples += num_examples
        self.num_by_use[use] += num_examples
        self.rejections += rejections
        self.rejected_by_use[use] += rejections

    def include(self, tables: Iterable[TableTrees], use: str = "train") -> None:
        """Count what is trained of these tables. use: `train` or `replay`."""
        for table in tables:
            self.formats.setdefault(table.name, Counter()).update(table.about["formats"])
            self._count(use, sum(table.about["formats"].values()), table.rejections)
            self.counts.include(table.about["counts"], table.name)
            self.shortened.add(Shortened(**table.about["shortened"]))

    def read_held_out(self, source: OpenSource) -> list[ExampleTree]:
        """The examples of a source that is held out, each with its tree."""
        found: list[ExampleTree] = []
        use = "held out" if source.side is None else "train"
        self._fitter.shortened = self.shortened
        for entry, fitted in read_trees(source, self._fitter, self._num_processes, self._cache, with_texts=True):
            self.formats.setdefault(entry.table, Counter())[entry.format] += 1
            self.num_held_out += 1
            self._count(use, 1, [fitted] if isinstance(fitted, Rejection) else [])
            if isinstance(fitted, Rejection):
                self.num_held_out_rejected += 1
            else:
                found += fitted
            self._on_example()
        return found

    def read(self, source: OpenSource, use: str = "train") -> list[TableTrees]:
        """The trees of each table of a source that is trained on, as `include` counts them.

        Several processes may ask at once: one renders, the others wait for it. Raises DataError if a file cannot be
        read.
        """
        found = self._tables(source)
        self.include(found, use)
        return found

    def _tables(self, source: OpenSource) -> list[TableTrees]:
        cache = _cache_for(source, self._cache)
        of_tables = [None if cache is None else self._key(cache, source, table) for table in source.tables]
        keys = [key for key in of_tables if key is not None]
        if cache is None or len(keys) < len(of_tables):
            return list(self._built(source, cache, list(zip(source.tables, of_tables, strict=True))))
        cache.use([cache.table_path(key) for key in keys])

        def look_up() -> list[TableTrees | None]:
            return [TableTrees.cached(table.name, cache, key) for table, key in zip(source.tables, keys, strict=True)]

        found = look_up()
        if None in found:
            lock = key_of("building", keys)
            with cache.building(lock, source.source.path, lambda: None not in look_up()):
                found = look_up()
                missing = [k for k, trees in enumerate(found) if trees is None]
                built = self._built(source, cache, [(source.tables[k], keys[k]) for k in missing], lock)
                for k, trees in zip(missing, built, strict=True):
                    found[k] = trees
        return [trees for trees in found if trees is not None]

    def _key(self, cache: Cache, source: OpenSource, table: DataTable) -> str | None:
        """By what is read and how, how it is rendered, and what is taken of it."""
        rendering, own = self._fitter.renderer.key, source.own
        if rendering is None or (own is not None and own.sha256 is None):
            return None
        identity = table.identity(cache.sha256_of)
        if identity is None:
            return None
        read = [identity, source.source.columns, source.source.nulls, *([own.sha256] if own else [])]
        read += [] if source.side is None else [repr(source.side)]
        return key_of("table", rendering, read, self._fitter.key)

    def _built(
        self, source: OpenSource, cache: Cache | None, tables: Sequence[tuple[DataTable, str | None]], lock: str = ""
    ) -> Iterator[TableTrees]:
        """Render tables, one after the other, in one go."""
        whole = len(tables) == len(source.tables)  # then what was peeked at is not read again
        entries = source.entries() if whole else chain.from_iterable(source.entries_of(table) for table, _ in tables)
        examples = enumerate(rendered_examples(entries, self._fitter, self._num_processes, cache))
        by_table = groupby(examples, key=lambda each: each[1].entry.table)
        begun = next(by_table, None)
        for table, key in tables:  # of one whose examples are all held out there is none
            builder = TableBuilder(table.name, self._fitter)
            if begun is not None and begun[0] == table.name:
                for number, example in begun[1]:
                    builder.add(example)
                    self._on_example()
                    if cache is not None and number % _HEARTBEAT == 0:
                        cache.still_building(lock)
                begun = next(by_table, None)
            yield builder.finish(cache, key)


def _cache_for(source: OpenSource, cache: Cache | None) -> Cache | None:
    """The cache, unless the source's files are so small that it would save nothing."""
    if cache is None:
        return None
    files = [table.files() for table in source.tables]
    small = all(files) and sum(file.stat().st_size for each in files for file in each) < _SMALL_BYTES
    return None if small else cache


# Rendered once --------------------------------------------------------------------------------------------------------


@dataclass
class _Portion:
    """Some examples, what became of them, and the file in which that is kept."""

    entries: list[Entry] = field(default_factory=list)
    contents: list[Example | Rejection] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    outcomes: list[Tree | Rejection] = field(default_factory=list)
    records: list[bytes] = field(default_factory=list)  # b"" for a rejection
    file: FlatFile | None = None
    key: str = ""


def rendered_examples(
    entries: Iterable[Entry],
    fitter: Fitter,
    num_processes: int = 1,
    cache: Cache | None = None,
    with_texts: bool = False,
) -> Iterator[RenderedExample]:
    """Each entry with what rendering makes of it, in order. with_texts: trees have the texts of their segments.

    Without a cache trees have them always. Raises as `render_all`.
    """
    renderer = fitter.renderer
    waiting: deque[tuple[Entry, Example | Rejection]] = deque()
    if cache is None or renderer.key is None:

        def contents() -> Iterator[Example | Rejection]:
            for entry in entries:
                waiting.append((entry, fitter.before_rendering(entry.example)))
                yield waiting[-1][1]

        for outcome in render_all(renderer, contents(), num_processes):
            yield RenderedExample(*waiting.popleft(), outcome, None)
        return
    yield from _from_cache_or_rendered(cache, _portions(entries, fitter), renderer, num_processes, with_texts)


def _from_cache_or_rendered(
    cache: Cache, portions: Iterator[_Portion], renderer: ExampleRenderer, num_processes: int, with_texts: bool
) -> Iterator[RenderedExample]:
    """Yield every example with its outcome, in order.

    Portions in the cache are read; consecutive portions that are not are rendered together and written. `_contents`
    stops at the first cached portion and leaves it in `cached_next`.
    """

    def looked_up() -> Iterator[_Portion]:
        for portion in portions:
            contents = hashlib.sha256(b"".join(portion.digests)).hexdigest()
            portion.key = key_of("portion", renderer.key, with_texts, len(portion.digests), contents)
            cache.use([cache.portion_path(portion.key)])  # also of a table that the cache cannot have
            _look_up(cache, portion)
            yield portion

    looked = looked_up()
    for portion in looked:
        if portion.file is not None:
            yield from _results(portion)
            continue
        missing: deque[_Portion] = deque()
        cached_next: list[_Portion] = []
        contents = _contents(chain([portion], looked), missing, cached_next)
        for outcome in render_all(renderer, contents, num_processes):
            missing[0].outcomes.append(outcome)
            if len(missing[0].outcomes) == len(missing[0].contents):
                _write(cache, missing[0], with_texts)
                yield from _results(missing.popleft())
        for each in cached_next:
            yield from _results(each)


def _contents(
    portions: Iterable[_Portion], missing: deque[_Portion], cached_next: list[_Portion]
) -> Iterator[Example | Rejection]:
    """The examples of one missing portion after the other, up to one that is in the cache."""
    for portion in portions:
        if portion.file is not None:
            cached_next.append(portion)
            return
        missing.append(portion)
        yield from portion.contents


def _portions(entries: Iterable[Entry], fitter: Fitter) -> Iterator[_Portion]:
    portion, size = _Portion(), 0
    for entry in entries:
        if portion.entries and entry.table != portion.entries[-1].table:
            yield portion
            portion, size = _Portion(), 0
        content = fitter.before_rendering(entry.example)
        portion.entries.append(entry)
        portion.contents.append(content)
        portion.digests.append(digest_of_content(content))
        own = cost_of(content)
        size += own
        drawn = int.from_bytes(portion.digests[-1][:4]) / 2**32  # the same wherever the example stands
        if (size >= _SMALL_CHARACTERS and drawn < own / _MEAN_CHARACTERS) or size >= _LARGE_CHARACTERS:
            yield portion
            portion, size = _Portion(), 0
    if portion.entries:
        yield portion


def digest_of_content(example: Example | Rejection) -> bytes:
    """16 bytes that differ where anything but the place differs, be it 1 and 1.0 or the order of keys."""
    spelled = repr(replace(example, source="")).encode(errors="surrogatepass")
    return hashlib.blake2b(spelled, digest_size=16).digest()


# Portions in the cache -----------------------------------------------------------------------------------------------


def _look_up(cache: Cache, portion: _Portion) -> None:
    """Take a portion's outcomes from the cache, if they are there and whole."""
    file = cache.opened(cache.portion_path(portion.key))
    if file is None:
        return
    try:
        content, sizes = file.load("records").tobytes(), file.load("sizes").tolist()
    except DataError as error:
        cache.damaged(file.path, error)
        return
    ends = np.cumsum(sizes).tolist()
    portion.file = file
    portion.records = [content[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    rejections = {k: (code, message) for k, code, message in file.about["rejections"]}
    for k, (entry, record) in enumerate(zip(portion.entries, portion.records, strict=True)):
        place = entry.example.source
        portion.outcomes.append(decode_tree(record, place) if record else Rejection(place, *rejections[k]))


def _write(cache: Cache, portion: _Portion, with_texts: bool) -> None:
    """Write a portion that is rendered."""
    portion.records = [encode_tree(each, with_texts) if isinstance(each, Tree) else b"" for each in portion.outcomes]
    rejections = [
        (k, each.code, each.message) for k, each in enumerate(portion.outcomes) if isinstance(each, Rejection)
    ]
    arrays: dict[str, np.ndarray] = {
        "records": np.frombuffer(b"".join(portion.records), np.uint8),
        "sizes": np.array(list(map(len, portion.records)), np.int64),
    }
    portion.file = cache.write(cache.portion_path(portion.key), {"rejections": rejections}, arrays)


def _results(portion: _Portion) -> Iterator[RenderedExample]:
    offset = 0
    for entry, content, outcome, record in zip(
        portion.entries, portion.contents, portion.outcomes, portion.records, strict=True
    ):
        stored = None
        if portion.file is not None:
            stored = StoredRecord(portion.key, portion.file.num_bytes, offset, len(record), digest(record))
        yield RenderedExample(entry, content, outcome, stored)
        offset += len(record)
