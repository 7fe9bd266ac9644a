"""An HTML page to browse examples: tokens with their borders, targets, origins, and trees as trees.

The page is one file that loads nothing: `show.html` with the examples in it as JSON. Text of an example is never read
as HTML: every `<` in the JSON is escaped, and the page's script inserts text as text.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup

from preceptor.chat.render import Renderer
from preceptor.chat.token_origins import Fields, TokenOrigins, token_origins
from preceptor.chat.tokenise import pieces_of, special_ids
from preceptor.data.examples import Completion, Conversation, Document, Example, Rejection
from preceptor.data.forest import Tree, leaf_path_lengths
from preceptor.errors import ConfigError
from preceptor.files import try_file, write_atomically
from preceptor.inspect.show import FittedExample, notes_of, to_json
from preceptor.report.skeleton import style_and_script, templates

MAX_EXAMPLES = 100
MAX_TOKENS = 400_000  # of all examples together; such a page has about 20 MB


@dataclass(frozen=True, slots=True)
class ExamplesPage:
    """The text of a page and its number of examples."""

    text: str
    num_examples: int


def check_page_file(file: Path, as_json: bool) -> None:
    """Raises ConfigError for a name that is not that of an HTML file, so that no data is overwritten by mistake;
    CheckpointError where no file can be written there.
    """
    if as_json:
        raise ConfigError("--html and --json exclude each other; give one of them")
    if file.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--html {file}: an HTML page is written there; give a name that ends in .html")
    try_file(file)


def write_page(
    file: Path, examples: Iterable[FittedExample], renderer: Renderer, about: str, number: int | None
) -> int:
    """Write the page of the first examples, or of example `number` only (counted from 1); returns how many it has.

    Without any example nothing is written. Raises CheckpointError if the file cannot be written.
    """
    page = make_page(examples, renderer, about, number)
    if page.num_examples:
        write_atomically(file, page.text)
    return page.num_examples


def make_page(
    examples: Iterable[FittedExample], renderer: Renderer, about: str, number: int | None = None
) -> ExamplesPage:
    """about: a line that says where the examples are from. At most MAX_EXAMPLES, and none after MAX_TOKENS tokens."""
    shown: list[dict[str, Any]] = []
    num_tokens, complete = 0, True
    for example in examples:
        if len(shown) == MAX_EXAMPLES or num_tokens > MAX_TOKENS:
            complete = False
            break
        shown.append(example_json(example, renderer))
        num_tokens += shown[-1]["num_tokens"]
    if renderer.template_name is not None:
        about += f"; chat template {renderer.template_name}"
    return ExamplesPage(_fill(shown, about, _note(len(shown), number, complete)), len(shown))


def _note(num_examples: int, number: int | None, complete: bool) -> str:
    if number is not None:
        return f"Example {number} of the data (--example {number})."
    if complete:
        return f"All {num_examples} examples of the data." if num_examples > 1 else "The only example of the data."
    return (
        f"The first {num_examples} examples of the data; a page has at most {MAX_EXAMPLES} examples or {MAX_TOKENS:,} "
        "tokens. `--example N` shows any other."
    )


def _fill(examples: Sequence[Any], about: str, note: str) -> str:
    values = {"title": "What is trained", "about": about, "note": note, "data": island({"examples": examples})}
    return templates("preceptor.inspect").get_template("show.html").render(values | style_and_script() | {"js": ""})


def island(value: Any) -> Markup:
    """JSON for a script element: without `<`, `>`, `&` and JavaScript line ends."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.translate({ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}))


def example_json(example: FittedExample, renderer: Renderer) -> dict[str, Any]:
    """What the page shows of an example: `to_json`, and the pieces of each segment with their fields."""
    given, rendered = example.given, example.trained
    shown = {"number": example.number, **to_json(rendered.source, rendered)}
    if isinstance(rendered, Rejection):
        return {**shown, "num_tokens": 0, "num_trained": 0, "num_saved": 0, "fields": [], "given": list(_given(given))}
    assert not isinstance(given, Rejection)
    whole, turns = renderer.render_with_turns(given)
    is_piece = isinstance(whole, Rejection) or whole.segments != rendered.segments  # cut by tokens
    origin = token_origins(given, rendered, () if is_piece else turns, renderer.tokenizer)
    fields: dict[Fields, int] = {}
    specials = special_ids(renderer.tokenizer)
    for index, segment in enumerate(shown["segments"]):
        segment["weight"] = rendered.segments[index].weight
        segment["num_trained"] = rendered.segments[index].num_trained
        segment["turn"] = rendered.segments[index].message
        segment["pieces"] = [
            (num, text, special, fields.setdefault(field, len(fields)))
            for num, text, special, field in _pieces(rendered, index, origin, renderer.tokenizer, specials)
        ]
    table = [[{"message": f.message, "role": f.role, "name": f.name} for f in together] for together in fields]
    return {
        **shown,
        "num_tokens": rendered.num_tokens,
        "num_trained": rendered.num_trained,
        "num_saved": sum(leaf_path_lengths(rendered)) - rendered.num_tokens,  # against a sequence for each path
        "notes": notes_of(example, renderer),
        "turns": sorted({own.message for own in rendered.segments if own.message is not None}),
        "fields": table,
    }


def _pieces(
    tree: Tree, index: int, origin: TokenOrigins, tokenizer: Any, specials: Collection[int]
) -> Iterator[tuple[int, str, bool, Fields]]:
    """(number of tokens, text, whether special, fields) of the pieces of a segment."""
    ids, fields, spelled = tree.segments[index].ids, origin.fields[index], origin.spelled[index]
    if spelled is None:
        at = 0
        for piece in pieces_of(ids, tokenizer, specials):
            yield len(piece.ids), piece.text, piece.special, fields[at]
            at += len(piece.ids)
        return
    numbers = range(len(ids))
    for (_, text), group in groupby(numbers, key=lambda number: spelled[number]):
        own = list(group)
        together = tuple(dict.fromkeys(field for number in own for field in fields[number]))
        yield len(own), text, ids[own[0]] in specials, together


def _given(record: Example | Rejection) -> Iterator[tuple[str, str]]:
    """The texts of a rejected example, as (name, text)."""
    if isinstance(record, Conversation):
        if record.tools:
            yield "tools", json.dumps(record.tools, ensure_ascii=False, indent=1)
        for index, message in enumerate(record.messages):
            rest = {key: value for key, value in message.given.items() if key != "role"}
            only_text = set(rest) == {"content"} and isinstance(rest["content"], str)
            text = rest["content"] if only_text else json.dumps(rest, ensure_ascii=False, indent=1)
            yield f"messages[{index}] ({message.role})", text
    elif isinstance(record, Completion):
        yield "prompt", record.prompt
        yield "completion", record.completion
    elif isinstance(record, Document):
        yield "text", record.text
