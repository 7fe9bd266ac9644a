"""Batched decoding gives what one prompt at a time gives, and stops where it should."""

import torch

from preceptor.evaluate.generate import generate
from tiny import tiny_model, tiny_tokenizer

CONTEXTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [8, 3]]


def greedy(model, context, stop, limit):
    """One token at a time, no cache, no padding."""
    ids = list(context)
    for _ in range(limit):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in stop:
            return ids[len(context) :], True
        ids.append(token)
    return ids[len(context) :], False


def test_batches_equal_single_prompts_and_keep_their_order():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer)).double()
    free = [greedy(model, context, set(), 12)[0] for context in CONTEXTS]
    stop = {free[0][4], free[2][7]}
    expected = [greedy(model, context, stop, 12) for context in CONTEXTS]
    assert {stopped for _, stopped in expected} == {True, False} or all(stopped for _, stopped in expected)
    for batch_size in (1, 3, 64):
        answers = generate(model, tokenizer, CONTEXTS, sorted(stop), 12, batch_size=batch_size)
        assert [(list(answer.ids), answer.stopped) for answer in answers] == expected
        assert [answer.text for answer in answers] == [tokenizer.decode(ids) for ids, _ in expected]


def test_the_model_is_left_in_its_mode():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer)).train()
    generate(model, tokenizer, CONTEXTS, [0], 2)
    assert model.training
    assert generate(model, tokenizer, [], [0], 2) == []
