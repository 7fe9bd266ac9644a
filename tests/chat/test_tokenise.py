"""Tokenising by chunks is tokenising the whole."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, GPTNeoXTokenizer, PreTrainedTokenizerFast

from preceptor.chat.tokenise import Path, Tokeniser, any_of
from preceptor.chat.words import Words
from tiny import tiny_tokenizer

SPECIAL = ["<eos>", "<|a|>", "<|a|>b", "<|"]
GPT4 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = ["the start of a message\n\nand the end 123", "a user and an assistant's message"] * 8


def build(kind):
    tokenizer = Tokenizer(models.BPE(unk_token="<eos>" if kind.startswith("metaspace") else None))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind.startswith("metaspace"):
        scheme = kind.split("-")[1]
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    elif kind == "split":
        split = pre_tokenizers.Split(Regex(GPT4), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
        tokenizer.decoder = decoders.ByteLevel()
    if kind == "normalised":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet(), *" abcé\n▁"})
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    if kind == "greedy":
        wrapped.add_tokens([AddedToken("<g>", lstrip=True, normalized=False, special=True)], special_tokens=True)
    return wrapped


KINDS = ("byte level", "split", "prefix", "normalised", "greedy", "metaspace-first", "metaspace-always")
TOKENIZERS = {kind: build(kind) for kind in KINDS}
PIECES = [*SPECIAL, "<", "|a", "|>", "b", " ", "\n", "\n\n", "the", " message", "'s", "12", "e\u0301", "é", "<g>", "🙂"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(KINDS), st.lists(st.tuples(TEXT, st.none() | TEXT), min_size=1, max_size=6))
def test_chunks_give_what_the_tokenizer_gives(kind, texts):
    tokenizer = TOKENIZERS[kind]
    path = Path(Tokeniser(tokenizer))
    text, before = "", ()
    for more, follows in texts:
        text = text[: len(text) - len(text) // 3] + more  # a prompt that extends, or rewrites the end of, the last
        num_shared = path.read(text)
        assert tuple(path.ids) == tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert tuple(path.ids[:num_shared]) == before[:num_shared]
        before = tuple(path.ids)
        if follows is not None:
            before += path.continuation(follows)
            text += follows


def test_only_tokens_that_swallow_blank_space_are_not_cut_at():
    assert [kind for kind in KINDS if not Tokeniser(TOKENIZERS[kind]).in_chunks] == ["greedy"]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(KINDS), TEXT, TEXT)
def test_a_continuation_spells_its_text_and_crosses_no_boundary(kind, before, text):
    tokenizer = TOKENIZERS[kind]
    tokeniser = Tokeniser(tokenizer)
    before = "the end<|a|>b\n" + before
    path = Path(tokeniser)
    path.read(before)
    context, ids = list(path.ids), list(path.continuation(text))
    whole = tokenizer(before + text, add_special_tokens=False)["input_ids"]
    if whole[: len(context)] == context:
        assert ids == whole[len(context) :]
    elif kind == "greedy" and "<g>" in text:  # the token takes white space that the context holds already
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    elif kind.startswith("metaspace") and 0 in whole:  # of unknown characters, several are one token
        assert tokenizer.decode(ids).strip("<eos>") in tokenizer.decode(whole)
    elif not any(match.start() < len(before) < match.end() for match in any_of(SPECIAL).finditer(before + text)):
        assert "".join(tokenizer.convert_ids_to_tokens(context + ids)) == "".join(
            tokenizer.convert_ids_to_tokens(whole)
        )


LONG = "the message of a user, and of an assistant too"


def test_characters_without_a_token_are_noticed():
    assert Tokeniser(TOKENIZERS["byte level"]).spells_all([], "🙂")  # a byte-level tokenizer knows all: not asked back
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "<e>": 2}, []))
    silent = Tokeniser(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>"))
    assert silent.spells_all(silent.whole("ab"), "ab")
    assert not silent.spells_all(silent.whole("a🙂b"), "a🙂b")


def test_an_eos_that_is_named_as_the_unknown_token_is_known():
    """As GPT2Tokenizer and GPTNeoXTokenizer do by default."""
    model = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    for kind in (GPT2Tokenizer, GPTNeoXTokenizer):
        tokenizer = kind(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
        tokeniser, text = Tokeniser(tokenizer), "the end 🙂<|endoftext|>"
        ids = tokeniser.whole(text)
        assert tokenizer.unk_token_id == tokenizer.eos_token_id == ids[-1]
        assert tokeniser.spells_all(ids, text)


@pytest.mark.parametrize("kind", ["metaspace-first", "metaspace-always"])
def test_an_unknown_token_that_is_written_is_noticed_also_where_it_is_the_eos(kind):
    tokenizer = build(kind)
    tokenizer.unk_token = "<eos>"
    tokeniser = Tokeniser(tokenizer)
    assert tokeniser.spells_all(tokeniser.whole("the end"), "the end")
    assert not tokeniser.spells_all(tokeniser.whole("the \U0010fffd end"), "the \U0010fffd end")


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(["byte level", "split", "normalised"]),
    st.sampled_from(["assistant\n", "a: ", "\n\n", ">", "x", "1", "", "it'"]),
    st.sampled_from(["", " ", "\n", "s ", "1", "é", "\u0301", "<", "'s", "."]),
)
def test_where_no_token_crosses_the_two_are_tokenised_apart(kind, before, start):
    tokenizer = TOKENIZERS[kind]

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if Words(tokenizer).part_at(before, start + LONG):
        assert ids(before + start + LONG) == ids(before) + ids(start + LONG)


@pytest.mark.parametrize(
    ("pattern", "before", "after"),
    [
        (r"\d{1,3}(?=(?:\d{3})*(?!\d))|\D+", "1", "2" * 31),  # digits in threes from the right
        (GPT4, "a\n", " " * 30 + "\nx"),  # a run of white space that ends in a newline is one word
        (r"(?<=\n)\w|\w+|\W", "a\n", "b" * 30),  # looks back
    ],
)
def test_patterns_that_look_far_are_not_trusted(pattern, before, after):
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    assert not Words(PreTrainedTokenizerFast(tokenizer_object=backend)).part_at(before, after)


def test_boundaries_are_known_where_they_matter():
    for kind in ("byte level", "split", "normalised"):
        assert Words(TOKENIZERS[kind]).part_at("assistant\n", LONG)
    for kind in ("prefix", "metaspace-first"):
        assert not Words(TOKENIZERS[kind]).part_at("assistant\n", LONG)


def test_history_is_not_tokenised_twice():
    for kind in ("byte level", "normalised"):
        tokeniser = Tokeniser(TOKENIZERS[kind])
        prompt = "<|a|>user\nthe start<eos>\n<|a|>assistant\n"
        path = Path(tokeniser)
        path.read(prompt)
        path.continuation(LONG + "<eos>")
        tokenised, ids = [], tokeniser.words.ids
        tokeniser.words.ids = lambda text, tokenised=tokenised, ids=ids: tokenised.append(text) or ids(text)
        path.read(prompt + LONG + "<eos>\n<|a|>user\nthe end<eos>\n<|a|>assistant\n")
        assert tokenised == ["user\nthe end"]


def test_special_tokens_of_messages_are_read_as_text():
    tokenizer = tiny_tokenizer(special_tokens=("<eos>", "<|a|>"))
    runs = [("<|a|>", False), ("x<|a|>y<", True), ("eos>", False), ("<eos>", False)]
    ids = Tokeniser(tokenizer).plain(runs, any_of(["<|a|>", "<eos>"]))
    assert (ids[0], ids[-1]) == (1, 0) and not {0, 1} & set(ids[1:-1])
    assert tokenizer.decode(ids) == "<|a|>x<|a|>y<eos><eos>"


@pytest.mark.parametrize("words", [["<|a|>", "<|a|>b", "<|", "x.y", "[INST]", "[/INST]"], ["a"], []])
def test_the_pattern_finds_the_leftmost_and_longest(words):
    pattern = any_of(words)
    text = "".join(words) + "<|a<|a|>xxy" + "".join(reversed(words))
    by_length = sorted(words, key=len, reverse=True)
    expected, at = [], 0
    while at < len(text):
        word = next((w for w in by_length if text.startswith(w, at)), None)
        expected += [word] if word else []
        at += len(word) if word else 1
    assert pattern.findall(text) == expected
