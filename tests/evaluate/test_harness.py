"""Tasks of the lm-eval harness, read from local files; with the real package where it is installed, and without."""

import importlib.util
import io
import json
import sys
from dataclasses import replace
from types import ModuleType
from typing import ClassVar

import pytest
from rich.console import Console

from conftest import conversations
from preceptor import config
from preceptor.errors import ConfigError, DataError
from preceptor.evaluate import harness
from preceptor.evaluate.harness import open_task, require_harness
from preceptor.train.prepare import prepare
from preceptor.train.provenance import tasks_sha256
from runs import execute

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval, an optional extra, is not installed"
)
HEAD = """task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
"""
CHOICE = (
    HEAD
    + """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
)
TEXT = (
    HEAD
    + """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
"""
)
ANSWER = (
    HEAD
    + """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"]}
metric_list: [{metric: exact_match}]
"""
)
ROWS = [{"question": f"the user {n}", "choices": ["the message", "and then"], "label": n % 2} for n in range(4)]


@pytest.fixture
def task_file(tmp_path, write_jsonl, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    def write(text, name="own_words"):
        place = tmp_path / "tasks" / f"{name}.yaml"
        place.parent.mkdir(exist_ok=True)
        place.write_text(text.replace("NAME", name).replace("FILE", write_jsonl(ROWS, f"{name}.jsonl")))
        return f"lm_eval:{place}"

    return write


@needs_lm_eval
def test_kinds_of_tasks(task_file):
    chosen = open_task(task_file(CHOICE))
    assert (chosen.kind, len(chosen.items)) == ("multiple choice", 4)
    item = chosen.items[1]
    assert (item.prompt.text, item.delimiter, item.answer) == ("the user 1", " ", 1)
    assert item.choices == ("the message", "and then")
    texts = open_task(task_file(TEXT, "own_texts"))
    assert texts.kind == "perplexity" and texts.items[0].text == "the user 0"
    answers = open_task(task_file(ANSWER, "own_answers"))
    assert answers.kind == "generation" and answers.items[0].until == ("\n",)
    assert answers.items[0].prompt.messages == ({"role": "user", "content": "the user 0"},)
    assert answers.items[0].accepted == ("the message",)


@needs_lm_eval
def test_what_lm_eval_scores_by_rules_of_its_own_is_refused_with_the_command(task_file):
    odd = ANSWER + 'filter_list: [{name: a, filter: [{function: regex, regex_pattern: "x"}, {function: take_first}]}]\n'
    with pytest.raises(DataError, match=r"lm_eval run --model hf .* --tasks own_words"):
        open_task(task_file(odd))


@needs_lm_eval
def test_its_figures_are_those_of_the_harness(task_file, run_file, tmp_path):
    """On a saved model: acc of the harness itself and here."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from preceptor.evaluate.model import load_evaluated_model
    from preceptor.evaluate.run import run_task

    execute(prepare(config.load(run_file(conversations(6)))), Console(quiet=True))
    path, place = task_file(CHOICE), str(tmp_path / "run" / "model")
    ours = run_task(load_evaluated_model(place, "float32", "cpu"), open_task(path), 8, 8)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    theirs = simple_evaluate(
        model="hf", model_args=f"pretrained={place},dtype=float32", tasks=["own_words"], task_manager=manager,
        device="cpu", bootstrap_iters=0, log_samples=True,
    )["samples"]["own_words"]  # fmt: skip
    assert [result.values["right"] for result in ours] == [sample["acc"] for sample in theirs]
    likely = [[float(pair[0]) for pair in sample["filtered_resps"]] for sample in theirs]
    for result, expected in zip(ours, likely, strict=True):
        assert result.record["log_likelihoods"] == pytest.approx(expected, abs=1e-3)


class _StandIn:
    """What harness.py uses of a task of lm-eval."""

    multiple_input = multiple_target = 0

    def __init__(self, output_type="multiple_choice", target="label", **config):
        self.eval_docs, self._target = ROWS, target
        names = ("num_fewshot", "generation_kwargs", "filter_list", "process_results", "metric_list")
        self.config = type("Config", (), {"output_type": output_type, "target_delimiter": " ", "task": "words"})
        for name in names:
            setattr(self.config, name, config.get(name))

    def set_fewshot_seed(self, seed):
        self.seed = seed

    def fewshot_context(self, doc, num_fewshot):
        return doc["question"]

    def doc_to_choice(self, doc):
        return doc["choices"]

    def doc_to_target(self, doc):
        return self._target(doc) if callable(self._target) else doc[self._target]


@pytest.fixture
def read(monkeypatch):
    """Read a stand-in as if lm-eval had loaded it."""
    monkeypatch.setattr(harness, "require_harness", lambda path: None)

    def of(task):
        monkeypatch.setattr(harness, "_loaded", lambda path: task)
        return open_task("lm_eval:words")

    return of


ACC, EXACT = [{"metric": "acc", "aggregation": "mean"}], [{"metric": "exact_match", "higher_is_better": True}]
REGEX = [{"name": "a", "filter": [{"function": "regex"}, {"function": "take_first"}]}]
FIRST = [{"name": "a", "filter": [{"function": "take_first"}]}]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("multiple_choice", {"metric_list": ACC, "process_results": print}),
        ("multiple_choice", {"metric_list": ACC, "filter_list": REGEX}),
        ("multiple_choice", {"metric_list": [{"metric": "f1"}]}),
        ("multiple_choice", {"metric_list": [*ACC, {"metric": "mcc"}]}),
        ("multiple_choice", {"metric_list": [{"metric": "acc", "aggregation": max}]}),
        ("loglikelihood_rolling", {"process_results": print}),
        ("generate_until", {"metric_list": EXACT, "process_results": print}),
        ("generate_until", {"metric_list": EXACT, "filter_list": REGEX}),
        ("generate_until", {"metric_list": [{"metric": "f1"}]}),
        ("generate_until", {"metric_list": [*EXACT, {"metric": "f1"}]}),
        ("generate_until", {"metric_list": [{"metric": "exact_match", "ignore_case": True}]}),
        ("generate_until", {"metric_list": [{"metric": "exact_match", "regexes_to_ignore": [","]}]}),
        ("loglikelihood", {"metric_list": ACC}),
    ],
)
def test_a_rule_of_lm_evals_own_is_refused(read, kind, config):
    with pytest.raises(DataError, match=r"own rules; run it .* --tasks words"):
        read(_StandIn(kind, **config))


@pytest.mark.parametrize(
    ("kind", "key"), [("multiple_choice", "multiple_input"), ("multiple_choice", "multiple_target"),
                      ("generate_until", "multiple_input")],
)  # fmt: skip
def test_choices_that_are_prompts_and_several_right_ones_are_refused(read, kind, key):
    task = _StandIn(kind, metric_list=ACC if kind == "multiple_choice" else EXACT)
    setattr(task, key, 2)
    with pytest.raises(DataError, match="scored by lm-eval's own rules"):
        read(task)


@pytest.mark.parametrize("metrics", [None, ACC, [*ACC, {"metric": "acc_norm"}]])
@pytest.mark.parametrize("target", ["label", lambda doc: doc["choices"][doc["label"]], lambda doc: str(doc["label"])])
def test_choices(read, metrics, target):
    """The right one by its index, or by its text."""
    found = read(_StandIn(metric_list=metrics, filter_list=FIRST, target=target))
    assert found.kind == "multiple choice" and [item.answer for item in found.items] == [0, 1, 0, 1]
    item = found.items[1]
    assert (item.prompt.text, item.delimiter, item.choices) == ("the user 1", " ", ("the message", "and then"))


@pytest.mark.parametrize(
    ("arguments", "until"),
    [(None, ()), ({}, ()), ({"until": None}, ()), ({"until": "\n\n"}, ("\n\n",)), ({"until": ["a", "b"]}, ("a", "b"))],
)
def test_answers_and_what_ends_them(read, arguments, until):
    found = read(_StandIn("generate_until", "question", metric_list=EXACT, generation_kwargs=arguments))
    assert found.kind == "generation" and found.items[0].until == until
    assert found.items[0].accepted == ("the user 0",)
    assert found.items[0].prompt.messages == ({"role": "user", "content": "the user 0"},)


@pytest.mark.parametrize(
    "arguments",
    [{"do_sample": True}, {"temperature": 0.7}, {"do_sample": True, "temperature": 0.0}, {"num_beams": 10}],
)
def test_answers_that_are_drawn_are_refused_with_the_reason(read, arguments):
    with pytest.raises(DataError, match=r"whose answers are drawn or searched for .* run it .* --tasks words"):
        read(_StandIn("generate_until", "question", metric_list=EXACT, generation_kwargs=arguments))


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        (None, None),
        ({"do_sample": False, "temperature": 0.7, "num_beams": 1}, None),
        ({"do_sample": None, "temperature": 0.0, "max_gen_toks": 32}, 32),
        ({"max_gen_toks": None, "max_new_tokens": 16}, 16),
        ({"max_tokens": 8, "max_gen_toks": "4"}, 4),
    ],
)
def test_the_limit_of_an_answer_is_the_tasks_own(read, arguments, limit):
    found = read(_StandIn("generate_until", "question", metric_list=EXACT, generation_kwargs=arguments))
    assert found.max_new_tokens == limit
    assert tasks_sha256([found]) != tasks_sha256([replace(found, max_new_tokens=5)]), "the base is measured again"
    assert read(_StandIn(metric_list=ACC, generation_kwargs=arguments)).max_new_tokens is None


def test_several_answers_are_accepted(read):
    task = _StandIn("generate_until", "choices", metric_list=EXACT, filter_list=FIRST)
    task.multiple_target = 2
    assert read(task).items[0].accepted == ("the message", "and then")


def test_texts(read):
    found = read(_StandIn("loglikelihood_rolling", "question"))
    assert found.kind == "perplexity" and [item.text for item in found.items] == [f"the user {n}" for n in range(4)]


@pytest.fixture
def manager(monkeypatch):
    """lm_eval.tasks with a TaskManager that says how it was asked."""
    asked = []

    class TaskManager:
        found: ClassVar = {"words": _StandIn(metric_list=ACC)}

        def __init__(self, **arguments):
            asked.append(arguments)

        def load(self, names):
            asked.append(names)
            return {"tasks": self.found}

    package, module = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    module.TaskManager = TaskManager
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", module)
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: True)
    return TaskManager, asked


def test_a_task_is_asked_for_by_its_name_or_that_in_its_file(manager, tmp_path):
    kind, asked = manager
    assert open_task("lm_eval:words").kind == "multiple choice" and kind.found["words"].seed == 1234
    file = tmp_path / "own.yaml"
    file.write_text("task: words_of_a_file\nprocess_docs: !function utils.f\n")
    open_task(f"lm_eval:{file}")
    first, second = {"include_path": None, "include_defaults": True}, {"include_path": str(tmp_path)}
    assert asked == [first, ["words"], {**second, "include_defaults": False}, ["words_of_a_file"]]
    file.write_text("group: words\n")
    with pytest.raises(DataError, match="has no key `task`"):
        open_task(f"lm_eval:{file}")
    kind.found = {"a": _StandIn(), "b": _StandIn()}
    with pytest.raises(DataError, match="a group of 2 tasks"):
        open_task("lm_eval:words")


def test_a_run_measures_it_with_intervals_and_its_base_once(run_file, monkeypatch, tmp_path):
    """By a stand-in of lm-eval's task, so that it runs without the package."""
    monkeypatch.setattr(harness, "_loaded", lambda path: _StandIn(metric_list=ACC))
    monkeypatch.setattr(harness, "require_harness", lambda path: None)
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path / "cache"))
    run = config.load(run_file(conversations(6), eval__tasks=["lm_eval:words"], eval__every="1 epochs"))
    measured = []
    from preceptor.train import evaluations

    real = evaluations.run_task
    monkeypatch.setattr(
        evaluations, "run_task", lambda *arguments, **more: measured.append(1) or real(*arguments, **more)
    )
    execute(prepare(run), Console(quiet=True))
    lines = [json.loads(line) for line in (tmp_path / "run" / "eval.jsonl").read_text().splitlines()]
    for line in lines:
        (task,) = line["tasks"]
        assert task["task"] == "lm_eval:words" and task["num_items"] == 4
        assert task["figures"]["acc"]["low"] <= task["figures"]["acc"]["value"] <= task["figures"]["acc"]["high"]
    first = len(measured)
    assert first == len(lines)
    console = Console(record=True, width=200, file=io.StringIO())
    again = run.model_copy(update={"out": str(tmp_path / "again")})
    execute(prepare(again), console)
    assert len(measured) - first == first - 1, "the base is not measured again"
    assert "the base model's figures are kept from an earlier run" in console.export_text()
    found = [json.loads(line) for line in (tmp_path / "again" / "eval.jsonl").read_text().splitlines()]
    assert found == lines
    other = again.model_copy(
        update={"out": str(tmp_path / "other"), "eval": again.eval.model_copy(update={"limit": 3})}
    )
    before = len(measured)
    execute(prepare(other), Console(quiet=True))
    assert len(measured) - before == len(lines), "other items: measured"


def test_without_the_package_it_is_told_at_once(monkeypatch, preceptor, run_file):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'preceptor\[lm-eval\]'"):
        require_harness("lm_eval:arc_easy")
    code, _, err = preceptor("check", run_file(conversations(2), eval__tasks=["lm_eval:arc_easy"]))
    assert code == 2 and "lm-eval is not installed" in err
