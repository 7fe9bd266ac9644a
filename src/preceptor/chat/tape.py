"""What a template did with its strings, recorded so that it can be done again without the template.

While a template runs on marked strings (`marked.Marked`), a `Tape` notes every operation as a step over numbered
values, and everything that the template *observed* (a comparison, a length, `'</think>' in content`) as a guard. For
other strings for which all guards hold, the template would take the same path; so running the steps gives what it would
have rendered.

    leaves   0: "Hi "            (the strings of the messages)
    steps    1: constant "<|im_start|>user\\n"    2: str.strip(0)    3: contains(2, 4)    4: constant "</think>"
    guard    3 is False
    render   values 1, 2, ...

Where an operation cannot be recorded, `exact` turns False and the tape is not used again. Where the origin of
characters cannot be followed they count as the template's own and `lost` turns True; the proof, which misses the field
then, rejects.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Atom(NamedTuple):
    """A run of characters of one origin; `ref` is the value of the tape that spells them, -1 if none does."""

    length: int
    origin: int | None
    ref: int


def between(atoms: Sequence[Atom], start: int, stop: int) -> list[Atom]:
    """The atoms of the characters start to stop; those that are cut cannot be spelled by the tape."""
    kept, at = [], 0
    for atom in atoms:
        end = at + atom.length
        low, high = max(at, start), min(end, stop)
        if low < high:
            kept.append(atom if high - low == atom.length else Atom(high - low, atom.origin, -1))
        at = end
    return kept


class Tape:
    """Steps over numbered values: the leaves are 0 to num_leaves - 1, constants and results follow."""

    def __init__(self, num_leaves: int) -> None:
        self.num_leaves = num_leaves
        self.steps: list[tuple[Callable[..., Any] | None, Any]] = []  # (None, constant) or (function, refs)
        self.guards: dict[int, Any] = {}
        self.exact = True
        self.lost = False
        self._refs: dict[Any, int] = {}

    def constant(self, value: Any) -> int:
        key = (None, type(value), value)
        ref = self._refs.get(key)
        return self._append(key, None, value) if ref is None else ref

    def step(self, function: Callable[..., Any], *refs: int) -> int:
        """The value function(*refs); -1 if one of them is unknown."""
        if -1 in refs:
            self.exact = False
            return -1
        key = (function, refs)
        ref = self._refs.get(key)
        return self._append(key, function, refs) if ref is None else ref

    def constant_at(self, ref: int) -> str | None:
        """The text of a value that is the same for all leaves; None for others."""
        function, payload = self.steps[ref - self.num_leaves] if ref >= self.num_leaves else (str, None)
        return payload if function is None and isinstance(payload, str) else None

    def _append(self, key: Any, function: Callable[..., Any] | None, payload: Any) -> int:
        self.steps.append((function, payload))
        self._refs[key] = ref = self.num_leaves + len(self.steps) - 1
        return ref

    def guard(self, ref: int, value: Any) -> None:
        """From now on the tape holds only for leaves that give this value."""
        if ref >= 0:
            self.guards[ref] = value

    def replay(self, leaves: Sequence[str]) -> list[Any] | None:
        """All values for these leaves; None if a guard fails or a step raises: the template might do otherwise."""
        values: list[Any] = list(leaves)
        append = values.append
        try:
            for function, payload in self.steps:
                if function is None:
                    append(payload)
                elif len(payload) == 2:
                    append(function(values[payload[0]], values[payload[1]]))
                else:
                    append(function(*[values[ref] for ref in payload]))
        except (IndexError, ValueError, TypeError):
            return None
        for ref, expected in self.guards.items():
            if values[ref] != expected:
                return None
        return values


# Steps that no function of Python's own is --------------------------------------------------------------------------


def join_texts(*texts: str) -> str:
    return "".join(texts)


def cut(text: str, start: int | None, stop: int | None, step: int | None) -> str:
    return text[start:stop:step]


def json_body(text: str, ensure_ascii: bool) -> str:
    """The text as JSON spells it between the quotes."""
    return json.dumps(text, ensure_ascii=ensure_ascii)[1:-1]


def is_true(value: Any) -> bool:
    return bool(value)


def is_part_of(item: str, container: str) -> bool:
    return item in container


def with_separator(items: Sequence[str], separator: str) -> list[str]:
    """The items with the separator between any two."""
    return [text for item in items for text in (separator, item)][1:]
