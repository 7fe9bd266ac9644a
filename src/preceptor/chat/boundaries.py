"""Between which two texts no token can cross, whatever follows.

An answer is tokenised as a target on its own, and again as part of the next turn's context, behind the header of its
message (`assistant\\n`). If the tokenizer splits there anyway the second time gives the same tokens and can be saved.
Byte-level tokenizers split a text into words by a pattern, from left to right, and never join two words. So if a word
ends at the boundary although more text follows, and the pattern does not look back, the words after it are those of
the second text alone.
"""

import json
from typing import Any
from unicodedata import is_normalized

from preceptor.chat.words import Words

_LOOKS_BACK = ("(?<", "\\b", "\\B", "\\A", "\\G", "^")
_SHOWN = 24  # characters after the boundary that the pattern may look at; none in use looks further than one
_KEPT_BEHAVIORS = ("Isolated", "Removed")


class Boundaries:
    """Answers for one tokenizer; always "no" where it splits words in a way that is not known to be local."""

    def __init__(self, tokenizer: Any, words: Words) -> None:
        self._pre_tokenizer = None
        self._words = words
        self._composed = False
        if not tokenizer.is_fast or any(token.normalized for token in tokenizer.added_tokens_decoder.values()):
            return
        backend = tokenizer.backend_tokenizer
        normalizer = json.loads(backend.to_str())["normalizer"]
        self._composed = normalizer is not None
        if backend.pre_tokenizer is None or (self._composed and normalizer["type"] != "NFC"):
            return
        if _is_local(json.loads(backend.pre_tokenizer.__getstate__())):
            self._pre_tokenizer = backend.pre_tokenizer

    def between(self, before: str, after: str) -> bool:
        """Whether the tokens of before + after are those of `before` and then those of `after`."""
        if self._pre_tokenizer is None or not before:
            return self._pre_tokenizer is not None
        shown = after[:_SHOWN]
        # Patterns look ahead over white space and over digits; and the end of a short text is no end of what may come.
        if len(after) <= _SHOWN or shown[0].isspace() or before[-1].isalnum():
            return False
        if self._composed and not is_normalized("NFC", before + after):
            return False
        ends = self._words.ends(before + shown)
        if ends is None:
            ends = [end for _, (_, end) in self._pre_tokenizer.pre_tokenize_str(before + shown)]
        return len(before) in ends


def _is_local(state: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer splits from left to right by a pattern that does not look back, and adds nothing."""
    kind: str = state["type"]
    if kind == "Sequence":
        return all(_is_local(part) for part in state["pretokenizers"])
    if kind == "ByteLevel":
        return state["add_prefix_space"] is False
    if kind == "Split":
        pattern = state["pattern"].get("Regex")
        if pattern is None:
            return state["behavior"] in _KEPT_BEHAVIORS
        looks_back = any(sign in pattern.replace("[^", "") for sign in _LOOKS_BACK)
        return state["behavior"] in _KEPT_BEHAVIORS and not (state["invert"] or looks_back)
    return kind == "Digits"
