"""Runs that start from another run's model or adapter, and runs that are lengthened."""

import json
import re

import pytest
import torch
from children import Killed, killed_at_step
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from conftest import conversations
from preceptor import config
from preceptor.errors import ConfigError
from preceptor.train.earlier_run import with_start
from tiny import tiny_model, tiny_tokenizer

LORA = ("adapter={rank: 2, dropout: 0.1}",)


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture
def first(run_file, tmp_path, preceptor):
    """Trains a run in `a`; gives its run file, and a function that starts another one."""
    file = run_file(eval_rows=conversations(4), optimizer__learning_rate=1e-2, eval__num_samples=0)

    def start(*words):
        code, out, error = preceptor("train", file, *words)
        return code, out + error

    def train(*overrides):
        code, shown = start(*overrides, f"out={tmp_path}/a")
        assert code == 0, shown
        return start

    return train


def losses(folder):
    return [line["loss"] for line in lines(folder, "eval.jsonl")]


def test_an_adapter_is_trained_on(first, tmp_path):
    """The first loss of the second run is the last of the first one; its base is the untouched one."""
    start = first(*LORA)
    code, shown = start("--from", tmp_path / "a", *LORA, f"out={tmp_path}/b")
    assert code == 0, shown
    assert f"trains on the adapter of {tmp_path}/a" in shown
    assert losses(tmp_path / "b")[0] == losses(tmp_path / "a")[-1]
    record = json.loads((tmp_path / "b" / "environment.json").read_text())
    first_record = json.loads((tmp_path / "a" / "environment.json").read_text())
    assert record["from_run"]["run"] == first_record["run"] and record["from_run"]["folder"] == str(tmp_path / "a")
    assert record["model"]["weights"] == first_record["model"]["weights"]
    assert config.load(tmp_path / "b" / "config.yaml").model.from_run == str(tmp_path / "a")


@pytest.mark.parametrize(("before", "now"), [((), ()), ((), LORA), (LORA, ())])
def test_in_all_other_cases_its_model_is_the_base(first, tmp_path, before, now):
    start = first(*before)
    code, shown = start("--from", tmp_path / "a", *now, "train.duration=1 steps", f"out={tmp_path}/b")
    assert code == 0, shown
    assert losses(tmp_path / "b")[0] == pytest.approx(losses(tmp_path / "a")[-1], rel=1e-6)
    assert config.load(tmp_path / "b" / "config.yaml").model.path == f"{tmp_path}/a/model"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("adapter={rank: 4, dropout: 0.1}", r"adapter\.rank: 2 there, 4 here"),
        ("adapter={rank: 2, alpha: 64}", r"adapter\.alpha: 4 there, 64 here"),
        (
            "adapter={rank: 2, target_modules: [q_proj]}",
            r"not adapted here \(adapter\.target_modules, adapter\.modules_to_save\)",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(first, tmp_path, settings, words):
    start = first(*LORA)
    code, shown = start("--from", tmp_path / "a", settings, f"out={tmp_path}/b")
    assert code == 5 and "this adapter does not fit the run's" in shown
    assert re.search(words, shown), shown
    assert not (tmp_path / "b").exists()


def template(folder, *tokens):
    """One that writes two special tokens around each message."""
    first, last = tokens
    text = "{% for m in messages %}" + first + "{{ m.role }} {{ m.content }}" + last + "{% endfor %}"
    file = folder / f"{first}{last}.jinja"
    file.write_text(text + "{% if add_generation_prompt %}" + first + "assistant {% endif %}")
    return f"data.chat_template={file}"


def rows_of(folder):
    """Each token's trained rows, by the table's name."""
    adapter = folder / "model" / "adapter"
    ids = json.loads((adapter / "adapter_config.json").read_text())["trainable_token_indices"]
    names = AutoTokenizer.from_pretrained(adapter).convert_ids_to_tokens
    found = load_file(adapter / "adapter_model.safetensors")
    rows = {name.split(".")[-3]: tensor for name, tensor in found.items() if "trainable_tokens" in name}
    return {(table, names(id_)): row for table in rows for id_, row in zip(ids[table], rows[table], strict=True)}


def test_rows_of_tokens_are_trained_on_by_their_ids(first, tmp_path):
    """Tokens in reserve: `<|b|>`, of the first run alone, keeps its row; `<|c|>`, of the second alone, gets its own."""
    tokenizer = tiny_tokenizer(special_tokens=("<|endoftext|>", "<|a|>", "<|b|>", "<|c|>"))
    model = tiny_model("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            table[1:4] = table.mean(dim=0)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    shared = (*LORA, f"model.path={tmp_path}/base", "checkpoint.every=1 steps")
    start = first(*shared, template(tmp_path, "<|a|>", "<|b|>"))
    again = ("--from", tmp_path / "a", *shared, template(tmp_path, "<|a|>", "<|c|>"))
    code, shown = start(*again, "optimizer.learning_rate=1e-9", f"out={tmp_path}/b")
    assert code == 0, shown
    before, after = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert {token for _, token in before} == {"<|a|>", "<|b|>"} and {token for _, token in after} == {
        "<|a|>",
        "<|b|>",
        "<|c|>",
    }
    for key, row in before.items():
        torch.testing.assert_close(after[key], row, rtol=0, atol=1e-7)
    for table in ("embed_tokens", "lm_head"):
        assert all((after[table, "<|c|>"] - before[table, other]).norm() > 0.1 for other in ("<|a|>", "<|b|>"))
    assert start(*again, f"out={tmp_path}/whole")[0] == 0
    with killed_at_step(2):
        start(*again, f"out={tmp_path}/killed")
    assert start(*again, f"out={tmp_path}/killed")[0] == 0
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_rows_of_other_tokens_under_the_same_ids_are_refused(first, tmp_path):
    start = first(*LORA, template(tmp_path, "<|a|>", "<|b|>"))
    again = ("--from", tmp_path / "a", *LORA, template(tmp_path, "<|a|>", "<|c|>"), f"out={tmp_path}/b")
    code, shown = start(*again)
    assert code == 5 and "rows for other tokens than the run's" in shown
    assert re.search(
        r"<\|b\|> is \d+ there, absent here\. Set data\.chat_template as in the run", " ".join(shown.split())
    )
    assert not (tmp_path / "b").exists()


def test_an_adapter_of_another_base_is_refused(first, tmp_path, base_folder):
    import shutil

    start = first(*LORA)
    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    changed = {name: tensor + 0.05 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
    code, shown = start("--from", tmp_path / "a", *LORA, f"model.path={base}", f"out={tmp_path}/b")
    assert code == 5 and f"the adapter of {tmp_path}/a was trained on another base model" in shown


def test_another_adapter_in_the_same_place_is_not_gone_on_with(first, tmp_path):
    start = first(*LORA)
    arguments = ("--from", tmp_path / "a", *LORA, f"out={tmp_path}/b")
    assert start(*arguments)[0] == 0
    for name in ("summary.json", "report.html"):
        (tmp_path / "b" / name).unlink()
    import shutil

    shutil.rmtree(tmp_path / "b" / "model")
    file = tmp_path / "a" / "model" / "adapter" / "adapter_model.safetensors"
    changed = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})
    code, shown = start(*arguments)
    assert code == 6 and "the adapter that the run starts from" in shown


def test_what_is_no_run_or_has_no_model_is_refused(run_file, tmp_path):
    run = config.load(run_file(), [f"model.from_run={tmp_path}"])
    with pytest.raises(ConfigError, match=r"model\.from_run: .* is not the folder of a run"):
        with_start(run)
    record = {"command": "x", "versions": {}, "trees_sha256": "0"}
    (tmp_path / "environment.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="has no model yet; its own command continues it"):
        with_start(run)


# A longer run --------------------------------------------------------------------------------------------------------

CONSTANT = ("optimizer.lr_scheduler=constant", "optimizer.warmup=2 steps", "checkpoint.every=3 steps")


def test_a_finished_run_of_constant_rate_is_lengthened_to_the_same_bits(run_file, tmp_path, preceptor):
    file = run_file(eval_rows=conversations(2), eval__num_samples=0)
    assert preceptor("train", file, *CONSTANT)[0] == 0
    compared = [tmp_path / "run" / name for name in ("compare.json", "items.jsonl")]  # of the shorter run's model
    for place in compared:
        place.write_text('{"tasks": []}\n')
    code, out, error = preceptor("train", file, *CONSTANT, "train.duration=7 steps")
    assert code == 0, error
    assert not any(place.exists() for place in compared)
    assert "lengthened to 7 steps; goes on after step 4" in out
    assert preceptor("train", file, *CONSTANT, "train.duration=7 steps", f"out={tmp_path}/whole")[0] == 0
    one, other = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 8))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_steps"] == 7
    assert config.load(tmp_path / "run" / "config.yaml").train.duration.count == 7
    code, _, error = preceptor("train", file, *CONSTANT)  # shorter again
    assert code == 6 and "train.duration: 7 steps in" in error


def test_a_run_without_a_checkpoint_is_not_lengthened_and_keeps_its_model(run_file, tmp_path, preceptor):
    file = run_file()
    settings = (*CONSTANT[:2], "checkpoint.every=null")
    assert preceptor("train", file, *settings)[0] == 0
    code, _, error = preceptor("train", file, *settings, "train.duration=7 steps")
    assert code == 6 and "has no checkpoint to train on from" in error
    assert (tmp_path / "run" / "model").is_dir() and (tmp_path / "run" / "summary.json").is_file()


def test_a_checkpoint_without_the_optimizer_is_not_trained_on_from(run_file, tmp_path, preceptor, monkeypatch):
    """Of a training whose model could not be saved: the same command saves it, a longer run is refused."""
    file = run_file()
    settings, longer = (*CONSTANT[:2], "checkpoint.every=null"), "train.duration=7 steps"
    with monkeypatch.context() as patch:
        patch.setattr("preceptor.train.run.save_model", lambda *_, **__: (_ for _ in ()).throw(OSError("no room")))
        assert preceptor("train", file, *settings)[0] == 6
    code, _, error = preceptor("train", file, *settings, longer)
    assert code == 6 and "step-00000004: was saved without the state of the optimizer" in error
    assert config.load(tmp_path / "run" / "config.yaml").train.duration.count == 4
    assert preceptor("train", file, *settings)[0] == 0 and (tmp_path / "run" / "model").is_dir()
    code, _, error = preceptor("train", file, *settings, longer)
    assert code == 6 and "was saved without the state of the optimizer" in error
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.parametrize("settings", [CONSTANT[1:], CONSTANT[:1]])
def test_where_the_rate_depends_on_the_length_it_may_not_change(run_file, preceptor, settings):
    file = run_file()
    assert preceptor("train", file, *settings)[0] == 0
    code, _, error = preceptor("train", file, *settings, "train.duration=7 steps")
    assert code == 6 and "train.duration: 4 steps in" in error and "such a run may be lengthened" in error


def test_a_lengthening_may_be_killed_anywhere(run_file, tmp_path, preceptor, monkeypatch):
    """After each of its removals and writes; the same command finishes it."""
    from preceptor.train import run_folder

    file = run_file()
    longer = (*CONSTANT, "train.duration=7 steps")
    assert preceptor("train", file, *longer, f"out={tmp_path}/whole")[0] == 0

    for name in ("remove_folder", "write_json", "write_atomically"):
        out = f"out={tmp_path}/{name}"
        assert preceptor("train", file, *CONSTANT, out)[0] == 0

        def killed(*_):
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(run_folder, name, killed)
            preceptor("train", file, *longer, out)
        code, _, error = preceptor("train", file, *longer, out)
        assert code == 0, error
        one, other = weights(tmp_path / name), weights(tmp_path / "whole")
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
