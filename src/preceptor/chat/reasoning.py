"""Reasoning in a turn and in a prompt: which fields and tags hold it, and what a model that reasons must generate."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from preceptor.chat.origins import MessageList
from preceptor.data.examples import REASONING_FIELDS, Rejected

TAGS = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<thinking>": "</thinking>",
    "<|channel>thought": "<channel|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<seed:think>": "</seed:think>",
}
_ALL_TAGS = (*TAGS, *TAGS.values())
_OPEN, _CLOSE = "|".join(map(re.escape, TAGS)), "|".join(map(re.escape, TAGS.values()))
_OPEN_AT_END = re.compile(rf"({_OPEN})\s*$")
_EMPTY_AT_END = re.compile(rf"(?:(?:{_OPEN})\s*)?(?:{_CLOSE})\s*$")
_EMPTY_AT_START = re.compile(rf"\s*(?:(?:{_OPEN})\s*)?(?:{_CLOSE})")
_TAGS_AT_START = re.compile(rf"(?:\s*(?:{_OPEN}|{_CLOSE}))*\s*")
_ANY_TAG = re.compile(f"{_OPEN}|{_CLOSE}")
ANY_CLOSE = re.compile(_CLOSE)
_LINE_END = re.compile(r"\s*?(?:\n|$)")
_TAIL = 256  # characters at the end of a prompt in which a reasoning block is looked for


def content_text(given: Mapping[str, Any]) -> str:
    """A message's text; that of its parts where content is a list."""
    content = given.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def reasoning_text(given: Mapping[str, Any]) -> str:
    """The reasoning that a message holds in a field of its own; "" if none."""
    values = (given.get(name) for name in REASONING_FIELDS)
    return next((value for value in values if isinstance(value, str) and value.strip()), "")


class Block(NamedTuple):
    """The reasoning block with which a content begins; closed: whether it ends; opened: whether its first tag is there.

    A model whose prompt has opened the block generates the closing tag only, at the end of a line; elsewhere in a line
    it is text.
    """

    tag: str
    reasoning: str
    answer: str
    opened: bool
    closed: bool


def block_of(content: str, tags: Mapping[str, str] = TAGS, rendered: bool = False) -> Block | None:
    """The block at the start of a content, in one of the `tags` (opening tag -> closing tag); None if there is none.

    rendered: the template wrote the text, and may write the answer on the line of the closing tag.
    """
    for tag, close in tags.items():
        if tag not in content and close not in content:
            continue
        before, found, answer = content.partition(close)
        opened = before.lstrip().startswith(tag)
        if opened or (found and tag not in before and (rendered or _LINE_END.match(answer))):
            reasoning = before.lstrip().removeprefix(tag) if opened else before
            return Block(tag, reasoning, answer, opened, bool(found))
    return None


def opening_end(text: str, tags: Mapping[str, str]) -> int:
    """Where the opening tag ends with which an assistant's text begins; 0 if it begins with none."""
    block = block_of(text, tags)
    return text.index(block.tag) + len(block.tag) if block is not None and block.opened else 0


def runs_of_answer(text: str, tags: Mapping[str, str]) -> list[tuple[str, bool]]:
    """An assistant's text in runs, each with whether it is only text: tags of a block at its start are more."""
    runs: list[tuple[str, bool]] = []
    block, at = block_of(text, tags), 0
    if block is not None:
        for tag in (block.tag,) * block.opened + (tags[block.tag],) * block.closed:
            place = text.index(tag, at)
            runs += [(text[at:place], True), (tag, False)]
            at = place + len(tag)
    return [*runs, (text[at:], True)]


def has_reasoning(given: Mapping[str, Any], tags: Mapping[str, str] = TAGS) -> bool:
    """Whether a message holds reasoning, in a field of its own or at the start of its content."""
    if reasoning_text(given):
        return True
    block = block_of(content_text(given), tags)
    return block is not None and bool(block.reasoning.strip())


class Reading(NamedTuple):
    """Messages with their reasoning in one form; as_given: what a turn generates may be its content as it is, even
    where no render of the template holds it."""

    messages: MessageList
    as_given: bool = False


def readings(
    messages: MessageList, turns: Collection[int], tags: Mapping[str, str], takes_field: bool, takes_parts: bool
) -> Iterator[Reading]:
    """The ways to give a template the reasoning of assistants' messages, in the order in which they are tried.

    First as the file gives it, but for a block without its first tag, which gets it, and an empty block, which is left
    out. Then blocks in a field of their own; then all reasoning as a part of the content, of type `thinking`; then
    blocks as they are. Raises Rejected where a block of one of the `turns` does not end, or no answer follows it.

    tags: those that the template knows; all others are text. takes_field, takes_parts: whether it knows such.
    """
    blocks = _blocks(messages, turns, tags)
    full = {k: block for k, block in blocks.items() if block.reasoning.strip()}
    empty = {k: {"content": block.answer.lstrip()} for k, block in blocks.items() if k not in full}
    begun = {
        k: {"content": f"{block.tag}\n{content_text(messages[k]).lstrip()}"}
        for k, block in full.items()
        if not block.opened
    }
    whole = _changed(messages, {**empty, **begun})
    yield Reading(whole)
    apart = {
        k: {"content": block.answer.lstrip(), "reasoning_content": block.reasoning.strip()}
        for k, block in full.items()
        if not reasoning_text(messages[k])
    }
    if apart and takes_field:
        yield Reading(_changed(messages, {**empty, **apart}))
    if takes_parts and (in_parts := _thinking_parts(_changed(messages, {**empty, **apart}))):
        yield Reading(_changed(messages, {**empty, **in_parts}))
    if full:
        yield Reading(whole, as_given=True)
    if empty:
        yield Reading(messages, as_given=True)


def _blocks(messages: MessageList, turns: Collection[int], tags: Mapping[str, str]) -> dict[int, Block]:
    """The blocks at the start of assistants' contents that end. Raises Rejected for a turn that is not finished."""
    blocks: dict[int, Block] = {}
    for k, given in enumerate(messages) if tags else ():
        block = block_of(content_text(given), tags) if given["role"] == "assistant" else None
        if block is None:
            continue
        if k in turns and not block.closed:
            raise Rejected("reasoning_unclosed", f"messages[{k}].content begins with {block.tag}")
        if k in turns and not block.answer.strip() and not given.get("tool_calls"):
            where = f"messages[{k}].content ends with {tags[block.tag]}"
            raise Rejected("empty_answer", where, "add an answer, or set train: false on it")
        if block.closed:
            blocks[k] = block
    return blocks


def _changed(messages: MessageList, changes: Mapping[int, Mapping[str, Any]]) -> MessageList:
    if not changes:
        return messages
    return [{**given, **changes[k]} if k in changes else given for k, given in enumerate(messages)]


def _thinking_parts(messages: MessageList) -> dict[int, dict[str, Any]]:
    """For assistants' messages with a field of reasoning: the content in parts that begin with it."""
    found: dict[int, dict[str, Any]] = {}
    for k, given in enumerate(messages):
        reasoning = reasoning_text(given) if given["role"] == "assistant" else ""
        if reasoning:
            text = [{"type": "text", "text": content_text(given)}] if content_text(given) else []
            found[k] = {name: None for name in REASONING_FIELDS if name in given}
            found[k]["content"] = [{"type": "thinking", "thinking": reasoning}, *text]
    return found


def opened_by(prompt: str) -> tuple[str, int]:
    """(the tag of the reasoning block that a prompt leaves open, where it stands); ("", -1) if none."""
    found = _at_end(_OPEN_AT_END, prompt)
    return (found.group(1), found.start()) if found else ("", -1)


def closed_by(prompt: str) -> int:
    """Where the empty reasoning block starts with which a prompt ends; -1 if it does not."""
    found = _at_end(_EMPTY_AT_END, prompt)
    return found.start() if found else -1


def _at_end(pattern: re.Pattern[str], prompt: str) -> re.Match[str] | None:
    if not prompt[-_TAIL:].rstrip().endswith(_ALL_TAGS):  # most prompts; a search takes ten times as long
        return None
    return pattern.search(prompt, max(len(prompt) - _TAIL, 0))


def empty_block_end(text: str, at: int) -> int:
    """Where an empty reasoning block that starts at `at` ends; `at` if there is none."""
    found = _EMPTY_AT_START.match(text, at)
    return found.end() if found else at


def has_tag(text: str, at: int = 0) -> bool:
    return _ANY_TAG.search(text, at) is not None


def opens_reasoning_twice(
    given: Mapping[str, Any], prompt: str, between: str, said: str, tags: Mapping[str, str]
) -> bool:
    """Whether the render opens a second reasoning block in front of the one that the content already begins with.

    Templates do that which know reasoning only as a field of its own, or by a switch. between: what the render has
    between the prompt and the turn's words `said`.
    """
    if block_of(content_text(given), tags) is None or block_of(said, tags, True) is None or reasoning_text(given):
        return False
    return bool(opened_by(prompt)[0]) or closed_by(prompt) >= 0 or has_tag(between)


def generated_behind_open_tag(prompt: str, between: str, said: str) -> str | None:
    """A turn whose content begins with the tag with which the prompt ends: the render without the second one.

    None where the prompt ends in another tag, or in none.
    """
    opened = opened_by(prompt)[0]
    if not opened or between.strip() or not said.lstrip().startswith(opened):
        return None
    words = said.lstrip().removeprefix(opened)
    return words.lstrip() if prompt[-1:].isspace() else words


def generated_as_given(
    given: Mapping[str, Any], prompt: str, between: str, said: str, tags: Mapping[str, str]
) -> str | None:
    """A turn whose reasoning block no render holds as a model generates it: the template takes it out of the content
    even where the turn is the last, or puts an empty one before it.

    Such templates are made for history. What the model generates is the content as the file gives it, since it spells
    the block with its tags, less the tag that the prompt has opened. None where that is not all of the turn: beside
    tool calls, or where the reasoning has a field of its own, nothing says how a model would spell it.
    """
    content = content_text(given).strip()
    block, opened = block_of(content, tags), opened_by(prompt)[0]
    more = _TAGS_AT_START.sub("", between, count=1).strip()
    if block is None or given.get("tool_calls") or reasoning_text(given) or more:
        return None
    if opened not in ("", block.tag) or (not opened and closed_by(prompt) >= 0):
        return None
    shown = block_of(said, tags, True)
    words = said.lstrip() if shown else content[: len(content) - len(block.answer.strip())] + said.lstrip()
    if not opened:
        return words
    words = words.removeprefix(opened)
    return words.lstrip() if prompt[-1:].isspace() else words
