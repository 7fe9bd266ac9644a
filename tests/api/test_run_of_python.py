"""`from preceptor import Run`: live models, data in memory, steps and calls; the same as the command, to the bit."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from conftest import conversations
from preceptor import Run, SFTTrainer, config
from preceptor.errors import CheckpointError, ConfigError, DataError, ModelError
from preceptor.train import evaluations
from preceptor.train.prepare import prepare

SETTINGS = {
    "train": {"duration": "4 steps", "batch_size": 2},
    "optimizer": {"learning_rate": 1e-3},
    "eval": {"num_samples": 1, "max_new_tokens": 4},
}


@pytest.fixture
def live(base_folder):
    """Loads the tiny model and its tokenizer again, as a program does."""

    def load(dtype=torch.float32):
        model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype)
        return {"model": model, "tokenizer": AutoTokenizer.from_pretrained(base_folder)}

    return load


def data(rows=None, **more):
    return {"train": conversations(12) if rows is None else rows, "chat_template": "chatml", "max_length": 128, **more}


def run_of(tmp_path, given, rows=None, name="run", eval_rows=None, **sections):
    own = data(rows) if eval_rows is None else data(rows, eval=eval_rows)
    return Run(**given, data=own, out=tmp_path / name, quiet=True, **{**SETTINGS, **sections})


def lines(folder, name="metrics.jsonl"):
    timed = ("seconds", "peak_memory_bytes")
    found = (json.loads(line) for line in (Path(folder) / name).read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in timed} for line in found]


def saved(folder):
    return AutoModelForCausalLM.from_pretrained(Path(folder) / "model").state_dict()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Live models and data in memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, {"rank": 4}])
def test_a_live_model_and_a_list_train_as_the_command_does_to_the_bit(run_file, tmp_path, live, preceptor, adapter):
    code, _, error = preceptor("train", run_file(out=str(tmp_path / "command"), adapter=adapter))
    assert code == 0, error
    given = live()
    result = run_of(tmp_path, given, adapter=adapter).train()
    assert lines(tmp_path / "command") == lines(tmp_path / "run")
    assert same(saved(tmp_path / "command"), saved(tmp_path / "run"))
    assert result.num_steps == 4 and len(result.losses) == 4 and result.model == tmp_path / "run" / "model"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {p.name for p in (tmp_path / "command").iterdir()}


def test_the_live_model_and_its_tokenizer_are_left_trained_as_plain_transformers(tmp_path, live):
    given = live()
    kinds = [type(module) for module in given["model"].modules()]
    run = run_of(tmp_path, given)
    run.train()
    model, tokenizer = given["model"], given["tokenizer"]
    assert run.model is model and not model.training
    assert [type(module) for module in model.modules()] == kinds
    assert same(saved(tmp_path / "run"), model.state_dict())
    assert all(parameter.grad is None for parameter in model.parameters())
    again = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    messages = [{"role": "user", "content": "user?"}]
    assert tokenizer.eos_token == "<|im_end|>" and len(tokenizer) == len(again) == len(run.tokenizer)
    given = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    ids, expected = (each.apply_chat_template(messages, **given) for each in (tokenizer, again))
    assert torch.equal(ids["input_ids"], expected["input_ids"])
    assert model.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["model"]["path"] == "live:LlamaForCausalLM"
    assert settings["data"]["train"][0]["path"] == "memory:data.train"


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("adapter", [None, {"rank": 2, "modules_to_save": ["lm_head", "norm"]}])
def test_a_bfloat16_model_is_left_to_an_optimizer_of_the_programs_own(tmp_path, live, adapter, fails):
    given = live(torch.bfloat16)
    run = run_of(tmp_path, given, adapter=adapter)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        for _ in run.steps():
            _ = 1 / (not fails)
    optimizer = torch.optim.AdamW(p for p in run.model.parameters() if p.requires_grad)
    ids = torch.tensor([[5, 6, 7]])
    run.model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.dtype == p.dtype for p in run.model.parameters() if p.grad is not None)
    optimizer.step()


def test_an_adapter_that_no_step_has_trained_is_taken_away_whole(tmp_path, live):
    given = live(torch.bfloat16)
    model, before = given["model"], given["model"].state_dict()
    norm, kinds = model.model.norm, [type(module) for module in model.modules()]
    sections = {"adapter": {"rank": 2, "modules_to_save": ["lm_head", "norm"]}, "optimizer": {"lr_factors": {"no": 2}}}
    with pytest.raises(ModelError, match=r"optimizer\.lr_factors"):
        run_of(tmp_path, given, **sections).train()
    assert model.model.norm is norm and [type(module) for module in model.modules()] == kinds
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    after = model.state_dict()
    assert after.keys() == before.keys() and {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(p.requires_grad for p in model.parameters())


ENDS_EARLY = {
    "a target that is none": {"adapter": {"rank": 2, "target_modules": ["nothing"]}},
    "a rank that is too large": {"adapter": {"rank": 2048, "init": "pissa"}},
    "Ctrl-C behind the adapter": {"adapter": {"rank": 2, "modules_to_save": ["norm"]}},
    "Ctrl-C in the preflight": {},
    "Ctrl-C in the preflight, with an adapter": {"adapter": {"rank": 2}},
    "a stop before step 1, with a penalty to the base": {"loss": {"kl_coef": 1.0}},
}


@pytest.mark.parametrize("ends", ENDS_EARLY)
@pytest.mark.parametrize("rows_are_there", [False, True])
@pytest.mark.parametrize("adapter", [None, {"rank": 4}])
def test_a_second_try_trains_what_a_first_one_would_have(tmp_path, live, monkeypatch, ends, rows_are_there, adapter):
    """rows_are_there: the embedding has room for new tokens, so that rows change in place."""

    def loaded():
        given = live()
        if rows_are_there:
            given["model"].resize_token_embeddings(len(given["tokenizer"]) + 70, mean_resizing=False)
            with torch.no_grad():
                for table in (given["model"].get_input_embeddings(), given["model"].get_output_embeddings()):
                    table.weight[len(given["tokenizer"]) :] = 0.0
        return given

    def about(given):
        model, tokenizer = given["model"], given["tokenizer"]
        own = [tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.special_tokens_map]
        modules = [type(module) for module in model.modules()]
        return held.content_of(model), model.generation_config.to_dict(), own, modules, model.vocab_size

    from preceptor.model import held

    given, fresh = loaded(), loaded()
    before = about(given)
    with monkeypatch.context() as patched:
        if ends == "Ctrl-C behind the adapter":
            patched.setattr("preceptor.train.build._require_same_values", stop_at_once)
        elif ends.startswith("Ctrl-C"):
            patched.setattr("preceptor.train.run.preflight", stop_at_once)
        elif ends.startswith("a stop"):
            patched.setattr("preceptor.train.run.Loop", stop_at_once)
        with pytest.raises((ModelError, KeyboardInterrupt)):
            run = run_of(tmp_path, given, name="first", **ENDS_EARLY[ends])
            run.train()
    assert about(given) == before and all(p.requires_grad for p in given["model"].parameters())
    second = run_of(tmp_path, given, adapter=adapter)
    second.train()
    expected = run_of(tmp_path, fresh, name="fresh", adapter=adapter)
    expected.train()
    assert lines(tmp_path / "run") == lines(tmp_path / "fresh")
    assert same(saved(tmp_path / "run"), saved(tmp_path / "fresh"))
    trained = [{name for name, p in each.model.named_parameters() if p.requires_grad} for each in (second, expected)]
    assert trained[0] == trained[1]


def stop_at_once(*_, **__):
    raise KeyboardInterrupt


def test_a_model_trained_before_is_trained_on_with_its_tokenizer(tmp_path, live):
    """What the first run has added is known to the second; nothing is drawn again."""
    given = live()
    run_of(tmp_path, given).train()
    trained = copy.deepcopy(given["model"].state_dict())
    second = run_of(tmp_path, given, name="second")
    for step in second.steps():
        if step.number == 1:
            rows = given["model"].get_input_embeddings().weight
            assert (rows - trained["model.embed_tokens.weight"]).abs().max() < 0.01
            assert second.tokenizer.get_added_vocab() == given["tokenizer"].get_added_vocab()
            break


def test_what_a_program_has_frozen_stays_so_and_what_a_run_froze_does_not(tmp_path, live):
    """Over a loop that is left and goes on, to the end of the run."""
    given = live()
    model = given["model"]
    model.model.norm.requires_grad_(False)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    first = copy.deepcopy(model.state_dict())
    given["model"] = {"path": model, "freeze": ["*.layers.0"]}
    run = run_of(tmp_path, given)
    for step in run.steps():
        if step.number == 2:
            break
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
    run.train()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
    for name, tensor in model.state_dict().items():
        if ".layers." in name or name == "model.norm.weight":
            assert torch.equal(tensor, first[name]) == (".layers.1." not in name), name


FORMS = {
    "a list": lambda rows, _: rows,
    "a generator": lambda rows, _: (row for row in rows),
    "a data set": lambda rows, _: datasets.Dataset.from_list(rows),
    "a path": lambda rows, write: write(rows),
    "two of them": lambda rows, write: [rows[:5], {"path": write(rows[5:]), "weight": 1.0}],
    "a source": lambda rows, _: {"path": rows},
}


@pytest.mark.parametrize("form", FORMS)
def test_whatever_the_data_is_held_in_the_same_tokens_are_trained(tmp_path, base_folder, write_jsonl, form):
    rows = conversations(9)
    tree = {"model": {"path": str(base_folder)}, "data": {"train": [{"path": write_jsonl(rows, "all.jsonl")}]}}
    expected = prepare(config.build({**tree, "out": "-"}, "test"))
    run = Run(base_folder, FORMS[form](rows, write_jsonl), out=tmp_path / "run")
    prepared = prepare(run.config)
    assert prepared.train.sha256 == expected.train.sha256
    assert prepare(run.config).train.sha256 == expected.train.sha256  # a second time, also of a generator


def test_data_in_memory_is_rejected_with_its_place(tmp_path, base_folder):
    rows = [*conversations(3), {"messages": [{"role": "user", "content": "?"}]}, "no record"]
    found = Run(base_folder, rows, out=tmp_path / "run").check()
    assert not found.passed and found.num_rejected == 2
    assert [reason["first_at"] for reason in found.rejections] == ["memory:data.train:row 4", "memory:data.train:row 5"]
    assert "not passed: 2 examples rejected" in str(found) and "<pre>" in found._repr_html_()


# Steps ---------------------------------------------------------------------------------------------------------------


def test_who_owns_the_loop_evaluates_and_saves_by_calls(tmp_path, live):
    run = run_of(tmp_path, live(), eval_rows=conversations(3), checkpoint={"every": None})
    seen = []
    for step in run.steps():
        seen.append((step.number, step.loss))
        if step.number == 2:
            found = run.evaluate()
            assert found.step == 2 and found.loss > 0 and run.evaluate() == found
            run.save()
            assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert seen == [(line["step"], line["loss"]) for line in lines(tmp_path / "run")]
    assert [line["step"] for line in lines(tmp_path / "run", "eval.jsonl")] == [0, 2, 3, 4]
    assert run.result.evaluations[1].loss == found.loss
    with pytest.raises(ConfigError, match=r"evaluate\(\): belongs inside the loop"):
        run.evaluate()


def test_an_evaluation_that_could_not_be_written_is_written_before_the_next_one(tmp_path, live, monkeypatch):
    append, left = evaluations.append_line, [1]

    def full_once(path, line):
        if path.name == "eval.jsonl" and line["step"] == 2 and left:
            left.clear()
            raise CheckpointError("eval.jsonl: no room")
        append(path, line)

    monkeypatch.setattr(evaluations, "append_line", full_once)
    run = run_of(tmp_path, live(), eval_rows=conversations(3), checkpoint={"every": None})
    for step in run.steps():
        if step.number == 2:
            with pytest.raises(CheckpointError, match="no room"):
                run.evaluate()
    for name in ("eval.jsonl", "samples.jsonl"):
        assert [line["step"] for line in lines(tmp_path / "run", name)] == [0, 2, 3, 4]


def test_a_loop_that_saves_each_step_obeys_the_file_STOP(tmp_path, live):
    run, taken = run_of(tmp_path, live()), []
    with pytest.raises(SystemExit):
        for step in run.steps():
            taken.append(step.number)
            if step.number == 2:
                (tmp_path / "run" / "STOP").touch()
            run.save()
    assert taken == [1, 2] and not (tmp_path / "run" / "STOP").exists()


def test_a_live_model_is_asked_tasks(tmp_path, live, write_jsonl):
    """Its figures are kept for no other run: nothing tells it from a model that was changed."""
    task = write_jsonl([{"prompt": "a user", "accepted": ["x"]}], "task.jsonl")
    settings = {"eval": {"tasks": [task], "max_new_tokens": 2, "num_samples": 0}, "train": {"duration": "1 steps"}}
    run_of(tmp_path, live(), **settings).train()
    assert [line["tasks"][0]["num_items"] for line in lines(tmp_path / "run", "eval.jsonl")] == [1, 1]


def test_evaluations_by_calls_alone(tmp_path, live):
    run = run_of(tmp_path, live(), eval_rows=conversations(3), eval={"every": None, "num_samples": 0})
    losses = [run.evaluate().loss for _ in run.steps()]
    assert len(losses) == 4 and all(losses)
    assert [line["step"] for line in lines(tmp_path / "run", "eval.jsonl")] == [1, 2, 3, 4]


def test_stop_ends_the_training_and_the_model_is_saved(tmp_path, live):
    run = run_of(tmp_path, live(), eval_rows=conversations(2))
    for step in run.steps():
        if step.number == 2:
            run.stop()
    result = run.result
    assert result.num_steps == 2 and result.facts["ended_by_program"] == 2 and result.model.is_dir()
    assert [line["step"] for line in lines(tmp_path / "run", "eval.jsonl")] == [0, 2]
    with pytest.raises(CheckpointError, match="this run is finished"):
        run.train()


@pytest.mark.parametrize(
    ("how", "sections"),
    [
        ("the same object", {"adapter": {"rank": 4, "dropout": 0.1}}),
        ("the same object", {"loss": {"kl_coef": 1.0}}),
        ("another program", {}),
        ("a cell that is run again", {}),
        ("a cell that is run again", {"adapter": {"rank": 4, "dropout": 0.1}}),
        ("a cell that is run again", {"loss": {"kl_coef": 1.0}}),
    ],
)
def test_a_loop_that_is_left_goes_on_to_the_same_bits(tmp_path, live, how, sections):
    run_of(tmp_path, live(), name="whole", **sections).train()
    given = live()
    run = run_of(tmp_path, given, **sections)
    for step in run.steps():
        if step.number == 2:
            break
    assert not (tmp_path / "run" / "model").exists()
    if how == "another program":
        run = run_of(tmp_path, live(), **sections)
    elif how == "a cell that is run again":
        run = run_of(tmp_path, given, **sections)
        with pytest.raises(CheckpointError, match="load the model again"):
            run.train(replace=True)
    run.train()
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert same(saved(tmp_path / "run"), saved(tmp_path / "whole"))


@pytest.mark.parametrize("change", ["template", "token", "config", "nothing"])
def test_a_cell_that_is_run_again_goes_on_only_with_what_it_had(tmp_path, live, change):
    """What was changed in between would else be passed over without a word."""
    given = live()
    first = run_of(tmp_path, given)
    for step in first.steps():
        if step.number == 2:
            break
    if change == "template":
        given["tokenizer"].chat_template = given["tokenizer"].chat_template.replace("\n", " \n", 1) + " "
    elif change == "token":
        given["tokenizer"].add_tokens(["<new>"])
    elif change == "config":
        given["model"].config.rms_norm_eps *= 2
    if change == "nothing":
        run_of(tmp_path, {**given, "tokenizer": None}).train()
        return
    with pytest.raises((ConfigError, ModelError, CheckpointError)):
        run_of(tmp_path, given).train()


def test_an_error_in_the_loop_is_raised_and_what_was_trained_is_kept(tmp_path, live):
    run = run_of(tmp_path, live())
    with pytest.raises(ZeroDivisionError):
        for step in run.steps():
            assert step.number == 1
            _ = 1 / 0
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    assert [step.number for step in run.steps()] == [2, 3, 4]


def test_ctrl_c_saves_and_is_raised(tmp_path, live):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background ignores
    run = run_of(tmp_path, live())
    with pytest.raises(KeyboardInterrupt, match="SIGINT after step 2; the same call goes on"):
        for step in run.steps():
            if step.number == 2:
                signal.raise_signal(signal.SIGINT)
    assert [step.number for step in run.steps()] == [3, 4]


# What must be the same -----------------------------------------------------------------------------------------------


def test_other_weights_or_other_data_do_not_go_on(tmp_path, live):
    for step in run_of(tmp_path, live()).steps():
        if step.number == 2:
            break
    changed = live()
    with torch.no_grad():
        changed["model"].lm_head.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"weights \(live:LlamaForCausalLM\) are others: held in memory"):
        run_of(tmp_path, changed).train()
    rows = conversations(12)
    rows[3]["messages"][1]["content"] += " And more."
    with pytest.raises(CheckpointError, match=r"trained tokens are others; these files are others: memory:data\.train"):
        run_of(tmp_path, live(), rows).train()


def test_a_live_model_that_was_trained_does_not_begin_anew(tmp_path, live):
    run = run_of(tmp_path, live())
    run.train()
    with pytest.raises(CheckpointError, match="load the model again"):
        run.train(replace=True)
    assert (tmp_path / "run" / "model").is_dir()


def test_the_command_says_who_goes_on_with_a_run_of_a_program(tmp_path, live, preceptor):
    for _ in run_of(tmp_path, live()).steps():
        break
    code, _, error = preceptor("train", tmp_path / "run" / "config.yaml")
    assert code == 5 and "a Python program held; the same program goes on" in error


# What cannot be -------------------------------------------------------------------------------------------------------


SPLITS = datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": "a"}]))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"model": 7}, ConfigError, "int is neither a path nor a transformers.PreTrainedModel"),
        ({"data": []}, ConfigError, r"data\.train: an empty list"),
        ({"data": 7}, ConfigError, r"data\.train: 7 is no data; give a path, a list of records"),
        ({"data": conversations}, ConfigError, "call it, it is a function"),
        ({"data": (row for row in ())}, ConfigError, "gave no record"),
        ({"data": SPLITS}, ConfigError, r"splits 'train'; give one of them, such as dataset\['train'\]"),
        ({"data": "absent.jsonl"}, DataError, "absent.jsonl: no such data file"),
        ({"learning_rate": 1}, ConfigError, "learning_rate: unknown key; here it is optimizer.learning_rate"),
        ({"train_dataset": object()}, ConfigError, "train_dataset: unknown key; here it is data.train"),
        ({"train": {"epochs": 3}}, ConfigError, "train.epochs: unknown key; here it is train.duration"),
        ({"tokenizer": None}, ConfigError, r"tokenizer: needed with a live model"),
        ({"model_dtype": "bfloat16"}, ConfigError, "model.dtype: says how a model is loaded"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(tmp_path, live, changes, error, says):
    given = {**live(), "data": conversations(2), "out": tmp_path / "run", **changes}
    if "model_dtype" in given:
        given["model"] = {"path": given["model"], "dtype": given.pop("model_dtype")}
    if given["tokenizer"] is None:
        given["model"].config._name_or_path = given["model"].name_or_path = ""
    with pytest.raises(error, match=says):
        Run(**given)
    assert not (tmp_path / "run").exists()


def test_a_data_set_with_a_transform_is_refused(tmp_path, live):
    """Its rows are read without it."""
    plain = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])
    made = plain.with_transform(lambda batch: {**batch, "completion": ["new"] * len(batch["prompt"])})
    for given in (made, [made], {"train": [{"path": made}]}, [plain, made]):
        with pytest.raises(ConfigError, match=r"with_transform.*with_format\(None\)\.map\(function, batched=True\)"):
            Run(**live(), data=given, out=tmp_path / "run")
    mapped = made.with_format(None).map(lambda batch: {"completion": ["new"] * len(batch["prompt"])}, batched=True)
    assert "new" in str(Run(**live(), data=mapped, out=tmp_path / "run").show(1))
    assert Run(**live(), data=plain.with_format("torch"), out=tmp_path / "run").check().num_examples == 1


def test_models_that_cannot_be_trained_as_they_are(tmp_path, live, base_folder):
    def refused(change, error, says):
        given = live()
        given["model"] = change(given["model"]) or given["model"]
        with pytest.raises(error, match=says):
            Run(**given, data=conversations(2), out=tmp_path / "run")

    from preceptor.model.adapters.lora import add_adapter

    refused(lambda model: model.half(), ModelError, "weights are float16; load it with dtype=torch.float32")
    refused(lambda model: add_adapter(model, 4, 8.0, 0.0, None, [], 0), ConfigError, "carries an adapter already")
    refused(lambda model: model.gradient_checkpointing_enable(), ConfigError, "activation_checkpointing")
    refused(lambda model: model.to("meta"), ModelError, "weights are on meta")
    own = type("Own", (LlamaForCausalLM,), {"__module__": "transformers_modules.own"})
    says = "Own is Python code that comes with the model.*Give its path: .*'trust_remote_code': True"
    refused(lambda model: setattr(model, "__class__", own), ConfigError, says)
    with pytest.raises(ConfigError, match="tokenizer: goes with a live model"):
        Run(base_folder, conversations(2), out=tmp_path / "run", tokenizer=live()["tokenizer"])


# Around the training -------------------------------------------------------------------------------------------------


def test_show_renders_as_text_and_as_a_page(tmp_path, live):
    run = run_of(tmp_path, live())
    shown = run.show(2)
    assert "⟦The of a message is 1." in str(shown) and "memory:data.train:row 2" in str(shown)
    page = shown._repr_html_()
    assert page.startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;') and "memory:data.train:row 2" in page
    assert "memory:data.train:row 1" in str(run.show())
    with pytest.raises(DataError, match="counted from 1"):
        run.show(0)
    with pytest.raises(DataError, match="fewer examples"):
        run.show(99)


def test_what_is_looked_at_before_the_training_changes_nothing(tmp_path, live):
    given = live()
    before = copy.deepcopy(given["model"].state_dict()), len(given["tokenizer"])
    run = run_of(tmp_path, given)
    run.check(), run.show(1)
    plan = run.plan()
    assert plan.fits and plan.peak_bytes > 0 and plan.num_steps == 4 and "Memory" in str(plan)
    assert plan.facts["model"]["path"] == "live:LlamaForCausalLM"
    several = run.plan(nproc=2)
    assert several.facts["ranks"] != plan.facts.get("ranks")
    chosen = several.facts["ranks"]["chosen"]
    assert (several.fits, several.peak_bytes) == (chosen["fits"], chosen["peak_bytes"])
    assert several.peak_bytes != several.facts["memory"]["peak_bytes"]
    for wrong in ({"nproc": 0}, {"nnodes": -1}):
        with pytest.raises(ConfigError, match="must be at least 1"):
            run.plan(**wrong)
    assert same(before[0], given["model"].state_dict()) and before[1] == len(given["tokenizer"])
    assert not (tmp_path / "run").exists()


def test_the_result_in_a_notebook_is_the_verdict_and_the_plots_of_the_report(tmp_path, live):
    result = run_of(tmp_path, live(), eval_rows=conversations(3)).train()
    assert set(result.plots()) >= {"Loss", "Learning rate", "Gradient norm"}
    assert all(svg.startswith("<svg") for svg in result.plots().values())
    page = result._repr_html_()
    assert page.count("data:image/svg+xml;base64,") == 4 and str(result.model) in page


def test_a_run_file_with_overrides_of_every_form(run_file, live, tmp_path):
    file = run_file()
    run = Run.from_file(file, "train.seed=3", train={"batch_size": 1}, **{"optimizer.learning_rate": 1e-4})
    settings = run.config
    assert (settings.train.seed, settings.train.batch_size) == (3, 1)
    assert str(settings.train.duration) == "4 steps" and settings.optimizer.learning_rate == 1e-4
    assert settings == config.load(file, ["train.seed=3", "train.batch_size=1", "optimizer.learning_rate=1e-4"])
    own = Run.from_file(file, **live(), data=conversations(5), **{"data.max_length": 64})
    assert (own.config.model.path, own.config.data.train[0].path) == ("live:LlamaForCausalLM", "memory:data.train")
    assert own.config.data.chat_template == "chatml" and own.config.data.max_length == 64
    with pytest.raises(ConfigError, match=r"data\.train\.1: '1' is not an index of a list of 1"):
        Run.from_file(file, **{"data.train.1.weight": 2})


def test_a_data_set_that_is_streamed_is_refused_with_what_works(tmp_path, live):
    """All its examples would be held in memory."""
    streamed = datasets.Dataset.from_list(conversations(4)).to_iterable_dataset()
    for train in (streamed, [conversations(4), streamed]):
        with pytest.raises(
            ConfigError, match=r"data\.train.*IterableDataset.*hf://datasets/OWNER/NAME', 'streaming': True"
        ):
            run_of(tmp_path, live(), train)
    with pytest.raises(ConfigError, match=r"train_dataset: a streamed data set .* cannot be read twice"):
        SFTTrainer(**live(), train_dataset=streamed, formatting_func=str, output_dir=str(tmp_path / "run"))


def test_trackers_follow_a_run_of_python(tmp_path, live, monkeypatch):
    from contextlib import contextmanager

    seen = []

    @contextmanager
    def followed(trackers, folder, say, **_):
        seen.append((trackers, folder))
        yield

    monkeypatch.setattr("preceptor.trackers.follower.followed", followed)
    monkeypatch.setattr("preceptor.trackers.sink.require_installed", lambda names: None)
    run_of(tmp_path, live(), tracker="tensorboard").train()
    assert seen == [(["tensorboard"], tmp_path / "run")]


def finish_late():
    """Let the end of a run take a while in this process."""
    from preceptor.train import finish

    summarise = finish.RunFolder.summarise

    def late(*arguments):
        time.sleep(0.5)
        return summarise(*arguments)

    finish.RunFolder.summarise = late


@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_several_processes_each_with_its_own_copy(tmp_path, live):
    run_of(tmp_path, live(), name="alone").train()

    def work(rank, place, same_weights=True):
        given = live()
        if rank and not same_weights:
            with torch.no_grad():
                given["model"].lm_head.weight[0, 0] += 1
        if not rank:
            finish_late()
        return run_of(place, given).train().losses

    first, second = run_ranks(2, lambda rank: work(rank, tmp_path), connected=False)
    assert first == second == pytest.approx([line["loss"] for line in lines(tmp_path / "alone")], rel=1e-5)
    for name in ("summary.json", "report.html"):  # as of a run that was killed when its model was saved
        (tmp_path / "run" / name).unlink()
    assert run_ranks(2, lambda rank: work(rank, tmp_path), connected=False) == [first, first]
    errors = run_ranks(2, lambda rank: work(rank, tmp_path / "other", same_weights=False), connected=False)
    assert any("live models of other weights" in str(error) for error in errors)


def test_a_program_is_not_run_anew_by_those_that_render(monkeypatch):
    """Fresh interpreters import the main file; most programs have no `if __name__ == "__main__"`."""
    from preceptor.api import run as api

    for method, has_file, expected in (("spawn", True, 1), ("spawn", False, 4), ("fork", True, 4)):
        monkeypatch.setattr(api, "start_method", lambda method=method: method)
        monkeypatch.setattr(api, "num_cores", lambda: 8)
        main = types.SimpleNamespace(**({"__file__": "program.py"} if has_file else {}))
        monkeypatch.setitem(sys.modules, "__main__", main)
        assert api._num_processes() == expected


def test_a_loop_over_a_name_that_was_left_is_saved_by_the_next_call(tmp_path, live, base_folder):
    """As `bar = tqdm(run.steps())`, which an error leaves open."""
    run_of(tmp_path, live(), name="whole").train()
    run = run_of(tmp_path, live())
    handler = signal.getsignal(signal.SIGTERM)
    named = run.steps()
    assert [next(named).number for _ in range(2)] == [1, 2]
    with pytest.raises(CheckpointError, match=r"this run is not finished"):
        _ = run.result
    with pytest.raises(CheckpointError, match=r"another run of this program uses this folder.*close\(\)"):
        run_of(tmp_path, live()).train()
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    last = run.steps()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert signal.getsignal(signal.SIGTERM) is handler and list(named) == []
    assert [step.number for step in last] == [3, 4]
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert same(saved(tmp_path / "run"), saved(tmp_path / "whole"))


def test_steps_are_taken_by_one_loop_at_a_time(tmp_path, live):
    run = run_of(tmp_path, live())

    def prepared(*_):
        run.steps()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("preceptor.train.run.Training.say", prepared)  # while the steps are being taken
        with pytest.raises(ConfigError, match="are being taken already"):
            run.train()


def test_two_runs_of_a_program_do_not_share_a_folder(tmp_path, base_folder):
    """By whatever name, in whatever thread; the lock of files keeps out other processes alone."""
    (tmp_path / "link").symlink_to(tmp_path / "run")
    given = {"model": base_folder}
    for _ in run_of(tmp_path, given).steps():
        held = (tmp_path / "run/.lock").read_text()
        for name in ("run", "link", "other/../run"):
            (tmp_path / "other").mkdir(exist_ok=True)
            with pytest.raises(CheckpointError, match=r"uses this folder.*choose another `out`"):
                run_of(tmp_path, given, name=name).train()
        with ThreadPoolExecutor() as threads, pytest.raises(CheckpointError, match="uses this folder"):
            threads.submit(run_of(tmp_path, given).train).result()
        assert (tmp_path / "run/.lock").read_text() == held
        break
    assert run_of(tmp_path, given).train().num_steps == 4


def test_a_display_that_goes_away_does_not_end_a_run(tmp_path, base_folder):
    """`python program.py | grep -m1 "step 2"`."""
    program = f"""
import sys
from preceptor import Run
from conftest import conversations
data = {{"train": conversations(12), "chat_template": "chatml", "max_length": 128}}
Run({str(base_folder)!r}, data, out={str(tmp_path / "run")!r}, **{SETTINGS!r}).train()
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read().decode()
    assert process.returncode == 0 and "Traceback" not in error and "BrokenPipe" not in error, error
    assert len(lines(tmp_path / "run")) == 4 and (tmp_path / "run/model").is_dir()


@pytest.mark.parametrize("changes", [{}, {"optimizer": {"learning_rate": 1e-4, "lr_factors": {"*.norm": 2.0}}}])
def test_keys_of_tables_may_have_dots(run_file, tmp_path, base_folder, changes):
    factors, ranks = {"*.embed_tokens": 0.1}, {"layers.0.self_attn.q_proj": 4}
    given = {"optimizer": {"lr_factors": factors}, "adapter": {"rank": 2, "rank_pattern": ranks}}
    columns = {"path": [{"a.b": "1?", "c": "2."}], "columns": {"prompt": "a.b", "completion": "c"}}
    for run in (
        Run(base_folder, {"train": columns}, out=tmp_path / "run", **given),
        Run.from_file(run_file(adapter={"rank": 4}, **changes), data={"train": columns}, **given),
    ):
        assert run.config.optimizer.lr_factors == factors
        assert run.config.adapter.rank == 2 and run.config.adapter.rank_pattern == ranks
        assert run.config.data.train[0].columns == columns["columns"]
    assert not changes or run.config.optimizer.learning_rate == 1e-4


def test_importing_preceptor_does_not_import_torch():
    code = "import sys, preceptor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
