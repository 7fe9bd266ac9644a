"""Chat formats: tokens found or added, eos and pad, and what ends a turn."""

import shutil

import pytest
from tokenizers import AddedToken

from preceptor.chat.format import add_tokens, align_tokenizer, load_chat_format, load_tokenizer, turn_ends
from preceptor.chat.template import Template, load_template
from preceptor.config import Data, Model, Source
from preceptor.errors import ModelError
from tiny import tiny_tokenizer

CHAT = ("<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"


def test_added_tokens_are_special_and_of_one_id():
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    added = add_tokens(tokenizer, [*CHAT, "<|endoftext|>", CHAT[0]])
    ids = tokenizer.encode("a<|im_start|>b<|im_end|>", add_special_tokens=False)
    assert added == {CHAT[0]: ids[1], CHAT[1]: ids[3]} == {CHAT[0]: size, CHAT[1]: size + 1}
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    assert add_tokens(tokenizer, CHAT) == {}


def test_a_plain_word_of_the_vocabulary_becomes_special_and_keeps_its_id():
    tokenizer = tiny_tokenizer()
    word = max((w for w in tokenizer.get_vocab() if w.isalpha()), key=len)
    word_id = tokenizer.get_vocab()[word]
    assert len(word) > 2
    assert add_tokens(tokenizer, [word]) == {}
    assert word_id in tokenizer.added_tokens_decoder
    assert tokenizer.added_tokens_decoder[word_id].special


def aligned(tokenizer, text=TEMPLATE):
    added = add_tokens(tokenizer, CHAT)
    align_tokenizer(tokenizer, Template("test", {"default": text}, {}, CHAT), "<|im_end|>")
    return added


def test_the_earlier_eos_becomes_the_pad_token_and_none_is_added():
    tokenizer = tiny_tokenizer()
    assert set(aligned(tokenizer)) == set(CHAT)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.chat_template == TEMPLATE


def test_a_tokenizer_without_a_token_to_spare_stays_without_a_pad_token():
    """Training needs none, and a new one would need a row of its own."""
    tokenizer = tiny_tokenizer(special_tokens=CHAT[::-1])
    size = len(tokenizer)
    assert tokenizer.eos_token == "<|im_end|>" and aligned(tokenizer) == {}
    assert tokenizer.pad_token is None and len(tokenizer) == size


def test_a_pad_token_that_is_the_eos_is_replaced():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)], special_tokens=True)
    tokenizer.pad_token = "<|im_end|>"
    aligned(tokenizer)
    assert tokenizer.pad_token != tokenizer.eos_token


def test_an_own_pad_token_is_kept():
    tokenizer = tiny_tokenizer(special_tokens=("<|endoftext|>", "<nothing>"))
    tokenizer.pad_token = "<nothing>"
    added = aligned(tokenizer)
    assert tokenizer.pad_token == "<nothing>"
    assert set(added) == set(CHAT)


@pytest.mark.parametrize(
    ("specials", "pad"),
    [
        (("<|reserved_0|>", "<|finetune_right_pad_id|>"), "<|finetune_right_pad_id|>"),
        (("<|fim_middle|>", "<|reserved_0|>"), "<|reserved_0|>"),
        (("<|fim_middle|>",), "<|endoftext|>"),
        (("<|reserved_in_use|>", "<|reserved_0|>"), "<|reserved_0|>"),
    ],
)
def test_a_reserved_token_becomes_the_pad_token(specials, pad):
    tokenizer = tiny_tokenizer(special_tokens=("<|endoftext|>", *specials))
    aligned(tokenizer, TEMPLATE + "<|reserved_in_use|>")
    assert tokenizer.pad_token == pad


def test_a_stop_token_that_is_none_is_refused():
    with pytest.raises(ModelError, match="<nope>"):
        align_tokenizer(tiny_tokenizer(), Template("test", {"default": TEMPLATE}, {}), "<nope>")


@pytest.mark.parametrize(
    ("after", "end"),
    [
        ("<|im_end|>\n", "<|im_end|>"),
        ("\n<|im_end|>", "<|im_end|>"),
        ("\n", "<|endoftext|>"),
        (" END", "<|endoftext|>"),
    ],
)
def test_the_token_after_an_answer_ends_a_turn_also_where_the_eos_is_another(tmp_path, after, end):
    """Base models often carry a chat template whose end of turn is not their eos."""
    tokenizer = tiny_tokenizer(special_tokens=("<|endoftext|>", "<|im_end|>"))
    file = tmp_path / "t.jinja"
    file.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '" + after.replace("\n", "\\n") + "' }}{% endfor %}"
    )
    assert turn_ends(load_template(str(file), tokenizer), tokenizer).tokens[0] == end


def test_a_folder_without_tokenizer(base_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((base_folder / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="owner/name: no such folder, and no"):
        load_tokenizer("owner/name")


def test_a_generation_config_that_cannot_be_read_is_an_error_and_not_taken_for_none(base_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base_folder, folder)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json: cannot be read"):
        load_chat_format(Model(path=str(folder)), Data(train=[Source(path="-")], chat_template="chatml"))
