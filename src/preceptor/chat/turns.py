"""Where a turn's target starts and ends (steps 2 to 4 of the proof).

P is the prompt that a server builds for turn k, F the render of the conversation up to and with turn k.

    P   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    F   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello.<|im_end|>\\n
                                                              start^ last^     end^

The target is F[start:end]. `start` is where the prompt ends; `last` is after the last character that came from the
turn; `end` is after the first stop token from there. What of this cannot be shown is Rejected, by name.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preceptor.chat import reasoning
from preceptor.chat.origins import Leaf, Rendered, json_body, shared_length
from preceptor.data.examples import REASONING_FIELDS, Rejected
from preceptor.errors import short

_BEFORE = 20  # characters that are shown before the place in which two texts part


@dataclass(eq=False, slots=True)
class Turn:
    """Message `message` of a conversation, an assistant's turn, and its renders.

    tags: the reasoning tags that the template knows. as_given: whether the target may be the content as it is
    (`reasoning.Reading`). leaves: the strings of all messages up to the turn, and maybe later ones; `own`: those of the
    turn itself. prompt: P. full: F, in which at least the turn's leaves are marked. prompt_marked, full_marked: P and F
    with all leaves marked. followed: F with a message after the turn, and the number of that message's only leaf; None
    where the template rejects that.
    """

    message: int
    given: Mapping[str, Any]
    tags: Mapping[str, str]
    as_given: bool
    leaves: Sequence[Leaf]
    own: range
    prompt: str
    full: Rendered
    prompt_marked: Callable[[], Rendered]
    full_marked: Callable[[], Rendered]
    followed: Callable[[], tuple[Rendered, int] | None]

    @property
    def where(self) -> str:
        return f"messages[{self.message}]"


@dataclass(frozen=True, slots=True)
class Stops:
    """The tokens that end a turn, as a pattern; eos: the one that is appended where nothing else ends it."""

    pattern: re.Pattern[str]
    eos: str | None


def target_of(turn: Turn, stops: Stops) -> str:
    """The text that the model must generate in this turn, its stop token included. Raises Rejected."""
    text = turn.full.text
    span = turn.full.span(turn.own)
    if span is None:
        raise Rejected("tool_call_dropped" if turn.given.get("tool_calls") else "turn_missing", turn.where)
    first, last = span
    start, closing = _start(turn, text, first), _closing(turn, text, last, stops)
    target = text[start:last] + closing
    missing = missing_fields(turn, target)
    for code, found in missing:
        if code != "reasoning_dropped":
            raise Rejected(code, found)
    between, said = text[start:first], text[first:last]
    twice = reasoning.opens_reasoning_twice(turn.given, turn.prompt, between, said, turn.tags)
    if missing or twice:
        generated = reasoning.generated_behind_open_tag(turn.prompt, between, said) if twice else None
        if generated is None and turn.as_given:
            generated = reasoning.generated_as_given(turn.given, turn.prompt, between, said, turn.tags)
        if generated is None:
            if twice:
                raise Rejected("reasoning_twice", turn.where)
            raise Rejected("reasoning_dropped", missing[0][1], _what_helps_reasoning(turn))
        return generated + closing
    if reasoning.opened_by(turn.prompt)[0]:
        reasons = reasoning.has_reasoning(turn.given, turn.tags)
        # Behind the first of an answer's words a closing tag is text.
        if not reasoning.ANY_CLOSE.search(target if reasons else between):
            raise Rejected("prompt_opens_reasoning", turn.where)
    return target


def target_runs(turn: Turn, target: str, stops: Stops) -> list[tuple[str, bool]]:
    """The target in runs, each with whether it came from the message.

    It ends as F does up to the turn's last character, and in what closes the turn. What F lacks before that is of the
    message: a reasoning block as the content spells it.
    """
    text, span = turn.full.text, turn.full.span(turn.own)
    assert span is not None
    closing = _closing(turn, text, span[1], stops)
    said = target[: len(target) - len(closing)]
    num_shared = shared_length(said[::-1], text[: span[1]][::-1])
    shared = turn.full.runs(span[1] - num_shared, span[1], turn.own)
    return [(said[: len(said) - num_shared], True), *shared, (closing, False)]


# Where it starts -----------------------------------------------------------------------------------------------------


def _start(turn: Turn, text: str, first: int) -> int:
    """The start of the target in F, whose first character from the turn stands at `first`. Raises Rejected."""
    if text.startswith(turn.prompt):
        return len(turn.prompt)
    reasons = reasoning.has_reasoning(turn.given, turn.tags)
    start = _after(turn.prompt, text, 0, first, reasons)
    if start is None:
        earlier = range(turn.own.start)
        tail = turn.prompt[turn.prompt_marked().end_before(earlier, len(turn.prompt)) :]
        if tail.strip():
            from_here = turn.full_marked().end_before(earlier, first)
            at = text.rfind(tail, from_here, first)  # its last place before the turn's first character
            start = at + len(tail) if at >= 0 else _after(tail, text, from_here, first, reasons)
    if start is not None:
        return start
    if reasoning.opened_by(turn.prompt)[0] and not reasons:
        raise Rejected("prompt_opens_reasoning", turn.where)
    if reasoning.closed_by(turn.prompt) >= 0 and reasons:
        raise Rejected("prompt_closes_reasoning", turn.where)
    served, rendered = _around_difference(turn.prompt, text[:first])
    raise Rejected("prompt_conflicts", f"{turn.where}: the prompt has {served}, the render of the turn {rendered}")


def _around_difference(one: str, other: str) -> tuple[str, str]:
    """The two texts from a little before the place in which they part."""
    at = max(shared_length(one, other) - _BEFORE, 0)
    return short(one[at:]), short(other[at:])


def _what_helps_reasoning(turn: Turn) -> str:
    """What to do about reasoning that the render leaves out; "" where the general advice says it."""
    texts = {key: (turn.given.get(key) or "").strip() for key in REASONING_FIELDS}
    texts = {key: text for key, text in texts.items() if text}
    if len(set(texts.values())) > 1:
        return (
            f"the turn has {' and '.join(texts)}, which differ, and the template does not render all: keep one of them"
        )
    if turn.given.get("tool_calls"):
        return (
            "the template leaves reasoning beside tool calls out: remove it, set train: false on the turn, or choose "
            "another template (chatml renders it)"
        )
    if turn.tags and reasoning.reasoning_text(turn.given):
        tag, close = next(iter(turn.tags.items()))
        return (
            "the template leaves it out even where the turn is the last, so nothing says how the model would spell it: "
            f"write it into content as the model is to generate it, {tag} reasoning {close} answer, or choose another "
            "template (chatml renders it)"
        )
    return ""


def _after(opening: str, text: str, from_here: int, first: int, reasons: bool) -> int | None:
    """Where `opening` (the prompt, or its tail) ends in text[from_here:], if it stands there; None if it does not.

    It stands there also if it differs in white space only; if it ends in a closed empty reasoning block that the render
    omits or spells differently and the turn has no reasoning; and if it opens a reasoning block that the render omits
    and the turn has some.
    """
    if text.startswith(opening, from_here):
        return from_here + len(opening)
    head = text[from_here:first]
    end = _end_but_for_space(opening, head)
    if end is not None and (reasons or not reasoning.opened_by(opening)[0]):
        # a server's prompt ends as it ends: white space before the first word is its own
        return from_here + (len(head) - len(head[end:].lstrip()) if opening[-1:].isspace() else end)
    block = reasoning.opened_by(opening)[1] if reasons else reasoning.closed_by(opening)
    if block < 0:
        return None
    base, space = opening[:block], opening[len(opening.rstrip()) :]
    if not head.startswith(base):
        return first if head.rstrip() == base.rstrip() else None
    if reasons:
        return from_here + block
    start = reasoning.empty_block_end(head, block)
    if start > block and head.startswith(space, start):
        start += len(space)
    return None if reasoning.has_tag(head, start) else from_here + start


def _end_but_for_space(opening: str, head: str) -> int | None:
    """Where `opening` ends at the start of `head`, if they differ in white space only; None if they do not."""
    packed = "".join(opening.split())
    if not "".join(head.split()).startswith(packed):
        return None
    left = len(packed)
    for word in re.finditer(r"\S+", head):
        if left <= len(word.group()):
            return word.start() + left
        left -= len(word.group())
    return 0


# Where it ends -------------------------------------------------------------------------------------------------------


def _closing(turn: Turn, text: str, last: int, stops: Stops) -> str:
    """What follows the turn's last character, up to and with the token that ends the turn. Raises Rejected."""
    found = stops.pattern.search(text, last)
    if found:
        return text[last : found.end()]
    own = text[last:]
    after = _before_next_message(turn, text[:last])
    if after is not None:
        found = stops.pattern.search(after)
        if found:
            return after[: found.end()]
        own = shared_start(own, after)
    if stops.eos is None:
        raise Rejected("no_stop_token", turn.where)
    return own.rstrip() + stops.eos


def _before_next_message(turn: Turn, upto_last: str) -> str | None:
    """The text between the end of the turn and a next message. upto_last: F up to the turn's last character.

    None if there can be none, or the turn's last character is not in the field in which F ends it: then what closes the
    turn is unknown. Where the render rewrites what came before, the turn ends at its last character before the next
    message's first (a tool's result may repeat the name of the call that it answers).
    """
    followed = turn.followed()
    if followed is None:
        return None
    full, follower = followed
    next_message = full.span(range(follower, follower + 1))
    limit = next_message[0] if next_message else len(full.text)
    if full.text.startswith(upto_last) and len(upto_last) <= limit:
        return full.text[len(upto_last) : limit]
    if full.last_leaf(turn.own, limit) != turn.full.last_leaf(turn.own, len(upto_last)):
        return None
    return full.text[full.end_before(turn.own, limit) : limit]


def shared_start(one: str, other: str) -> str:
    """The longest common start that does not end inside something like a tag."""
    length = shared_length(one, other)
    for tag in re.finditer(r"<[^<>\s]*>?|\[[^\[\]\s]*\]?", one):
        if tag.start() < length < tag.end():
            return one[: tag.start()]
    return one[:length]


# What must be in it --------------------------------------------------------------------------------------------------


def missing_fields(turn: Turn, target: str) -> list[tuple[str, str]]:
    """The fields of the turn that F does not spell in full: a code, and where and how they differ."""
    missing: list[tuple[str, str]] = []
    for index in turn.own:
        leaf, spelled = turn.leaves[index], turn.full.spelled(index)
        if spelled == leaf.text:
            continue
        code: str | None = None
        if leaf.path[0] == "content":
            code = _content_problem(leaf.text, spelled, turn.tags)
        elif leaf.path[0] in REASONING_FIELDS:
            code = None if _shows_reasoning(turn, leaf.text) else "reasoning_dropped"
        elif leaf.path[0] == "tool_calls":
            code = None if _in_id(turn, leaf, target) else _call_problem(leaf, spelled)
        if code is not None:
            given, rendered = _around_difference(leaf.text, spelled)
            shown = f": {given} is rendered as {rendered}" if code == "content_changed" else ""
            missing.append((code, f"{turn.where}.{leaf.name}{shown}"))
    for place, call in enumerate(turn.given.get("tool_calls") or ()):
        function = call.get("function", call)
        if not _shows(function.get("arguments"), target):
            missing.append(("tool_call_dropped", f"{turn.where}.tool_calls[{place}].function.arguments"))
    return missing


def _shows_reasoning(turn: Turn, text: str) -> bool:
    """Whether F spells it from any field: servers give the same reasoning under two names, templates read one."""
    fields = (index for index in turn.own if turn.leaves[index].path[0] in REASONING_FIELDS)
    return any(_spells(turn.full.spelled(index), text) for index in fields)


def _spells(spelled: str, *forms: str) -> bool:
    """Whether it is one of the forms, without the white space around it, once or, as a name may be, several times."""
    spelled = spelled.strip()
    return any(
        spelled == form or (form and spelled.startswith(form) and not spelled.replace(form, "").strip())
        for form in map(str.strip, forms)
    )


def _content_problem(text: str, spelled: str, tags: Mapping[str, str]) -> str | None:
    if _spells(spelled, text):
        return None
    block = reasoning.block_of(text, tags)
    if block is not None:
        if "".join(spelled.split()) == "".join((block.reasoning + block.answer).split()):
            return None
        if spelled.strip() == block.answer.strip():
            return "reasoning_dropped"
    return "content_changed" if spelled.strip() else "content_dropped"


def _in_id(turn: Turn, leaf: Leaf, target: str) -> bool:
    """Whether it is a function's name, and the call's id holds it and stands in the target in its place."""
    call = turn.given["tool_calls"][leaf.path[1]]
    id_ = call.get("id") if isinstance(call, Mapping) and leaf.path[-1] == "name" else None
    return isinstance(id_, str) and leaf.text in id_ and id_ in target


def _call_problem(leaf: Leaf, spelled: str) -> str | None:
    """A name, and arguments given as a string, are spelled as they are; strings inside arguments also as in JSON."""
    path = leaf.path[3:] if leaf.path[2:3] == ("function",) else leaf.path[2:]
    if not path or path[0] not in ("name", "arguments"):
        return None  # an id, or what no template is asked to render
    text = leaf.text
    forms: tuple[str, ...] = ()
    if path != ("arguments",):  # a string inside arguments, as JSON spells it, or Python
        forms = json_body(text, ensure_ascii=True), json_body(text, ensure_ascii=False), repr(text)[1:-1]
    if _spells(spelled, text, *forms):
        return None
    return "content_changed" if spelled.strip() else "tool_call_dropped"


def _shows(value: Any, target: str) -> bool:
    """Whether names and plain values of a call's arguments stand in the target (its strings are proved by origin)."""
    if isinstance(value, Mapping):
        forms = [(key, json_body(key, ensure_ascii=False)) for key in value]
        return all(any(f in target for f in form) for form in forms) and all(_shows(v, target) for v in value.values())
    if isinstance(value, list):
        return all(_shows(item, target) for item in value)
    if value is None or isinstance(value, str):
        return True
    return json.dumps(value) in target or str(value) in target
