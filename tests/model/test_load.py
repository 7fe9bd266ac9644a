"""Loading and saving: a folder that plain transformers reads, all or nothing, and errors that name what is wrong."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from preceptor import files
from preceptor.chat.format import add_tokens, align_tokenizer
from preceptor.chat.template import Template
from preceptor.data.forest import pack_trees
from preceptor.errors import CheckpointError, ModelError
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.embeddings import align_model, resize_embeddings
from preceptor.model.forward import Engine
from preceptor.model.load import load_model, make_ready, save_model, saved_bytes
from tiny import chain, tiny_model, tiny_tokenizer

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"


def assistant(kind):
    tokenizer = tiny_tokenizer()
    model = tiny_model(kind, vocab_size=len(tokenizer))
    added = add_tokens(tokenizer, ["<|im_start|>", "<|im_end|>"])
    align_tokenizer(tokenizer, Template("test", {"default": TEMPLATE}, {}, tuple(added)), "<|im_end|>")
    resize_embeddings(model, tokenizer, added, seed=0)
    align_model(model, tokenizer)
    return model, tokenizer, added


def logits(model):
    ids = torch.tensor([[5, 286, 17, 287, 3]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_a_saved_model_is_the_same_in_plain_transformers(kind, tmp_path):
    model, tokenizer, _ = assistant(kind)
    save_model(model, tokenizer, tmp_path / "model")
    attention = model.config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation=attention)
    read = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.generation_config.eos_token_id == read.eos_token_id == 287
    assert read.pad_token == "<|endoftext|>"
    messages = [{"role": "user", "content": "the user"}]
    text = "<|im_start|>the user<|im_end|>\n"
    assert read.apply_chat_template(messages, tokenize=False) == text
    assert read.encode(text) == tokenizer.encode(text)
    assert torch.equal(logits(load_model(tmp_path / "model", "float32", "cpu")), logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_soft_cap_is_not_left_to_an_attention_without():
    """As transformers 5.17 loads Gemma 2; later ones choose as is chosen here."""
    for kind, chosen in (("gemma2", "eager"), ("llama", "sdpa")):
        model = tiny_model(kind)
        model.config._attn_implementation = "sdpa"
        make_ready(model)
        assert model.config._attn_implementation == chosen


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_an_adapter_is_saved_merged_and_beside(kind, tmp_path):
    from peft import PeftModel

    model, tokenizer, added = assistant(kind)
    adapted = add_adapter(model, 4, 8.0, 0.0, None, sorted(added.values()), 0)
    sequence = pack_trees(
        [chain(np.random.default_rng(0), (5, 8)), chain(np.random.default_rng(0), (3, 5), vocab_size=288)]
    )
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        Engine(adapted)(sequence).backward()
        optimizer.step()
    save_model(adapted, tokenizer, tmp_path / "model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)
    base, _, _ = assistant(kind)
    assert not torch.allclose(logits(base), logits(adapted), atol=1e-2)
    again = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter")
    torch.testing.assert_close(logits(again), logits(adapted), rtol=1e-4, atol=1e-4)


def test_the_generation_config_is_written(tmp_path):
    model, tokenizer, _ = assistant("llama")
    model.generation_config = model.generation_config.__class__(eos_token_id=[287, 0], max_new_tokens=7)
    save_model(model, tokenizer, tmp_path / "model")
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (written["eos_token_id"], written["max_new_tokens"]) == ([287, 0], 7)


def test_weights_that_the_type_cannot_hold_are_saved_as_they_are(tmp_path):
    model, tokenizer, _ = assistant("llama")
    save_model(model, tokenizer, tmp_path / "half", dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "the model is there for another try"
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    model.lm_head.weight.data[0, 0] = 1e5
    save_model(model, tokenizer, tmp_path / "large", dtype=torch.float16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "large", dtype="auto")
    assert loaded.dtype == torch.float32 and loaded.lm_head.weight[0, 0] == 1e5


@pytest.mark.parametrize("adapter", ["", "both", "merged", "adapter"])
@pytest.mark.parametrize(("held", "saved"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", None)])
def test_the_room_for_a_model_is_that_of_its_files(adapter, held, saved, tmp_path):
    model, tokenizer, added = assistant("llama")
    model, saved = model.to(getattr(torch, held)), getattr(torch, saved or "", None)
    if adapter:
        model = add_adapter(model, 4, 8.0, 0.0, None, sorted(added.values()), 0)
    save_model(model, tokenizer, tmp_path / "model", saved, adapter or "both")
    tensors = [tensor for file in tmp_path.rglob("*.safetensors") for tensor in load_file(file).values()]
    written = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert saved_bytes(model, saved, adapter or "both") == pytest.approx(written, rel=0.02)


def test_what_transformers_keeps_in_float32_is_saved_so(tmp_path):
    model, tokenizer, _ = assistant("llama")
    model._keep_in_fp32_modules_strict = {"norm"}
    save_model(model, tokenizer, tmp_path / "model", dtype=torch.bfloat16)
    found = {name: p.dtype for name, p in load_file(tmp_path / "model" / "model.safetensors").items()}
    assert found.pop("model.norm.weight") == torch.float32 and set(found.values()) == {torch.bfloat16}


def test_an_existing_folder_is_never_written_to(tmp_path):
    model, tokenizer, _ = assistant("llama")
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        save_model(model, tokenizer, tmp_path / "model")
    assert not any((tmp_path / "model").iterdir())


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    model, tokenizer, _ = assistant("llama")

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "_flush", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        save_model(model, tokenizer, tmp_path / "runs" / "model")
    assert not any((tmp_path / "runs").iterdir())


def test_random_weights_follow_the_seed_and_keep_the_shape(tmp_path):
    model, tokenizer, _ = assistant("qwen3")
    model.generation_config.eos_token_id = [287, 0]
    save_model(model, tokenizer, tmp_path / "model")
    state = torch.random.get_rng_state()
    first, again, other = (load_model(tmp_path / "model", "float32", "cpu", init="random", seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))
    assert not torch.equal(logits(first), logits(model))
    assert first.generation_config.eos_token_id == [287, 0]
    assert not first.training


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_weights_come_in_the_dtype_asked_for(dtype, base_folder):
    model = load_model(base_folder, dtype, "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def changed_config(base_folder, folder, **changes):
    folder.mkdir()
    for file in base_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_what_is_no_causal_language_model_is_rejected(base_folder, tmp_path):
    classifier = changed_config(base_folder, tmp_path / "a", architectures=["LlamaForSequenceClassification"])
    with pytest.raises(ModelError, match=r"LlamaForSequenceClassification.*no causal language model"):
        load_model(classifier, "float32", "cpu")
    translator = changed_config(base_folder, tmp_path / "b", model_type="t5", architectures=["T5Model"])
    with pytest.raises(ModelError, match=r"T5Model.*no causal language model"):
        load_model(translator, "float32", "cpu")
    unknown = changed_config(base_folder, tmp_path / "c", model_type="nonesuch")
    with pytest.raises(ModelError, match="nonesuch"):
        load_model(unknown, "float32", "cpu")


def test_missing_weights_never_start_at_random_values(base_folder, tmp_path):
    deeper = changed_config(base_folder, tmp_path / "a", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"weights are missing.*layers.2"):
        load_model(deeper, "float32", "cpu")
    (deeper / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match="cannot load the model of this folder"):
        load_model(deeper, "float32", "cpu")
    (deeper / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load the model of this folder"):
        load_model(deeper, "float32", "cpu")
