"""Making the stencil of a plan (`stencil.py`): where in the template's own text the turns start and end."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from preceptor.chat import reasoning
from preceptor.chat.growing_tree import shared_length
from preceptor.chat.plans import Output, Plan, Recorded, Request
from preceptor.chat.stencil import Part, Piece, Stencil, Stretch, TurnCheck
from preceptor.chat.tokenise import Ids, Tokeniser
from preceptor.chat.turns import Stops

_FIELDS = ("content", *reasoning.REASONING_FIELDS)


class Place(NamedTuple):
    """A place in a render: in which of the template's own texts, and where in that."""

    text: int
    at: int


class NoStencil(Exception):
    """What the turns are hangs on the words of the conversation."""


def stencil_of(plan: Plan, tokeniser: Tokeniser, stops: Stops, stop_token_ids: Collection[int]) -> Stencil | None:
    """The stencil of a plan, of all its turns or of the first of them; None where there can be none."""
    if not tokeniser.goes_by_words:
        return None
    asked = list(plan.recorded.turns)
    while asked:
        checks: list[TurnCheck] = []
        places: list[Place] = []
        try:
            render = _Render(plan, _output(plan, asked[-1], prompt=False))
            for turn in asked:
                start, end = _places(render, plan, turn, stops)
                checks.append(_check(render, turn[0], start, end, plan.recorded))
                places += [start, end]
            pieces = _Pieces(render, tokeniser, stop_token_ids).cut(places)
        except NoStencil:
            asked = asked[: max(1, len(checks))] if len(checks) < len(asked) > 1 else []
            continue
        return Stencil(
            pieces=list(zip(pieces[::2], pieces[1::2], strict=True)),
            checks=checks,
            values=render.values,
            num_values=[0, *(place.text for place in places[1::2])],
            stop_token_ids=stop_token_ids,
        )
    return None


def _output(plan: Plan, turn: tuple[int, str], prompt: bool) -> Output:
    """The prompt of a turn, or the render up to it. Raises NoStencil where it was not recorded."""
    k, key = turn
    output = plan.outputs.get(Request(k, True, key) if prompt else Request(k + 1, False, key))
    if output is None:
        raise NoStencil
    return output


class _Render:
    """A render as the template's own texts, some of them empty, with a value between any two: t0 v0 t1 v1 t2."""

    def __init__(self, plan: Plan, output: Output) -> None:
        self._plan = plan
        self._refs = output.all_refs
        self.texts: list[str] = [""]
        self.values: list[int] = []
        self.origins: list[int | None] = []
        self._places: list[Place] = []  # before each of the refs, and at the end
        for ref, origin in zip(self._refs, output.all_origins, strict=True):
            self._places.append(self._end())
            text = plan.tape.constant_at(ref)
            if text is not None:
                self.texts[-1] += text
                continue
            self.values.append(ref)
            self.origins.append(origin)
            self.texts.append("")
        self._places.append(self._end())

    def _end(self) -> Place:
        return Place(len(self.values), len(self.texts[-1]))

    def end_of(self, output: Output) -> Place:
        """Where another render ends in this one. Raises NoStencil if it is not always a beginning of it."""
        refs = output.all_refs
        num_shared = shared_length(refs, self._refs)
        index, at = self._places[num_shared]
        for ref in refs[num_shared:]:
            text = self._plan.tape.constant_at(ref)
            if text is not None and self.texts[index].startswith(text, at):
                at += len(text)
            elif text is None and at == len(self.texts[index]) and self.values[index : index + 1] == [ref]:
                index, at = index + 1, 0
            else:
                raise NoStencil
        return Place(index, at)


def _places(render: _Render, plan: Plan, turn: tuple[int, str], stops: Stops) -> tuple[Place, Place]:
    """Where the target of a turn starts and ends. Raises NoStencil."""
    start, end = (render.end_of(_output(plan, turn, prompt)) for prompt in (True, False))
    own = plan.recorded.own(turn[0])
    origins = render.origins[start.text : end.text]
    found = stops.pattern.search(render.texts[end.text], 0, end.at)
    if not origins or found is None or any(origin is None or origin not in own for origin in origins):
        raise NoStencil
    return start, Place(end.text, found.end())


def _check(render: _Render, k: int, start: Place, end: Place, recorded: Recorded) -> TurnCheck:
    """What of turn k hangs on its words. Raises NoStencil where that is more than a TurnCheck asks."""
    before = render.texts[start.text][: start.at]
    if recorded.messages[k].get("tool_calls") or (start.text and reasoning.may_end_a_tag(before)):
        raise NoStencil
    spelled = []
    for leaf in recorded.own(k):
        refs = tuple(render.values[at] for at in range(start.text, end.text) if render.origins[at] == leaf)
        if recorded.leaves[leaf].path[0] in _FIELDS:
            if not refs:
                raise NoStencil
            spelled.append((leaf, refs))
    between = "".join([render.texts[start.text][start.at :], *render.texts[start.text + 1 : end.text]])
    opened = bool(reasoning.opened_by(before)[0])
    return TurnCheck(k, tuple(spelled), render.values[end.text - 1], opened, opened or reasoning.has_tag(between))


class _Pieces:
    """Cuts a render at the places where contexts and targets end, and each of these at the added tokens."""

    def __init__(self, render: _Render, tokeniser: Tokeniser, stop_token_ids: Collection[int]) -> None:
        self._render, self._tokeniser, self._stops = render, tokeniser, stop_token_ids
        self._pieces: list[Piece] = []
        self._ids: list[Ids | Stretch] = []
        self._text: list[Part] = []
        self._stretch: list[Part] = []  # since the last added token
        self._lead: list[str] = []  # words of the stretch that belong to the piece before

    def cut(self, places: Sequence[Place]) -> list[Piece]:
        """The pieces up to each of the places, contexts and targets by turns. Raises NoStencil."""
        texts, values = self._render.texts, self._render.values
        last = places[-1].text
        for index, text in enumerate(texts[: last + 1]):
            self._cut_text(text, [place.at for place in places if place.text == index])
            if index == last:
                break
            if (index and not text) or self._tokeniser.may_cross(text, texts[index + 1]):
                raise NoStencil  # a token might be made where texts meet
            self._stretch.append(values[index])
            self._text.append(values[index])
        return self._pieces

    def _cut_text(self, text: str, ends: list[int]) -> None:
        at = 0
        for start, end, token in self._tokeniser.added_tokens(text):
            at = self._cut_plain(text, at, start, ends)
            if ends and ends[0] < end:
                raise NoStencil
            self._flush()
            self._ids.append((token,))
            self._text.append(text[start:end])
            at = end
        self._cut_plain(text, at, len(text), ends)

    def _cut_plain(self, text: str, at: int, end: int, ends: list[int]) -> int:
        """Takes text[at:end], in which no added token is, and ends the pieces that end there."""
        while ends and ends[0] <= end:
            self._take(text[at : ends[0]])
            at = ends.pop(0)
            if len(self._pieces) % 2:
                self._end_target()
            else:
                self._end_context()
        self._take(text[at:end])
        return end

    def _take(self, text: str) -> None:
        if text:
            self._stretch.append(text)
            self._text.append(text)

    def _end_context(self) -> None:
        lead = "".join(map(str, self._stretch))
        if not all(isinstance(part, str) for part in self._stretch):
            raise NoStencil  # words of a message and of the turn might be one
        words = self._words(lead)
        self._flush()
        self._end_piece()
        self._lead, self._stretch = words, [lead] if lead else []

    def _end_target(self) -> None:
        last = self._ids[-1] if self._ids else ()
        if self._stretch or isinstance(last, Stretch) or last[-1] not in self._stops:
            raise NoStencil
        self._end_piece()

    def _end_piece(self) -> None:
        joined: list[Ids | Stretch] = []
        for ids in self._ids:
            if joined and not isinstance(ids, Stretch) and not isinstance(joined[-1], Stretch):
                joined[-1] = (*joined[-1], *ids)
            else:
                joined.append(ids)
        if not joined:
            raise NoStencil
        self._pieces.append(Piece(tuple(joined), tuple(self._text)))
        self._ids, self._text = [], []

    def _flush(self) -> None:
        """The ids of the stretch; of one with values in it they are found for each conversation."""
        if not all(isinstance(part, str) for part in self._stretch):
            self._ids.append(Stretch(self._lead, tuple(self._stretch)))
        elif self._stretch:
            words = self._words("".join(map(str, self._stretch)))
            if words[: len(self._lead)] != self._lead:
                raise NoStencil
            ids: list[int] = []
            self._tokeniser.add_words(ids, words[len(self._lead) :])
            self._ids.append(tuple(ids))
        self._lead, self._stretch = [], []

    def _words(self, text: str) -> list[str]:
        words = self._tokeniser.cut(text)
        if words is None:
            raise NoStencil
        return words
