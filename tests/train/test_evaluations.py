"""Evaluations during training: what eval.jsonl and samples.jsonl hold, and that they change no training step."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from conftest import conversations
from preceptor import config
from preceptor.errors import DataError, ModelError
from preceptor.evaluate.model import EvaluatedModel
from preceptor.train.evaluations import Evaluations, _base_figures, _shown
from preceptor.train.prepare import prepare
from preceptor.world import ONE
from runs import execute

TASK = [{"messages": [{"role": "user", "content": f"start of a message {n}?"}], "accepted": ["x"]} for n in range(5)]


def train(file, *overrides):
    run = config.load(file, overrides)
    execute(prepare(run), Console(quiet=True))
    return Path(run.out)


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_every_look_has_the_held_out_figures_in_all_and_by_group_and_the_tasks(run_file, write_jsonl):
    task = write_jsonl(TASK, "task.jsonl")
    file = run_file(eval_rows=conversations(4, turns=2), eval__tasks=[task], eval__limit=3, eval__every="2 steps")
    folder = train(file)
    looks = lines(folder, "eval.jsonl")
    assert [look["step"] for look in looks] == [0, 2, 4], "every curve starts at the base model"
    for look in looks:
        assert look["loss"] > 0 and look["bits_per_byte"] > 0 and look["num_trained"] > 0
        (source,) = look["by_source"]
        assert source.endswith("eval.jsonl")
        assert set(look["by_turn"]) == {"1", "2"} and set(look["by_kind"]) == {"plain"}
        for group in ("by_source", "by_kind", "by_turn"):
            assert sum(own["num_trained"] for own in look[group].values()) == look["num_trained"]
            mean = sum(own["loss"] * own["num_trained"] for own in look[group].values()) / look["num_trained"]
            assert mean == pytest.approx(look["loss"], rel=1e-6)
        (examined,) = look["tasks"]
        assert examined["task"] == task and examined["num_items"] == 3
        assert sum(examined["counts"][key] for key in ("stop_token", "until", "length")) == 3
        assert look["measured_on"].keys() == {"held_out", task} and look["measured_on"] == looks[0]["measured_on"]
    assert looks[-1]["loss"] < looks[0]["loss"]
    samples = lines(folder, "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0, 2, 4]
    assert all({"answer", "stopped", "sampled", "sampled_stopped", "reference"} <= sample.keys() for sample in samples)


@pytest.mark.parametrize(("train_on", "turn"), [("assistant", 0), ("last", 1), ("all", 0)])
def test_samples_answer_the_question_that_stands_beside_them(train_on, turn, run_file):
    """Also where the prompt is a target too, and where the first turn that is trained is not the conversation's."""
    row = conversations(2, turns=2)[1]
    run = config.load(run_file(eval_rows=[row]), [f"data.train_on={train_on}", "train.precision=float32"])
    prepared = prepare(run)
    (prompt,) = Evaluations(prepared, Path(run.out), print, alone=False).prompts
    question, answer = row["messages"][2 * turn : 2 * turn + 2]
    assert (prompt.last_message, prompt.reference) == (question["content"], answer["content"])
    context = prepared.chat.tokenizer.decode(prompt.context)
    assert context.endswith(f"{question['content']}<|im_end|>\n<|im_start|>assistant\n")
    assert context.count("assistant\n") == turn + 1


def test_looking_changes_nothing_that_is_trained(run_file, write_jsonl):
    file = run_file(eval_rows=conversations(2), eval__tasks=[write_jsonl(TASK, "task.jsonl")], adapter={"dropout": 0.3})
    often = train(file, "eval.every=1 steps")
    never = train(file, "eval.every=null", f"out={often}-never")

    def losses(folder):
        return [(line["loss"], line["grad_norm"]) for line in lines(folder, "metrics.jsonl")]

    assert losses(often) == losses(never)
    assert lines(never, "eval.jsonl") == []


def test_samples_are_drawn_anew_but_by_the_same_seed(run_file):
    """At a rate that changes no weight all looks say the same; another seed says something else."""
    file = run_file(eval_rows=conversations(1), eval__every="1 steps", optimizer__learning_rate=1e-30)
    first = lines(train(file, "eval.max_new_tokens=12"), "samples.jsonl")
    assert len({sample["sampled"] for sample in first}) == 1 and first[0]["sampled"] != first[0]["answer"]
    other = train(file, "eval.max_new_tokens=12", "eval.temperature=0.01", "out=" + str(file.parent / "cold"))
    cold = lines(other, "samples.jsonl")
    assert cold[0]["sampled"] == cold[0]["answer"], "at a low temperature the likeliest token is drawn"


def test_figures_of_the_base_are_kept_apart_for_each_quantization(run_file, write_jsonl):
    file = run_file(eval__tasks=[write_jsonl(TASK, "task.jsonl")], adapter={"rank": 2})
    kinds = ["null", "int8", "nf4"]
    runs = [config.load(file, [f"model.quantization={kind}"]) for kind in kinds]
    runs += [config.load(file, ["model.quantization=nf4", "model.double_quantization=false"])]
    assert len({_base_figures(prepare(run), ONE)[1] for run in runs}) == 4


def test_a_kept_figure_that_is_not_finite_is_said():
    kept = {"task": "t", "figures": {"own": {"value": None, "low": None, "high": None}}}
    assert _shown({"tasks": [kept]}) == "t own not finite"


def test_a_broken_task_stops_the_run_before_anything_is_written(run_file, write_jsonl, tmp_path):
    task = write_jsonl([{"prompt": "x"}], "task.jsonl")
    with pytest.raises(DataError, match=r"task\.jsonl:1: not an item of a task"):
        prepare(config.load(run_file(eval__tasks=[task])))
    assert not (tmp_path / "run").exists()


def test_held_out_examples_that_do_not_fit_in_memory_are_named(run_file, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("preceptor.train.evaluations.measure", fail)
    with pytest.raises(ModelError, match=r"held-out examples does not fit in memory: lower data\.max_length"):
        train(run_file(eval_rows=conversations(1)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_samples_and_tasks_are_answered_in_the_precision_of_the_run(precision, run_file, write_jsonl, monkeypatch):
    seen, generate = [], EvaluatedModel.generate

    def watched(self, prompts, *given, **named):
        seen.append((len(prompts), torch.is_autocast_enabled("cpu")))
        return generate(self, prompts, *given, **named)

    monkeypatch.setattr(EvaluatedModel, "generate", watched)
    file = run_file(eval_rows=conversations(1), eval__tasks=[write_jsonl(TASK, "task.jsonl")])
    train(file, f"train.precision={precision}", "train.duration=1 steps", "eval.every=1 steps")
    assert {number for number, _ in seen} == {1, 5} and {half for _, half in seen} == {precision == "bfloat16"}
