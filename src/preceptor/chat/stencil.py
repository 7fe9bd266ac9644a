"""What the proof found for one conversation of a plan, as far as it holds for all others: a stencil to fill in.

Under most templates a conversation is one chain: the prompt of every turn, and the render up to it, are beginnings of
the longest render. Where the *values* of the plan show that (`plans.py`), whatever their text, each turn's start and
end are places in the template's own text, so that only the words between them are new:

    values     "<|start|>assistant\\n"  v7  "<|end|>\\n<|start|>user\\n"  v9  "<|end|>\\n<|start|>assistant\\n"  v12 ...
    context                        │                                                                    │
    target                         └─ words of v7, <|end|> ┘                                            └─ ...

Of another conversation remains to be asked what hangs on its words (`Stencil.fill`): that no text holds an added token,
that each turn is spelled as given, that no word crosses from the template's text into a turn, that no stop token is
among its words. Where one of these is not so, or a turn calls tools or is rewritten in the history of later ones, the
proof is made turn by turn (`render.py`), with the same result.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from preceptor.chat import reasoning
from preceptor.chat.origins import Leaf
from preceptor.chat.tokenise import Ids, Tokeniser

Part = str | int  # the template's own text, or the number of a value


class Stretch(NamedTuple):
    """Text between two added tokens with values in it, cut into words at once; the first of them are known.

    lead: the words of the template's own text before a turn, with which `parts` begin: it ends a context, the words
    after it begin the target.
    """

    lead: list[str]
    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """A context or a target: its ids, some of them yet to be found, and the parts of its text."""

    ids: tuple[Ids | Stretch, ...]
    text: tuple[Part, ...]


class Filled(NamedTuple):
    """A turn of a conversation: the ids and the text that are new in its context, and those of its target."""

    context: Ids
    context_text: str
    target: Ids
    target_text: str


@dataclass(frozen=True, eq=False, slots=True)
class TurnCheck:
    """What is asked of the words of a turn, message `index`.

    spelled: its leaves, each with the values that spell it. last: the value that ends it. opened: the prompt has opened
    a reasoning block. tagged: it has, or the template writes a tag of one before the turn's words.
    """

    index: int
    spelled: tuple[tuple[int, tuple[int, ...]], ...]
    last: int
    opened: bool
    tagged: bool

    def holds(self, values: Sequence[Any], leaves: Sequence[Leaf], message: Mapping[str, Any]) -> bool:
        """Whether the turn is spelled as it is given, and its reasoning is where the template has it."""
        if not values[self.last]:
            return False
        for leaf, refs in self.spelled:
            text = leaves[leaf].text
            spelled = values[refs[0]] if len(refs) == 1 else "".join([values[ref] for ref in refs])
            if spelled is not text and spelled != text and spelled.strip() != text.strip():
                return False
        if not self.tagged or reasoning.reasoning_text(message):
            return True
        return reasoning.inline_reasoning(reasoning.content_text(message)) is None


@dataclass(frozen=True, eq=False, slots=True)
class Stencil:
    """The turns of all conversations of one plan, or the first of them: `pieces` are the context and the target of
    each of `checks`. values: those that the pieces consist of, in order; of the first n turns, `num_values[n]`.
    """

    pieces: Sequence[tuple[Piece, Piece]]
    checks: Sequence[TurnCheck]
    values: Sequence[int]
    num_values: Sequence[int]
    stop_token_ids: Collection[int]

    def fill(
        self,
        turns: Sequence[int],
        values: Sequence[Any],
        leaves: Sequence[Leaf],
        messages: Sequence[Mapping[str, Any]],
        tokeniser: Tokeniser,
    ) -> list[Filled] | None:
        """The turns of a conversation with these values; None where its words need the proof turn by turn."""
        num = len(turns)
        if num > len(self.checks):
            return None
        if tokeniser.has_added_token("\n".join([values[ref] for ref in self.values[: self.num_values[num]]])):
            return None
        filled = []
        for (context, target), check in zip(self.pieces[:num], self.checks[:num], strict=True):
            if not check.holds(values, leaves, messages[check.index]):
                return None
            context_ids, target_ids = _ids(context, values, tokeniser), _ids(target, values, tokeniser)
            if context_ids is None or target_ids is None or not self._ends_once(target_ids):
                return None
            target_text = _text(target, values)
            if check.opened and not reasoning.closes(target_text):
                return None
            filled.append(Filled(context_ids, _text(context, values), target_ids, target_text))
        return filled

    def _ends_once(self, target: Ids) -> bool:
        """Whether no token but the last, which is one, ends the turn."""
        return sum(map(self.stop_token_ids.__contains__, target)) == 1


def _ids(piece: Piece, values: Sequence[Any], tokeniser: Tokeniser) -> Ids | None:
    ids: list[int] = []
    for known in piece.ids:
        if not isinstance(known, Stretch):
            ids += known
            continue
        words = tokeniser.cut("".join([part if isinstance(part, str) else values[part] for part in known.parts]))
        if words is None:
            return None
        if known.lead:
            num = len(known.lead)
            if words[:num] != known.lead:
                return None
            del words[:num]
        tokeniser.add_words(ids, words)
    return None if tokeniser.has_unknown(ids) else tuple(ids)


def _text(piece: Piece, values: Sequence[Any]) -> str:
    return "".join([part if isinstance(part, str) else values[part] for part in piece.text])
