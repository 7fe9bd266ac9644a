"""Saving a model over several ranks: the files of one process, tensor by tensor; read back before anything is said."""

import json

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from preceptor.errors import CheckpointError
from preceptor.model import weights
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.forward import Engine
from preceptor.model.load import save_model
from preceptor.model.sharding import device_mesh, shard_model
from tiny import merged, seeing_model, tiny_model, tiny_tokenizer

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "tie_word_embeddings": False}


def made(kind, new_token_ids=None, **settings):
    model = seeing_model(kind) if kind == "gemma3" else tiny_model(kind, **settings)
    if new_token_ids is None:
        return model
    model = add_adapter(model, 4, 8.0, 0.0, None, new_token_ids, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1, generator=generator)
    return model


CASES = {
    "tied": ("qwen3", {}, None),
    "untied, in half precision": ("llama", {}, torch.bfloat16),
    "experts that are many tensors in files": ("qwen3_moe", EXPERTS, None),
    "a tower": ("gemma3", {}, None),
    "adapter": ("llama", {"new_token_ids": [60, 63]}, torch.bfloat16),
    "adapter, tied": ("gemma3_text", {"new_token_ids": [60, 63]}, None),
    "adapter of experts": ("qwen3_moe", {**EXPERTS, "new_token_ids": []}, None),
}


def _save(rank, folder, strategy):
    for name, (kind, settings, dtype) in CASES.items():
        model = made(kind, **settings)
        shard_model(Engine(model), device_mesh(strategy, "cpu", 2, 2))
        save_model(model, tiny_tokenizer(), folder / name, dtype=dtype)


def files(folder):
    """Every file's content: of weights, the tensors by name wherever they are."""
    found, tensors = {}, {}
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors" and path.parent == folder:
            tensors |= load_file(path)
        elif path.name == "adapter_config.json":  # peft writes names in any order
            found[name] = {
                key: sorted(value) if isinstance(value, list) else value for key, value in _json(path).items()
            }
        elif path.name != weights.INDEX:
            found[name] = load_file(path) if path.suffix == ".safetensors" else path.read_bytes()
    return found, tensors


def _json(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def saved_by_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    for name, (kind, settings, dtype) in CASES.items():
        save_model(made(kind, **settings), tiny_tokenizer(), folder / name, dtype=dtype)
    return folder


@pytest.mark.parametrize("strategy", ["shard", "replicate"])
def test_two_ranks_write_what_one_process_writes(strategy, saved_by_one, tmp_path):
    on_ranks(2, _save, tmp_path, strategy)
    for name in CASES:
        (beside, tensors), (true_beside, true) = files(tmp_path / name), files(saved_by_one / name)
        assert beside.keys() == true_beside.keys()
        for file, content in beside.items():
            if file.endswith(".safetensors"):
                torch.testing.assert_close(content, true_beside[file], rtol=0, atol=0)
            else:
                assert content == true_beside[file], f"{name}: {file}"
        torch.testing.assert_close(tensors, true, rtol=0, atol=0)
        index = _json(tmp_path / name / weights.INDEX)
        assert index["weight_map"].keys() == true.keys() and len(set(index["weight_map"].values())) == 2
        held = made(*CASES[name][:1], **CASES[name][1])
        assert index["metadata"]["total_parameters"] == _bare(held).num_parameters()


def _bare(model):
    return merged(model) if hasattr(model, "peft_config") else model


@pytest.mark.parametrize("name", [name for name, (_, _, dtype) in CASES.items() if dtype is None])
def test_files_are_those_of_save_pretrained(name, saved_by_one, tmp_path):
    kind, settings, _ = CASES[name]
    _bare(made(kind, **settings)).save_pretrained(tmp_path)
    _, tensors = files(saved_by_one / name)
    torch.testing.assert_close(tensors, load_file(tmp_path / "model.safetensors"), rtol=0, atol=0)
    if kind == "qwen3_moe":
        assert "model.layers.0.mlp.experts.3.up_proj.weight" in tensors
        AutoModelForCausalLM.from_pretrained(saved_by_one / name)


def _broken(rank, folder, broken_rank):
    save_file = weights.save_file

    def flipping(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    if rank == broken_rank:
        weights.save_file = flipping
    model = made("llama")
    shard_model(Engine(model), device_mesh("shard", "cpu", 2, 2))
    with pytest.raises(CheckpointError) as raised:
        save_model(model, tiny_tokenizer(), folder / "model")
    weights.save_file = save_file
    assert not list(folder.iterdir())
    save_model(model, tiny_tokenizer(), folder / "model")
    return str(raised.value)


def test_a_byte_that_is_read_back_as_another_is_told_on_all_ranks(tmp_path):
    messages = on_ranks(2, _broken, tmp_path, 1)
    assert messages[0] == messages[1]
    assert "model-00002-of-00002.safetensors: " in messages[0] and "read back as something else" in messages[0]
    assert (tmp_path / "model" / "config.json").is_file()


def _written_elsewhere(rank, folder):
    """As of two nodes whose folders are two disks."""
    model = made("llama")
    shard_model(Engine(model), device_mesh("shard", "cpu", 2, 2))
    if rank == 1:
        write = weights._write_file
        weights._write_file = lambda path, tensors: (write(path, tensors), path.unlink())
    with pytest.raises(CheckpointError, match=r"safetensors: another process has written it.*all nodes share"):
        save_model(model, tiny_tokenizer(), folder / "model")


def test_a_file_that_the_first_rank_does_not_see_is_told_on_all_ranks(tmp_path):
    on_ranks(2, _written_elsewhere, tmp_path)
    assert list(tmp_path.iterdir()) == []


def _begun_nowhere(rank, folder):
    model = made("llama")
    shard_model(Engine(model), device_mesh("shard", "cpu", 2, 2))
    with pytest.raises(CheckpointError, match="file/model: cannot be written: Not a directory"):
        save_model(model, tiny_tokenizer(), folder / "file" / "model")


def test_a_folder_that_the_first_rank_cannot_begin_is_told_on_all_ranks(tmp_path):
    (tmp_path / "file").touch()
    on_ranks(2, _begun_nowhere, tmp_path)


def _overflowing(rank, folder):
    model = made("llama")
    with torch.no_grad():
        model.lm_head.weight[-1, -1] = 1e6  # of the second rank's part
    shard_model(Engine(model), device_mesh("shard", "cpu", 2, 2))
    save_model(model, tiny_tokenizer(), folder / "model", dtype=torch.float16)


def test_a_weight_too_large_for_the_type_leaves_all_as_they_are(tmp_path):
    on_ranks(2, _overflowing, tmp_path)
    _, tensors = files(tmp_path / "model")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert _json(tmp_path / "model" / "config.json")["dtype"] == "float32"


def _overflowing_in_the_last_file(rank, folder):
    model = made("llama")
    with torch.no_grad():
        model.lm_head.weight[-1, -1] = 1e6
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    weights._FILE_BYTES = weights._FILE_BYTES_OF_RANK = num_bytes // 6
    if torch.distributed.get_world_size() > 1:
        shard_model(Engine(model), device_mesh("shard", "cpu", 2, 2))
    save_model(model, tiny_tokenizer(), folder / "model", dtype=torch.float16)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_of_a_type_that_is_too_small_no_file_is_left(num_ranks, tmp_path):
    """Half as large, there are fewer of them, under other names."""
    on_ranks(num_ranks, _overflowing_in_the_last_file, tmp_path)
    files_there = {path.name for path in (tmp_path / "model").glob("*.safetensors")}
    assert files_there == set(_json(tmp_path / "model" / weights.INDEX)["weight_map"].values())
