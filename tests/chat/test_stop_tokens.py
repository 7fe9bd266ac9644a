"""The tokens that end a turn: confirmed by two conversations, or by the model's own files."""

import pytest
import template_table as tt
from tokenizers import AddedToken

from conftest import conversations
from preceptor import config
from preceptor.chat.format import load_chat_format
from preceptor.chat.stop_tokens import find_stop_tokens
from preceptor.chat.template import load_template
from tiny import tiny_tokenizer

ENTRIES = tt.read_entries() if (tt.TEMPLATES / "index.json").is_file() else []
FOREIGN = "<|end_of_base|>"
# gpt-oss writes <|end|> in history and samples <|return|>, which it knows as its eos only
OTHERS = {"openai-gpt-oss-120b": {"<|end|>"}}
SPECIAL = ("<eos>", "<|start|>", "<|system|>", "<|user|>", "<|bot|>", "<|end|>", "<|stop|>", "<|part|>")

BODY = "{% for m in messages %}<|start|><|{{ {'user': 'user', 'assistant': 'bot', 'tool': 'system'}[m.role] }}|>"
CALLS = "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
PLAIN = BODY + CALLS + "<|end|>{% endfor %}"


def found(text, known=(), eos="<eos>"):
    tokenizer = tiny_tokenizer(special_tokens=SPECIAL)
    tokenizer.chat_template, tokenizer.eos_token = text, eos
    return find_stop_tokens(load_template("tokenizer", tokenizer), tokenizer, known)


@pytest.mark.skipif(not ENTRIES, reason=f"the stock templates are not at {tt.TEMPLATES}")
def test_a_base_with_another_eos_stops_where_the_template_ends_a_turn():
    for entry in ENTRIES:
        tokenizer = tt.tokenizer_for(entry)
        right = find_stop_tokens(load_template("tokenizer", tokenizer), tokenizer)
        assert not right.doubts, entry.name
        tokenizer.add_tokens([AddedToken(FOREIGN, special=True, normalized=False)], special_tokens=True)
        tokenizer.eos_token = FOREIGN
        foreign = find_stop_tokens(load_template("tokenizer", tokenizer), tokenizer)
        assert set(foreign.tokens) <= {*right.tokens, FOREIGN, *OTHERS.get(entry.name, ())}, entry.name
        assert not foreign.doubts, entry.name


def test_instructions_behind_a_conversation_end_no_turn():
    """As Command R's template for tools writes them."""
    text = PLAIN + "{% if tools %}<|start|><|system|>Answer with an action.{% endif %}"
    assert found(text) == (("<|end|>",), ())
    assert found(text, eos="<|end|>") == (("<|end|>",), ())


def test_the_end_of_a_part_ends_no_turn():
    special = ("<eos>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|END_OF_TURN|>")
    tokenizer = tiny_tokenizer(special_tokens=special)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}<|START_RESPONSE|>{{ m.content }}"
        "<|END_RESPONSE|>{% else %}{{ m.content }}{% endif %}<|END_OF_TURN|>{% endfor %}"
    )
    assert find_stop_tokens(load_template("tokenizer", tokenizer), tokenizer).tokens == ("<|END_OF_TURN|>",)


DISAGREEING = BODY + CALLS + "{{ '<|end|>' if loop.index < 3 else '<|stop|>' }}{% endfor %}"


def test_two_conversations_that_disagree_are_no_proof():
    assert found(PLAIN) == (("<|end|>",), ())
    tokens, doubts = found(DISAGREEING)
    assert tokens == () and "an answer with <|end|> and <|stop|>" in doubts[0]
    assert found(DISAGREEING, known=["<|stop|>"]) == (("<|stop|>",), ())


def test_what_ends_a_tool_call_alone_does_not_end_a_text():
    """A template that shows no answers."""
    tokens, _ = found(PLAIN.replace("{{ m.content }}", "{{ m.content if m.role != 'assistant' }}"))
    assert tokens == ("<eos>", "<|end|>")


ONE_TURN = "{% if messages | length > 2 and messages[2].role == 'user' %}{{ raise_exception('one turn') }}{% endif %}"


def test_a_conversation_that_a_template_rejects_proves_nothing():
    tokens, doubts = found(ONE_TURN + PLAIN)
    assert tokens[:1] in ((), ("<eos>",)) and doubts
    assert found(ONE_TURN + PLAIN, known=["<|end|>"]) == (("<|end|>",), ())


def test_a_template_that_ends_a_turn_otherwise_than_the_model_says_so(base_folder, tmp_path, write_jsonl):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|stop|>{% endfor %}")
    data = {"train": [{"path": write_jsonl(conversations(2))}], "chat_template": str(file)}
    chat = load_chat_format(config.Model(path=str(base_folder)), config.Data(**data))
    assert chat.doubts == (
        "the chat template ends an answer with <|stop|>, the model's own files with <|endoftext|>: the tuned model "
        "stops at all of them",
    )
    chat = load_chat_format(config.Model(path=str(base_folder)), config.Data(**{**data, "chat_template": "chatml"}))
    assert chat.doubts == ()
