"""Text -> token ids, exactly as the tokenizer, at a cost that grows with what is new.

A fast tokenizer first cuts a text at its added tokens (`<|im_end|>` ...) and then treats each stretch between them on
its own. So a text may be cut before any added token, the chunks tokenised one by one, and a chunk that was met before
(all earlier turns of a conversation) not at all. Every chunk but the first keeps the added token that it starts with,
so that tokenizers which treat the start of a text differently (SentencePiece's leading space) see no start.

    <|im_start|>user\\nHi | <|im_end|>\\n | <|im_start|>assistant\\n

Where this cannot be relied on (a slow tokenizer; added tokens that swallow white space to their left or stand between
word boundaries) the whole text is tokenised. The first texts of a run, and then less than one in a hundred, are
tokenised both ways; if the two ever differ, chunks are given up for good.
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from preceptor.chat.boundaries import Boundaries
from preceptor.chat.words import Words

Ids = tuple[int, ...]

_CHECKED_TEXTS = 16
_CHECK_EVERY = 150  # times the characters of a text
_CACHE_CHARACTERS = 4_000_000


class Context(NamedTuple):
    """The ids of a prompt; the first `num_shared` are those of the prompt that was tokenised before it."""

    ids: Sequence[int]
    num_shared: int


class Tokeniser:
    """Tokenises prompts (`context`) and what follows them (`continuation`) with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self._cuts, self._longest = _cut_pattern(tokenizer.added_tokens_decoder.values())
        self._chunked = self._backend is not None and self._longest > 0
        self._words = Words(tokenizer)
        self._boundaries = Boundaries(tokenizer, self._words)
        self._unknown = tokenizer.unk_token_id
        self._cache: dict[str, Ids] = {}
        self._cached_characters = 0
        self._crossed: dict[tuple[str, str], bool] = {}
        self._num_texts = 0
        self._unchecked_characters = 0
        self._text = ""  # the last context, where its chunks start, and how many ids stand before each
        self._starts: list[int] = [0]
        self._num_before: list[int] = [0]
        self._ids: list[int] = []
        self._start_is_special = self._treats_start_differently()
        self._drops_characters = any(
            tokenizer.unk_token_id not in self.whole(rare) and rare not in tokenizer.decode(self.whole(rare))
            for rare in ("\U0001f9ea", "\u0e01", "\u4e8c")
        )

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

    def whole(self, text: str) -> Ids:
        """The tokenizer's own answer."""
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def context(self, text: str) -> Context:
        """The ids of a text that stands at the beginning, as `tokenizer(text, add_special_tokens=False)`.

        The result is valid until the next call.
        """
        if not self._chunked:
            return Context(self.whole(text), 0)
        keep = self._num_kept(text)
        num_shared = self._num_before[keep]
        new = [match.start() for match in self._cuts.finditer(text, self._starts[keep])]
        starts = [self._starts[keep], *(start for start in new if start > self._starts[keep]), len(text)]
        del self._starts[keep:], self._num_before[keep:], self._ids[num_shared:]
        for start, end in pairwise(starts):
            self._starts.append(start)
            self._num_before.append(len(self._ids))
            self._ids += self._chunk(text[start:end])
        self._text = text
        self._num_texts += 1
        self._unchecked_characters += len(text) - starts[0]
        if self._num_texts <= _CHECKED_TEXTS or self._unchecked_characters > _CHECK_EVERY * len(text):
            self._unchecked_characters = 0
            expected = self.whole(text)
            if tuple(self._ids) != expected:
                self._chunked = False
                return Context(expected, 0)
        return Context(self._ids, num_shared)

    def _num_kept(self, text: str) -> int:
        """The last chunk of the last text up to whose start this text is the same, and is cut the same way."""
        last = self._text
        num_same = len(last)
        if not text.startswith(last):
            low = 0  # the first `low` characters are the same, the first `num_same` are not
            while num_same - low > 1:
                middle = (low + num_same) // 2
                if text.startswith(last[low:middle], low):
                    low = middle
                else:
                    num_same = middle
            num_same = low
        # What follows the longest token that may start there cannot change that one does.
        return max(bisect_right(self._starts, num_same - self._longest) - 1, 0)

    def continuation(self, text: str, after: str) -> Ids:
        """The ids of a text that follows `after`, tokenised on its own: no token crosses the boundary.

        For tokenizers that put a space before the start of every text, that space is not there: the text is then
        tokenised behind the end of `after`, or behind another character where a token would cross.
        """
        if self._start_is_special or not self._chunked:
            return self._continued(text, after) if self._start_is_special else self.whole(text)
        match = self._cuts.search(text, 1)
        head = text[: match.start()] if match else text
        ids = self._chunk(head)
        if after is self._text:
            before = after[self._starts[-1] :]
            token = self._cuts.match(before)
            if self._boundaries.between(before[token.end() :] if token else before, head):
                self._remember(before + head, self._chunk(before) + ids)  # as the next turn's context will have it
        return (*ids, *self._several(text[len(head) :]))

    def _continued(self, text: str, after: str) -> Ids:
        anchor = after[self._starts[-1] :] if after is self._text else after
        for before in (anchor, "\n", "a", "."):
            before_ids, both = self.whole(before), self.whole(before + text)
            if both[: len(before_ids)] == before_ids and self._spells(both[len(before_ids) :], text):
                return both[len(before_ids) :]
        return self.whole(text)

    def _spells(self, ids: Ids, text: str) -> bool:
        return self._tokenizer.decode([*self.whole("a"), *ids]).endswith(text) if ids else not text

    def _several(self, text: str) -> Ids:
        """As `whole`, for a text that starts with an added token."""
        starts = [match.start() for match in self._cuts.finditer(text)]
        return tuple(id for start, end in pairwise([*starts, len(text)]) for id in self._chunk(text[start:end]))

    def _chunk(self, text: str) -> Ids:
        ids = self._cache.get(text)
        if ids is None:
            ids = self._new_chunk(text)
            self._remember(text, ids)
        return ids

    def _new_chunk(self, text: str) -> Ids:
        assert self._backend is not None
        token = self._cuts.match(text)
        if token is None:
            ids = self._words.ids(text)
        else:  # an added token is one id, whatever follows
            ids = self._words.ids(text[token.end() :])
            ids = None if ids is None else (self._backend.token_to_id(token.group()), *ids)
        if ids is None:
            self._backend.no_truncation()
            self._backend.no_padding()
            ids = tuple(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        return ids

    def _remember(self, text: str, ids: Ids) -> None:
        if self._cached_characters > _CACHE_CHARACTERS:
            self._cache.clear()
            self._cached_characters = 0
        self._cache[text] = ids
        self._cached_characters += len(text)

    def plain(self, runs: Sequence[tuple[str, bool]], special: re.Pattern[str]) -> Ids:
        """The ids of a text in which special tokens act as such only outside of message text.

        runs: pieces of the text, each with whether it came from a message. Stretches between acting tokens are
        tokenised with special tokens read as ordinary characters.
        """
        text = "".join(piece for piece, _ in runs)
        spans, at = [], 0
        for piece, from_message in runs:
            if from_message:
                spans.append((at, at + len(piece)))
            at += len(piece)
        ids: list[int] = []
        at = 0
        for match in special.finditer(text):
            if any(start < match.end() and match.start() < end for start, end in spans):
                continue
            ids += self._stretch(text[at : match.start()])
            ids.append(self._tokenizer.convert_tokens_to_ids(match.group()))
            at = match.end()
        return (*ids, *self._stretch(text[at:]))

    def _stretch(self, text: str) -> Ids:
        if not text:
            return ()
        before = "\n" if self._start_is_special else ""
        num_before = len(self.whole(before)) if before else 0
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return tuple(self._tokenizer(before + text, **options)["input_ids"][num_before:])

    def _treats_start_differently(self) -> bool:
        """Whether a text on its own is tokenised otherwise than behind a newline or an added token."""
        added = list(self._tokenizer.added_tokens_decoder.values())
        befores = ["\n", *(token.content for token in added[:1] if self._chunked)]
        return any(
            self.whole(before + sample)[len(self.whole(before)) :] != self.whole(sample)
            for before in befores
            for sample in ("a", "é")
        )

    # Word by word, for stencils ---------------------------------------------------------------------------------------

    @property
    def goes_by_words(self) -> bool:
        """Whether a text's ids are those of its added tokens and of the words between, one after the other."""
        exact = self._chunked and not (self._start_is_special or self._drops_characters)
        return exact and self._words.known and self._boundaries.are_local

    def added_tokens(self, text: str) -> list[tuple[int, int, int]]:
        """(start, end, id) of each added token in a text."""
        assert self._backend is not None
        return [(*found.span(), self._backend.token_to_id(found.group())) for found in self._cuts.finditer(text)]

    def has_added_token(self, text: str) -> bool:
        return self._cuts.search(text) is not None

    def may_cross(self, before: str, after: str) -> bool:
        """Whether an added token may begin in `before`, or end in `after`, for some text between the two."""
        near = before[-self._longest :], after[: self._longest]
        if near not in self._crossed:
            tokens = [token.content for token in self._tokenizer.added_tokens_decoder.values()]
            self._crossed[near] = any(
                near[0].endswith(token[:cut]) or near[1].startswith(token[cut:])
                for token in tokens
                for cut in range(1, len(token))
            )
        return self._crossed[near]

    def cut(self, text: str) -> list[str] | None:
        """The words of a text without added tokens; None if the tokenizer has to be asked."""
        return self._words.cut(text)

    def add_words(self, ids: list[int], words: Iterable[str]) -> None:
        ids.extend(self._words.ids_of(words))

    def has_unknown(self, ids: Sequence[int]) -> bool:
        return self._unknown is not None and self._unknown in ids


def _cut_pattern(tokens: Iterable[Any]) -> tuple[re.Pattern[str], int]:
    """(a pattern that finds the added tokens before which a text may be cut, the length of the longest added token).

    All tokens that are matched before normalisation take part in the search, leftmost and longest first, as in the
    tokenizer. Tokens that swallow white space to their left, or must stand between word boundaries, make cutting
    unsafe near them: with any of those present, nothing is cut.
    """
    found = [token for token in tokens if token.content and not token.normalized]
    if not found or any(token.lstrip or token.single_word for token in found):
        return any_of(()), 0
    return any_of(token.content for token in found), max(len(token.content) for token in found)


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
