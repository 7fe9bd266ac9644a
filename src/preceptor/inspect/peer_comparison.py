"""The tokens that another trainer would train and those that are trained here, side by side."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import Match, SequenceMatcher
from itertools import groupby, islice
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from preceptor.chat.render import Renderer
from preceptor.chat.tokenise import decode
from preceptor.config import Source
from preceptor.console import has_colour, visible
from preceptor.data.examples import Example, Rejection
from preceptor.data.forest import leaf_paths
from preceptor.data.sources import OpenSource, require_no_pipe
from preceptor.errors import first_line
from preceptor.inspect.emulation import Emulation, PeerTokens

SHOWN = 3  # examples
COUNTED = 1000
_NAMED = 5  # pieces of text that one trains and the other does not
_LONGEST = 20_000  # tokens that are aligned
_STYLE = "black on green"


@dataclass(frozen=True)
class BothTokens:
    """One example. A sentence in place of tokens: why one does not train it."""

    source: str
    theirs: PeerTokens | str
    ours: PeerTokens | str
    branches: int = 1  # ways through our tree; `ours` is the last
    off_path: tuple[tuple[int, ...], ...] = ()  # what is trained on the others alone, in their contexts


@dataclass
class BothCounts:
    """Trained tokens over all examples; only_*: of which the other trains none."""

    examples: int = 0
    theirs: int = 0
    ours: int = 0
    only_theirs: int = 0
    only_ours: int = 0
    examples_not_theirs: int = 0
    examples_not_ours: int = 0
    examples_too_long: int = 0
    pieces_only_theirs: Counter[str] = field(default_factory=Counter)
    pieces_only_ours: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        return {
            key: dict(value.most_common(_NAMED)) if isinstance(value, Counter) else value
            for key, value in vars(self).items()
        }


def compared(source: Source, rule: Emulation, renderer: Renderer) -> Iterator[BothTokens]:
    """The first COUNTED examples of the data, by both."""
    read, raw = OpenSource(source), OpenSource(source.path)
    require_no_pipe([read])
    pairs = zip(read.examples(), raw.rows(), strict=False)
    for example, (_, row) in islice(pairs, COUNTED):
        yield _both(example, row if isinstance(row, Mapping) else {}, rule, renderer)


def _both(example: Example | Rejection, row: Mapping[str, Any], rule: Emulation, renderer: Renderer) -> BothTokens:
    if isinstance(example, Rejection):
        why = f"rejected: {example.code}: {example.message}"
        return BothTokens(example.source, "not read here, so not emulated", why)
    tree = renderer.render(example)
    try:
        theirs = rule.tokens(example, row)
    except Exception as error:  # whatever a template raises, or its own loader would
        theirs = f"cannot be told: {type(error).__name__}: {first_line(error)}"
    if isinstance(theirs, PeerTokens) and None in theirs.ids:
        theirs = "cannot be told: the trainer writes a token that this tokenizer has not, such as its end of a text"
    if isinstance(tree, Rejection):
        return BothTokens(example.source, theirs, f"rejected: {tree.code}: {tree.message}")
    paths = leaf_paths(tree)
    pieces = [(segment.ids, segment.kind == "target" and segment.weight > 0) for segment in tree.segments]
    ours = PeerTokens.of(*(pieces[index] for index in paths[-1]))
    # an answer of an earlier turn that this path reads in another form is trained in its own
    off_path = tuple(ids for at, (ids, mark) in enumerate(pieces) if mark and at not in paths[-1])
    return BothTokens(example.source, theirs, ours, len(paths), off_path)


def add(counts: BothCounts, both: BothTokens, tokenizer: Any) -> None:
    counts.examples += 1
    counts.examples_not_theirs += isinstance(both.theirs, str)
    counts.examples_not_ours += isinstance(both.ours, str)
    if isinstance(both.theirs, str) or isinstance(both.ours, str):
        return
    common = _common(both.theirs, both.ours)
    if common is None:
        counts.examples_too_long += 1
        return
    counts.theirs += sum(both.theirs.trained)
    elsewhere = sum(map(len, both.off_path))
    counts.ours += sum(both.ours.trained) + elsewhere
    counts.only_ours += elsewhere
    counts.pieces_only_ours.update(decode(list(ids), tokenizer) for ids in both.off_path)
    for own, shared, pieces, name in (
        (both.theirs, {there for there, _ in common}, counts.pieces_only_theirs, "only_theirs"),
        (both.ours, {here for _, here in common}, counts.pieces_only_ours, "only_ours"),
    ):
        alone = [mark and at not in shared for at, mark in enumerate(own.trained)]
        setattr(counts, name, getattr(counts, name) + sum(alone))
        pieces.update(text for text, mark in _runs(own.ids, alone, tokenizer) if mark)


def _common(theirs: PeerTokens, ours: PeerTokens) -> set[tuple[int, int]] | None:
    """Places of tokens that are the same in both and that both train; None where that would take too long."""
    if theirs.ids == ours.ids:
        blocks = [Match(0, 0, len(ours.ids))]
    elif max(len(theirs.ids), len(ours.ids)) > _LONGEST:
        return None
    else:
        blocks = SequenceMatcher(None, theirs.ids, ours.ids, autojunk=False).get_matching_blocks()
    pairs = ((block.a + at, block.b + at) for block in blocks for at in range(block.size))
    return {(there, here) for there, here in pairs if theirs.trained[there] and ours.trained[here]}


def _runs(ids: Sequence[int], marks: Sequence[bool], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Texts of the tokens that are marked, and of those that are not, in their order."""
    for mark, run in groupby(zip(ids, marks, strict=True), key=lambda pair: pair[1]):
        yield decode([id_ for id_, _ in run], tokenizer), mark


def to_json(found: Iterable[BothTokens], tokenizer: Any) -> dict[str, Any]:
    """The first examples as ids with their marks, and counts over all."""
    counts, shown = BothCounts(), []
    for both in found:
        if counts.examples < SHOWN:
            shown.append(asdict(both))
        add(counts, both, tokenizer)
    return {"examples": shown, "counts": counts.to_json()}


# As text -------------------------------------------------------------------------------------------------------------


def print_comparison(rule: Emulation, found: Iterable[BothTokens], tokenizer: Any, console: Console) -> None:
    """The first examples side by side, and counts over all."""
    counts, peer = BothCounts(), rule.peer
    console.print(f"{rule.says}. It is emulated, without {peer}; what is cut at a maximum length is left out.")
    marks = Text(" trained ", _STYLE) if has_colour(console) else Text("⟦trained⟧")
    console.print(Text.assemble(marks, " not trained; ⏎ line end"))
    for both in found:
        if counts.examples < SHOWN:
            table = Table(title=both.source, title_justify="left", expand=True, show_lines=False)
            table.add_column(_heading(peer, both.theirs), ratio=1, overflow="fold")
            table.add_column(_heading("preceptor", both.ours) + _elsewhere(both), ratio=1, overflow="fold")
            table.add_row(*(_shown(own, tokenizer, has_colour(console)) for own in (both.theirs, both.ours)))
            console.print(table)
        add(counts, both, tokenizer)
    for line in counts_lines(peer, counts):
        console.print(line)


def _heading(name: str, own: PeerTokens | str) -> str:
    return name if isinstance(own, str) else f"{name}: {sum(own.trained):,} of {len(own.ids):,} tokens trained"


def _elsewhere(both: BothTokens) -> str:
    if both.branches == 1:
        return ""
    return f"; the last of {both.branches} paths, the others train {sum(map(len, both.off_path)):,} more"


def _shown(own: PeerTokens | str, tokenizer: Any, coloured: bool) -> Text:
    if isinstance(own, str):
        return Text(own, "italic")
    text = Text()
    for piece, mark in _runs(own.ids, own.trained, tokenizer):
        shown = visible(piece, joiners=False).replace("\n", "⏎\n").replace("\t", "⇥\t")
        text.append(f"⟦{shown}⟧" if mark and not coloured else shown, _STYLE if mark else None)
    return text


def counts_lines(peer: str, counts: BothCounts) -> Iterator[str]:
    """The counts in words."""
    of = "the first " * (counts.examples == COUNTED) + f"{counts.examples:,} example{'s' * (counts.examples != 1)}"
    yield (
        f"{of}: {peer} trains {counts.theirs:,} tokens, preceptor {counts.ours:,}; only {peer} "
        f"{counts.only_theirs:,}, only preceptor {counts.only_ours:,}"
    )
    for name, num in ((peer, counts.examples_not_theirs), ("preceptor", counts.examples_not_ours)):
        if num:
            yield f"{num:,} not trained by {name} or not emulated, and not counted"
    if num := counts.examples_too_long:
        yield f"{num:,} longer than {_LONGEST:,} tokens: not compared, and not counted"
    for name, pieces in ((peer, counts.pieces_only_theirs), ("preceptor", counts.pieces_only_ours)):
        if pieces:
            named = ", ".join(f"{_short(text)} ({num:,} x)" for text, num in pieces.most_common(_NAMED))
            yield f"only {name} trains: {named}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
