"""Which message and field each token of a tree came from.

Every turn is rendered again as for its proof, with characters that know their origin. A turn's tokens are found in the
tree (context and target must be the same, token for token or character for character), measured against the text that
they spell, and named after the origin of those characters. What cannot be had this way is UNKNOWN, never guessed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from preceptor.chat import reasoning
from preceptor.chat.message_forms import find_forms
from preceptor.chat.origins import Leaf, Rendered, leaves_of
from preceptor.chat.render import Renderer
from preceptor.chat.renders import Chat, Renders, Runs
from preceptor.chat.token_text import spans, special_ids
from preceptor.chat.tokenise import any_of
from preceptor.chat.turns import Stops, Turn, target_of
from preceptor.data.examples import Completion, Conversation, Document, Example, trainable_turns
from preceptor.data.forest import Tree, path_ids
from preceptor.data.rejections import Rejected


class Field(NamedTuple):
    """A field of a message (`content`, `tool_calls[0].function.name`); without message, what else a text comes from."""

    name: str
    message: int | None = None
    role: str = ""


TEMPLATE = Field("template")
TOOLS = Field("template or tools")
UNKNOWN = Field("unknown")

Fields = tuple[Field, ...]
Run = tuple[str, Field]


@dataclass(frozen=True, slots=True)
class Whence:
    """For each segment of a tree: the fields of each token (several where a token joins their texts), and `turns`.

    turns: the index of the message that a target segment is (a part of); None for contexts. texts: for each token of a
    segment the characters that it spells, with their place, where they are known.
    """

    fields: tuple[tuple[Fields, ...], ...]
    turns: tuple[int | None, ...]
    spelled: tuple[tuple[tuple[int, str], ...] | None, ...]


def whence(record: Example, tree: Tree, renderer: Renderer) -> Whence:
    """Where the tokens of `tree`, which is `renderer.render(record)`, came from."""
    found = _Finding(tree, renderer.tokenizer)
    if isinstance(record, Conversation):
        for k, context, target in _turns(record, tree, renderer):
            for path, length in found.paths(context, target):
                found.name(path, length, [*context, *target], k)
                break
    else:
        found.name_plain(record)
    return Whence(tuple(found.fields), tuple(found.turns), tuple(found.spelled))


class _Finding:
    """The segments of a tree, named one after the other."""

    def __init__(self, tree: Tree, tokenizer: Any) -> None:
        self.tree, self._tokenizer = tree, tokenizer
        self._specials = special_ids(tokenizer)
        self.fields: list[tuple[Fields, ...]] = [((UNKNOWN,),) * len(s.ids) for s in tree.segments]
        self.turns: list[int | None] = [None] * len(tree.segments)
        self.spelled: list[tuple[tuple[int, str], ...] | None] = [None] * len(tree.segments)
        self._children: dict[int | None, list[int]] = {}
        self._text: list[str] = []  # from the root to the end of each segment; so are the next two
        self._num_ids: list[int] = []
        self._ends: dict[int, int] = {}  # how many characters, of the segments that are named
        for index, segment in enumerate(tree.segments):
            self._children.setdefault(segment.parent, []).append(index)
            before = "" if segment.parent is None else self._text[segment.parent]
            self._text.append(before + segment.text)
            num_before = 0 if segment.parent is None else self._num_ids[segment.parent]
            self._num_ids.append(num_before + len(segment.ids))

    def paths(self, context: Sequence[Run], target: Sequence[Run]) -> Iterator[tuple[list[int], int]]:
        """Paths from the root whose first segments spell the context and whose others spell the target.

        Each with the number of segments that the context takes.
        """
        prompt, said = _text_of(context), _text_of(target)
        prompt_ids: tuple[int, ...] | None = None
        for parent in [None, *range(len(self.tree.segments))]:
            if ("" if parent is None else self._text[parent]) != prompt:
                if prompt_ids is None:
                    prompt_ids = tuple(self._tokenizer(prompt, add_special_tokens=False)["input_ids"])
                num_ids = 0 if parent is None else self._num_ids[parent]
                if num_ids != len(prompt_ids) or path_ids(self.tree, parent) != prompt_ids:
                    continue
            above = self._path(parent)
            stack = [(child, self.tree.segments[child].text) for child in self._children.get(parent, ())]
            while stack:
                index, spelled = stack.pop()
                if spelled == said:
                    yield self._path(index), len(above)
                elif said.startswith(spelled):
                    deeper = self._children.get(index, ())
                    stack += [(child, spelled + self.tree.segments[child].text) for child in deeper]

    def _path(self, index: int | None) -> list[int]:
        path: list[int] = []
        while index is not None:
            path.insert(0, index)
            index = self.tree.segments[index].parent
        return path

    def name(self, path: Sequence[int], num_context: int, runs: Sequence[Run], turn: int | None) -> None:
        """Name the tokens of a path that spells the runs; segments from `num_context` on are those of the turn.

        Segments that an earlier turn named are the first of the path, and are passed over.
        """
        for index in path[num_context:]:
            self.turns[index] = turn
        num_named = next((at for at, index in enumerate(path) if index not in self._ends), len(path))
        start = self._ends[path[num_named - 1]] if num_named else 0
        new = path[num_named:]
        ids = [token for index in new for token in self.tree.segments[index].ids]
        measured = spans(ids, _text_of(runs)[start:], self._tokenizer, self._specials)
        if measured is None:
            return
        text = _text_of(runs)
        places = iter((low + start, high + start) for low, high in measured)
        edges, at = [], 0
        for run, field in runs:
            edges.append((at, at + len(run), field))
            at += len(run)
        for index in new:
            own = list(islice(places, len(self.tree.segments[index].ids)))
            self.fields[index] = tuple(_fields_of(own, edges))
            self.spelled[index] = tuple((low, text[low:high]) for low, high in own)
            self._ends[index] = own[-1][1]

    def name_plain(self, record: Completion | Document) -> None:
        """A completion or a document: one path, whatever was put around its texts was added (bos, eos)."""
        prompt, text = (record.prompt, record.completion) if isinstance(record, Completion) else ("", record.text)
        path = self._path(len(self.tree.segments) - 1)
        whole = self._text[-1]
        at = whole.find(prompt + text)
        if at < 0 or len(path) != len(self.tree.segments):
            return
        name = "completion" if isinstance(record, Completion) else "text"
        end = at + len(prompt) + len(text)
        added = Field("added around the text")
        runs = [(whole[:at], added), (prompt, Field("prompt")), (text, Field(name)), (whole[end:], added)]
        self.name(path, len(path), runs, None)


def _fields_of(places: Sequence[tuple[int, int]], edges: Sequence[tuple[int, int, Field]]) -> Iterator[Fields]:
    """The fields whose texts each place has a part of; places and edges stand in order."""
    first = 0
    for start, end in places:
        while first < len(edges) - 1 and edges[first][1] <= start:
            first += 1
        found = []
        for edge in range(first, len(edges)):
            low, high, field = edges[edge]
            if low >= end:
                break
            if low < high:
                found.append(field)
        yield tuple(dict.fromkeys(found)) or (UNKNOWN,)


def _text_of(runs: Sequence[Run]) -> str:
    return "".join(text for text, _ in runs)


# Turns with their origins --------------------------------------------------------------------------------------------


def _turns(record: Conversation, tree: Tree, renderer: Renderer) -> Iterator[tuple[int, list[Run], list[Run]]]:
    """(k, context, target) of each trained turn, as texts with their fields, each way that it is proved."""
    template, tokenizer = renderer.template, renderer.tokenizer
    turns = trainable_turns(record.messages)
    forms = find_forms(template)
    try:
        given = [forms.fit(m.given, f"messages[{k}]") for k, m in enumerate(record.messages[: turns[-1] + 1])]
    except Rejected:
        return
    stops = Stops(any_of(map(tokenizer.convert_ids_to_tokens, renderer.stop_token_ids)), tokenizer.eos_token)
    arguments = {**renderer.template_kwargs, **record.template_kwargs}
    switches = [name for name in template.reasoning_switches if name not in arguments]
    chat = Chat(template, given, record.tools, [leaves_of(message, k) for k, message in enumerate(given)])
    renders = Renders(chat, Runs(tokenizer))
    for k in turns:
        switched = [{**arguments, **dict.fromkeys(switches, reasoning.has_reasoning(given[k]))}] if switches else []
        for attempt in (*switched, arguments):
            try:
                turn = renders.turn(k, attempt)
                target = target_of(turn, stops)
                prompt, full = turn.prompt_marked(), turn.full_marked()
            except Rejected:
                continue
            yield k, _runs(prompt, turn.leaves, given, record.tools), _target_runs(target, turn, full, given)


def _runs(
    rendered: Rendered, leaves: Sequence[Leaf], messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
) -> list[Run]:
    """The rendered text in runs of one field.

    Where a template does something through which origins are not followed, a message's text seems to be the template's
    own; such text is unknown. From the first to the last place in which a tool is spelled, the template's text and that
    of the tools are not told apart.
    """
    lost = {leaf.text.strip() for at, leaf in enumerate(leaves) if _is_text(leaf) and not rendered.spelled(at)} - {""}
    runs: list[Run] = []
    for piece, origin in rendered.parts():
        if origin is not None:
            runs.append((piece, field_of(leaves[origin], messages) if origin < len(leaves) else UNKNOWN))
            continue
        at = 0
        for start, end in _places_of([text for text in lost if text in piece], piece):
            runs += [(piece[at:start], TEMPLATE), (piece[start:end], UNKNOWN)]
            at = end
        runs.append((piece[at:], TEMPLATE))
    names = _tool_texts(tools)
    places = [at for at, (text, f) in enumerate(runs) if f is TEMPLATE and any(name in text for name in names)]
    for at in range(places[0], places[-1] + 1) if places else ():
        if runs[at][1] is TEMPLATE:
            runs[at] = (runs[at][0], TOOLS)
    return runs


def _places_of(texts: Sequence[str], piece: str) -> list[tuple[int, int]]:
    return [match.span() for match in any_of(texts).finditer(piece)] if texts else []


def _is_text(leaf: Leaf) -> bool:
    """Whether it is what someone said, not a name or an id, which templates often leave out."""
    return leaf.path[0] in ("content", *reasoning.REASONING_FIELDS) or "arguments" in leaf.path


def _tool_texts(tools: Sequence[Any] | None) -> set[str]:
    """Names and descriptions of the tools."""
    functions = [tool.get("function", tool) for tool in tools or ()]
    return {text for f in functions for text in (f.get("name"), f.get("description")) if isinstance(text, str) and text}


def _target_runs(target: str, turn: Turn, full: Rendered, messages: Sequence[Mapping[str, Any]]) -> list[Run]:
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
                return _cut(_runs(full, turn.leaves, messages, None), start, target[: len(said)], target[len(said) :])
    return _searched(target, turn, messages)


def _searched(target: str, turn: Turn, messages: Sequence[Mapping[str, Any]]) -> list[Run]:
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
    runs: list[Run] = []
    at = 0
    for place, spelled, leaf in sorted(found, key=lambda each: each[0]):
        if place < at:  # one inside the other: which is which is not known
            return [(target, UNKNOWN)]
        runs += [(target[at:place], rest), (spelled, field_of(leaf, messages))]
        at = place + len(spelled)
    return [*runs, (target[at:], rest)]


def _cut(runs: Sequence[Run], start: int, text: str, closing: str) -> list[Run]:
    """The runs from character `start` on, as long as `text`, and then the closing, which is the template's."""
    end, at, cut = start + len(text), 0, []
    for piece, field in runs:
        cut.append((piece[max(0, start - at) : max(0, end - at)], field))
        at += len(piece)
    return [*cut, (closing, TEMPLATE)]


def field_of(leaf: Leaf, messages: Sequence[Mapping[str, Any]]) -> Field:
    name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in leaf.path).removeprefix(".")
    return Field(name, leaf.message, str(messages[leaf.message].get("role", "")))
