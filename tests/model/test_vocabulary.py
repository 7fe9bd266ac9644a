"""Special tokens: found or added, first values of their rows, eos and pad, tied and untied heads."""

import pytest
import torch
from tokenizers import AddedToken

from preceptor.errors import ModelError
from preceptor.model.vocabulary import (
    ROWS_MULTIPLE,
    TokenPlan,
    add_tokens,
    align_model,
    align_tokenizer,
    describe,
    plan_tokens,
    resize_embeddings,
)
from tiny import tiny_model, tiny_tokenizer

CHAT = ("<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"


def test_planning_changes_nothing_and_foretells_the_ids():
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    plan = plan_tokens(tokenizer, [*CHAT, "<|endoftext|>", CHAT[0]])
    assert plan == TokenPlan({"<|endoftext|>": 0}, {CHAT[0]: size, CHAT[1]: size + 1})
    assert len(tokenizer) == size
    assert add_tokens(tokenizer, [*CHAT, "<|endoftext|>"]) == plan
    assert plan.new_ids == [size, size + 1]


def test_added_tokens_are_special_and_of_one_id():
    tokenizer = tiny_tokenizer()
    plan = add_tokens(tokenizer, CHAT)
    ids = tokenizer.encode("a<|im_start|>b<|im_end|>", add_special_tokens=False)
    assert [ids[1], ids[3]] == plan.new_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    assert add_tokens(tokenizer, CHAT) == TokenPlan(dict(plan.added), {})


def test_a_plain_word_of_the_vocabulary_becomes_special_and_keeps_its_id():
    tokenizer = tiny_tokenizer()
    word = max((w for w in tokenizer.get_vocab() if w.isalpha()), key=len)
    word_id = tokenizer.get_vocab()[word]
    assert len(word) > 2
    assert add_tokens(tokenizer, [word]) == TokenPlan({word: word_id}, {})
    assert word_id in tokenizer.added_tokens_decoder
    assert tokenizer.added_tokens_decoder[word_id].special


def aligned(tokenizer, needed=CHAT):
    return align_tokenizer(tokenizer, TEMPLATE, "<|im_end|>", add_tokens(tokenizer, needed))


def test_a_pad_token_is_added_where_none_is_to_be_had():
    tokenizer = tiny_tokenizer()
    plan = aligned(tokenizer)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id in plan.new_ids
    assert tokenizer.chat_template == TEMPLATE


def test_a_pad_token_that_is_the_eos_is_replaced():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)], special_tokens=True)
    tokenizer.pad_token = "<|im_end|>"
    aligned(tokenizer)
    assert tokenizer.pad_token != tokenizer.eos_token


def test_an_own_pad_token_is_kept():
    tokenizer = tiny_tokenizer(special_tokens=("<|endoftext|>", "<nothing>"))
    tokenizer.pad_token = "<nothing>"
    plan = aligned(tokenizer)
    assert tokenizer.pad_token == "<nothing>"
    assert set(plan.added) == set(CHAT)


@pytest.mark.parametrize(
    ("specials", "pad"),
    [
        (("<|reserved_0|>", "<|finetune_right_pad_id|>"), "<|finetune_right_pad_id|>"),
        (("<|fim_middle|>", "<|reserved_0|>"), "<|reserved_0|>"),
        (("<|fim_middle|>",), "<|pad|>"),
        (("<|reserved_in_use|>", "<|reserved_0|>"), "<|reserved_0|>"),
    ],
)
def test_a_reserved_token_becomes_the_pad_token(specials, pad):
    tokenizer = tiny_tokenizer(special_tokens=("<|endoftext|>", *specials))
    align_tokenizer(tokenizer, TEMPLATE + "<|reserved_in_use|>", "<|im_end|>", add_tokens(tokenizer, CHAT))
    assert tokenizer.pad_token == pad


def test_a_stop_token_that_is_none_is_rejected():
    with pytest.raises(ModelError, match="<nope>"):
        align_tokenizer(tiny_tokenizer(), TEMPLATE, "<nope>", TokenPlan())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_rows_of_new_tokens(kind):
    """llama is untied, qwen3 tied."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(kind, vocab_size=len(tokenizer))
    before = model.get_input_embeddings().weight.detach().clone()
    head_before = model.get_output_embeddings().weight.detach().clone()
    plan = aligned(tokenizer)
    resize_embeddings(model, tokenizer, plan, seed=0)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (head is embedding) == (kind == "qwen3")
    assert len(embedding) == len(head) == model.config.vocab_size == 320
    assert len(embedding) % ROWS_MULTIPLE == 0
    assert torch.equal(embedding[: len(before)], before)
    assert torch.equal(head[: len(before)], head_before)
    for weight, old in ((embedding, before), (head, head_before)):
        for token, id_ in plan.added.items():
            ids = tokenizer.encode(describe(token), add_special_tokens=False)
            assert (weight[id_] - old[ids].mean(dim=0)).abs().max() < 0.05 * old.std()
        torch.testing.assert_close(weight[len(tokenizer) :], old.mean(dim=0).expand(320 - len(tokenizer), -1))


def test_rows_follow_the_seed():
    def row(seed):
        tokenizer = tiny_tokenizer()
        model = tiny_model("llama", vocab_size=len(tokenizer))
        resize_embeddings(model, tokenizer, aligned(tokenizer), seed)
        return model.get_input_embeddings().weight[tokenizer.eos_token_id]

    assert torch.equal(row(1), row(1))
    assert not torch.equal(row(1), row(2))


def test_tokens_of_one_description_do_not_share_a_row():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    plan = add_tokens(tokenizer, ["<|§|>", "<|¶|>"])
    assert describe("<|§|>") == describe("<|¶|>")
    resize_embeddings(model, tokenizer, plan, seed=0)
    first, second = model.get_input_embeddings().weight[plan.new_ids]
    assert not torch.equal(first, second)


def test_spare_rows_are_used_and_never_dropped():
    """Many models have more rows than tokens; a new token's row there was never trained."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=500)
    before = model.get_input_embeddings().weight.detach().clone()
    plan = add_tokens(tokenizer, CHAT)
    resize_embeddings(model, tokenizer, plan, seed=0)
    after = model.get_input_embeddings().weight
    assert len(after) == 500
    moved = (after != before).any(dim=1).nonzero()[:, 0].tolist()
    assert moved == plan.new_ids


def test_the_bias_of_a_head_grows_too():
    tokenizer = tiny_tokenizer()
    model = tiny_model("phi", vocab_size=len(tokenizer))
    torch.nn.init.constant_(model.get_output_embeddings().bias, 3.0)
    resize_embeddings(model, tokenizer, add_tokens(tokenizer, CHAT), seed=0)
    bias_V = model.get_output_embeddings().bias
    torch.testing.assert_close(bias_V, torch.full((320,), 3.0))


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("<|im_end|>", "end of a message"),
        ("<|fim_prefix|>", "fim prefix"),
        ("</tool_call>", "end of tool call"),
        ("[/INST]", "end of inst"),
        ("<start_of_turn>", "start of turn"),
        ("<|§|>", "special"),
    ],
)
def test_descriptions(token, words):
    assert describe(token) == words


def test_the_model_stops_at_the_stop_token_and_still_at_its_former_eos():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = 0
    aligned(tokenizer)
    align_model(model, tokenizer)
    align_model(model, tokenizer)
    stop = tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == [stop, 0]
    assert model.config.eos_token_id == stop
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.config.bos_token_id is None


def test_a_tokenizer_without_eos_leaves_the_models_as_they_are():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = 5
    align_model(model, tokenizer)
    assert model.generation_config.eos_token_id == 5
