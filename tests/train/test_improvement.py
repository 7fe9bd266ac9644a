"""The best evaluation, and when they no longer improve: from the lines of eval.jsonl alone."""

import math
import random

import pytest

from preceptor import config
from preceptor.errors import ConfigError
from preceptor.train.improvement import best_of, improvement, num_without_improvement, outcome, stopped_early


def run_of(best=None, patience=None, tasks=(), **changes):
    tree = {
        "model": {"path": "m"},
        "data": {"train": [{"path": "a"}], "eval": [{"path": "e"}]},
        "train": {"patience": patience},
        "checkpoint": {"best": best},
        "eval": {"tasks": list(tasks), "every": "2 steps"},
        "out": "o",
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    return config.build(tree, "test")


def judged(*losses, num=40, spread=0.0):
    """The lines of evaluations whose examples have about these losses, with noise of this standard deviation."""
    lines, drawn = [], random.Random(1)
    for step, loss in enumerate(losses):
        own = [10 * (loss + drawn.gauss(0, spread)) for _ in range(num)]
        line = {"step": step, "loss": loss, "by_example": {"loss": own, "num_tokens": [10] * num}}
        lines.append(line | {"improvement": improvement(lines, line, 0)})
    return lines


def test_an_evaluation_improves_where_the_whole_interval_is_below_zero():
    lines = judged(3.0, 2.5, 2.5, 2.6)
    assert [line["improvement"]["improves"] for line in lines] == [True, True, False, False]
    assert [line["improvement"]["on_step"] for line in lines] == [None, 0, 1, 1]
    assert lines[3]["improvement"]["difference"] == pytest.approx(0.1)
    noisy = judged(3.0, 2.99, spread=1.0)
    assert [line["improvement"]["improves"] for line in noisy] == [True, False]
    assert noisy[1]["improvement"]["low"] < 0 < noisy[1]["improvement"]["high"]


def test_small_steps_add_up():
    """Each is within chance of the one before, all together are not: compared with the last that improved."""
    lines = judged(*(3.0 - 0.04 * step for step in range(12)), spread=0.3)
    improves = [line["improvement"]["improves"] for line in lines]
    assert False in improves and any(improves[improves.index(False) :])


def test_one_example_has_no_interval_and_its_loss_decides():
    lines = judged(3.0, 2.0, 2.5, num=1)
    assert [line["improvement"]["improves"] for line in lines] == [True, True, False]


@pytest.mark.parametrize("first", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_nothing_to_improve_on(first):
    lines = judged(first, first, 2.0, first, 1.5)
    assert [line["improvement"]["improves"] for line in lines] == [True, False, True, False, True]
    assert [line["improvement"]["on_step"] for line in lines] == [None, 0, None, 2, 2]


def test_other_held_out_examples_are_no_pair():
    lines = judged(3.0, 2.0)
    line = {"step": 2, "loss": 9.0, "by_example": {"loss": [9.0], "num_tokens": [1]}}
    assert improvement(lines, line, 0) == {"improves": True, "on_step": None}


def test_the_run_ends_after_so_many_evaluations_without_improvement():
    lines = judged(3.0, 2.0, 2.1, 2.2, 2.3)
    assert [num_without_improvement(lines[:end]) for end in range(6)] == [0, 0, 0, 1, 2, 3]
    assert stopped_early(lines[:4], 3) is None and stopped_early(lines, None) is None
    early = stopped_early(lines, 3)
    assert early["step"] == 4 and early["num_evaluations"] == 3 and early["on_step"] == 1


def test_the_best_is_the_earliest_of_equal_ones_and_not_the_base():
    lines = [
        {"step": step, "loss": loss, "token_accuracy": 1 - loss / 9} for step, loss in ((0, 1.0), (2, 2.0), (4, 2.0))
    ]
    assert best_of(lines, run_of("loss")) == (2, 2.0)
    assert best_of(lines, run_of("token_accuracy"))[0] == 2
    assert best_of(lines, run_of()) is None and best_of(lines[:1], run_of("loss")) is None
    for bad in (math.nan, math.inf, -math.inf):
        broken = [{"step": 1, "loss": bad, "token_accuracy": bad}, *lines, {"step": 6, "loss": bad}]
        assert best_of(broken, run_of("loss")) == (2, 2.0), "of no number nothing can be the best"
        assert best_of(broken[:-1], run_of("token_accuracy"))[0] == 2 and best_of(broken[:1], run_of("loss")) is None
    assert outcome(lines, run_of("loss"), 4, 9) == {
        "model_step": 2,
        "best": {"metric": "loss", "value": 2.0, "step": 2},
    }
    assert outcome(lines, run_of(), 4, 9) == {"model_step": 4}


@pytest.mark.parametrize(("figure", "step"), [("accuracy", 4), ("bits_per_byte", 2)])
def test_the_best_by_a_task_is_by_its_first_figure(figure, step):
    lines = [
        {"step": at, "tasks": [{"task": "a", "figures": {}}, {"task": "b", "figures": {figure: {"value": value}}}]}
        for at, value in ((2, 0.1), (4, 0.3), (6, 0.2))
    ]
    for tasks in (["a", "b"], ["b", "a"], ["c", "a", "b"], ["b"]):  # also where the run went on with other tasks
        assert best_of(lines, run_of("b", tasks=tasks))[0] == step
    assert best_of(lines, run_of("c", tasks=["c", "b"])) is None


def on(line, **measured_on):
    return line | {"measured_on": measured_on}


def test_only_figures_of_the_same_held_out_examples_and_tasks_are_compared():
    """A run may go on with other ones: their losses say nothing about each other."""
    before, after = judged(3.0, 0.5), judged(3.0, 2.9, 2.8)[1:]
    lines = [on(line, held_out="x", b="y") for line in before]
    for step, line in enumerate(after, start=2):
        line = on(line | {"step": step}, held_out="z", b="y")
        lines.append(line | {"improvement": improvement(lines, line, 0)})
    assert [line["improvement"]["on_step"] for line in lines] == [None, 0, None, 2]
    assert [line["improvement"]["improves"] for line in lines] == [True] * 4
    assert best_of(lines, run_of("loss")) == (3, 2.8)
    assert best_of(lines[:2], run_of("loss")) == (1, 0.5)
    for line, value in zip(lines, (0.0, 0.9, 0.2, 0.1), strict=True):
        line["tasks"] = [{"task": "b", "figures": {"accuracy": {"value": value}}}]
    assert best_of(lines, run_of("b", tasks=["b"])) == (1, 0.9), "the task is the same"
    lines[-1]["measured_on"]["b"] = lines[-2]["measured_on"]["b"] = "other items"
    assert best_of(lines, run_of("b", tasks=["b"])) == (2, 0.2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"best": "f1"}, r"checkpoint\.best: 'f1' is not measured; choose one of loss, token_accuracy"),
        ({"best": "loss", "eval__every": None}, r"checkpoint\.best: needs evaluations: set eval\.every"),
        ({"patience": 3, "eval__every": None}, r"train\.patience: needs evaluations"),
        ({"patience": 3, "eval__every": "10 minutes"}, r"train\.patience: needs eval\.every in steps or epochs"),
        ({"patience": 3, "data__eval": []}, r"train\.patience: needs held-out examples: name files in data\.eval"),
        ({"best": "loss", "data__eval": []}, r"checkpoint\.best: needs held-out examples"),
    ],
)
def test_what_no_evaluation_measures_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        run_of(**changes)


def test_the_best_by_a_task_needs_no_held_out_examples():
    assert run_of("t", tasks=["t"], data__eval=[]).checkpoint.best == "t"
