"""Examples longer than `data.max_length`: reject, truncate or split them, as `data.overflow` says.

`reject`: they are not trained. `truncate_context`: the oldest messages are left out, as a chat program does when a
conversation outgrows the model's context. `split`: nothing is left out; the turns are shared among several examples.

    system │ user 1 │ turn 1 │ user 2 │ turn 2 │ user 3 │ turn 3 │ user 4 │ turn 4

    truncate_context   system                            │ user 3 │ turn 3 │ user 4 │ turn 4     turns 1, 2: untrained
    split              system │ user 1 │ turn 1 │ user 2 │ turn 2
                       system │                   user 2 │(turn 2)│ user 3 │ turn 3 │ user 4 │ turn 4  (): context only

A shortened conversation is rendered and proved like any other: its context is what a server would build from these
messages, and every target is whole, stop token included. In the order in which they are given up: exchanges that begin
with a user's message; within the last exchange, an assistant's messages with the tool results that follow; last, the
beginning of the text of the user's message (or of a completion's prompt). System messages stay, wherever they stand.
In `split`, a turn that does not fit with all that was said before it keeps about `max_length / 2` tokens of it at
least, as messages allow, and more where the turns of its example leave room. Plain text is cut into pieces; each begins
with the last token of the one before, so that every token is trained once. A target longer than `max_length` is
rejected.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from preceptor.data.examples import (
    Completion,
    Conversation,
    Example,
    Message,
    Rejection,
    num_characters,
    trainable_turns,
)
from preceptor.data.forest import Segment, Tree
from preceptor.data.workers import ExampleRenderer
from preceptor.errors import counted

Overflow = Literal["reject", "truncate_context", "split"]
ExampleTree = tuple[Example, Tree]

_CUT_TRIES = 12  # renders in search of the longest end of a text that fits


@dataclass
class Shortened:
    """What was done to examples that are too long. An example counts once, whatever its source's weight."""

    num_truncated: int = 0
    num_split: int = 0
    num_parts: int = 0
    num_messages_left_out: int = 0
    num_turns_left_out: int = 0
    num_texts_cut: int = 0

    def add(self, other: "Shortened") -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def __str__(self) -> str:
        """A line for each kind; "" where every example fitted."""
        lines = []
        if self.num_truncated:
            messages = f": {counted(self.num_messages_left_out, 'message')}" if self.num_messages_left_out else ""
            own = "a turn that is" if self.num_turns_left_out == 1 else "turns that are"
            turns = f", {self.num_turns_left_out:,} of them {own} not trained" if self.num_turns_left_out else ""
            whose = _whose(self.num_truncated)
            lines.append(f"{self.num_truncated:,} too long, {whose} oldest context left out{messages}{turns}")
        if self.num_split:
            lines.append(f"{self.num_split:,} too long, split into {self.num_parts:,}; every turn is trained once")
        if self.num_texts_cut:
            texts = f"{counted(self.num_texts_cut, 'text')} without {_whose(self.num_texts_cut)} beginning"
            lines.append(f"{texts}, as even one exchange was too long")
        return "\n".join(lines)


def _whose(count: int) -> str:
    return "its" if count == 1 else "their"


_CHARACTERS_OF_A_TOKEN = 100  # more than any text has on average


class Fitter:
    """Makes examples fit into `max_length` tokens; counts in `shortened` what it did.

    num_positions: for how many tokens the model has positions; None for any number.
    """

    def __init__(
        self, renderer: ExampleRenderer, max_length: int, overflow: Overflow, num_positions: int | None = None
    ) -> None:
        self.renderer = renderer
        self._of_model = num_positions is not None and num_positions < max_length
        self._max_length = min(max_length, num_positions or max_length)
        self._overflow = overflow
        self.shortened = Shortened()

    @property
    def key(self) -> list[Any]:
        """What decides about an example whose tree is known."""
        return [self._max_length, self._overflow, self._of_model]

    def before_rendering(self, example: Example | Rejection) -> Example | Rejection:
        """The example, or its rejection where it cannot be short enough: tokenising takes 200 bytes a character."""
        if isinstance(example, Rejection) or self._overflow != "reject":
            return example
        num, most = num_characters(example), _CHARACTERS_OF_A_TOKEN * self._max_length
        return example if num <= most else self._rejection(example, f"it has {num:,} characters", "or split the text")

    def fit(self, example: Example | Rejection, tree: Tree | Rejection) -> list[ExampleTree] | Rejection:
        """An example as it is, or what stands for it; the rejection of one that has one or cannot be made to fit."""
        if isinstance(tree, Rejection):
            return tree
        assert not isinstance(example, Rejection)
        if tree.num_tokens <= self._max_length:
            return [(example, tree)]
        if self._overflow == "reject":
            return self._rejection(example, f"it has {tree.num_tokens:,} tokens", "or set data.overflow")
        done = Shortened()
        if isinstance(example, Conversation) and not (self._overflow == "split" and self.renderer.targets == "all"):
            found = self._split(example, done) if self._overflow == "split" else self._truncate(example, done)
        elif isinstance(example, Completion):
            found = self._cut(example, done)
        else:
            found = self._pieces(example, tree)
        if isinstance(found, Rejection):
            return found
        if self._overflow == "split" and len(found) > 1:
            done.num_split, done.num_parts = 1, len(found)
            named = enumerate(found, start=1)
            found = [(r, replace(t, source=f"{t.source} (part {n} of {len(found)})")) for n, (r, t) in named]
        else:
            done.num_truncated = 1
        self.shortened.add(done)
        return found

    def _rejection(self, example: Example, found: str, advice: str) -> Rejection:
        holds, longer = "a sequence holds", "raise data.max_length"
        if self._of_model:
            holds, longer = "the model has learned positions for", "use a model with more"
        sentence = f"{found}, {holds} {self._max_length:,}: {longer}, {advice}"
        return Rejection(example.source, "too_long", sentence)

    # Conversations

    def _truncate(self, example: Conversation, done: Shortened) -> list[ExampleTree] | Rejection:
        """One example: its end, as long as fits."""
        turns = self._turns(example)
        options = _beginnings(example.messages, turns[-1])

        def candidate(option: int) -> ExampleTree | None:
            return self._rendered(_kept(example, (*options[option], turns[-1]), turns))

        option = self._first_that_fits(candidate, len(options))
        found = None if option is None else candidate(option)
        kept = _kept(example, (*options[-1], turns[-1]), turns) if found is None else found[0]
        assert isinstance(kept, Conversation)
        done.num_messages_left_out = turns[-1] + 1 - len(kept.messages)
        done.num_turns_left_out = len(turns) - len(self._turns(kept))
        return self._cut(kept, done) if found is None else [found]

    def _split(self, example: Conversation, done: Shortened) -> list[ExampleTree] | Rejection:
        """Examples that hold each turn once, in order."""
        turns = self._turns(example)
        parts: list[ExampleTree] = []
        num_done = 0
        while num_done < len(turns):
            part = self._part(example, turns, num_done, done)
            if isinstance(part, Rejection):
                return part
            shortened, num_turns = part
            parts.append(shortened)
            num_done += num_turns
        return parts

    def _part(
        self, example: Conversation, turns: Sequence[int], first: int, done: Shortened
    ) -> tuple[ExampleTree, int] | Rejection:
        """The example that begins to train with `turns[first]`, and how many turns it trains."""
        options = _beginnings(example.messages, turns[first])

        def candidate(option: int, num_turns: int = 1) -> ExampleTree | None:
            trained = turns[first : first + num_turns]
            return self._rendered(_kept(example, (*options[option], *range(trained[0], trained[-1] + 1)), trained))

        start = 0 if not first and self._fits(candidate(0)) else None
        for most_tokens in (self._max_length // 2, self._max_length):
            if start is None:
                start = self._first_that_fits(candidate, len(options), most_tokens)
        if start is None:
            cut = self._cut(_kept(example, (*options[-1], turns[first]), turns[first : first + 1]), done)
            return cut if isinstance(cut, Rejection) else (cut[0], 1)
        more = len(turns) - first - 1
        beyond = _first(more, lambda extra: not self._fits(candidate(start, extra + 2)))
        num_turns = 1 + (more if beyond is None else beyond)
        best = self._first_that_fits(lambda option: candidate(option, num_turns), start + 1)
        found = None if best is None else candidate(best, num_turns)
        assert found is not None
        return found, num_turns

    def _turns(self, example: Conversation) -> list[int]:
        """The messages that the renderer trains."""
        turns = trainable_turns(example.messages)
        return turns[-1:] if self.renderer.targets == "last" else turns

    def _rendered(self, example: Example) -> ExampleTree | None:
        tree = self.renderer.render(example)
        return None if isinstance(tree, Rejection) else (example, tree)

    def _fits(self, candidate: ExampleTree | None, most_tokens: int | None = None) -> bool:
        return candidate is not None and candidate[1].num_tokens <= (most_tokens or self._max_length)

    def _first_that_fits(
        self, candidate: Callable[[int], ExampleTree | None], num_options: int, most_tokens: int | None = None
    ) -> int | None:
        return _first(num_options, lambda option: self._fits(candidate(option), most_tokens), near_end=True)

    # Texts

    def _cut(self, example: Conversation | Completion, done: Shortened) -> list[ExampleTree] | Rejection:
        """The example with as much of the end of its user's message, or of its prompt, as fits."""
        text = _text(example)
        short, long = len(text) - len(_end(text, 1)), 0  # where the text may begin: with its last word, at the start
        best = self._rendered(_with_text(example, text[short:])) if text else None
        whole = self._rendered(example)
        if best is None or whole is None or not self._fits(best):
            return self._rejection(example, "its last turn is too long even without what comes before", "or shorten it")
        fewest, most = best[1].num_tokens, whole[1].num_tokens
        for _ in range(_CUT_TRIES):
            share = (self._max_length - fewest) / (most - fewest)
            at = len(text) - len(_end(text, int((short - long) * share) + len(text) - short))
            if not long < at < short:  # the beginning of a word that was tried
                at = len(text) - len(_end(text, len(text) - (long + short) // 2))
            if not long < at < short:
                break
            tried = self._rendered(_with_text(example, text[at:]))
            if tried is not None and self._fits(tried):
                best, short, fewest = tried, at, tried[1].num_tokens
            elif tried is not None:
                long, most = at, tried[1].num_tokens
            else:
                break
        done.num_texts_cut += 1
        return [best]

    def _pieces(self, example: Example, tree: Tree) -> list[ExampleTree] | Rejection:
        """A chain of which every token is trained, cut into pieces."""
        if self._overflow != "split":
            found = f"all its {tree.num_tokens:,} tokens are trained"
            return self._rejection(example, found, "or set data.overflow: split")
        if any(segment.parent != (index - 1 if index else None) for index, segment in enumerate(tree.segments)):
            found = f"it has {tree.num_tokens:,} tokens and its template rewrites earlier turns"
            return self._rejection(example, found, "or set data.overflow: truncate_context")
        pieces: list[list[Segment]] = [[]]
        room = self._max_length
        for segment in tree.segments:
            ids = segment.ids
            while ids:
                if not room:
                    pieces.append([Segment("context", pieces[-1][-1].ids[-1:], None)])
                    room = self._max_length - 1
                piece = pieces[-1]
                parent = len(piece) - 1 if piece else None
                piece.append(segment._replace(ids=ids[:room], parent=parent, text=""))
                room, ids = room - len(piece[-1].ids), ids[room:]
        return [(example, replace(tree, segments=tuple(piece))) for piece in pieces]


def _first(num: int, holds: Callable[[int], bool], near_end: bool = False) -> int | None:
    """The first of `range(num)` for which `holds`, which then holds for all that follow; None if there is none.

    It is looked for in growing steps from the start, or from the end: where each is rendered, the ones near it are the
    short ones, so that the cost does not depend on how long the conversation is.
    """
    low, high, step = 0, num, 1
    while low < high:
        tried = max(low, high - step) if near_end else min(high, low + step) - 1
        found = holds(tried)
        low, high = (low, tried) if found else (tried + 1, high)
        if found != near_end:
            break
        step *= 2
    first = bisect_left(range(num), True, low, high, key=holds)
    return None if first == num else first


def _beginnings(messages: Sequence[Message], turn: int) -> list[tuple[int, ...]]:
    """Which messages may stand before a turn, from all of them to the fewest (module docstring)."""
    systems = [k for k in range(turn) if messages[k].role in ("system", "developer")]
    users = [k for k in range(turn) if messages[k].role == "user"]
    found = [range(turn), *((*systems, *range(user, turn)) for user in users)]
    if users:
        user = users[-1]
        within = [k for k in range(user + 2, turn) if messages[k].role == "assistant"]
        found += [(*systems, user, *range(k, turn)) for k in (*within, turn)]
    return list(dict.fromkeys(tuple(sorted(set(kept))) for kept in found))


def _kept(example: Conversation, kept: Sequence[int], trained: Sequence[int]) -> Conversation:
    """The conversation with these messages only, of which no other turns than `trained` are trained."""
    of_kept = ((k, example.messages[k]) for k in kept)
    messages = tuple(replace(m, train=m.train and k in trained) for k, m in of_kept)
    is_beginning = list(kept) == list(range(len(kept)))
    return replace(example, messages=messages, is_shortened=example.is_shortened or not is_beginning)


def _text(example: Conversation | Completion) -> str:
    """What may be cut: the prompt, or the last user's message where it is one text."""
    if isinstance(example, Completion):
        return example.prompt
    content = next((m.given.get("content") for m in reversed(example.messages) if m.role == "user"), None)
    return content if isinstance(content, str) else ""


def _with_text(example: Conversation | Completion, text: str) -> Example:
    if isinstance(example, Completion):
        return replace(example, prompt=text)
    user = max(k for k, message in enumerate(example.messages) if message.role == "user")
    shorter = replace(example.messages[user], given={**example.messages[user].given, "content": text})
    return replace(example, messages=(*example.messages[:user], shorter, *example.messages[user + 1 :]))


def _end(text: str, num_characters: int) -> str:
    """About the last `num_characters` of a text, from the beginning of a word where one begins near."""
    start = max(0, len(text) - num_characters)
    space = text.rfind(" ", 0, start + 1)
    return text[space + 1 :] if start - space < 40 else text[start:]
