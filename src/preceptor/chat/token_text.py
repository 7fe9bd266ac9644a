"""Tokens as text: which characters each token of a sequence spells, and which tokens are special.

A character may take several tokens (bytes of an emoji), and some tokenizers drop a space when a token is decoded alone;
`spans` therefore measures tokens against the text that they are known to spell, and gives up rather than be off by one.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

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
