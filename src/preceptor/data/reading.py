"""The trees of a source: read from the cache, or rendered and written to it."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

from preceptor.data.cache import Cache, key_of
from preceptor.data.examples import Rejection
from preceptor.data.formats.tables import DataTable
from preceptor.data.rendered import rendered_examples
from preceptor.data.sources import Entry, OpenSource
from preceptor.data.table_trees import ExampleCounts, TableBuilder, TableTrees
from preceptor.data.truncation import ExampleTree, Fitter
from preceptor.data.workers import ExampleRenderer

_SMALL_BYTES = 1 << 20  # of a source's files; what is rendered in the time in which a cache is read and written
_HEARTBEAT = 500  # examples between two signs that this process still renders


def read_trees(
    source: OpenSource,
    renderer: ExampleRenderer,
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
    for each in rendered_examples(islice(source.entries(), most), renderer, fitter, num_processes, cache, with_texts):
        yield each.entry, fitter.fit(each.content, each.outcome)


class TableReader:
    """Reads sources as the trees that a run takes of their tables. What renders is in `renderer` and `fitter`.

    new_counts: what is counted of the examples of a table. whole: as `TableBuilder`.
    """

    def __init__(
        self,
        renderer: ExampleRenderer,
        fitter: Fitter,
        new_counts: Callable[[], ExampleCounts],
        whole: bool,
        cache: Cache | None = None,
        num_processes: int = 1,
        on_example: Callable[[], None] = lambda: None,
    ) -> None:
        self._renderer, self._fitter, self._new_counts, self._whole = renderer, fitter, new_counts, whole
        self._cache, self._num_processes, self._on_example = cache, num_processes, on_example

    def read(self, source: OpenSource) -> list[TableTrees]:
        """The trees of each table. Several processes may ask at once: one renders, the others wait for it.

        Raises DataError if a file cannot be read.
        """
        cache = _cache_for(source, self._cache)
        keys = [self._key(cache, source, table) for table in source.tables]
        if cache is None or None in keys:
            return list(self._build(source, cache, list(zip(source.tables, keys, strict=True))))
        found = self._look_up(cache, source, keys)
        if None in found:
            lock = key_of("building", keys)
            with cache.building(lock, source.source.path, lambda: None not in self._look_up(cache, source, keys)):
                found = self._look_up(cache, source, keys)
                missing = [k for k, trees in enumerate(found) if trees is None]
                built = self._build(source, cache, [(source.tables[k], keys[k]) for k in missing], lock)
                for k, trees in zip(missing, built, strict=True):
                    found[k] = trees
        cache.use({key for key in keys if key is not None})
        return [trees for trees in found if trees is not None]

    def _look_up(self, cache: Cache, source: OpenSource, keys: Sequence[str | None]) -> list[TableTrees | None]:
        files = [None if key is None else cache.table(key) for key in keys]
        found = []
        for table, file in zip(source.tables, files, strict=True):
            found.append(None if file is None else TableTrees.opened(table.name, file, cache))
        return found

    def _key(self, cache: Cache | None, source: OpenSource, table: DataTable) -> str | None:
        """By what is read and how, how it is rendered, and what is taken of it."""
        if cache is None or self._renderer.key is None or (source.own is not None and source.own.sha256 is None):
            return None
        identity = table.identity(cache.sha256_of)
        if identity is None:
            return None
        read = [identity, source.source.columns, source.source.nulls, *([source.own.sha256] if source.own else [])]
        read += [] if source.side is None else [repr(source.side)]
        return key_of("table", self._renderer.key, read, self._fitter.key, self._whole)

    def _build(
        self,
        source: OpenSource,
        cache: Cache | None,
        tables: Sequence[tuple[DataTable, str | None]],
        lock: str = "",
    ) -> Iterator[TableTrees]:
        """Render tables, one after the other, in one go."""
        whole = len(tables) == len(source.tables)  # then what was peeked at is not read again
        entries = source.entries() if whole else chain.from_iterable(source.entries_of(table) for table, _ in tables)
        names, waiting = None, list(tables)
        builder: TableBuilder | None = None
        for number, example in enumerate(
            rendered_examples(entries, self._renderer, self._fitter, self._num_processes, cache)
        ):
            if names != example.entry.table:
                if builder is not None:
                    yield builder.finish(cache, waiting.pop(0)[1])
                names = example.entry.table
                builder = TableBuilder(names, self._fitter, self._new_counts(), self._whole)
            assert builder is not None
            builder.add(example)
            self._on_example()
            if cache is not None and number % _HEARTBEAT == 0:
                cache.still_building(lock)
        if builder is not None:
            yield builder.finish(cache, waiting.pop(0)[1])


def _cache_for(source: OpenSource, cache: Cache | None) -> Cache | None:
    """The cache, unless the source's files are so small that it would save nothing."""
    if cache is None:
        return None
    files = [table.files() for table in source.tables]
    small = all(files) and sum(file.stat().st_size for each in files for file in each) < _SMALL_BYTES
    return None if small else cache
