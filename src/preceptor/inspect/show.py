"""Segments and tokens of an example as coloured text or as JSON."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text

from preceptor.chat.render import Renderer
from preceptor.chat.thinking import thinking_lines
from preceptor.chat.tokenise import pieces_of
from preceptor.console import has_colour, print_json, visible
from preceptor.data.examples import Example, Rejection
from preceptor.data.forest import Tree

FIRST_EXAMPLES = 5  # shown without --example

# Neighbouring tokens differ in shade, so that their borders can be seen.
_STYLES = {"context": ("dim", "dim underline"), "target": ("black on green", "black on bright_green")}


def show_examples(
    records: Iterable[Example | Rejection], renderer: Renderer, number: int | None, as_json: bool, console: Console
) -> int:
    """Print example `number`, counted from 1, or the first ones, or all as JSON; returns how many."""
    num_shown = 0
    for _, record in numbered(records, number):
        num_shown += 1
        rendered = record if isinstance(record, Rejection) else renderer.render(record)
        thinking = thinking_of(record, rendered, renderer)
        if as_json:
            left_out = [] if isinstance(rendered, Rejection) else list(rendered.left_out)
            print_json({**to_json(record.source, rendered), "thinking": thinking, "left_out": left_out}, indent=None)
        else:
            if num_shown == 1:
                console.print(legend(has_colour(console)))
            console.rule(record.source, align="left")
            console.print(to_text(rendered, renderer.tokenizer, coloured=has_colour(console)))
            if not isinstance(rendered, Rejection):
                missing = [f"the template leaves out the {name}: the model never sees it" for name in rendered.left_out]
                for line in (summary_line(rendered), *thinking_lines(thinking, {}), *missing):
                    console.print(line, style="italic")
            if number is None and num_shown == FIRST_EXAMPLES:
                console.print(f"the first {FIRST_EXAMPLES} examples; --example N shows another, --json all")
                break
    return num_shown


def numbered(records: Iterable[Example | Rejection], number: int | None) -> Iterator[tuple[int, Example | Rejection]]:
    """The records with their numbers from 1; only that of `number` where it is given."""
    return islice(enumerate(records, start=1), None if number is None else number - 1, number)


def thinking_of(
    record: Example | Rejection, rendered: Tree | Rejection, renderer: Renderer
) -> Sequence[Mapping[str, Any]]:
    """The turns of one example by the template's thinking switch: `TrainedCounts.thinking`."""
    counts = renderer.new_counts()
    if not isinstance(record, Rejection) and not isinstance(rendered, Rejection):
        counts.add(record, rendered)
    return counts.thinking()


def to_json(source: str, rendered: Tree | Rejection) -> dict[str, Any]:
    """An example as one object: its segments, each continuing its parent's ids, or its rejection."""
    if isinstance(rendered, Rejection):
        return {"source": source, "segments": [], "rejection": {"code": rendered.code, "message": rendered.message}}
    segments = [
        {"id": index, "parent": segment.parent, "kind": segment.kind, "ids": list(segment.ids), "text": segment.text}
        for index, segment in enumerate(rendered.segments)
    ]
    return {"source": source, "segments": segments, "rejection": None}


def legend(coloured: bool) -> Text:
    """What the signs and colours of `to_text` mean."""
    signs = "; ⏎ line end, ⇥ tab"
    if not coloured:
        return Text(f"⟦trained⟧ context{signs}")
    trained, context = (" trained ", _STYLES["target"][0]), ("context", _STYLES["context"][0])
    return Text.assemble(trained, " ", context, f"{signs}; shades show where tokens meet")


def to_text(rendered: Tree | Rejection, tokenizer: Any, coloured: bool = True) -> Text:
    """Text for a terminal, with visible token borders, line ends and special tokens; without colours ⟦targets⟧."""
    if isinstance(rendered, Rejection):
        return Text.assemble((f"rejected: {rendered.code}: ", "bold red"), rendered.message)
    text = Text()
    for index, segment in enumerate(rendered.segments):
        branches = segment.parent is not None and segment.parent != index - 1
        if branches:
            text.append(f"\n↳ continues segment {segment.parent}\n", "bold yellow")
        marked = segment.kind == "target" and not coloured
        text.append("⟦" * marked)
        for place, piece in enumerate(pieces_of(segment.ids, tokenizer)):
            style = _STYLES[segment.kind][place % 2]
            shown = visible(piece.text).replace("\n", "⏎\n").replace("\t", "⇥\t")
            text.append(shown, f"bold {style}" if piece.special else style)
        text.append("⟧" * marked)
    return text


def summary_line(rendered: Tree) -> str:
    """The number of tokens, and how many of them are trained."""
    turns = sum(segment.kind == "target" for segment in rendered.segments)
    share = rendered.num_trained / max(1, rendered.num_tokens)
    of_turns = f"{turns} turn{'s' * (turns != 1)}"
    return f"{rendered.num_tokens} tokens, {rendered.num_trained} trained in {of_turns} ({share:.0%})"
