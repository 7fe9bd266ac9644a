"""Text -> token ids word by word, each word tokenised once: three times as fast as asking the tokenizer.

Byte-level tokenizers cut a text into words by a regular expression and tokenise each word on its own, so a table of
words is enough, and most words of a text are in it. The expression is run here by the `regex` module instead of the
tokenizer's engine (Oniguruma). The two differ in a few characters, by the version of Unicode and by what is white
space; so every character is tried in both before a text that holds it is cut here, and texts with characters that are
cut otherwise are left to the tokenizer. So is every text for a tokenizer that is not of this kind. A text of ASCII
alone is cut by Python's own `re`, three times as fast again, by the expression in which `\\p{L}` and its like are
written out; that is tried on all of ASCII in the same way.
"""

import json
import re
from collections.abc import Callable
from itertools import chain
from typing import Any
from unicodedata import is_normalized

import regex

from preceptor.data.examples import Rejected

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel(use_regex=True)
_AROUND = ("{0}", "{0}{0}", "a{0}a", "A{0}A", "a{0}A", "1{0}1", " {0} ", "!{0}!", "a'{0}a", "\n{0}\n", "  {0}", "{0}1a")
_MAX_WORDS = 100_000
_LONGEST_WORD = 64  # characters; longer ones seldom come twice
_SHOWN = 24  # characters behind a boundary that the expression may look at; none in use looks further than one
_LOOKS_BACK = ("(?<", "\\b", "\\B", "\\A", "\\G", "^")
_HUGE = 2**20  # characters of a word, for which a tokenizer takes 150 bytes each, and 2 s


class Words:
    """`ids` for one tokenizer; always None, as the pattern, where it is not of the kind described above."""

    def __init__(self, tokenizer: Any) -> None:
        self.pattern: Any = None
        self._ascii: Callable[[str], list[str]] | None = None
        self._not_ascii: set[str] = set()  # ASCII characters that `re` would cut otherwise
        self._same: set[str] = set()  # characters that both engines treat alike
        self._other: set[str] = set()
        self._looks_back = True
        if not tokenizer.is_fast or any(
            token.normalized or token.lstrip or token.rstrip or token.single_word
            for token in tokenizer.added_tokens_decoder.values()
        ):
            return
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        source = _word_pattern(state["pre_tokenizer"])
        normalizer = (state["normalizer"] or {"type": None})["type"]
        if source is None or normalizer not in (None, "NFC") or state["model"]["type"] != "BPE":
            return
        self._composed = normalizer == "NFC"
        self._looks_back = any(sign in source.replace("[^", "") for sign in _LOOKS_BACK)
        self._pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
        self._ids_of = _Table(tokenizer.backend_tokenizer.model).__getitem__
        if not state["model"]["dropout"]:
            self.pattern = _compiled(source)
        in_ascii = None if self.pattern is None else _ascii_pattern(source)
        if in_ascii is not None:
            self._ascii = in_ascii.findall
            self._not_ascii = {chr(code) for code in range(128) if not self._alike(in_ascii, chr(code))}

    def ids(self, text: str) -> tuple[int, ...] | None:
        """The ids of a text without added tokens, as the tokenizer's; None if it has to be asked."""
        words = self._words(text)
        if words is None or len("".join(words)) != len(text):
            return None
        return tuple(chain.from_iterable(map(self._ids_of, words)))

    def part_at(self, before: str, after: str) -> bool:
        """Whether the words of before + after are known to be those of `before` and then those of `after`.

        Words are cut out from left to right. So it is enough that a word ends there although more text follows, and
        that the expression does not look back. What it may look ahead at, white space and digits, is not decided here.
        """
        shown = after[:_SHOWN]
        if not before:
            return True
        if self._looks_back or len(after) < _SHOWN or shown[0].isspace() or before[-1].isalnum():
            return False
        words, both = self._words(before), self._words(before + shown)
        return words is not None and both is not None and both[: len(words)] == words

    def _words(self, text: str) -> list[str] | None:
        if self._ascii is not None and text.isascii() and (not self._not_ascii or self._not_ascii.isdisjoint(text)):
            return self._ascii(text)
        if self.pattern is None or not (self._same.issuperset(text) or self._learn(text)):
            return None
        if self._composed and not is_normalized("NFC", text):
            return None
        words: list[str] = self.pattern.findall(text)
        return words

    def _learn(self, text: str) -> bool:
        """Try the characters of a text that were not met before; whether all of its characters are the same in both."""
        for character in set(text) - self._same - self._other:
            (self._same if self._alike(self.pattern, character) else self._other).add(character)
        return self._other.isdisjoint(text)

    def _alike(self, pattern: Any, character: str) -> bool:
        """Whether the expression cuts texts with this character as the tokenizer does."""
        for sample in [form.format(character) for form in _AROUND]:
            if self._composed and not is_normalized("NFC", sample):
                continue  # such texts are not cut here
            cut = [span for _, span in self._pre_tokenizer.pre_tokenize_str(sample)]
            if [match.span() for match in pattern.finditer(sample)] != cut:
                return False
        return True


class _Table(dict[str, tuple[int, ...]]):
    """word -> its ids; asks the tokenizer's model for those that it lacks.

    Equal ids are one object: what is read most is then near together in memory, and trees take less of it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model
        self._numbers: dict[int, int] = {}

    def __missing__(self, word: str) -> tuple[int, ...]:
        if len(word) > _HUGE:
            raise Rejected("text_too_large", f"one word of {len(word):,} characters")
        spelled = "".join([_SPELLED[byte] for byte in word.encode()])
        one = self._numbers.setdefault
        ids = tuple([one(token.id, token.id) for token in self._model.tokenize(spelled)])
        if len(word) <= _LONGEST_WORD:
            if len(self) >= _MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _byte_level() -> list[str]:
    """The character by which byte-level tokenizers spell each byte: itself if it can be seen, else one from 256 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    spelled = dict.fromkeys(seen) | {byte: 256 + number for number, byte in enumerate(unseen)}
    return [chr(spelled[byte] or byte) for byte in range(256)]


_SPELLED = _byte_level()


def _word_pattern(state: dict[str, Any] | None) -> str | None:
    """The expression by which a pre-tokenizer cuts out words, if that is all it does."""
    if state is None:
        return None
    parts: list[dict[str, Any]] = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return None
    if len(parts) == 1:
        return _GPT2 if parts[0]["use_regex"] else None
    split = parts[0]
    if len(parts) > 2 or parts[1]["use_regex"] or split["type"] != "Split":
        return None
    whole = (split["behavior"], split["invert"]) in (("Isolated", False), ("Removed", True))
    source: str | None = split["pattern"].get("Regex")
    return source if whole else None


def _compiled(source: str) -> Any:
    """None where the two engines read an expression differently (`{1,3}+`), or it would not give whole words."""
    try:
        pattern = regex.compile(source)
    except regex.error:
        return None
    return None if regex.search(r"\{[\d,]+\}\+", source) or pattern.groups else pattern


_IN_ASCII = {
    "L": "A-Za-z",
    "Lu": "A-Z",
    "Ll": "a-z",
    "N": "0-9",
    "Nd": "0-9",
    "P": r"!-#%-*,-/:;?@\[-\]_{}",
    "S": r"$+<->^`|~",
    **dict.fromkeys(("Lt", "Lm", "Lo", "M", "Mn", "Han"), ""),
}


def _ascii_pattern(source: str) -> re.Pattern[str] | None:
    """The expression with Unicode's classes as the characters of ASCII in them; None where that cannot be written."""
    parts: list[str] = []
    inside = False  # brackets
    for part in re.findall(r"\\[pP]\{\^?\w+\}|\\.|.", source, re.DOTALL):
        if part[:2] in (r"\p", r"\P"):
            characters = _IN_ASCII.get(part[3:-1])
            if characters is None or (part[1] == "P" and (inside or not characters)):
                return None
            if not inside:
                bar = "^" if part[1] == "P" else ""
                characters = f"[{bar}{characters}]" if characters else "(?!)"
            parts.append(characters)
            continue
        if part in ("[", "]"):
            if inside and part == "[":
                return None  # a set of sets, or a bracket that one engine reads otherwise
            inside = part == "["
        parts.append(part)
    text = "".join(parts)
    if "[]" in text or "[^]" in text:
        return None
    try:
        return re.compile(text, re.ASCII)
    except re.error:
        return None
