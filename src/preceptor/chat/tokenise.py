"""Text -> token ids, exactly as the tokenizer, at a cost that grows with what is new; token ids -> their texts.

A fast tokenizer first cuts a text at its added tokens (`<|im_end|>` ...) and then treats each stretch between them on
its own. So a text may be cut before any added token, the chunks tokenised one by one, and a chunk that was met before
(all earlier turns of a conversation) not at all. Every chunk but the first keeps the added token that it starts with,
so that tokenizers which treat the start of a text differently (SentencePiece's leading space) see no start.

    <|im_start|>user\\nHi | <|im_end|>\\n | <|im_start|>assistant\\n

Where this cannot be relied on (a slow tokenizer; added tokens that swallow white space to their left or stand between
word boundaries) the whole text is tokenised. That chunks and words (`words.py`) give what the tokenizer gives is made
sure of by how they are cut, and is compared for a sample of the examples only (`render.py`): to ask the tokenizer for
every text would take six times as long.
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, NamedTuple

from preceptor.chat.origins import shared_length
from preceptor.chat.words import Words
from preceptor.data.examples import Rejected

Ids = tuple[int, ...]
SpecialTokens = Literal["reject", "plain", "allow"]

_CACHED_IDS = 100_000  # few enough to stay in the processor's cache
_HUGE = 2**22  # characters in one call of the tokenizer, which takes 150 bytes for each
_ANCHORS = ("a", ".", "\n", "1", ")")  # behind which a text is tokenised where a token would cross from what is before
_RARE = ("\U0001f9ea", "\u0e01", "\u4e8c")  # characters that a vocabulary without bytes may lack
_RARER = ("\U0010fffd", "\U00013000", "\ua500", "\ua66e", "\u16a0")  # and these, if its normaliser keeps them


class Tokeniser:
    """One tokenizer; chunks: see above. added: a pattern for its added tokens. longest: characters of such a token."""

    def __init__(self, tokenizer: Any, chunks: bool = True) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self.added, self.longest = _added_tokens(tokenizer.added_tokens_decoder.values())
        self.in_chunks = chunks and self._backend is not None and self.longest > 0
        if self.in_chunks:
            self.words = Words(tokenizer)
        self.cuts_words = self.in_chunks and self.words.pattern is not None
        added = [(token, number) for number, token in tokenizer.added_tokens_decoder.items()]
        self._lstrip = {token.content for token, _ in added if token.lstrip}
        self._rstrip = {token.content for token, _ in added if token.rstrip}
        self._single: dict[str, Ids] = {token.content: (number,) for token, number in added} | {"": ()}
        # Whether a text behind an added token is tokenised as at the start of a text.
        self._prefixes_tokens = any(
            self.whole(f"{token.content}a") == (number, *self.whole("a")) for token, number in added[:1]
        )
        self._cache: dict[tuple[str, str], Ids] = {}
        self._num_cached = 0
        rare = {text: self.whole(text) for text in (*_RARE, *_RARER)}
        unknown = tokenizer.unk_token_id
        # GPT-2 names its eos as the unknown token, but has bytes for all texts: then it stands only for itself.
        self._unknown = unknown if any(unknown in ids for ids in rare.values()) else None
        self._drops_characters = any(
            unknown not in rare[text] and text not in tokenizer.decode(rare[text]) for text in _RARE
        )

    def whole(self, text: str) -> Ids:
        """The tokenizer's own answer. Raises Rejected for a text of which it would take too much memory."""
        _require_size(text)
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def spells_all(self, ids: Sequence[int], text: str, num_known: int = 0) -> bool:
        """Whether no character of the text is without a token; of the first `num_known` ids that is known.

        A tokenizer that has a token for what it does not know says so; one that has not drops it, and is asked back.
        """
        if self._unknown is not None and self._unknown in (ids[num_known:] if num_known else ids):
            return False
        if not self._drops_characters:
            return True
        back = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return sorted("".join(back.split())) == sorted("".join(unicodedata.normalize("NFKC", text).split()))

    # Chunks ----------------------------------------------------------------------------------------------------------

    def chunk(self, token: str, text: str) -> Ids:
        """The ids of an added token and of a text without added tokens behind it."""
        if not text:
            return self._single[token]
        ids = self._cache.get((token, text))
        if ids is None:
            words = self.words.ids(text)
            ids = self._asked(token + text) if words is None else self._single[token] + words
            if token:  # what stands at the beginning seldom comes twice
                self.keep(token, text, ids)
        return ids

    def keep(self, token: str, text: str, ids: Ids) -> None:
        """What `chunk` gives from now on."""
        if self._num_cached > _CACHED_IDS:
            self._cache.clear()
            self._num_cached = 0
        self._cache[token, text] = ids
        self._num_cached += len(ids)

    def _asked(self, text: str) -> Ids:
        assert self._backend is not None
        _require_size(text)
        self._backend.encode_special_tokens = False  # as it is not once `_as_text` was asked
        self._backend.no_truncation()
        self._backend.no_padding()
        return tuple(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    # Otherwise -------------------------------------------------------------------------------------------------------

    def plain(
        self, runs: Sequence[tuple[str, bool]], special: re.Pattern[str], before: Sequence[tuple[str, bool]] = ()
    ) -> Ids:
        """The ids of a text in which special tokens act as such only outside of message text.

        runs: pieces of the text, each with whether it came from a message; before: of the text that it follows.
        Stretches between acting tokens are tokenised with special tokens read as ordinary characters.
        """
        ids: list[int] = []
        acting, last = self._stretches(before, special)[-1]
        (_, first), *others = self._stretches(runs, special)
        if last and first:
            ids += _rest(self._as_text, last, self._as_text(last), first)
        else:
            ids += self._stretch(acting, first)
        for token, stretch in others:
            ids.append(self._tokenizer.convert_tokens_to_ids(token))
            ids += self._stretch(token, stretch)
        return tuple(ids)

    def _stretch(self, token: str, text: str) -> Ids:
        """The ids of a text behind an acting token, or at the beginning."""
        if not text or not token or self._prefixes_tokens:
            return self._as_text(text)
        return _rest(self._as_text, "", (), text)

    def _stretches(self, runs: Sequence[tuple[str, bool]], special: re.Pattern[str]) -> list[tuple[str, str]]:
        """Each special token that acts, and the text up to the next; "" for what stands before the first."""
        text = "".join(piece for piece, _ in runs)
        of_messages = "".join(("x" if from_message else " ") * len(piece) for piece, from_message in runs)
        found, token, at = [], "", 0
        for match in special.finditer(text):
            if "x" in of_messages[match.start() : match.end()]:
                continue
            found.append((token, self._stripped(token, text[at : match.start()], match.group())))
            token, at = match.group(), match.end()
        return [*found, (token, self._stripped(token, text[at:], ""))]

    def _stripped(self, before: str, text: str, after: str) -> str:
        """A text without the white space that the tokens around it take."""
        text = text.lstrip() if before in self._rstrip else text
        return text.rstrip() if after in self._lstrip else text

    def _as_text(self, text: str) -> Ids:
        _require_size(text)
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return tuple(self._tokenizer(text, **options)["input_ids"]) if text else ()


def _require_size(text: str) -> None:
    if len(text) > _HUGE:
        raise Rejected("text_too_large", f"a text of {len(text):,} characters")


def _rest(ids_of: Callable[[str], Ids], before: str, before_ids: Sequence[int], text: str) -> Ids:
    """Ids of `text` as they follow `before`, whose ids are `before_ids`.

    If a token would cross the border, the text is tokenised behind one of _ANCHORS instead.
    """
    if before:
        both = ids_of(before + text)
        if both[: len(before_ids)] == tuple(before_ids):
            return both[len(before_ids) :]
    for anchor in _ANCHORS:
        known, both = ids_of(anchor), ids_of(anchor + text)
        if known and both[: len(known)] == known:
            return both[len(known) :]
    raise Rejected("unknown_token", f"the tokens of {text[:20]!r} cannot be told from those before it")


@dataclass(eq=False, slots=True)
class Path:
    """The prompts of one conversation, which begin alike, read one after the other, and what follows each.

    ids: those of the text that was read last, as `tokenizer(text, add_special_tokens=False)`.
    """

    tokeniser: Tokeniser
    ids: list[int] = field(default_factory=list)
    _text: str = ""
    _starts: list[int] = field(default_factory=lambda: [0])  # of the chunks of the text: beginning, each added token
    _num_before: list[int] = field(default_factory=lambda: [0])  # ids before each of them
    _last: str = ""  # what the text holds behind its last added token
    _said: tuple[str, Ids] = "", ()  # what follows the text up to its own first added token, and the ids of that

    def read(self, text: str) -> int:
        """Tokenise the next prompt; how many ids of the last one are the first of its own."""
        tokeniser = self.tokeniser
        if self._said[0]:
            self._keep_said()
        if not tokeniser.in_chunks:
            self.ids, self._text = list(tokeniser.whole(text)), text
            return 0
        num_same = len(self._text) if text.startswith(self._text) else shared_length(self._text, text)
        # The last chunk up to whose start the texts are cut alike: what follows the longest token that may start at a
        # place cannot change that one does.
        keep = max(bisect_right(self._starts, num_same - tokeniser.longest) - 1, 0)
        num_shared, at = self._num_before[keep], self._starts[keep]
        keep = max(keep, 1)  # the beginning stays
        del self._starts[keep:], self._num_before[keep:], self.ids[num_shared:]
        head, *rest = tokeniser.added.split(text[at:])
        self.ids += tokeniser.chunk("", head)
        at += len(head)
        starts, num_before, ids, chunk = self._starts, self._num_before, self.ids, tokeniser.chunk
        for token, plain in zip(rest[::2], rest[1::2], strict=True):
            starts.append(at)
            num_before.append(len(ids))
            ids += chunk(token, plain)
            at += len(token) + len(plain)
        self._text, self._last = text, rest[-1] if rest else head
        return num_shared

    def continuation(self, text: str) -> Ids:
        """The ids of a text that follows the one read last; no token crosses the boundary.

        As in the ids of both: its first token is not spelled as at the start of a text. Raises Rejected where the
        boundary cannot be found.
        """
        tokeniser = self.tokeniser
        if not (tokeniser.cuts_words and (not self._last or self._last[-1] == "\n")):  # else a word may go on
            before, before_ids = self._text[self._starts[-1] :], self.ids[self._num_before[-1] :]
            return _rest(tokeniser.whole, before, before_ids, text)
        head, *rest = tokeniser.added.split(text)
        ids = tokeniser.chunk("", head)
        if rest:
            self._said = head, ids
        return tuple(chain(ids, *map(tokeniser.chunk, rest[::2], rest[1::2])))

    def _keep_said(self) -> None:
        """Before the next prompt is read, which need not be tokenised again up to what was said behind the last."""
        (head, ids), self._said = self._said, ("", ())
        if self.tokeniser.words.part_at(self._last, head):
            token = self._text[self._starts[-1] : len(self._text) - len(self._last)]
            self.tokeniser.keep(token, self._last + head, (*self.ids[self._num_before[-1] :], *ids))


def _added_tokens(tokens: Iterable[Any]) -> tuple[re.Pattern[str], int]:
    """(a pattern that finds the added tokens before which a text may be cut, the length of the longest added token).

    All tokens that are matched before normalisation take part, leftmost and longest first, as in the tokenizer.
    """
    found = [token for token in tokens if token.content and not token.normalized]
    if not found or any(token.lstrip or token.single_word for token in found):
        return any_of(()), 0
    pattern = any_of(token.content for token in found).pattern
    return re.compile(f"({pattern})"), max(len(token.content) for token in found)


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern for the leftmost, and there the longest, word: a trie, since a vocabulary may hold thousands."""
    trie: dict[str, Any] = {}
    for word in words:
        node = trie
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}
    return re.compile(_trie_pattern(trie) if trie else r"(?!)")


def _trie_pattern(node: dict[str, Any]) -> str:
    """The pattern of what may follow in a trie; greedy, so that longer words win."""
    text = ""
    while len(node) == 1 and "" not in node:  # a run without a choice needs neither group nor recursion
        character, node = next(iter(node.items()))
        text += re.escape(character)
    branches = [re.escape(character) + _trie_pattern(inner) for character, inner in node.items() if character]
    if not branches:
        return text
    return text + f"(?:{'|'.join(branches)})" + ("?" if "" in node else "")


# Tokens as text -------------------------------------------------------------------------------------------------------

# A character may take several tokens (bytes of an emoji), and some tokenizers drop a space when a token is decoded
# alone; `spans` therefore measures tokens against the text that they are known to spell, and gives up rather than be
# off by one.

_LONGEST_GROUP = 8  # tokens that may share one character; UTF-8 needs no more than four


class Piece(NamedTuple):
    """Some tokens and their text. More than one token only where they share a character."""

    ids: tuple[int, ...]
    text: str
    special: bool


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that act rather than spell: those with a role (eos ...) and all others that were added as special."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def bos_ids(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before a plain text: its bos token, or nothing."""
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else ()


def pieces_of(ids: Sequence[int], tokenizer: Any, specials: Collection[int] | None = None) -> Iterator[Piece]:
    """The tokens with their text as the tokenizer decodes it; tokens that share a character come together.

    specials: `special_ids(tokenizer)`, where that is known; to find it out takes a while.
    """
    specials = special_ids(tokenizer) if specials is None else specials
    waiting: list[int] = []
    for token in ids:
        if token in specials:
            if waiting:
                yield Piece(tuple(waiting), decode(waiting, tokenizer), False)
                waiting = []
            yield Piece((token,), str(tokenizer.convert_ids_to_tokens(token)), True)
            continue
        waiting.append(token)
        text = decode(waiting, tokenizer)
        if not text.endswith("�") or len(waiting) > _LONGEST_GROUP:
            yield Piece(tuple(waiting), text, False)
            waiting = []
    if waiting:
        yield Piece(tuple(waiting), decode(waiting, tokenizer), False)


def spans(
    ids: Sequence[int], text: str, tokenizer: Any, specials: Collection[int] | None = None
) -> list[tuple[int, int]] | None:
    """For each token the characters of `text` that it spells, as (start, end); None if the tokens do not spell it.

    Tokens that share a character have the same span. A space that is lost when a token is decoded alone is given back.
    """
    found: list[tuple[int, int]] = []
    at = 0
    for piece in pieces_of(ids, tokenizer, specials):
        lost_space = not text.startswith(piece.text, at) or (not piece.text and text.startswith(" ", at))
        end = at + len(piece.text) + lost_space
        if text[at:end] != " " * lost_space + piece.text:
            return None
        found += [(at, end)] * len(piece.ids)
        at = end
    return found if at == len(text) else None


def decode(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
