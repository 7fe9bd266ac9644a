"""Recorded examples as what the page draws: straight lines of segments, and forks from which branches go off."""

from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from preceptor.report.run_record import JsonObject

_MARKS = {"\n": '<i class="nl"></i>\n', "\t": '<i class="tab">\t</i>'}


@dataclass(slots=True)
class Fork:
    """Where a tree branches: `branches` go off to the side, what follows the fork goes straight on."""

    num_tokens: int
    branches: list[list[Any]] = field(default_factory=list)


def paths(example: JsonObject) -> list[Any]:
    """The segments of an example from the root on, each with `position`, and a Fork before each that has siblings.

    The last child goes straight on, as later turns see it; those before it are branches.
    """
    children: dict[int | None, list[JsonObject]] = {}
    for segment in example["segments"]:
        children.setdefault(segment["parent"], []).append(segment)

    def grow(parent: int | None, position: int) -> list[Any]:
        path: list[Any] = []
        while following := children.get(parent):
            if len(following) > 1:
                branches = [
                    [{**child, "position": position}, *grow(child["id"], position + child["num_tokens"])]
                    for child in following[:-1]
                ]
                path.append(Fork(position, branches))
            last = following[-1]
            path.append({**last, "position": position})
            parent, position = last["id"], position + last["num_tokens"]
        return path

    return grow(None, 0)


def num_branches(example: JsonObject) -> int:
    parents = {segment["parent"] for segment in example["segments"]}
    return sum(segment["id"] not in parents for segment in example["segments"])


def visible(text: str) -> Markup:
    """Text with its line ends and tabs marked, and characters without a shape shown as their number."""
    shown = []
    for character in text:
        if character in _MARKS:
            shown.append(_MARKS[character])
        elif character.isprintable():
            shown.append(str(escape(character)))
        else:
            shown.append(f'<i class="odd-character" data-name="U+{ord(character):04X}"></i>')
    return Markup("".join(shown))
