"""Averaged weights: the formula for every tensor, added rows kept, the result loads, what does not fit is rejected."""

import pytest
import torch
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
