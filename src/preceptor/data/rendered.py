"""Examples of a source, rendered once: through the cache where there is one.

Examples are cached in *portions*, some megabytes of text each. Where a portion ends hangs on the content of its last
example, and its name on the content of all its examples and on everything that rendering depends on. So the same
conversations are found again in a file that grew, in another file, or under another mixture, and of a file that changed
in the middle one or two portions are rendered anew. What depends on `max_length` comes after the cache.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np

from preceptor.data.cache import Cache, key_of
from preceptor.data.examples import Completion, Conversation, Document, Example, Rejection
from preceptor.data.flat_files import FlatFile
from preceptor.data.forest import Tree
from preceptor.data.records import decode, digest, encode
from preceptor.data.sources import Entry
from preceptor.data.truncation import Fitter
from preceptor.data.workers import ExampleRenderer, characters_in, render_all
from preceptor.errors import DataError

_SMALL_CHARACTERS, _LARGE_CHARACTERS = 1 << 20, 1 << 24  # of a portion: the fewest (but the last) and the most
_MEAN_CHARACTERS = 3 << 20  # after the fewest, by chance that hangs on the content


class StoredRecord(NamedTuple):
    """Where the record of a tree is; of no bytes for an example that is rejected."""

    portion: str
    num_portion_bytes: int
    offset: int
    size: int
    digest: bytes


class RenderedExample(NamedTuple):
    """An entry, what of it was rendered (a Rejection is not), the outcome, and where its record is kept, if it is."""

    entry: Entry
    content: Example | Rejection
    outcome: Tree | Rejection
    stored: StoredRecord | None


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
    renderer: ExampleRenderer,
    fitter: Fitter,
    num_processes: int = 1,
    cache: Cache | None = None,
    with_texts: bool = False,
) -> Iterator[RenderedExample]:
    """Each entry with what rendering makes of it, in order. with_texts: trees have the texts of their segments.

    Without a cache trees have them always. Raises as `render_all`.
    """
    waiting: deque[RenderedExample] = deque()
    if cache is None or renderer.key is None:

        def contents() -> Iterator[Example | Rejection]:
            for entry in entries:
                content = fitter.before_rendering(entry.example)
                waiting.append(RenderedExample(entry, content, content, None))  # type: ignore[arg-type]
                yield content

        for _, outcome in render_all(renderer, contents(), num_processes):
            yield waiting.popleft()._replace(outcome=outcome)
        return
    yield from _through(cache, _portions(entries, fitter), renderer, num_processes, with_texts)


def _through(
    cache: Cache, portions: Iterator[_Portion], renderer: ExampleRenderer, num_processes: int, with_texts: bool
) -> Iterator[RenderedExample]:
    def looked_up() -> Iterator[_Portion]:
        for portion in portions:
            contents = hashlib.sha256(b"".join(portion.digests)).hexdigest()
            portion.key = key_of("portion", renderer.key, with_texts, len(portion.digests), contents)
            _look_up(cache, portion)
            yield portion

    looked = looked_up()
    for portion in looked:
        if portion.file is not None:
            yield from _results(portion)
            continue
        missing: deque[_Portion] = deque()
        there: list[_Portion] = []
        for _, outcome in render_all(renderer, _contents(chain([portion], looked), missing, there), num_processes):
            missing[0].outcomes.append(outcome)
            if len(missing[0].outcomes) == len(missing[0].contents):
                _write(cache, missing[0], with_texts)
                yield from _results(missing.popleft())
        for each in there:
            yield from _results(each)


def _contents(
    portions: Iterable[_Portion], missing: deque[_Portion], there: list[_Portion]
) -> Iterator[Example | Rejection]:
    """The examples of one missing portion after the other, up to one that is there."""
    for portion in portions:
        if portion.file is not None:
            there.append(portion)
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
        own = characters_in(content)
        size += own
        drawn = int.from_bytes(portion.digests[-1][:4]) / 2**32  # the same wherever the example stands
        if (size >= _SMALL_CHARACTERS and drawn < own / _MEAN_CHARACTERS) or size >= _LARGE_CHARACTERS:
            yield portion
            portion, size = _Portion(), 0
    if portion.entries:
        yield portion


def digest_of_content(example: Example | Rejection) -> bytes:
    """16 bytes that differ where anything but the place differs, be it 1 and 1.0 or the order of keys."""
    content: object
    if isinstance(example, Conversation):
        messages = [(m.given, m.train, m.weight) for m in example.messages]
        content = (messages, example.tools, example.template_kwargs)
    elif isinstance(example, Completion):
        content = (example.prompt, example.completion)
    else:
        content = (example.text,) if isinstance(example, Document) else (example.code, example.message)
    spelled = f"{type(example).__name__} {content!r}".encode(errors="surrogatepass")
    return hashlib.blake2b(spelled, digest_size=16).digest()


# Portions in the cache -----------------------------------------------------------------------------------------------


def _look_up(cache: Cache, portion: _Portion) -> None:
    """Take a portion's outcomes from the cache, if they are there and whole."""
    file = cache.portion(portion.key)
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
        portion.outcomes.append(decode(record, place) if record else Rejection(place, *rejections[k]))


def _write(cache: Cache, portion: _Portion, with_texts: bool) -> None:
    """Write a portion that is rendered."""
    portion.records = [encode(each, with_texts) if isinstance(each, Tree) else b"" for each in portion.outcomes]
    rejections = [
        (k, each.code, each.message) for k, each in enumerate(portion.outcomes) if isinstance(each, Rejection)
    ]
    arrays: dict[str, np.ndarray] = {
        "records": np.frombuffer(b"".join(portion.records), np.uint8),
        "sizes": np.array([len(record) for record in portion.records], np.int64),
    }
    portion.file = cache.write_portion(portion.key, {"rejections": rejections}, arrays)


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
