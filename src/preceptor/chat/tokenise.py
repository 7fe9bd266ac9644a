"""Text -> token ids, exactly as the tokenizer, at a cost that grows with what is new.

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
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from preceptor.chat.growing_tree import shared_length
from preceptor.chat.words import Boundaries, Words
from preceptor.data.rejections import Rejected

Ids = tuple[int, ...]

_CACHED_IDS = 100_000  # few enough to stay in the processor's cache
_HUGE = 2**22  # characters in one call of the tokenizer, which takes 150 bytes for each
_ANCHORS = ("a", ".", "\n", "1", ")")  # behind which a text is tokenised where a token would cross from what is before


class Tokeniser:
    """One tokenizer. `path` tokenises the prompts of a conversation and what follows each; chunks: see above."""

    def __init__(self, tokenizer: Any, chunks: bool = True) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self._added, self._longest = _added_tokens(tokenizer.added_tokens_decoder.values())
        self.in_chunks = chunks and self._backend is not None and self._longest > 0
        if self.in_chunks:
            self._words = Words(tokenizer)
            self._boundaries = Boundaries(tokenizer, self._words)
        self.cuts_words = self.in_chunks and self._words.known
        self._prefixes_tokens = self._puts_space_behind_tokens()
        self._unknown = tokenizer.unk_token_id
        self._lstrip = {token.content for token in tokenizer.added_tokens_decoder.values() if token.lstrip}
        self._rstrip = {token.content for token in tokenizer.added_tokens_decoder.values() if token.rstrip}
        self._single = {token.content: (number,) for number, token in tokenizer.added_tokens_decoder.items()} | {"": ()}
        self._is_whole: dict[str, bool] = {}
        self._cache: dict[tuple[str, str], Ids] = {}
        self._num_cached = 0
        self._drops_characters = any(
            tokenizer.unk_token_id not in self.whole(rare) and rare not in tokenizer.decode(self.whole(rare))
            for rare in ("\U0001f9ea", "\u0e01", "\u4e8c")
        )

    def path(self) -> "Path":
        """For the prompts of one conversation, which begin alike."""
        return Path(self)

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

    def cut(self, text: str) -> list[str]:
        """The added tokens of a text with what stands before, between and behind them, by turns."""
        return self._added.split(text)

    def num_safe(self, num_same: int) -> int:
        """Of two texts that begin alike, up to where they are cut alike.

        What follows the longest token that may start at a place cannot change that one does.
        """
        return num_same - self._longest

    def head(self, text: str) -> Ids:
        """The ids of a text without added tokens that stands at the beginning."""
        return self.chunk("", text) if text else ()

    def chunk(self, token: str, text: str) -> Ids:
        """The ids of an added token and of a text without added tokens behind it."""
        if not text:
            return self._single[token]
        key = token, text
        ids = self._cache.get(key)
        if ids is None:
            words = self._words.ids(text)
            ids = self._asked(token + text) if words is None else self._single[token] + words
            if self._num_cached > _CACHED_IDS:
                self._cache.clear()
                self._num_cached = 0
            self._cache[key] = ids
            self._num_cached += len(ids)
        return ids

    def is_whole(self, token: str) -> bool:
        """Whether an added token stays one, whatever stands around it: none of the others holds it."""
        if token not in self._is_whole:
            self._is_whole[token] = sum(token in other for other in self._single) == 1
        return self._is_whole[token]

    def parts_at(self, before: str, head: str, after: str) -> bool:
        """Whether the ids of before + after are those of both; `before` holds no added token, `after` begins by `head`
        and then one."""
        near = self.cut(before + after[: self._longest])[0]
        return len(near) >= len(before) and (not head or self._boundaries.between(before, head))

    def _asked(self, text: str) -> Ids:
        assert self._backend is not None
        _require_size(text)
        self._backend.no_truncation()
        self._backend.no_padding()
        return tuple(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    # Otherwise -------------------------------------------------------------------------------------------------------

    def behind(self, before: str, before_ids: Sequence[int], text: str) -> Ids:
        """The ids of a text that stands behind another, as in the ids of both: its first token is not spelled as at
        the start of a text. Where a token crosses from `before` into the text, it is tokenised behind a character
        from which none crosses. Raises Rejected where every token crosses."""
        return _rest(self.whole, before, before_ids, text)

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
        spans, at = [], 0
        for piece, from_message in runs:
            if from_message:
                spans.append((at, at + len(piece)))
            at += len(piece)
        found, token, at = [], "", 0
        for match in special.finditer(text):
            if any(start < match.end() and match.start() < end for start, end in spans):
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

    def _puts_space_behind_tokens(self) -> bool:
        """Whether a text behind an added token is tokenised as at the start of a text."""
        added = [(number, token.content) for number, token in self._tokenizer.added_tokens_decoder.items()]
        return any(self.whole(token + "a") == (number, *self.whole("a")) for number, token in added[:1])


def _require_size(text: str) -> None:
    if len(text) > _HUGE:
        raise Rejected("text_too_large", f"a text of {len(text):,} characters")


def _rest(ids_of: Callable[[str], Ids], before: str, before_ids: Sequence[int], text: str) -> Ids:
    """What follows the ids of `before` in those of before + text; of another character, where a token crosses."""
    if before:
        both = ids_of(before + text)
        if both[: len(before_ids)] == tuple(before_ids):
            return both[len(before_ids) :]
    for anchor in _ANCHORS:
        known, both = ids_of(anchor), ids_of(anchor + text)
        if known and both[: len(known)] == known:
            return both[len(known) :]
    raise Rejected("unknown_token", f"the tokens of {text[:20]!r} cannot be told from those before it")


class Said(NamedTuple):
    """What followed a prompt; head: up to its first added token, last: the added token with which it ends."""

    text: str
    ids: Ids
    head: str
    last: str


class Path:
    """The prompts of one conversation, read one after the other, and what follows each.

    ids: those of the text that was read last, as `tokenizer(text, add_special_tokens=False)`.
    """

    def __init__(self, tokeniser: Tokeniser) -> None:
        self._tokeniser = tokeniser
        self.ids: list[int] = []
        self._text = ""
        self._starts = [0]  # of the chunks of the text: its beginning, and each added token
        self._num_before = [0]  # ids before each of them
        self._last = ""  # what the text holds behind its last added token
        self._said: Said | None = None

    def read(self, text: str) -> int:
        """Tokenise the next prompt; how many ids of the last one, and of what followed it, are the first of its own."""
        tokeniser = self._tokeniser
        if not tokeniser.in_chunks:
            self.ids, self._text = list(tokeniser.whole(text)), text
            return 0
        said, self._said = self._said, None
        if said is not None and self._goes_on(text, said):
            self.ids += said.ids
            self._starts.append(len(self._text) + len(said.text) - len(said.last))
            self._num_before.append(len(self.ids) - 1)
            keep = len(self._starts) - 1
        else:
            keep = self._num_kept(text)
        num_shared, at = self._num_before[keep], self._starts[keep]
        keep = max(keep, 1)  # the beginning stays
        del self._starts[keep:], self._num_before[keep:], self.ids[num_shared:]
        head, *rest = tokeniser.cut(text[at:])
        self.ids += tokeniser.head(head)
        at += len(head)
        starts, num_before, ids, chunk = self._starts, self._num_before, self.ids, tokeniser.chunk
        for token, plain in zip(rest[::2], rest[1::2], strict=True):
            starts.append(at)
            num_before.append(len(ids))
            ids += chunk(token, plain)
            at += len(token) + len(plain)
        self._text, self._last = text, rest[-1] if rest else head
        return num_shared

    def _goes_on(self, text: str, said: Said) -> bool:
        """Whether a text is the last one, what was said, and more, with the ids of both and of what follows."""
        if not (text.startswith(said.text, len(self._text)) and text.startswith(self._text)):
            return False
        return self._tokeniser.parts_at(self._last, said.head, said.text) and self._tokeniser.is_whole(said.last)

    def _num_kept(self, text: str) -> int:
        """The last chunk of the last text up to whose start this text is the same, and is cut the same way."""
        num_same = len(self._text) if text.startswith(self._text) else shared_length(self._text, text)
        return max(bisect_right(self._starts, self._tokeniser.num_safe(num_same)) - 1, 0)

    def continuation(self, text: str) -> Ids:
        """The ids of a text that follows the one read last; no token crosses the boundary."""
        tokeniser = self._tokeniser
        if not (tokeniser.cuts_words and (not self._last or self._last[-1] == "\n")):  # else a word may go on
            last = slice(self._num_before[-1], None)
            return tokeniser.behind(self._text[self._starts[-1] :], self.ids[last], text)
        head, *rest = tokeniser.cut(text)
        found = [tokeniser.head(head), *map(tokeniser.chunk, rest[::2], rest[1::2])]
        ids = tuple(chain.from_iterable(found))
        if rest and not rest[-1]:
            self._said = Said(text, ids, head, rest[-2])
        return ids


def _added_tokens(tokens: Iterable[Any]) -> tuple[re.Pattern[str], int]:
    """(a pattern that finds the added tokens before which a text may be cut, the length of the longest added token).

    All tokens that are matched before normalisation take part in the search, leftmost and longest first, as in the
    tokenizer. Tokens that swallow white space to their left, or must stand between word boundaries, make cutting
    unsafe near them: with any of those present, nothing is cut.
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
