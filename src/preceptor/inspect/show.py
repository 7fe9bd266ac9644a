"""Segments and tokens of an example as coloured text or as JSON."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from preceptor.chat.render import Renderer
from preceptor.chat.thinking import thinking_lines
from preceptor.chat.tokenise import pieces_of, special_ids
from preceptor.console import has_colour, print_json, visible
from preceptor.data.examples import Example, Rejection
from preceptor.data.forest import Tree
from preceptor.data.truncation import Fitter
from preceptor.errors import counted

FIRST_EXAMPLES = 5  # shown without --example

# Neighbouring tokens differ in shade, so that their borders can be seen.
_STYLES = {"context": ("dim", "dim underline"), "target": ("black on green", "black on bright_green")}


class FittedExample(NamedTuple):
    """number: of the example in the data, from 1; several have one where it is split. given: what was read, or a part
    of it. trained: as it is trained, or why it is not. is_shortened: whether `data.overflow` made it another one.
    """

    number: int
    given: Example | Rejection
    trained: Tree | Rejection
    is_shortened: bool


def fitted(records: Iterable[Example | Rejection], fitter: Fitter, number: int | None) -> Iterator[FittedExample]:
    """The examples as they are trained; only that of `number` where it is given."""
    for at, read in islice(enumerate(records, start=1), None if number is None else number - 1, number):
        given = fitter.before_rendering(read)
        rendered = given if isinstance(given, Rejection) else fitter.renderer.render(given)
        found = fitter.fit(given, rendered)
        if isinstance(found, Rejection):
            yield FittedExample(at, read, found, is_shortened=False)
        else:
            yield from (FittedExample(at, example, tree, tree is not rendered) for example, tree in found)


def show_examples(
    examples: Iterable[FittedExample], renderer: Renderer, number: int | None, as_json: bool, console: Console
) -> int:
    """Print example `number`, or the first ones, or all as JSON; returns how many."""
    num_shown = 0
    for each in examples:
        num_shown += 1
        trained = each.trained
        if as_json:
            left_out = [] if isinstance(trained, Rejection) else list(trained.left_out)
            about = {"thinking": thinking_of(each, renderer), "left_out": left_out}
            print_json({**to_json(trained.source, trained), **about}, indent=None)
        else:
            if num_shown == 1:
                console.print(legend(has_colour(console)))
            console.rule(trained.source, align="left")
            console.print(to_text(trained, renderer.tokenizer, coloured=has_colour(console)))
            if not isinstance(trained, Rejection):
                for line in (summary_line(trained), *notes_of(each, renderer)):
                    console.print(line, style="italic")
            if number is None and num_shown == FIRST_EXAMPLES:
                console.print(f"the first {FIRST_EXAMPLES} examples; --example N shows another, --json all")
                break
    return num_shown


def notes_of(example: FittedExample, renderer: Renderer) -> list[str]:
    """What the tokens do not show: settings of the thinking switch, what is left out, whether it was too long."""
    names = () if isinstance(example.trained, Rejection) else example.trained.left_out
    missing = [f"the template leaves out the {name}: the model never sees it" for name in names]
    shortened = ["it was too long: this is what data.overflow makes of it"] * example.is_shortened
    return [*thinking_lines(thinking_of(example, renderer), {}), *missing, *shortened]


def thinking_of(example: FittedExample, renderer: Renderer) -> Sequence[Mapping[str, Any]]:
    """The turns of one example by the template's thinking switch: `TrainedCounts.thinking`."""
    counts = renderer.new_counts()
    if not isinstance(example.given, Rejection) and not isinstance(example.trained, Rejection):
        counts.add(example.given, example.trained)
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
    text, specials = Text(), special_ids(tokenizer)
    for index, segment in enumerate(rendered.segments):
        branches = segment.parent is not None and segment.parent != index - 1
        if branches:
            text.append(f"\n↳ continues segment {segment.parent}\n", "bold yellow")
        num_read, at, trained = len(segment.ids) - segment.num_trained, 0, False
        for place, piece in enumerate(pieces_of(segment.ids, tokenizer, specials)):
            text.append("⟦" * (at >= num_read and not trained and not coloured))
            trained = at >= num_read
            at += len(piece.ids)
            style = _STYLES["target" if trained else "context"][place % 2]
            shown = visible(piece.text, joiners=False).replace("\n", "⏎\n").replace("\t", "⇥\t")
            text.append(shown, f"bold {style}" if piece.special else style)
        text.append("⟧" * (trained and not coloured))
    return text


def summary_line(rendered: Tree) -> str:
    """The number of tokens, and how many of them are trained."""
    turns = len({segment.message for segment in rendered.segments if segment.message is not None})
    share = rendered.num_trained / max(1, rendered.num_tokens)
    of_turns = f" in {counted(turns, 'turn')}" if turns else ""  # a text has none
    return f"{rendered.num_tokens} tokens, {rendered.num_trained} trained{of_turns} ({share:.0%})"
