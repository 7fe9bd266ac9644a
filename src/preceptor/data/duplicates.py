"""Examples that say the same: exactly, and nearly (MinHash, Broder 1997; banding, Leskovec et al., ch. 3).

*Exact*: the same messages (roles, texts, reasoning, tool calls, weights of what is trained), tools and template
arguments, where a run of white space counts as one space. *Near*: the texts of all messages but system prompts, each as
the set of its sequences of 5 words (lower case, no punctuation; a character of Chinese, Japanese or Thai is a word, and
so is each sign of arithmetic or code, currency sign and emoji), have a Jaccard similarity of at least `NEAR` = 0.8:
four fifths of the sequences that occur in either occur in both. Then about one word in 45 differs, or up to a fifth of
the text is missing.

*Prompt*: what the users say in a conversation, or the prompt of a completion, is exactly the same, whatever the
answers and the system prompt; white space and case do not count.

An example is reduced to two digests (16 bytes each), its place (12 bytes) and a signature of 64 MinHash values (128
bytes): 172 MB for a million examples, whatever their length, and about as much again while they are compared. The 64
hash functions are drawn from a fixed seed. The share of equal values estimates the similarity s with a standard
deviation of sqrt(s (1 - s) / 64): 0.05 at 0.8. Examples that agree in all 4 values of one of 16 bands are compared,
which 99.98 % of pairs at s = 0.8 do. In a band an example is compared with the first that has its values and with the
one before it, so time is linear in the number of examples but for sorting: 4 s for a million.

Legend: N examples, K = 64 hash functions, B = 16 bands, W word sequences of an example.
"""

import hashlib
import json
import re
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from unicodedata import normalize

import numpy as np
import regex

from preceptor.data.examples import Completion, Conversation, Document, Example

NEAR = 0.8

_WORDS = 5
_HASHES = 64
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# A word holds its marks: vowels of Hindi, harakat of Arabic. The first pattern is the second on ASCII, 3 times as fast.
_ASCII_WORD = re.compile(r"\w+|[-#$%&*+/<=>@\\^|~]", re.ASCII)
_WORD = regex.compile(
    rf"(?V1)[[\p{{L}}\p{{N}}\p{{M}}_]--[{_UNSPACED}\uFE00-\uFE0F\U000E0100-\U000E01EF]]++|"  # no variation selectors
    rf"[{_UNSPACED}\p{{Sm}}\p{{Sc}}\p{{So}}\U0001F3FB-\U0001F3FF#%\&*/@\\^\-]"  # with tones of skin
)
_PLACE = re.compile(r"(.*\D)(\d+)", re.DOTALL)
_PIECE_SEQUENCES = 1024  # at a time, so that a long example takes no more memory than a short one: 0.5 MB
_PIECE_PAIRS = 1 << 16

_rng = np.random.default_rng(1997)
_FACTOR_K = _rng.integers(0, 2**64, _HASHES, dtype=np.uint64) | np.uint64(1)
_OFFSET_K = _rng.integers(0, 2**64, _HASHES, dtype=np.uint64)
_WORD_FACTORS = _rng.integers(0, 2**64, _WORDS, dtype=np.uint64) | np.uint64(1)


class Fingerprints:
    """Digests and signatures of examples, and where they stand, in the order in which they were added."""

    def __init__(self) -> None:
        self._digests, self._prompt_digests, self._signatures = bytearray(), bytearray(), bytearray()
        # "train.jsonl:12" and "train.parquet:row 12" are kept as an index of what is before the number, and the number.
        self._tables: dict[str, int] = {}
        self._table_N, self._number_N = array("i"), array("q")

    def __len__(self) -> int:
        return len(self._table_N)

    def add(self, example: Example) -> None:
        self._digests += digest_of(example)
        self._prompt_digests += prompt_digest_of(example)
        self._signatures += signature_of(" ".join(_said(example))).tobytes()
        match = _PLACE.fullmatch(example.source)
        table, number = (match[1], int(match[2])) if match else (example.source, -1)
        self._table_N.append(self._tables.setdefault(table, len(self._tables)))
        self._number_N.append(number)

    def source(self, index: int) -> str:
        """Where example `index` stands."""
        number = self._number_N[index]
        return list(self._tables)[self._table_N[index]] + (str(number) if number >= 0 else "")

    @property
    def digest_N(self) -> np.ndarray:
        return np.frombuffer(self._digests, "S16")

    @property
    def prompt_digest_N(self) -> np.ndarray:
        """Digests of the prompts; b"" where there is none."""
        return np.frombuffer(self._prompt_digests, "S16")

    @property
    def signature_NK(self) -> np.ndarray:
        return np.frombuffer(self._signatures, np.uint16).reshape(-1, _HASHES)


@dataclass(frozen=True, slots=True)
class Matches:
    """For each example one that it repeats; -1 where none.

    exact_N: exactly. near_N: nearly but not exactly. prompt_N: neither, but its prompt (not in `repeats`).
    """

    exact_N: np.ndarray
    near_N: np.ndarray
    prompt_N: np.ndarray


def repeats(examples: Fingerprints) -> Matches:
    """Which examples repeat an earlier one. An exact repeat is not compared any further."""
    exact_N = _first_equal(examples.digest_N)
    distinct = np.flatnonzero(exact_N < 0)
    found = _near(examples.signature_NK[distinct], num_reference=None)
    near_N = np.full(len(examples), -1, np.int64)
    near_N[distinct[found >= 0]] = distinct[found[found >= 0]]
    return Matches(exact_N, near_N, np.full(len(examples), -1, np.int64))


def leaks(examples: Fingerprints, held_out: Fingerprints) -> Matches:
    """Which examples repeat one of `held_out`: examples to train on that occur in the evaluation set."""
    num = len(held_out)

    def equal(held_out_N: np.ndarray, record_N: np.ndarray) -> np.ndarray:
        first = _first_equal(np.concatenate([held_out_N, record_N]))[num:]
        return np.where(first < num, first, -1)  # not an earlier one of the examples themselves

    exact_N = equal(held_out.digest_N, examples.digest_N)
    near_N = _near(np.concatenate([held_out.signature_NK, examples.signature_NK]), num_reference=num)[num:]
    near_N = np.where(exact_N >= 0, -1, near_N)
    prompt_N = equal(held_out.prompt_digest_N, examples.prompt_digest_N)
    other = (exact_N < 0) & (near_N < 0) & (examples.prompt_digest_N != b"")
    return Matches(exact_N, near_N, np.where(other, prompt_N, -1))


def _first_equal(digest_N: np.ndarray) -> np.ndarray:
    """For each example the first with the same digest; -1 if it is the first itself."""
    _, first, place_N = np.unique(digest_N, return_index=True, return_inverse=True)
    result: np.ndarray = first[place_N]
    result[result == np.arange(len(result))] = -1
    return result


def _near(signature_NK: np.ndarray, num_reference: int | None) -> np.ndarray:
    """For each example an earlier one that agrees in `NEAR` of the values; -1 where none is found.

    num_reference: only matches of the other examples with the first so many are looked for; None: of all with all.
    """
    num = len(signature_NK)
    places, result = np.arange(num), np.full(num, -1, np.int64)
    for keys_N in np.ascontiguousarray(signature_NK).view(np.uint64).T:
        order = np.argsort(keys_N, kind="stable")
        is_start = np.r_[True, keys_N[order[1:]] != keys_N[order[:-1]]][:num]
        starts = np.maximum.accumulate(np.where(is_start, places, 0))  # of each place's group of equals
        before = places - 1
        if num_reference is not None:  # the last reference up to here
            before = np.maximum.accumulate(np.where(order < num_reference, places, -1))
        for earlier in (starts, before):
            pairs = (earlier >= starts) & (earlier != places) & (result[order] < 0)
            if num_reference is not None:
                pairs &= (order >= num_reference) & (order[earlier] < num_reference)
            _settle(signature_NK, order[pairs], order[earlier[pairs]], result)
    return result


def _settle(signature_NK: np.ndarray, examples: np.ndarray, candidates: np.ndarray, result: np.ndarray) -> None:
    """Write the candidates that are near enough into `result`."""
    for start in range(0, len(examples), _PIECE_PAIRS):
        these, those = examples[start : start + _PIECE_PAIRS], candidates[start : start + _PIECE_PAIRS]
        near = (signature_NK[these] == signature_NK[those]).mean(axis=1) >= NEAR
        result[these[near]] = those[near]


def digest_of(example: Example) -> bytes:
    """16 bytes that are the same for examples that say, and train, exactly the same."""
    if isinstance(example, Conversation):
        messages = [
            (m.role, _spaced(m.content), _spaced(m.reasoning_content), list(m.tool_calls), m.train and float(m.weight))
            for m in example.messages
        ]
        said: object = [messages, list(example.tools or ()), dict(example.template_kwargs)]
    else:
        said = [type(example).__name__, *map(_spaced, _said(example))]
    text = json.dumps(said, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def prompt_digest_of(example: Example) -> bytes:
    """16 bytes that are the same for examples with the same prompt; zeros where there is none."""
    if isinstance(example, Conversation):
        asked = [m.content for m in example.messages if m.role == "user"]
    else:
        asked = [example.prompt] if isinstance(example, Completion) else []
    asked = [_spaced(text).lower() for text in asked]
    if not any(asked):
        return bytes(16)
    return hashlib.blake2b("\0".join(asked).encode(), digest_size=16).digest()


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _said(example: Example) -> Iterator[str]:
    """The texts of an example, without system prompts: these are often long, and the same for a whole file."""
    if isinstance(example, Completion):
        yield from (example.prompt, example.completion)
    elif isinstance(example, Document):
        yield example.text
    else:
        for message in example.messages:
            if message.role not in ("system", "developer"):
                yield from (message.reasoning_content, message.content)
                if message.tool_calls:
                    yield json.dumps(list(message.tool_calls), ensure_ascii=False, default=str)


def signature_of(text: str) -> np.ndarray:
    """K values, each 16 bits of the least hash that one of K functions gives to a sequence of words."""
    words = _words(text.lower()) or [text.strip()]
    word_hashes = np.array([zlib.crc32(word.encode()) for word in words], np.uint64)
    num_sequences = max(1, len(words) - _WORDS + 1)
    sequences_W = np.zeros(num_sequences, np.uint64)
    for place, factor in enumerate(_WORD_FACTORS[: len(words)]):
        sequences_W += word_hashes[place : place + num_sequences] * factor
    sequences_W = _mixed(sequences_W)
    least_K = np.full(_HASHES, 2**64 - 1, np.uint64)
    for start in range(0, num_sequences, _PIECE_SEQUENCES):
        hashes_WK = sequences_W[start : start + _PIECE_SEQUENCES, None] * _FACTOR_K + _OFFSET_K
        np.minimum(least_K, hashes_WK.min(axis=0), out=least_K)
    # without mixing, they depend on the 16 low bits of the sequence alone: short examples agree in all K or in none
    return (_mixed(least_K) & np.uint64(0xFFFF)).astype(np.uint16)


def _words(text: str) -> list[str]:
    """An accent may be one character with its letter, or one of its own: NFC makes both the same."""
    found: list[str] = _ASCII_WORD.findall(text) if text.isascii() else _WORD.findall(normalize("NFC", text))
    return found


def _mixed(x: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of x (the finaliser of MurmurHash3)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
    mixed: np.ndarray = x ^ (x >> np.uint64(33))
    return mixed
