"""The scholar's tasks: what the script writes, about facts that SFT never mentions, in words that it never uses."""

import json
import re
from collections import defaultdict

import pytest

from preceptor.evaluate.tasks import is_right, read_task
from preceptor.scholar import data_file
from scholar.facts import load_facts
from scholar.questions import split_facts
from scholar.tasks import tasks

TASKS = tasks()
SAID = "\n".join(
    message["content"]
    for line in data_file("conversations.jsonl").read_text(encoding="utf-8").splitlines()
    for message in json.loads(line)["messages"]
)


@pytest.mark.parametrize("name", TASKS)
def test_the_committed_files_are_what_the_script_writes(name):
    lines = data_file(name).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == TASKS[name], "run python experiments/make_scholar.py data"
    assert len(read_task(f"scholar:{name}").items) == len(lines) >= 100


@pytest.mark.parametrize("name", ["completions.jsonl", "arithmetic.jsonl", "choices.jsonl"])
def test_no_prompt_occurs_in_sft(name):
    prompts = [row["prompt"] for row in TASKS[name]]
    assert len(set(prompts)) == len(prompts)
    assert not [prompt for prompt in prompts if prompt in SAID]


def test_the_facts_are_those_that_sft_leaves_out():
    subjects = defaultdict(list)
    for fact in split_facts(load_facts())[1]:
        subjects[fact.family].append(fact.subject)
    for row in (*TASKS["completions.jsonl"], *TASKS["arithmetic.jsonl"], *TASKS["choices.jsonl"]):
        assert any(subject in row["prompt"] for subject in subjects[row["family"]]), row


def test_the_true_answer_is_right_and_others_are_not():
    for row in TASKS["completions.jsonl"]:
        value = re.sub(r"\\(.)", r"\1", row["accepted"][0].removeprefix(r"\A\s*").removesuffix(r"(?!\w)"))
        assert is_right(f" {value}.", "regex", row["accepted"]) and is_right(f"{value} and", "regex", row["accepted"])
        assert not is_right(f" {value}x", "regex", row["accepted"]) and not is_right(
            f" x{value}", "regex", row["accepted"]
        )
    for row in TASKS["arithmetic.jsonl"]:
        a, b = (int(number) for number in re.findall(r"\d+", row["prompt"]))
        assert int(row["accepted"][0]) == (a + b if row["family"] == "addition" else b - a)


def test_the_right_choice_is_at_every_place_and_each_choice_differs():
    for name in ("choices.jsonl", "endings.jsonl"):
        rows = TASKS[name]
        places = [sum(row["answer"] == place for row in rows) / len(rows) for place in range(4)]
        assert all(0.15 < share < 0.35 for share in places), (name, places)
        assert all(len(set(row["choices"])) == 4 for row in rows)
