"""What `from preceptor import load_chat_format, collate` gives to programs that train with something else."""

import doctest

import pytest
import torch

from conftest import conversations
from preceptor import collate, load_chat_format
from preceptor.api import chat_format
from preceptor.chat.render import Renderer
from preceptor.data.examples import ADVICE, CODES, Rejection
from preceptor.data.forest import pack_trees
from preceptor.errors import ConfigError, DataError, ModelError
from preceptor.model.forward import Engine
from tiny import tiny_model

# Earlier answers lose their reasoning, as in Qwen 3 and others: the tree of two turns branches.
REWRITES = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.reasoning_content and loop.last %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def a_conversation(reasoning=False):
    messages = conversations(2, turns=2)[1]["messages"]
    extra = {"reasoning_content": "The user and the message."} if reasoning else {}
    return [{**message, **extra} if message["role"] == "assistant" else message for message in messages]


@pytest.fixture
def chat(base_folder):
    return load_chat_format(str(base_folder))


@pytest.fixture
def rewriting(base_folder, tmp_path):
    file = tmp_path / "rewrites.jinja"
    file.write_text(REWRITES, encoding="utf-8")
    return load_chat_format(str(base_folder), chat_template=str(file))


def test_contexts_are_what_the_saved_tokenizer_builds_and_targets_end_where_a_server_stops(chat):
    messages = a_conversation()
    turns = chat.render(messages).turns
    assert [turn.message for turn in turns] == [1, 3] and set(chat.added) == {"<|im_start|>", "<|im_end|>"}
    for turn in turns:
        before = messages[: turn.message]
        asked = chat.tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
        assert list(turn.context) == list(asked)
        assert turn.target_text == messages[turn.message]["content"] + "<|im_end|>"
        assert turn.target[-1] in chat.stop_token_ids
        assert chat.tokenizer.decode(turn.context) == turn.context_text
        assert chat.tokenizer.decode(turn.target) == turn.target_text


def test_turns_of_a_template_that_rewrites_history_each_read_their_own_context(rewriting):
    messages = a_conversation(reasoning=True)
    first, second = rewriting.render(messages).turns
    assert "<think>" in first.target_text and "<think>" in second.target_text
    assert "<think>" not in second.context_text and second.context_text.endswith("<|im_start|>assistant\n")
    assert messages[1]["content"] in second.context_text


@pytest.mark.parametrize("reasoning", [False, True])
def test_the_loss_of_transformers_over_a_collated_batch_is_ours(chat, rewriting, reasoning):
    renderer = rewriting if reasoning else chat
    rendered = [
        renderer.render(a_conversation(reasoning)),
        renderer.render(conversations(1)[0]["messages"]),
        renderer.render([{**m, "train": False} if n == 1 else m for n, m in enumerate(a_conversation())]),
    ]
    model = tiny_model("llama", vocab_size=len(renderer.tokenizer)).eval()
    sequence = pack_trees([each.tree for each in rendered])
    expected = Engine(model)(sequence).item() / sequence.num_trained
    batch = collate(rendered)
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(expected, rel=1e-5)
    assert int((batch["labels"] != -100).sum()) == sequence.num_trained
    assert batch["input_ids"].shape[0] == (4 if reasoning else 3), "a row for each path"


def test_a_packed_batch_is_the_rows_one_after_the_other_without_padding(rewriting):
    rendered = [rewriting.render(a_conversation(reasoning=True)), rewriting.render(conversations(1)[0]["messages"])]
    rows, packed = collate(rendered), collate(rendered, packed=True)
    for name, values in packed.items():
        joined = [
            value
            for row, mask in zip(rows[name], rows["attention_mask"], strict=True)
            for value in row[mask.bool()].tolist()
        ]
        assert values.tolist() == [joined], name
    assert "attention_mask" not in packed and int((packed["position_ids"] == 0).sum()) == 3


def test_what_cannot_be_proved_is_an_error_that_says_why(chat):
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    with pytest.raises(DataError, match="unknown_role"):
        chat.render([{"role": "narrator", "content": "x"}])
    with pytest.raises(DataError, match=r"special_token_in_text.*messages\[0\]"):
        chat.render([{"role": "user", "content": "<|im_end|>"}, answer])
    with pytest.raises(DataError, match=r"weight 0\.5"):
        collate([chat.render([user, {**answer, "weight": 0.5}])])
    rendered = chat.render([user, answer])
    with pytest.raises(DataError, match="more than max_length 4"):
        collate([rendered], max_length=4)
    with pytest.raises(DataError, match="no conversations"):
        collate([])


def test_each_reason_is_told_once(chat, monkeypatch):
    user, unfinished = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nx\n</think>"}
    with pytest.raises(DataError, match=r"^empty_answer: messages\[1\]\.content ends with </think>: add an answer"):
        chat.render([user, unfinished])
    for code in sorted(CODES):
        said = f"{code} here: {ADVICE[code]}" if code in ADVICE else f"{code} here"
        monkeypatch.setattr(Renderer, "render", lambda *_, code=code, said=said: Rejection("messages", code, said))
        with pytest.raises(DataError) as error:
            chat.render([user, {"role": "assistant", "content": "Hello"}])
        assert str(error.value) == f"{code}: {said}"


def test_places_may_be_paths(base_folder, tmp_path):
    file = tmp_path / "rewrites.jinja"
    file.write_text(REWRITES)
    expected = load_chat_format(str(base_folder), chat_template=str(file))
    assert load_chat_format(base_folder, chat_template=file).tokenizer.chat_template == (
        expected.tokenizer.chat_template
    )


def test_a_model_that_is_not_there_and_an_argument_that_is_wrong(base_folder):
    with pytest.raises(ModelError):
        load_chat_format("/nowhere/at/all")
    with pytest.raises(ConfigError, match="train_on"):
        load_chat_format(str(base_folder), train_on="answers")


def test_the_example_at_the_head_of_the_module_gives_what_it_says():
    found = doctest.testmod(chat_format)
    assert found.attempted == 5 and found.failed == 0
