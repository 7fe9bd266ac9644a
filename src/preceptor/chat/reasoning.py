"""Reasoning in a turn and in a prompt: which fields and tags hold it, and what a model that reasons must generate."""

import re
from collections.abc import Mapping
from typing import Any

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
INLINE_WORDS = ("<think>", "</think>", "[THINK]", "[/THINK]")  # with which a content may hold its reasoning
_TAGS = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<thinking>": "</thinking>",
    "<|channel>thought": "<channel|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<seed:think>": "</seed:think>",
}
_ALL_TAGS = (*_TAGS, *_TAGS.values())
_OPEN, _CLOSE = "|".join(map(re.escape, _TAGS)), "|".join(map(re.escape, _TAGS.values()))
_INLINE = re.compile(r"\s*(<think>|\[THINK\])(.*?)(</think>|\[/THINK\])(.*)", re.DOTALL)
_OPEN_AT_END = re.compile(rf"({_OPEN})\s*$")
_EMPTY_AT_END = re.compile(rf"(?:(?:{_OPEN})\s*)?(?:{_CLOSE})\s*$")
_EMPTY_AT_START = re.compile(rf"\s*(?:(?:{_OPEN})\s*)?(?:{_CLOSE})")
_TAGS_AT_START = re.compile(rf"(?:\s*(?:{_OPEN}|{_CLOSE}))*\s*")
_ANY_TAG = re.compile(f"{_OPEN}|{_CLOSE}")
_ANY_CLOSE = re.compile(_CLOSE)
_TAIL = 256  # characters at the end of a prompt in which a reasoning block is looked for


def content_text(given: Mapping[str, Any]) -> str:
    """A message's text; that of its parts where content is a list."""
    content = given.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def reasoning_text(given: Mapping[str, Any]) -> str:
    """The reasoning that a message holds in a field of its own; "" if none."""
    for name in REASONING_FIELDS:
        value = given.get(name)
        if isinstance(value, str) and value.strip():
            return value
    return ""


def inline_reasoning(content: str) -> tuple[str, str] | None:
    """(reasoning, answer) of a content that begins with a reasoning block, else None."""
    if "<think>" not in content and "[THINK]" not in content:
        return None
    found = _INLINE.match(content)
    return (found.group(2), found.group(4)) if found else None


def has_reasoning(given: Mapping[str, Any]) -> bool:
    """Whether a message holds reasoning, in a field of its own or inline."""
    if reasoning_text(given):
        return True
    inline = inline_reasoning(content_text(given))
    return inline is not None and bool(inline[0].strip())


def opened_by(prompt: str) -> tuple[str, int]:
    """(the tag of the reasoning block that a prompt leaves open, where it stands); ("", -1) if none."""
    return _at_end(_OPEN_AT_END, prompt)


def closed_by(prompt: str) -> int:
    """Where the empty reasoning block starts with which a prompt ends; -1 if it does not."""
    return _at_end(_EMPTY_AT_END, prompt)[1]


def _at_end(pattern: re.Pattern[str], prompt: str) -> tuple[str, int]:
    tail = prompt[-_TAIL:]
    if not tail.rstrip().endswith(_ALL_TAGS):  # most prompts; a search takes ten times as long
        return "", -1
    found = pattern.search(tail)
    if found is None:
        return "", -1
    return found.group(1) if found.re.groups else found.group(), len(prompt) - len(tail) + found.start()


def empty_block_end(text: str, at: int) -> int:
    """Where an empty reasoning block that starts at `at` ends; `at` if there is none."""
    found = _EMPTY_AT_START.match(text, at)
    return found.end() if found else at


def has_tag(text: str, at: int = 0) -> bool:
    return _ANY_TAG.search(text, at) is not None


def closes(text: str) -> bool:
    return _ANY_CLOSE.search(text) is not None


def without_leading_tags(text: str) -> str:
    return _TAGS_AT_START.sub("", text, count=1)


def reasons_twice(given: Mapping[str, Any], prompt: str, between: str, said: str) -> bool:
    """Whether a content that begins with a reasoning block is rendered behind another one.

    Templates that know reasoning only as a field of its own do that: `<think></think>`, which may end the prompt, and
    then the content, which begins with `<think>`. No model was meant to generate it. between: what the render has
    between the prompt and the turn's words `said`.
    """
    if reasoning_text(given) or inline_reasoning(said) is None or inline_reasoning(content_text(given)) is None:
        return False
    return bool(opened_by(prompt)[0]) or closed_by(prompt) >= 0 or has_tag(between)


def with_reasoning(given: Mapping[str, Any], prompt: str, between: str, said: str) -> str | None:
    """A turn with its reasoning as the model must generate it; the render has `between` and `said` after the prompt.

    Templates made for history leave a turn's reasoning out even where it is the last. What the model must generate is
    known all the same in two cases: the content itself spells the reasoning block, or the prompt has opened one. None
    in all others.
    """
    content = content_text(given).strip()
    inline, own, opened = inline_reasoning(content), reasoning_text(given), opened_by(prompt)[0]
    rest = without_leading_tags(between)  # what a tool call begins with, for example
    if has_tag(rest):
        return None
    if own:
        if not opened or (inline is not None and inline_reasoning(said) is None):
            return None
        close = _TAGS[opened]
        return (f"{own.strip()}\n{close}\n\n" if prompt.endswith("\n") else f"{own}{close}") + rest + said
    if inline is None or (not opened and closed_by(prompt) >= 0):
        return None
    block = content[: len(content) - len(inline[1].strip())]
    if inline_reasoning(said) is not None:
        if block not in said:
            return None
        said = said[said.index(block) + len(block) :]
    answer = (rest + said).lstrip()
    if not opened:
        return block + answer
    if not block.startswith(opened):
        return None
    block = block[len(opened) :]
    return (block.lstrip() if prompt[-1:].isspace() else block) + answer
