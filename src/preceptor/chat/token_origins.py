"""Which message and field each token of a tree came from.

The prompt and the render of every turn are made with characters that know their origin. The turn's tokens, which the
tree knows by their message, are measured against the text that they spell, and named after the origin of those
characters. What cannot be had this way is UNKNOWN, never guessed.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, islice, takewhile
from typing import Any, NamedTuple

from preceptor.chat import reasoning
from preceptor.chat.origins import Leaf, Rendered
from preceptor.chat.render import Proved
from preceptor.chat.tokenise import any_of, spans, special_ids
from preceptor.chat.turns import Turn
from preceptor.data.examples import REASONING_FIELDS, Completion, Conversation, Document, Example
from preceptor.data.forest import Tree, path_to


class Field(NamedTuple):
    """A field of a message (`content`, `tool_calls[0].function.name`); without message, what else a text comes from."""

    name: str
    message: int | None = None
    role: str = ""


TEMPLATE = Field("template")
TOOLS = Field("template or tools")
UNKNOWN = Field("unknown")

Fields = tuple[Field, ...]
TextRun = tuple[str, Field]


def token_origins(record: Example, tree: Tree, turns: Sequence[Proved], tokenizer: Any) -> "TokenOrigins":
    """Where the tokens came from; tree, turns: what `Renderer.render_with_turns` made of the record."""
    found = TokenOrigins(tree, tokenizer)
    if not isinstance(record, Conversation):
        found.name(len(tree.segments) - 1, _plain_runs(record, tree))
        return found
    roles = [message.role for message in record.messages]
    for turn, target, _ in turns:
        last = max(at for at, segment in enumerate(tree.segments) if segment.message == turn.message)
        context = _runs(turn.prompt_marked(), turn.leaves, roles, record.tools)
        found.name(last, [*context, *_target_runs(target, turn, turn.full_marked(), roles)])
    return found


class TokenOrigins:
    """For each segment of a tree the fields of each token: several where a token joins their texts.

    spelled: for each token of a segment the characters that it spells, with their place, where they are known.
    """

    def __init__(self, tree: Tree, tokenizer: Any) -> None:
        self._segments, self._tokenizer, self._specials = tree.segments, tokenizer, special_ids(tokenizer)
        self.fields: list[tuple[Fields, ...]] = [((UNKNOWN,),) * len(s.ids) for s in tree.segments]
        self.spelled: list[tuple[tuple[int, str], ...] | None] = [None] * len(tree.segments)
        self._ends: dict[int, int] = {}  # characters from the root to the end of each segment that is named

    def name(self, last: int, runs: Sequence[TextRun]) -> None:
        """Name what is not yet named of the tokens up to the end of segment `last`; runs: what they spell, if known."""
        path = path_to(self._segments, last)
        num_named = next((at for at, index in enumerate(path) if index not in self._ends), len(path))
        start = self._ends[path[num_named - 1]] if num_named else 0
        new = path[num_named:]
        ids = [token for index in new for token in self._segments[index].ids]
        text = "".join(run for run, _ in runs)
        measured = spans(ids, text[start:], self._tokenizer, self._specials) if runs else None
        if measured is None:
            return
        places = iter((low + start, high + start) for low, high in measured)
        ends = accumulate(len(run) for run, _ in runs)
        edges = [(end - len(run), end, field) for (run, field), end in zip(runs, ends, strict=True)]
        for index in new:
            own = list(islice(places, len(self._segments[index].ids)))
            self.fields[index] = tuple(_fields_of(low, high, edges) for low, high in own)
            self.spelled[index] = tuple((low, text[low:high]) for low, high in own)
            self._ends[index] = own[-1][1]


def _plain_runs(record: Completion | Document, tree: Tree) -> list[TextRun]:
    """The text of a completion or a document, around which other text (bos, eos) was put; [] where it is not known."""
    prompt, text = (record.prompt, record.completion) if isinstance(record, Completion) else ("", record.text)
    whole = "".join(segment.text for segment in tree.segments)
    at = whole.find(prompt + text)
    if at < 0 or len(path_to(tree.segments, len(tree.segments) - 1)) != len(tree.segments):
        return []
    name = "completion" if isinstance(record, Completion) else "text"
    end = at + len(prompt) + len(text)
    added = Field("added around the text")
    return [(whole[:at], added), (prompt, Field("prompt")), (text, Field(name)), (whole[end:], added)]


def _fields_of(start: int, end: int, edges: Sequence[tuple[int, int, Field]]) -> Fields:
    """The fields whose texts a place has a part of; edges: (start, end, field) of all texts, in order."""
    first = min(bisect_right(edges, start, key=lambda edge: edge[1]), len(edges) - 1)
    reached = takewhile(lambda edge: edge[0] < end, islice(edges, first, None))
    return tuple(dict.fromkeys(field for low, high, field in reached if low < high)) or (UNKNOWN,)


def _runs(
    rendered: Rendered, leaves: Sequence[Leaf], roles: Sequence[str], tools: Sequence[Any] | None
) -> list[TextRun]:
    """The rendered text in runs of one field.

    Where a template does something through which origins are not followed, a message's text seems to be the template's
    own; such text is unknown. From the first to the last place in which a tool is spelled, the template's text and that
    of the tools are not told apart.
    """
    lost = {leaf.text.strip() for at, leaf in enumerate(leaves) if _is_text(leaf) and not rendered.spelled(at)} - {""}
    runs: list[TextRun] = []
    for piece, origin in rendered.parts():
        if origin is not None:
            runs.append((piece, _field_of(leaves[origin], roles) if origin < len(leaves) else UNKNOWN))
            continue
        at = 0
        for start, end in (match.span() for match in any_of(lost).finditer(piece)):
            runs += [(piece[at:start], TEMPLATE), (piece[start:end], UNKNOWN)]
            at = end
        runs.append((piece[at:], TEMPLATE))
    functions = [tool.get("function", tool) for tool in tools or ()]
    said = [f.get(key) for f in functions if isinstance(f, Mapping) for key in ("name", "description")]
    names = [text for text in said if isinstance(text, str) and text]
    places = [at for at, (text, f) in enumerate(runs) if f is TEMPLATE and any(name in text for name in names)]
    for at in range(places[0], places[-1] + 1) if places else ():
        if runs[at][1] is TEMPLATE:
            runs[at] = (runs[at][0], TOOLS)
    return runs


def _is_text(leaf: Leaf) -> bool:
    """Whether it is what someone said, not a name or an id, which templates often leave out."""
    return leaf.path[0] in ("content", *REASONING_FIELDS) or "arguments" in leaf.path


def _target_runs(target: str, turn: Turn, full: Rendered, roles: Sequence[str]) -> list[TextRun]:
    """The target in runs of one field: its text is that of F from its start to the turn's last character, then closes.

    A target that F does not spell so (reasoning that the template leaves out was put back) is searched for the turn's
    texts.
    """
    span = full.span(turn.own)
    if span is not None:
        first, last = span
        for start in range(first, -1, -1):
            said = full.text[start:last]
            if len(said) > len(target):
                break
            if target.startswith(said) and not reasoning.has_tag(target[len(said) :]):
                return [*_cut(_runs(full, turn.leaves, roles, None), start, last), (target[len(said) :], TEMPLATE)]
    return _searched(target, turn, roles)


def _searched(target: str, turn: Turn, roles: Sequence[str]) -> list[TextRun]:
    """The target in runs, by the places of the turn's texts; only if all are found, each once, is the rest known."""
    opened = reasoning.opened_by(turn.prompt)[0]
    found: list[tuple[int, str, Leaf]] = []
    complete = True
    for leaf in (turn.leaves[index] for index in turn.own):
        text = leaf.text.strip()
        inner = text.removeprefix(opened)  # where the prompt has opened the reasoning that a content begins with
        spelled = next((each for each in (text, inner, inner.lstrip()) if each and each in target), "")
        if spelled and target.count(spelled) == 1:
            found.append((target.find(spelled), spelled, leaf))
        elif spelled or (text and _is_text(leaf)):
            complete = False
    rest = TEMPLATE if complete else UNKNOWN
    runs: list[TextRun] = []
    at = 0
    for place, spelled, leaf in sorted(found, key=lambda each: each[0]):
        if place < at:  # one inside the other: which is which is not known
            return [(target, UNKNOWN)]
        runs += [(target[at:place], rest), (spelled, _field_of(leaf, roles))]
        at = place + len(spelled)
    return [*runs, (target[at:], rest)]


def _cut(runs: Sequence[TextRun], start: int, end: int) -> list[TextRun]:
    """The runs from character `start` up to `end`."""
    at, cut = 0, []
    for piece, field in runs:
        cut.append((piece[max(0, start - at) : max(0, end - at)], field))
        at += len(piece)
    return cut


def _field_of(leaf: Leaf, roles: Sequence[str]) -> Field:
    return Field(leaf.name, leaf.message, roles[leaf.message])
