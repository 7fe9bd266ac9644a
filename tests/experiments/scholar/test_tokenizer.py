"""The scholar's tokenizer is a base model's, loses nothing, and spells numbers digit by digit."""

import pytest
from transformers import AutoConfig, AutoTokenizer

from scholar.facts import load_facts
from scholar.library import library
from scholar.tokenizer import END_OF_TEXT, VOCABULARY_SIZE, learn_tokenizer, model_config

FACTS = load_facts()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scholar")
    tokenizer = learn_tokenizer(library(FACTS[::30]))
    tokenizer.save_pretrained(folder)
    model_config(tokenizer.eos_token_id).save_pretrained(folder)
    return folder


def test_decoding_gives_the_text_back(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("The code of é is 233, not 65.", "🐙 & 日本 \n\n  two  spaces\t", "<|im_start|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_and_punctuation_marks_stand_alone(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = [tokenizer.decode(token) for token in tokenizer("In 1984, a .tar.gz?!")["input_ids"]]
    assert [piece.strip() for piece in pieces if piece.strip().isdigit()] == ["1", "9", "8", "4"]
    assert "?" in pieces and "!" in pieces


def test_it_is_a_base_model(folder):
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    assert tokenizer.chat_template is None
    assert tokenizer.eos_token == END_OF_TEXT and tokenizer.eos_token_id == config.eos_token_id
    assert [str(token) for token in tokenizer.all_special_tokens] == [END_OF_TEXT]
    assert len(tokenizer) <= VOCABULARY_SIZE == config.vocab_size
