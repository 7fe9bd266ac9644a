"""The textbook's interface: `SFTTrainer(model, tokenizer).train_step(prompt, response, optimizer)`."""

import copy
import random

import pytest
import torch

from preceptor import SFTTrainer
from preceptor.errors import DataError
from tiny import tiny_model, tiny_tokenizer

TEXT = "the start of a message and the end of it: user, assistant, 0123456789 äöü ∑ \n"


def formula(model, tokenizer, prompt, response):
    """-1/n sum_i log p(y_i | y_<i, X), in float64, by the model's own attention and logits."""
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([prompt_ids + response_ids])).logits[0].double().log_softmax(-1)
    start = len(prompt_ids) - 1
    return -sum(logits[start + i, token] for i, token in enumerate(response_ids)) / len(response_ids)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_train_step_equals_the_formula_on_20_random_pairs(kind):
    tokenizer = tiny_tokenizer()
    trained = tiny_model(kind, vocab_size=len(tokenizer))
    expected = copy.deepcopy(trained).double()
    trainer = SFTTrainer(trained, tokenizer)
    ours = torch.optim.SGD(trained.parameters(), lr=0.01)
    theirs = torch.optim.SGD(expected.parameters(), lr=0.01)
    draw = random.Random(0)
    for _ in range(20):
        prompt = "".join(draw.choices(TEXT, k=draw.randint(1, 40)))
        response = "".join(draw.choices(TEXT, k=draw.randint(1, 40)))
        truth = formula(expected, tokenizer, prompt, response)
        theirs.zero_grad()
        truth.backward()
        theirs.step()
        loss = trainer.train_step(prompt, response, ours)
        assert isinstance(loss, float)
        assert loss == pytest.approx(truth.item(), rel=1e-5)
    difference = max(
        (a.double() - b).abs().max().item() for a, b in zip(trained.parameters(), expected.parameters(), strict=True)
    )
    assert difference < 1e-5


def test_float64_models_stay_float64():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), dtype=torch.float64)
    truth = formula(model, tokenizer, "user", "message").item()
    loss = SFTTrainer(model, tokenizer).train_step("user", "message", torch.optim.SGD(model.parameters(), lr=0.1))
    assert loss == pytest.approx(truth, rel=1e-12)


def test_only_the_response_is_in_the_loss():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    trainer = SFTTrainer(model, tokenizer)
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    alone = trainer.train_step("a user", " message", frozen)
    assert alone == pytest.approx(formula(model, tokenizer, "a user", " message").item(), rel=1e-5)
    whole = -sum(
        model(torch.tensor([tokenizer("a user message")["input_ids"]])).logits[0].log_softmax(-1).flatten()[:1]
    ).item()
    assert alone != pytest.approx(whole)


def test_the_model_is_left_as_it_was_found():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    before = model.config._attn_implementation
    SFTTrainer(model, tokenizer).train_step("a", "b", torch.optim.SGD(model.parameters(), lr=0.1))
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(("prompt", "response"), [("", "answer"), ("question", "")])
def test_an_empty_side_is_rejected(prompt, response):
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    with pytest.raises(DataError):
        SFTTrainer(model, tokenizer).train_step(prompt, response, torch.optim.SGD(model.parameters(), lr=0.1))
