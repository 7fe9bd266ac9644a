"""Averaged weights: the formula for every tensor, added rows kept, the result loads, what does not fit is rejected."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from preceptor.errors import CheckpointError, ModelError
from preceptor.model.interpolate import merge_weights
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def folders(tmp_path):
    """A base and a tuned model of other values with eight more rows, in several files."""
    tiny_model("qwen3", seed=1).save_pretrained(tmp_path / "base")
    tuned = tiny_model("qwen3", seed=2)
    tuned.resize_token_embeddings(72, mean_resizing=False)
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
    return tmp_path / "base", tmp_path / "tuned"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_every_tensor_is_the_average_and_added_rows_are_the_tuned_ones(folders, tmp_path, weight):
    base, tuned = folders
    merge_weights(base, tuned, weight, tmp_path / "out")
    before, after, merged = load(base), load(tuned), load(tmp_path / "out")
    assert merged.keys() == after.keys()
    for name, tensor in merged.items():
        rows = len(before[name])
        torch.testing.assert_close(tensor[:rows], (1 - weight) * before[name] + weight * after[name][:rows])
        assert torch.equal(tensor[rows:], after[name][rows:])
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_named_templates_are_in_the_merged_model(folders, tmp_path):
    base, tuned = folders
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    tokenizer.save_pretrained(tuned)
    merge_weights(base, tuned, 0.5, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_a_base_with_one_table_for_both_ends(tmp_path):
    tied = tiny_model("qwen3", seed=1)
    tied.save_pretrained(tmp_path / "base")
    untied = tiny_model("qwen3", seed=2, tie_word_embeddings=False)
    untied.save_pretrained(tmp_path / "tuned")
    merge_weights(tmp_path / "base", tmp_path / "tuned", 0.5, tmp_path / "out")
    expected = (tied.lm_head.weight + untied.lm_head.weight) / 2
    torch.testing.assert_close(load(tmp_path / "out")["lm_head.weight"], expected.detach())


def test_another_model_is_rejected_and_nothing_is_written(folders, tmp_path):
    _, tuned = folders
    tiny_model("qwen3", num_hidden_layers=1).save_pretrained(tmp_path / "shallow")
    with pytest.raises(ModelError, match=r"layers\.1.*base has not"):
        merge_weights(tmp_path / "shallow", tuned, 0.5, tmp_path / "out")
    tiny_model("qwen3", hidden_size=16).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ModelError, match="shape"):
        merge_weights(tmp_path / "narrow", tuned, 0.5, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_folder_that_exists_is_not_touched(folders, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        merge_weights(*folders, 0.5, tmp_path / "out")


@pytest.mark.parametrize("kind", ["qwen3", "llama", "phi"])  # one table; two; a bias per token beside them
@pytest.mark.parametrize("reserve", [True, False])  # rows that the new tokens take
def test_rows_of_new_tokens_are_the_tuned_ones_also_where_the_base_has_rows_in_reserve(kind, reserve, tmp_path):
    before, after = tiny_tokenizer(), tiny_tokenizer()
    after.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    new = after.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    num_rows = 320 if reserve else len(before)
    old = [row for row in range(320) if row not in new]
    for folder, tokenizer, seed, rows in (("base", before, 1, num_rows), ("tuned", after, 2, 320)):
        model = tiny_model(kind, vocab_size=rows, seed=seed)
        for p in model.parameters():  # biases begin as zeros
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(seed))
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    merge_weights(tmp_path / "base", tmp_path / "tuned", 0.0, tmp_path / "out")
    base, tuned, merged = (load(tmp_path / name) for name in ("base", "tuned", "out"))
    tables = [name for name, tensor in tuned.items() if len(tensor) == 320]
    assert len(tables) == {"qwen3": 2, "llama": 2, "phi": 3}[kind]
    for name in merged:
        if name in tables:
            assert torch.equal(merged[name][new], tuned[name][new]), name
            shared = [row for row in old if row < num_rows]
            torch.testing.assert_close(merged[name][shared], base[name][shared])
        else:
            torch.testing.assert_close(merged[name], base[name])


@pytest.mark.parametrize("kind", ["gpt2", "bloom"])
@pytest.mark.parametrize("bare", ["base", "tuned"])
def test_files_that_leave_out_the_prefix_of_the_names(kind, bare, tmp_path):
    models = {"base": tiny_model(kind, seed=1), "tuned": tiny_model(kind, seed=2)}
    for name, model in models.items():
        (model.transformer if name == bare else model).save_pretrained(tmp_path / name)
    assert not any(name.startswith("transformer.") for name in load_file(tmp_path / bare / "model.safetensors"))
    merge_weights(tmp_path / "base", tmp_path / "tuned", 0.25, tmp_path / "out")
    base, tuned, merged = (load(tmp_path / name) for name in ("base", "tuned", "out"))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.75 * base[name] + 0.25 * tuned[name])


INFINITE = float("inf")


@pytest.mark.parametrize(
    ("base", "tuned", "expected"),
    [
        (1.0, 2.0, 1.75),
        ([-INFINITE, 1.0], [-INFINITE, 2.0], [-INFINITE, 1.75]),
        ([1.0], [2.0, 5.0], [1.75, 5.0]),
        (1.0, [2.0], None),
        ([1.0], 2.0, None),
        ([1.0, 2.0], [1.0], None),
    ],
)
def test_numbers_and_infinite_values(base, tuned, expected, tmp_path):
    for name, values in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({"a": torch.tensor(values)}, tmp_path / name / "model.safetensors")
    arguments = (tmp_path / "base", tmp_path / "tuned", 0.75, tmp_path / "out")
    if expected is None:
        with pytest.raises(ModelError, match=r"a: shape .* in the tuned model and .* in the base"):
            merge_weights(*arguments)
    else:
        merge_weights(*arguments)
        assert torch.equal(load_file(tmp_path / "out/model.safetensors")["a"], torch.tensor(expected))
