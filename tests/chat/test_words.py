"""Word by word gives the tokenizer's own ids, for every kind of text; what cannot be cut so is left to it."""

import random
import re

import pytest
import regex
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from preceptor.chat.words import Words, _ascii_pattern

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECES = (
    *("Hello", "it's", "WE'LL", "don'ſ", "x1", "1234567", " ", "  ", "\n", "\n\n ", "\t", "\r\n", "...", "!?", "a_b"),
    *(
        "été",
        "e\u0301te\u0301",
        "Straße",
        "ИВАН",
        "日本語",
        "한국어",
        "ǅ",
        "½",
        "Ⅷ",
        "٣",
        "🙂",
        "👩‍👩‍👧",
        "\u200b",
        "\u00a0",
    ),
    *("\x1c", "\x1f", "\x85", "\u2028", "\u3000", "\u180e", "\ufeff", "\U0001e900", "\U00016ea0", "\u1c89", "\x00"),
)


def make(pattern: str | None, normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts(300, seed=1), trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def texts(num: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(num)]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["as it is", "NFC"])
@pytest.mark.parametrize("pattern", [None, QWEN, LLAMA3, GPT4O], ids=["GPT-2", "Qwen", "Llama 3", "GPT-4o"])
def test_gives_the_ids_of_the_tokenizer(pattern: str | None, normalizer: normalizers.Normalizer | None) -> None:
    tokenizer = make(pattern, normalizer)
    words = Words(tokenizer)
    given = [(text, words.ids(text)) for text in texts(1500, seed=2)]
    for text, ids in given:
        assert ids is None or list(ids) == tokenizer(text, add_special_tokens=False)["input_ids"], text
    # Some of the characters above are cut otherwise by the two engines, or fall under NFC; those texts are left alone.
    assert sum(ids is not None for _, ids in given) > 300
    plain = "Hello, it's a plain text of 1234 words.\n\n日本語 été!  The end. "
    assert words.ids(plain) == tuple(tokenizer(plain, add_special_tokens=False)["input_ids"])


def test_leaves_characters_that_the_engines_treat_differently_to_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words(make(QWEN))
    # Such characters come and go with versions of the engines (letters of a new Unicode); here one is made up.
    monkeypatch.setattr(words, "pattern", regex.compile(QWEN.replace(r"|\p{N}|", "|[0-9½]|")))
    assert words.ids("the end of ½") is not None
    assert words.ids("the end of ٣") is None
    assert words.ids("the end of é") is not None


def test_leaves_characters_of_ascii_that_are_cut_differently_to_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = make(QWEN)("the end of 9", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("preceptor.chat.words._ascii_pattern", lambda _: re.compile(r" ?[a-z]+|[0-8]| ?9|\s"))
    words = Words(make(QWEN))
    assert words._not_ascii >= {"9"}
    assert words.ids("the end of 9") == tuple(asked)


@pytest.mark.parametrize("pattern", [QWEN, LLAMA3, GPT4O])
def test_ascii_is_cut_by_the_faster_engine(pattern: str) -> None:
    words = Words(make(pattern))
    assert words._ascii is not None and words._not_ascii == set()


def test_expressions_that_cannot_be_written_for_ascii() -> None:
    for source in (r"\p{Greek}+", r"[\P{L}]", "[[a]]", r"(?<name"):
        assert _ascii_pattern(source) is None
    found = _ascii_pattern(r"[^\p{L}]|\p{Lu}\p{Ll}+|\P{N}|\p{M}")
    assert found is not None and found.pattern == "[^A-Za-z]|[A-Z][a-z]+|[^0-9]|(?!)"


def test_leaves_other_kinds_of_tokenizers_alone() -> None:
    lowercase, grouping, possessive = make(QWEN, normalizers.Lowercase()), make("(a|b)|."), make(r"\p{N}{1,3}+|.|\n")
    with_prefix, swallowing, dropping = make(None), make(QWEN), make(QWEN)
    with_prefix.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    swallowing.add_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    dropping.backend_tokenizer.model.dropout = 0.5
    for tokenizer in (lowercase, grouping, possessive, with_prefix, swallowing, dropping):
        assert Words(tokenizer).ids("abc") is None
    assert Words(make(QWEN)).ids("abc") is not None


def test_text_that_the_pattern_does_not_cover_is_left_to_the_tokenizer() -> None:
    assert Words(make(r"\p{L}+")).ids("abc 12") is None
