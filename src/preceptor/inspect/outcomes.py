"""The result of rendering a probe: a chain, a tree (and what was rewritten), or a rejection."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from preceptor.chat.template import Template
from preceptor.chat.turns import shared_start
from preceptor.data.examples import Rejection
from preceptor.data.forest import Tree, path_to
from preceptor.inspect.probes import Probe, shows_tools, texts_of

_SHOWN = 70  # characters of an excerpt


@dataclass(frozen=True, slots=True)
class Rewrite:
    """How the template rewrites an earlier turn once there is a later one."""

    dropped: tuple[str, ...]  # parts that are no longer rendered: `reasoning`, `text`, `tool call`
    moves: bool  # the text before the answer changes too
    generated: str  # what was generated, from the first difference on
    becomes: str  # what it becomes


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one kind of conversation."""

    kind: str
    proved: bool
    shape: Literal["chain", "tree", ""] = ""
    rewrite: Rewrite | None = None
    left_out: tuple[str, ...] = ()  # messages of others, or the tools, that the template does not show to the model
    code: str = ""  # why it is rejected
    message: str = ""


def outcome(probe: Probe, tree: Tree | Rejection, template: Template) -> Outcome:
    """template: with the renderer's arguments among its variables."""
    left_out = tree.left_out if isinstance(tree, Tree) else tuple(_left_out(probe, template))
    if isinstance(tree, Rejection):
        return Outcome(probe.kind, False, left_out=left_out, code=tree.code, message=tree.message)
    chain = all(segment.parent == (index - 1 if index else None) for index, segment in enumerate(tree.segments))
    rewrite = None if chain else _rewrite(probe, tree)
    return Outcome(probe.kind, True, "chain" if chain else "tree", rewrite, left_out)


def _left_out(probe: Probe, template: Template) -> list[str]:
    """The messages of others, and the tools, that the last turn's prompt does not contain."""
    text = template.render_or_none(probe.messages[:-1], probe.tools, add_generation_prompt=True)
    if text is None:
        return []
    names = {"system": "system prompt", "developer": "developer prompt", "user": "user message", "tool": "tool result"}
    others = [message for message in probe.messages if message["role"] in names]
    missing = [names[message["role"]] for message in others if message["content"] not in text]
    if probe.tools and not shows_tools(text):
        missing.append("tools")
    return list(dict.fromkeys(missing))


def _rewrite(probe: Probe, tree: Tree) -> Rewrite | None:
    """The first turn as generated, compared with the context of the first later turn that does not continue it."""
    own: dict[int, list[int]] = {}  # message -> its segments
    for index, segment in enumerate(tree.segments):
        if segment.message is not None:
            own.setdefault(segment.message, []).append(index)
    for now, later in pairwise(sorted(own)):
        generated = _path_text(tree, own[now][-1])
        context = _path_text(tree, tree.segments[own[later][0]].parent)
        if context.startswith(generated):
            continue
        shared = len(shared_start(generated, context))
        question = next(message["content"] for message in probe.messages if message["role"] == "user")
        texts = texts_of(probe.messages[now])
        return Rewrite(
            dropped=tuple(dict.fromkeys(name for name, text in texts if text in generated and text not in context)),
            moves=generated.find(question) + len(question) > shared,
            generated=_excerpt(generated[shared:]),
            becomes=_excerpt(context[shared:]),
        )
    return None


def _excerpt(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _path_text(tree: Tree, index: int | None) -> str:
    return "".join(tree.segments[each].text for each in path_to(tree.segments, index))
