"""What a template itself says of each turn, by the prompts and renders of `apply_chat_template`.

The messages are given in every form in which a server may give them. Nothing of the package is used; the proof is
compared with this.

A turn is *represented* if some render of the conversation up to it begins with a prompt that a server builds and holds
every text of the turn behind it. White space does not count, nor a closed empty reasoning block at the prompt's end.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import template_table as tt

ARGUMENTS: tuple[Mapping[str, Any], ...] = (
    {},
    {"enable_thinking": False, "thinking": False},
    {"enable_thinking": True, "thinking": True},
    {"enable_thinking": True, "skip_think": False},
    {"reasoning_effort": "none"},
)
_EMPTY_BLOCK = re.compile(
    r"<think>\s*</think>\s*$|</think>\s*$|<\|channel>thought\s*<channel\|>\s*$|<\|START_THINKING\|><\|END_THINKING\|>$"
)
_CLOCK = re.compile(r"\d\d:\d\d:\d\d")  # the time of day of each render
_TAIL = 20  # characters of a prompt's end, where the turn rewrites what is before
_OPEN_TAG = re.compile(r"(<think>|\[THINK\]|<\|channel>thought)\s*$")


class Served(NamedTuple):
    """What a server builds before a turn, and the renders up to the turn, and with another message behind it."""

    prompt: str
    renders: tuple[str, ...]
    message: Mapping[str, Any]


def _squeezed(text: str) -> str:
    return "".join(_CLOCK.sub("", text).split())


def _contents(messages: Sequence[Mapping[str, Any]], form: str) -> Iterator[dict[str, Any]]:
    """given; text: parts joined; parts: a text as a part; one part: both."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, dict):
            content = json.dumps(content, ensure_ascii=False)
        if form in ("text", "one part") and isinstance(content, list):
            content = ("" if message["role"] == "assistant" else "\n").join(part["text"] for part in content)
        if form in ("parts", "one part") and isinstance(content, str):
            content = [{"type": "text", "text": content}]
        yield {**message, "content": content}


def _reasoned(messages: Sequence[Mapping[str, Any]], form: str) -> Iterator[dict[str, Any]]:
    """given; two tags: an opening tag where there is a closing one only; field; part; plain: without empty blocks."""
    for message in messages:
        content, thought = message.get("content"), message.get("reasoning_content")
        if isinstance(content, list) and len(content) == 1:
            content = content[0]["text"]
        if message["role"] != "assistant" or not isinstance(content, str) or form == "given":
            yield dict(message)
            continue
        if thought is None and "</think>" in content:
            thought, _, content = content.partition("</think>")
            thought, content = thought.replace("<think>", "").strip(), content.lstrip()
        other = {key: value for key, value in message.items() if key != "reasoning_content"}
        if not thought:
            yield {**other, "content": content}
        elif form == "two tags":
            yield {**other, "content": f"<think>\n{thought}\n</think>\n\n{content}"}
        elif form == "part":
            texts = [{"type": "text", "text": content}] if content else []
            yield {**other, "content": [{"type": "thinking", "thinking": thought}, *texts]}
        else:
            yield {**other, "content": content, "reasoning_content": thought}


def _called(messages: Sequence[Mapping[str, Any]], arguments: str, ids: str) -> Iterator[dict[str, Any]]:
    """arguments: object or string. ids: given; numbered, with the function's name in each result; or named."""
    number, new = 0, {}
    for message in messages:
        message = dict(message)
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                call, function = dict(call), dict(call["function"])
                given = function["arguments"] or {}
                given = json.loads(given) if isinstance(given, str) else given
                function["arguments"] = given if arguments == "object" else json.dumps(given, ensure_ascii=False)
                if ids == "numbered" and not re.fullmatch("[A-Za-z0-9]{9}", str(call.get("id"))):
                    id_ = re.sub("[^A-Za-z0-9]", "", f"{number:09}{call.get('id') or ''}")[-9:]
                    id_ = f"call{number:05}" if "id" not in call else id_
                    new[call.get("id", number)] = id_
                    call = {"id": id_, **{k: v for k, v in call.items() if k != "id"}}
                if ids == "named":
                    new[call.get("id", number)] = id_ = f"functions.{function['name']}:{number}"
                    call = {**call, "id": id_}
                number += 1
                calls.append({**call, "function": function})
            message["tool_calls"] = calls
        elif message["role"] == "tool" and ids != "given":
            id_ = message.get("tool_call_id", number - 1)
            message |= {"tool_call_id": new.get(id_, id_)} | ({"name": "get_weather"} if ids == "numbered" else {})
        yield message


@lru_cache(maxsize=2048)
def _forms(kind: str) -> tuple[list[dict[str, Any]], ...]:
    messages, tools = tt.conversation(kind)
    made = []
    calls = itertools.product(("object", "string"), ("given", "numbered", "named")) if tools else [("object", "given")]
    for (arguments, ids), thought, content in itertools.product(
        calls, ("given", "field", "two tags", "part"), ("text", "parts", "given", "one part")
    ):
        form = list(_reasoned(list(_contents(list(_called(messages, arguments, ids)), content)), thought))
        if form not in made:
            made.append(form)
    return tuple(made)


class Oracle:
    """The renders of one tokenizer's template; each is made once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._kept: dict[str, str | None] = {}

    def _render(self, messages: Sequence[Any], tools: Any, prompt: bool, arguments: Mapping[str, Any]) -> str | None:
        key = json.dumps([messages, bool(tools), prompt, arguments])
        if key not in self._kept:
            try:
                self._kept[key] = self._tokenizer.apply_chat_template(
                    list(messages), tools, tokenize=False, add_generation_prompt=prompt, **arguments
                )
            except Exception:
                self._kept[key] = None
        return self._kept[key]

    def served(self, kind: str, k: int) -> Iterator[Served]:
        tools = tt.conversation(kind)[1]
        for messages in _forms(kind):
            after = messages[k + 1 : k + 2] or [{"role": "user", "content": "And then?"}]
            made = [
                self._render(shown, tools, False, arguments)
                for arguments in ARGUMENTS
                for shown in (messages[: k + 1], [*messages[: k + 1], *after])
            ]
            renders = tuple(dict.fromkeys(text for text in made if text is not None))
            prompts = [self._render(messages[:k], tools, True, arguments) for arguments in ARGUMENTS]
            for prompt in dict.fromkeys(prompts):
                if prompt is not None and renders:
                    yield Served(prompt, renders, messages[k])

    def represented(self, kind: str) -> bool:
        """Whether every turn is. A block in the content, where the file has a field, is not what the file says."""
        turns = [k for k, message in enumerate(tt.conversation(kind)[0]) if message["role"] == "assistant"]
        apart = any("reasoning_content" in message for message in tt.conversation(kind)[0])

        def as_the_file(served: Served) -> bool:
            return not apart or "<think>" not in str(served.message["content"])

        return all(any(as_the_file(one) and self._holds(one) for one in self.served(kind, k)) for k in turns)

    def _holds(self, served: Served) -> bool:
        heads = {_squeezed(served.prompt), _squeezed(_EMPTY_BLOCK.sub("", served.prompt))}
        for text in map(_squeezed, served.renders):
            for head in heads:
                behind = text[len(head) :]
                if "'thinking'" in behind or '"thinking"' in behind:  # parts as Python or JSON prints them
                    continue
                if text.startswith(head) and all(any(f in behind for f in each) for each in texts_of(served.message)):
                    return True
        return False

    def right(self, kind: str, k: int, context: str, target: str, stops: Sequence[str]) -> bool:
        """Whether a context is a server's and the target is what the template renders behind it.

        Or, where the template takes reasoning out of the content, the content as it is behind the prompt, with the tag
        that the prompt has opened.
        """
        bare = _squeezed(next((target.removesuffix(stop) for stop in stops if target.endswith(stop)), target))
        for served in self.served(kind, k):
            if _squeezed(served.prompt) != _squeezed(context):
                continue
            opened = _OPEN_TAG.search(context)
            content = served.message.get("content")
            as_it_is = not served.message.get("tool_calls") and not _EMPTY_BLOCK.search(context)
            tag = _squeezed(opened.group(1) if opened else "")
            if as_it_is and isinstance(content, str) and _squeezed(content) == tag + bare:
                return True
            texts = [_squeezed(text) for text in served.renders]
            for head in map(_squeezed, (context, _EMPTY_BLOCK.sub("", context), _OPEN_TAG.sub("", context))):
                if any(text.startswith(head + bare) or head[-_TAIL:] + bare in text for text in texts):
                    return True
        return False


def texts_of(message: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Every text of a turn that the model must generate, each in the ways in which it may be spelled, squeezed."""
    content = message.get("content")
    parts = (
        [part.get("text") or part.get("thinking", "") for part in content] if isinstance(content, list) else [content]
    )
    texts = [text for part in parts if part for text in re.split(r"</?think>", part)]
    texts.append(message.get("reasoning_content") or "")
    for call in message.get("tool_calls", ()):
        texts.append(call["function"]["name"])
        given = call["function"]["arguments"]
        texts += _strings(json.loads(given) if isinstance(given, str) else given)
    for text in texts:
        if text.strip():
            yield tuple(
                map(
                    _squeezed,
                    (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], repr(text)[1:-1]),
                )
            )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
    elif isinstance(value, str):
        yield value
