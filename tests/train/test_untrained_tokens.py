"""Tokens that a base model has and never saw: found, given first values, trained beside an adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import conversations
from preceptor.model.embeddings import never_trained, resize_embeddings
from tiny import tiny_model, tiny_tokenizer

CHAT = ("<|im_start|>", "<|im_end|>")
RESERVED = tuple(f"<|reserved_{number}|>" for number in range(6))


def tokenizer_with(*tokens):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in tokens], special_tokens=True)
    return tokenizer


def base_with(rows, tied, tokens=(*CHAT, *RESERVED), kind=None):
    """A model whose rows of `tokens` are as a release leaves those of reserved tokens."""
    tokenizer = tokenizer_with(*tokens)
    model = tiny_model(kind or ("qwen3" if tied else "llama"), vocab_size=len(tokenizer))
    first = len(tokenizer) - len(tokens)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    with torch.no_grad():
        for table in tables[: 1 if tied else 2]:
            known = table[:first]
            table[first:] = {
                "zero": torch.zeros_like(known[0]),
                "nearly zero": torch.randn(len(tokens), table.shape[1]) * 1e-6,
                "mean": known.mean(dim=0),
                "near the mean": known.mean(dim=0) + known.std() * 1e-4 * torch.randn(len(tokens), table.shape[1]),
                "alike": torch.full_like(known[0], 0.3),
            }[rows]
    return model, tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", ["zero", "nearly zero", "mean", "near the mean", "alike"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_rows_are_found_and_get_first_values(rows, tied, dtype):
    model, tokenizer = base_with(rows, tied)
    model = model.to(dtype)
    ids = dict(zip(CHAT, tokenizer.convert_tokens_to_ids(list(CHAT)), strict=True))
    used = {*range(40), *ids.values()}
    found = never_trained(model, tokenizer, used)
    assert found == ids
    before = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    resize_embeddings(model, tokenizer, {}, 0, found)
    for table, old in zip((model.get_input_embeddings(), model.get_output_embeddings()), before, strict=True):
        changed = (table.weight[: len(old)] != old).any(dim=1).nonzero().flatten().tolist()
        assert changed == sorted(ids.values())
        start, end = (table.weight[id_].float() for id_ in ids.values())
        assert (start - end).norm() > 0.1 * table.weight[:40].float().std() * len(start) ** 0.5
    assert never_trained(model, tokenizer, used) == {}


def test_trained_rows_are_left_alone():
    model, tokenizer = base_with("alike", tied=False)
    assert never_trained(model, tokenizer, range(200)) == {}  # none of them is an added token that is used
    model = tiny_model("llama", vocab_size=len(tokenizer))
    assert never_trained(model, tokenizer, range(len(tokenizer))) == {}


def test_a_row_that_one_table_has_trained_stays_there():
    """A token that was only predicted: its head row is trained, its embedding is not."""
    model, tokenizer = base_with("zero", tied=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        model.get_output_embeddings().weight[end] = 0.7 * torch.randn(model.config.hidden_size)
    trained = model.get_output_embeddings().weight[end].clone()
    found = never_trained(model, tokenizer, {end})
    assert found == {"<|im_end|>": end}
    resize_embeddings(model, tokenizer, {}, 0, found)
    assert torch.equal(model.get_output_embeddings().weight[end], trained)
    assert model.get_input_embeddings().weight[end].abs().max() > 0


def save(folder, model, tokenizer):
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("adapter", [{"kind": "lora", "rank": 2}, None])
@pytest.mark.parametrize("tied", [True, False])
def test_a_run_says_so_and_trains_them(adapter, tied, preceptor, run_file, tmp_path):
    model, tokenizer = base_with("zero" if tied else "mean", tied)
    base = save(tmp_path / "base", model, tokenizer)
    code, out, err = preceptor("train", run_file(model__path=base, **({"adapter": adapter} if adapter else {})))
    assert code == 0, err
    said = [line for line in out.splitlines() if "never trained" in line]
    how = "beside the adapter" if adapter else "with all others"
    assert len(said) == 1 and said[0].startswith("<|im_start|>, <|im_end|> exist but were never trained")
    assert said[0].endswith(how) and out.index(said[0]) < out.index("proved:")
    tuned = load_file(tmp_path / "run" / "model" / "model.safetensors")
    names = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    first = tokenizer.convert_tokens_to_ids("<|im_start|>")
    resize_embeddings(model, tokenizer, {}, 0, never_trained(model, tokenizer, {first, first + 1}))
    for name in names:
        start = model.state_dict()[name]
        moved = (tuned[name][: len(start)] != start).any(dim=1)
        assert moved[first] and moved[first + 1]
        if adapter:
            assert moved.sum() == 2


def test_tokens_that_a_user_added_without_rows_are_trained_apart(preceptor, run_file, tmp_path):
    tokenizer = tokenizer_with()
    num_rows = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<sql>", normalized=False), AddedToken("</sql>", normalized=False)])
    base = save(tmp_path / "base", tiny_model("qwen3", vocab_size=num_rows), tokenizer)
    rows = conversations(4)
    rows[0]["messages"][1]["content"] = "<sql>and then</sql>"
    code, out, err = preceptor("train", run_file(rows, model__path=base, adapter={"kind": "lora", "rank": 2}))
    assert code == 0, err
    assert "<sql>, </sql> exist but were never trained" in out
    embedding = load_file(tmp_path / "run" / "model" / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(embedding[num_rows], embedding[num_rows + 1])
    saved = json.loads((tmp_path / "run" / "model" / "adapter" / "adapter_config.json").read_text())
    assert {num_rows, num_rows + 1} <= set(next(iter(saved["trainable_token_indices"].values())))


def test_ordinary_tokens_without_rows_are_refused_where_the_data_hold_them(preceptor, run_file, tmp_path):
    base = save(tmp_path / "base", tiny_model("llama", vocab_size=64), tiny_tokenizer())
    code, _, err = preceptor("train", run_file(model__path=base))
    assert code == 5 and "64 embeddings" in err and "train.jsonl:1" in err
    assert not (tmp_path / "run").exists()


def test_lora_on_a_base_with_untrained_chat_tokens_learns_to_stop(preceptor, run_file, tmp_path):
    """The same answer to every question: after a few steps the stop token must be likely where the answer ends."""
    model, tokenizer = base_with("mean", tied=True)
    base = save(tmp_path / "base", model, tokenizer)
    rows = [{"messages": [{"role": "user", "content": "start"}, {"role": "assistant", "content": "the end"}]}] * 8
    changes = {"train__duration": "60 steps", "optimizer__learning_rate": 0.02, "model__path": base}
    code, _, err = preceptor("train", run_file(rows, adapter={"kind": "lora", "rank": 4}, **changes))
    assert code == 0, err
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    prompt = tokenizer.apply_chat_template(rows[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    answer = tuned.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "the end<|im_end|>"
