"""One HTML page on which to step through rows: tokens with their borders, targets, origins, and trees as trees.

The page is one file that loads nothing: `show.html`, with the rows in it as JSON. Nothing of a row is ever read as
HTML: in the JSON every `<` is escaped, and the page's script writes text as text.
"""

import html
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from preceptor.chat.render import Renderer
from preceptor.chat.token_origins import Fields, Whence, whence
from preceptor.chat.token_text import pieces_of, special_ids
from preceptor.data.examples import Completion, Conversation, Document, Example, Rejection
from preceptor.data.forest import Tree, path_ids
from preceptor.errors import ConfigError
from preceptor.files import write_atomically
from preceptor.inspect.show import to_json

MAX_ROWS = 100
MAX_TOKENS = 400_000  # of all rows together; a page of them is some 20 MB


@dataclass(frozen=True, slots=True)
class Page:
    """A page and how many rows it holds."""

    text: str
    num_rows: int


def check_page_file(file: Path, as_json: bool) -> None:
    """Raises ConfigError for anything but the name of an HTML file, so that no data is overwritten by mistake."""
    if as_json:
        raise ConfigError("--html and --json are two ways to look; give one of them")
    if file.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--html {file}: the page is written there; give a name that ends in .html")


def write_page(
    file: Path, records: Iterable[Example | Rejection], renderer: Renderer, about: str, row: int | None
) -> int:
    """Write the page of the first rows, or of row `row` only (counted from 1); returns how many rows it has.

    Without any row nothing is written. Raises CheckpointError if the file cannot be.
    """
    page = make_page(records, renderer, about, row)
    if page.num_rows:
        write_atomically(file, page.text)
    return page.num_rows


def make_page(records: Iterable[Example | Rejection], renderer: Renderer, about: str, row: int | None = None) -> Page:
    """`about`: one line on where the rows are from. At most MAX_ROWS rows, and no more once MAX_TOKENS are passed."""
    rows: list[dict[str, Any]] = []
    num_tokens, complete = 0, True
    for number, record in enumerate(records, start=1):
        if row is not None and number != row:
            continue
        if len(rows) == MAX_ROWS or num_tokens > MAX_TOKENS:
            complete = False
            break
        rows.append(row_json(number, record, renderer))
        num_tokens += rows[-1]["num_tokens"]
        if row is not None:
            complete = False
            break
    if renderer.template is not None:
        about += f"; chat template {renderer.template.name}"
    return Page(_fill(rows, about, _note(len(rows), row, complete)), len(rows))


def _note(num_rows: int, row: int | None, complete: bool) -> str:
    if row is not None:
        return f"Row {row} of the data, as asked for with --example {row}."
    if complete:
        return f"All {num_rows} rows of the data." if num_rows > 1 else "The only row of the data."
    return (
        f"The first {num_rows} rows of the data; a page holds at most {MAX_ROWS} rows or {MAX_TOKENS:,} tokens. "
        "`--example N` shows any other."
    )


def _fill(rows: Sequence[Any], about: str, note: str) -> str:
    page = (files("preceptor.inspect") / "show.html").read_text(encoding="utf-8")
    parts = {"TITLE": "What is trained", "ABOUT": about, "NOTE": note}
    before, _, after = page.partition("@DATA@")  # first, so that nothing in the data is taken for a place to fill in
    for name, text in parts.items():
        before = before.replace(f"@{name}@", html.escape(text))
    return before + island({"rows": rows}) + after


def island(value: Any) -> str:
    """JSON that can stand in a script element, whatever it holds: no `<`, `>` or `&`, no JavaScript line end."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.translate({ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


# Rows ----------------------------------------------------------------------------------------------------------------


def row_json(number: int, record: Example | Rejection, renderer: Renderer) -> dict[str, Any]:
    """All that the page shows of a row: `to_json`, and for each segment its pieces, each with its field."""
    rendered = record if isinstance(record, Rejection) else renderer.render(record)
    row = {"number": number, **to_json(record.source, rendered)}
    if isinstance(rendered, Rejection):
        return {**row, "num_tokens": 0, "num_trained": 0, "num_saved": 0, "fields": [], "given": list(_given(record))}
    assert not isinstance(record, Rejection)
    origin = whence(record, rendered, renderer)
    fields: dict[Fields, int] = {}
    specials = special_ids(renderer.tokenizer)
    for index, segment in enumerate(row["segments"]):
        segment["weight"] = rendered.segments[index].weight
        segment["turn"] = origin.turns[index]
        segment["pieces"] = [
            (num, text, special, fields.setdefault(field, len(fields)))
            for num, text, special, field in _pieces(rendered, index, origin, renderer.tokenizer, specials)
        ]
    table = [[{"message": f.message, "role": f.role, "name": f.name} for f in together] for together in fields]
    return {
        **row,
        "num_tokens": rendered.num_tokens,
        "num_trained": rendered.num_trained,
        "num_saved": _num_saved(rendered),
        "turns": sorted({turn for turn in origin.turns if turn is not None}),
        "fields": table,
    }


def _pieces(
    tree: Tree, index: int, origin: Whence, tokenizer: Any, specials: Collection[int]
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


def _num_saved(tree: Tree) -> int:
    """How many tokens there would be more if each branch were a row of its own, with what stands before it."""
    parents = {segment.parent for segment in tree.segments}
    leaves = [index for index in range(len(tree.segments)) if index not in parents]
    return sum(len(path_ids(tree, leaf)) for leaf in leaves) - tree.num_tokens


def _given(record: Example | Rejection) -> Iterator[tuple[str, str]]:
    """What the file holds of a rejected record, as (name, text)."""
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
