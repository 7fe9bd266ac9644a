"""Where a turn's target starts and ends (steps 2 to 4 of the proof).

P is the prompt that a server builds for turn k, F the render of the conversation up to and with turn k.

    P   <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n
    F   <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n
                                                              ^start  ^last    ^end
The target is F[start:end]. `start` is where the prompt ends; `last` is after the last character that came from the turn;
`end` is after the first stop token from there. Whatever of this cannot be shown is a Refused, by name.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preceptor.data.provenance import Leaf, Rendered
from preceptor.data.refusals import Refused

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
REASONING_TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thinking>", "</thinking>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)
REASONING_WORDS = ("<think>", "</think>", "[THINK]", "[/THINK]")  # what a turn may spell inline
_INLINE = re.compile(r"\s*(<think>|\[THINK\])(.*?)(</think>|\[/THINK\])(.*)", re.DOTALL)
_CLOSING = "|".join(re.escape(close) for _, close in REASONING_TAGS)
_OPENING = "|".join(re.escape(tag.strip()) for tag, _ in REASONING_TAGS)
_EMPTY_BLOCK = re.compile(rf"(?:(?:{_OPENING})\s*)?(?:{_CLOSING})\s*$")
_EMPTY_START = re.compile(rf"\s*(?:(?:{_OPENING})\s*)?(?:{_CLOSING})")
_ANY_TAG = re.compile(f"{_OPENING}|{_CLOSING}")
_LEADING_TAGS = re.compile(rf"(?:\s*(?:{_OPENING}|{_CLOSING}))*\s*")
_OPEN_BLOCK = re.compile(rf"({_OPENING})\s*$")
_CLOSE_OF = {tag.strip(): close for tag, close in REASONING_TAGS}


def inline_reasoning(content: str) -> tuple[str, str] | None:
    """(reasoning, answer) of a content that begins with a reasoning block, else None."""
    found = _INLINE.match(content)
    return (found.group(2), found.group(4)) if found else None


def has_reasoning(given: Mapping[str, Any], content: str) -> bool:
    """Whether a message holds reasoning, in a field of its own or inline."""
    if any((given.get(name) or "").strip() for name in REASONING_FIELDS if isinstance(given.get(name) or "", str)):
        return True
    inline = inline_reasoning(content)
    return inline is not None and bool(inline[0].strip())


@dataclass(frozen=True, eq=False, slots=True)
class Turn:
    """One turn and its renders.

    leaves: the strings of all messages up to the turn; `own`: those of the turn itself. prompt: P. full: F, in which at
    least the turn's leaves are marked. prompt_marked, full_marked: P and F with all leaves marked. followed: F with a
    message after the turn; None where the template refuses that.
    """

    where: str
    given: Mapping[str, Any]
    leaves: Sequence[Leaf]
    own: range
    prompt: str
    full: Rendered
    prompt_marked: Callable[[], Rendered]
    full_marked: Callable[[], Rendered]
    followed: Callable[[], "Followed | None"]


@dataclass(frozen=True, eq=False, slots=True)
class Followed:
    """F with a message after the turn, whose leaves are `follower`."""

    full: Rendered
    follower: range

    def text_between(self, turn: Turn, upto_last: str) -> str:
        """What stands between the turn and the message that follows it; `upto_last`: F up to the turn's last character.

        Where the render rewrites what came before, the turn ends at its last character before the next message's first
        (a tool's result may repeat the name of the call that it answers).
        """
        text, own, next_message = self.full.text, self.full.span(turn.own), self.full.span(self.follower)
        limit = next_message[0] if next_message else len(text)
        if text.startswith(upto_last) and len(upto_last) <= limit:
            return text[len(upto_last) : limit]
        return text[own[1] : limit] if own and own[1] <= limit else ""


@dataclass(frozen=True, slots=True)
class Stops:
    """The tokens that end a turn, as a pattern; eos: the one that is appended where nothing else ends it."""

    pattern: re.Pattern[str]
    eos: str | None


def target_of(turn: Turn, stops: Stops) -> str:
    """The text that the model must generate in this turn, its stop token included. Raises Refused."""
    text = turn.full.text
    span = turn.full.span(turn.own)
    if span is None:
        if turn.given.get("tool_calls"):
            raise Refused("tool_call_dropped", turn.where)
        if not any(leaf.text.strip() for leaf in turn.leaves[turn.own.start : turn.own.stop]):
            raise Refused("turn_missing", f"{turn.where} is empty")
        raise Refused("turn_missing", f"{turn.where}: nothing of it is rendered")
    first, last = span
    reasons = has_reasoning(turn.given, content_text(turn.given))
    start, opened = _start(turn, text, first, reasons)
    closing = _closing(turn, text, last, stops)
    missing = missing_fields(turn, text[start:last] + closing)
    if set(missing) == {"reasoning_dropped"}:
        return _restored(turn, opened, text[start:first]) + text[first:last] + closing
    if missing:
        raise Refused(missing[0], turn.where)
    target = text[start:last] + closing
    if opened and not any(close in target for _, close in REASONING_TAGS):
        raise Refused("prompt_opens_reasoning", turn.where)
    return target


def content_text(given: Mapping[str, Any]) -> str:
    content = given.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


# Where it starts -----------------------------------------------------------------------------------------------------


def _start(turn: Turn, text: str, first: int, reasons: bool) -> tuple[int, str]:
    """(start of the target in F, the reasoning tag that the prompt leaves open or "")."""
    block = _OPEN_BLOCK.search(turn.prompt)
    opened = block.group(1) if block else ""
    start = _after(turn.prompt, text, 0, first, reasons)
    if start is None:
        before = turn.prompt_marked()
        tail = turn.prompt[_end_of_messages(before, range(turn.own.start)) :]
        from_here = _end_of_messages_before(turn.full_marked(), range(turn.own.start), first)
        if tail.strip():
            start = _after_tail(tail, text, from_here, first, reasons)
    if start is None:
        if opened:
            raise Refused("prompt_opens_reasoning" if not reasons else "prompt_conflicts", turn.where)
        if reasons and _EMPTY_BLOCK.search(turn.prompt):
            raise Refused("prompt_closes_reasoning", turn.where)
        raise Refused("prompt_conflicts", turn.where)
    return start, opened


def _end_of_messages(rendered: Rendered, leaves: range) -> int:
    span = rendered.span(leaves)
    return span[1] if span else 0


def _end_of_messages_before(rendered: Rendered, leaves: range, limit: int) -> int:
    """The end of the last character from these leaves that stands before `limit`."""
    at = end = 0
    for piece, origin in zip(rendered.pieces, rendered.origins, strict=True):
        if at >= limit:
            break
        at += len(piece)
        if piece and origin is not None and origin in leaves:
            end = at
    return min(end, limit)


def _after(opening: str, text: str, from_here: int, first: int, reasons: bool) -> int | None:
    """Where `opening` (the prompt, or its tail) ends in text[from_here:], if it stands there; None if it does not.

    It stands there also if it differs in white space only; if it ends in a closed empty reasoning block that the render
    omits or spells differently and the turn has no reasoning; and if it opens a reasoning block that the render omits
    and the turn has some.
    """
    if text.startswith(opening, from_here):
        return from_here + len(opening)
    head = text[from_here:first]
    if head.rstrip() == opening.rstrip():
        return first
    block = _OPEN_BLOCK.search(opening) if reasons else _EMPTY_BLOCK.search(opening)
    if block is None:
        return None
    base, space = opening[: block.start()], opening[len(opening.rstrip()) :]
    if not head.startswith(base):
        return first if head.rstrip() == base.rstrip() else None
    start = len(base)
    if not reasons:
        spelled = _EMPTY_START.match(head, start)
        if spelled:
            start = spelled.end() + (len(space) if head.startswith(space, spelled.end()) else 0)
        if _ANY_TAG.search(head, start):
            return None
    return from_here + start


def _after_tail(tail: str, text: str, from_here: int, first: int, reasons: bool) -> int | None:
    """As `_after`, for the last place before the turn's first character in which the tail stands."""
    at = text.rfind(tail, from_here, first)
    if at >= 0:
        return at + len(tail)
    return _after(tail, text, from_here, first, reasons)


# Where it ends -------------------------------------------------------------------------------------------------------


def _closing(turn: Turn, text: str, last: int, stops: Stops) -> str:
    """What follows the turn's last character, up to and with the token that ends the turn."""
    found = stops.pattern.search(text, last)
    if found:
        return text[last : found.end()]
    own = text[last:]
    followed = turn.followed()
    if followed is not None:
        after = followed.text_between(turn, text[:last])
        found = stops.pattern.search(after)
        if found:
            return after[: found.end()]
        own = shared_start(own, after)
    if stops.eos is None:
        raise Refused("no_stop_token", turn.where)
    return own.rstrip() + stops.eos


def shared_start(one: str, other: str) -> str:
    """The longest common start that does not end inside something like a tag."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    for cut in re.finditer(r"<[^<>\s]*>?|\[[^\[\]\s]*\]?", one):
        if cut.start() < length < cut.end():
            return one[: cut.start()]
    return one[:length]


# What must be in it --------------------------------------------------------------------------------------------------


def missing_fields(turn: Turn, target: str) -> list[str]:
    """The codes of the fields of the turn that F does not spell in full."""
    missing = []
    for index in turn.own:
        leaf = turn.leaves[index]
        kind, spelled = leaf.path[0], turn.full.spelled(index)
        if kind == "content":
            missing.append(_content_problem(leaf.text, spelled))
        elif kind in REASONING_FIELDS:
            missing.append(None if _spells(spelled, leaf.text) else "reasoning_dropped")
        elif kind == "tool_calls":
            missing.append(_call_problem(leaf, spelled))
    for call in turn.given.get("tool_calls") or ():
        if not _shows(_arguments(call), target):
            missing.append("tool_call_dropped")
    return [code for code in missing if code]


def _spells(spelled: str, text: str) -> bool:
    return spelled == text or spelled.strip() == text.strip()


def _content_problem(text: str, spelled: str) -> str | None:
    if _spells(spelled, text):
        return None
    inline = inline_reasoning(text)
    if inline is not None:
        reasoning, answer = inline[0].strip(), inline[1].strip()
        if "".join(spelled.split()) == "".join((reasoning + answer).split()):
            return None
        if spelled.strip() == answer:
            return "reasoning_dropped"
    return "content_changed" if spelled.strip() else "content_dropped"


def _call_problem(leaf: Leaf, spelled: str) -> str | None:
    """A name and arguments given as a string are spelled as they are; strings inside arguments also as in JSON."""
    path = leaf.path[3:] if leaf.path[2] == "function" else leaf.path[2:]
    if not path or path[0] not in ("name", "arguments"):
        return None  # an id, or what no template is asked to render
    if _spells(spelled, leaf.text) or (path != ("arguments",) and spelled in _json_forms(leaf.text)):
        return None
    return "content_changed" if spelled.strip() else "tool_call_dropped"


def _json_forms(text: str) -> tuple[str, str]:
    return json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]


def _arguments(call: Mapping[str, Any]) -> Any:
    function = call.get("function")
    return (function if isinstance(function, Mapping) else call).get("arguments")


def _shows(value: Any, target: str) -> bool:
    """Whether names and plain values of a call's arguments stand in the target (its strings are proved by origin)."""
    if isinstance(value, Mapping):
        return all((key in target or _json_forms(key)[1] in target) and _shows(v, target) for key, v in value.items())
    if isinstance(value, list):
        return all(_shows(item, target) for item in value)
    if value is None or isinstance(value, str):
        return True
    return json.dumps(value) in target or str(value) in target


# Reasoning that the render of the turn omits ---------------------------------------------------------------------------


def _restored(turn: Turn, opened: str, between: str) -> str:
    """The turn's reasoning as the model must generate it before its answer; `between`: what F has in its place.

    Templates made for history leave a turn's reasoning out even where it is the last. What the model must generate is
    known all the same in two cases: the prompt has opened the block, or the content itself spells the block.
    """
    content = content_text(turn.given).strip()
    inline = inline_reasoning(content)
    own = next((turn.given[name] for name in REASONING_FIELDS if (turn.given.get(name) or "").strip()), None)
    rest = _LEADING_TAGS.sub("", between, count=1)  # what a tool call begins with, for example
    block = ""
    if inline is not None and own is None:
        block = content[: len(content) - len(inline[1].strip())]
        if opened and block.startswith(opened):
            block = block[len(opened) :].lstrip() if turn.prompt[-1:].isspace() else block[len(opened) :]
        elif opened or _EMPTY_BLOCK.search(turn.prompt):
            block = ""
    elif opened and own is not None:
        close = _CLOSE_OF[opened]
        block = f"{own.strip()}\n{close}\n\n" if turn.prompt.endswith("\n") else f"{own}{close}"
    if not block or _ANY_TAG.search(rest):
        raise Refused("reasoning_dropped", turn.where)
    return block + rest
