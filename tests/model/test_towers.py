"""Models that also see: text is trained, the tower is kept, and what is saved is the whole."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from rich.console import Console
from transformers import AutoModelForMultimodalLM

from conftest import conversations
from preceptor import config
from preceptor.errors import ModelError
from preceptor.model import load
from preceptor.model.attention import decoder_of
from preceptor.model.forward import check_head, check_isolation
from preceptor.model.load import load_model
from preceptor.model.plain import check_plain
from preceptor.model.towers import freeze_towers, tower_parameters
from preceptor.train import execute as execution
from preceptor.train.prepare import prepare
from tiny import SEEING, seeing_model, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("kind", SEEING)
def test_the_proofs_hold_for_its_text(kind):
    model = seeing_model(kind)
    check_head(model)
    if kind == "llama4":  # chunked attention
        with pytest.raises(ModelError, match="its mask shows it other tokens"):
            check_isolation(model)
        check_plain(model)
    else:
        check_isolation(model)


@pytest.mark.parametrize("kind", SEEING)
def test_exactly_the_tower_is_frozen(kind):
    model = seeing_model(kind)
    freeze_towers(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all("vision" in name or "visual" in name or "projector" in name for name in frozen)
    assert all(
        p.requires_grad for part in (decoder_of(model), model.get_output_embeddings()) for p in part.parameters()
    )


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "mamba"])
def test_a_model_that_knows_text_only_has_none(kind):
    assert not list(tower_parameters(tiny_model(kind)))


@pytest.mark.parametrize("kind", SEEING)
@pytest.mark.parametrize("adapter", [None, {"rank": 4}])
def test_a_run_changes_the_text_and_saves_the_whole(run_file, tmp_path, kind, adapter):
    tokenizer = tiny_tokenizer()
    base = seeing_model(kind, vocab_size=len(tokenizer))
    base.generation_config.eos_token_id = tokenizer.eos_token_id
    for part in (base, tokenizer):
        part.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "processor_config.json").write_text('{"processor_class": "Any"}')
    sections = {"model": {"path": str(tmp_path / "base")}} | ({"adapter": adapter} if adapter else {})
    file = run_file(conversations(8), eval_rows=conversations(2), **sections)
    run = config.load(file, ["train.duration=3 steps", "train.learning_rate=0.01"])
    execution.execute(prepare(run), Console(quiet=True))
    saved = Path(run.out) / "model"
    written = json.loads((saved / "config.json").read_text())
    assert written["architectures"] == [type(base).__name__]
    assert (saved / "processor_config.json").read_text() == '{"processor_class": "Any"}'
    tuned = AutoModelForMultimodalLM.from_pretrained(saved)
    towers = {id(p) for p in tower_parameters(tuned)}
    before = dict(base.named_parameters())
    for name, parameter in tuned.named_parameters():
        if id(parameter) in towers:
            assert torch.equal(parameter, before[name]), name
        elif name.endswith("q_proj.weight"):
            assert not torch.equal(parameter, before[name]), name
    assert towers
    assert type(load_model(saved, "float32", "cpu")) is type(tuned)


def test_of_a_hub_model_the_processor_is_fetched_when_it_is_loaded(monkeypatch, tmp_path):
    """The Hub is played: it has one of the three files. Saving reads the cache, so that it needs no network."""
    cache = {}

    def download(place, name, revision):
        if name != "preprocessor_config.json":
            raise EntryNotFoundError(f"{place} has no {name}")
        cache[place, name] = tmp_path / name
        cache[place, name].write_text("{}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda place, name, revision: str(cache.get((place, name), "")) or None,
    )
    model = seeing_model("gemma3")
    model.name_or_path = "owner/name"
    assert load._processor_files(model) == []
    load._fetch_processor("owner/name", None)
    assert load._processor_files(model) == [tmp_path / "preprocessor_config.json"]
