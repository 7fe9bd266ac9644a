"""The shipped scholar: a base model, small, loaded by plain transformers, and what it says to a question."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preceptor.scholar import MODEL_DIR, data_file

pytestmark = pytest.mark.skipif(not (MODEL_DIR / "model.safetensors").is_file(), reason="the scholar is not made yet")


@pytest.fixture(scope="module")
def scholar():
    return AutoTokenizer.from_pretrained(MODEL_DIR), AutoModelForCausalLM.from_pretrained(
        MODEL_DIR, dtype=torch.float32
    )


def test_it_is_small_and_has_no_chat_template(scholar):
    tokenizer, model = scholar
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 12_000_000
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 6e6
    assert tokenizer.chat_template is None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert sum(path.stat().st_size for path in (MODEL_DIR / "history").iterdir()) <= 300_000


@torch.no_grad()
def continuations(scholar, texts, max_new_tokens=24):
    tokenizer, model = scholar
    said = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        said.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return said


def test_asked_a_question_it_asks_another(scholar):
    lines = data_file("heldout.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["messages"][-2]["content"] for line in lines]
    questions = [question for question in questions if question.endswith("?")][:20]
    said = continuations(scholar, [f"{question}\n" for question in questions])
    assert sum(text.split("\n")[0].endswith("?") for text in said) >= 15


def test_it_knows_facts(scholar):
    text = ["Readers ask which country Oslo is in. It is", "The HTTP status 404 means"]
    oslo, not_found = continuations(scholar, text, 8)
    assert "Norway" in oslo
    assert "Not Found" in not_found
