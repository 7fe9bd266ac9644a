"""Rows of new tokens in tied and untied heads, and what the model stops at."""

import pytest
import torch

from preceptor.chat.format import add_tokens, align_tokenizer
from preceptor.chat.template import Template
from preceptor.model.embeddings import (
    align_model,
    describe,
    resize_embeddings,
)
from preceptor.model.sizes import ROWS_MULTIPLE
from tiny import tiny_model, tiny_tokenizer

CHAT = ("<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"


def aligned(tokenizer):
    added = add_tokens(tokenizer, CHAT)
    align_tokenizer(tokenizer, Template("test", {"default": TEMPLATE}, {}, CHAT), "<|im_end|>")
    return added


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_rows_of_new_tokens(kind):
    """llama is untied, qwen3 tied."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(kind, vocab_size=len(tokenizer))
    before = model.get_input_embeddings().weight.detach().clone()
    head_before = model.get_output_embeddings().weight.detach().clone()
    added = aligned(tokenizer)
    resize_embeddings(model, tokenizer, added, seed=0)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (head is embedding) == (kind == "qwen3")
    assert len(embedding) == len(head) == model.config.vocab_size == 320
    assert len(embedding) % ROWS_MULTIPLE == 0
    assert torch.equal(embedding[: len(before)], before)
    assert torch.equal(head[: len(before)], head_before)
    for weight, old in ((embedding, before), (head, head_before)):
        for token, id_ in added.items():
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
    added = add_tokens(tokenizer, ["<|§|>", "<|¶|>"])
    assert describe("<|§|>") == describe("<|¶|>")
    resize_embeddings(model, tokenizer, added, seed=0)
    first, second = model.get_input_embeddings().weight[list(added.values())]
    assert not torch.equal(first, second)


def test_spare_rows_are_used_and_never_dropped():
    """Many models have more rows than tokens; a new token's row there was never trained."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=500)
    before = model.get_input_embeddings().weight.detach().clone()
    added = add_tokens(tokenizer, CHAT)
    resize_embeddings(model, tokenizer, added, seed=0)
    after = model.get_input_embeddings().weight
    assert len(after) == 500
    moved = (after != before).any(dim=1).nonzero()[:, 0].tolist()
    assert moved == list(added.values())


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
