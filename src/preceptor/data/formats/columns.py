"""The keys that make a format, and the `columns` of the run file that would make one of other keys."""

import difflib
import re
from collections.abc import Mapping, Sequence

from preceptor.config.yaml_text import one_line_yaml
from preceptor.data.formats.values import RawRecord, Unreadable, parsed

PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("prompt", "response"),
)
_ASKED, _SAID = (dict.fromkeys(pair[side] for pair in PAIRS) for side in (0, 1))
_NEAR = 0.8  # how alike a key and a known one are, from 0 to 1


def has_format(keys: Sequence[str]) -> bool:
    """Whether a row with these keys, none of them null, can be read."""
    try:
        return "messages" in keys or "conversations" in keys or "text" in keys or pair_of(keys) is not None
    except Unreadable:
        return False


def pair_of(keys: Sequence[str]) -> tuple[str, str] | None:
    """The two keys of a prompt and its answer, if there are any. Raises Unreadable if two pairs fit."""
    fitting = [pair for pair in PAIRS if pair[0] in keys and pair[1] in keys]
    if len(fitting) > 1:
        names = ", or ".join(" and ".join(pair) for pair in fitting)
        raise Unreadable("ambiguous_format", f"the example can be read as {names}; say which with `columns`")
    return fitting[0] if fitting else None


def unknown_format(row: RawRecord, columns: Mapping[str, str] | None = None) -> str:
    """What the row has, what it needs, and how to say that they are the same.

    columns: of the run file, where the row's keys are named by it.
    """
    keys = [key for key in row if row[key] is not None] or list(row)  # of a header all values are None
    nulls = [key for key in row if key not in keys]
    has = f"the keys are {', '.join(map(repr, keys)) or 'none'}"
    needs = (
        "an example needs messages or conversations, or text, or one of "
        f"{', '.join(' and '.join(pair) for pair in PAIRS)}"
    )
    if nulls and has_format(list(row)):
        return f"{has}; {', '.join(map(repr, nulls))} {'is' if len(nulls) == 1 else 'are'} null, so absent; {needs}"
    separator = next((mark for mark in ";|\t" if len(row) == 1 and mark in next(iter(row))), None)
    if separator is not None:
        return (
            f"{has}: its cells are separated by {separator!r}; separate them by commas, or by tabs in a .tsv; {needs}"
        )
    return (
        f"{has}; {needs}; `columns` can say which of its keys they are{_hint({key: row[key] for key in keys}, columns)}"
    )


def _hint(row: RawRecord, columns: Mapping[str, str] | None) -> str:
    """The `columns` that read the row, as far as its keys tell; those of a pair make a conversation."""
    for name, value in row.items():
        value = parsed(value)
        if isinstance(value, list) and value and isinstance(value[0], dict) and {"role", "from"} & value[0].keys():
            return f". {name} holds messages: set `columns: {{messages: {one_line_yaml(name)}}}`"
    names = [key for key in row if re.fullmatch(r"[\w-]+( [\w-]+){0,2}", key)]
    asked, said = (
        next(((ours, key) for ours in side if (key := _named(ours, names))), None) for side in (_ASKED, _SAID)
    )
    for known in ("messages", "conversations", "text"):
        key = _named(known, names)
        if key is not None and (row[key] is None or known == "text") and not (asked and said):
            return _such_as({known: key}, columns)
    if len(names) == 2:  # the other one is what is not known
        asked = asked or ("question", next(key for key in names if said is None or key != said[1]))
        said = said or ("answer", next(key for key in names if key != asked[1]))
    if asked is None and said is None:
        return ", such as `columns: {question: ..., answer: ...}`" if len(names) > 1 else ""
    (question, ask), (answer, say) = asked or ("question", "..."), said or ("answer", "...")
    if question == "instruction" and answer not in ("output", "response"):
        answer = "output"  # so that an input is read, too
    if (question, answer) not in PAIRS[1:]:  # the first is trained without a template
        question, answer = ("prompt", "response") if (question, answer) == PAIRS[0] else ("question", "answer")
    beside = ("input", "history") if question == "instruction" else ()
    read = {
        ours: key for ours in (*beside, "system", "tools") if (key := _named(ours, names)) and key not in (ask, say)
    }
    return _such_as({question: ask, answer: say, **read}, columns)


def _named(known: str, names: Sequence[str]) -> str | None:
    """The name that is meant for a known key: the key itself, whatever its case, or the nearest one."""
    lower = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(known, lower, n=1, cutoff=_NEAR)
    return lower[near[0]] if near else None


def _such_as(read: Mapping[str, str], columns: Mapping[str, str] | None) -> str:
    theirs = {ours: (columns or {}).get(key, key) for ours, key in read.items()}
    inner = ", ".join(f"{ours}: {key if key == '...' else one_line_yaml(key)}" for ours, key in theirs.items())
    return f", such as `columns: {{{inner}}}`"
