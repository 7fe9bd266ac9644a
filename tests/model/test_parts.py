"""Models that also see: text is trained, the tower is kept, and what is saved is the whole."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForMultimodalLM

from conftest import conversations
from preceptor import config
from preceptor.errors import ModelError
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.checks import check_head, check_isolation, check_sequential
from preceptor.model.load import load_model
from preceptor.model.loss.linear_cross_entropy import output_head
from preceptor.model.options import LoraOptions
from preceptor.model.parts import freeze_towers, tower_parameters
from preceptor.train.prepare import prepare
from runs import execute
from tiny import SEEING, seeing_model, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("kind", SEEING)
def test_the_proofs_hold_for_its_text(kind):
    model = seeing_model(kind)
    check_head(model)
    if kind == "llama4":  # chunked attention
        with pytest.raises(ModelError, match="its mask shows it other tokens"):
            check_isolation(model)
        check_sequential(model)
    else:
        check_isolation(model)


@pytest.mark.parametrize("kind", SEEING)
def test_exactly_the_tower_is_frozen(kind):
    model = seeing_model(kind)
    freeze_towers(model)
    for name, parameter in model.named_parameters():
        of_tower = any(mark in name for mark in ("vision", "visual", "projector"))
        assert parameter.requires_grad != of_tower, name


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
    run = config.load(file, ["train.duration=3 steps", "optimizer.learning_rate=0.01"])
    shown = io.StringIO()
    execute(prepare(run), Console(file=shown, width=200))
    num_towers = sum(p.numel() for p in tower_parameters(base))
    assert f"{num_towers:,} parameters are of towers that no text goes through" in shown.getvalue()
    if adapter is None:
        total, trained = re.search(r"([\d,]+) parameters, ([\d,]+) trained", shown.getvalue()).groups()
        assert int(total.replace(",", "")) - int(trained.replace(",", "")) == num_towers
    saved = Path(run.out) / "model"
    written = json.loads((saved / "config.json").read_text())
    assert written["architectures"] == [type(base).__name__]
    assert (saved / "processor_config.json").read_text() == '{"processor_class": "Any"}'
    tuned = AutoModelForMultimodalLM.from_pretrained(saved)
    towers = {id(p) for p in tower_parameters(tuned)}
    before = dict(base.named_parameters())
    changed = {name for name, p in tuned.named_parameters() if not torch.equal(p, before[name])}
    assert not changed & {name for name, p in tuned.named_parameters() if id(p) in towers}
    of_text = {name for name, p in tuned.named_parameters() if id(p) not in towers and "q_proj" in name}
    assert of_text and changed >= of_text
    assert type(load_model(saved, "float32", "cpu")) is type(tuned)


def test_a_head_that_is_trained_whole_in_float32_is_the_models_own_beside_a_decoder_in_bfloat16():
    model = tiny_model("llama", dtype=torch.bfloat16)
    options = LoraOptions(modules_to_save=("lm_head",))
    model = add_adapter(model, 4, 8.0, 0.0, None, [], seed=0, options=options)
    assert output_head(model).weight_VD.dtype == torch.float32
    check_head(model)
