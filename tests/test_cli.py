"""The commands as a user types them: what goes right, and each mistake with its message and exit code."""

import gc
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest

from conftest import conversations
from preceptor.commands.options import large_imports
from preceptor.errors import TemplateError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}


@pytest.mark.parametrize("collects", [True, False])
def test_large_imports_leave_the_collector_as_they_found_it(collects):
    if not collects:
        gc.disable()
    try:
        with pytest.raises(ImportError), large_imports():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == collects
    finally:
        gc.enable()


def test_help_names_the_commands_and_imports_nothing_heavy():
    code = (
        "import atexit, sys; from preceptor import cli; sys.argv = ['preceptor', '--help'];"
        "atexit.register(lambda: print('torch' in sys.modules)); cli.main()"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    for command in ("train", "demo", "show", "check", "chat"):
        assert command in shown
    assert shown.endswith("False\n")


def test_train_then_reject_the_same_folder_then_replace_it(preceptor, run_file):
    file = run_file()
    code, out, _ = preceptor("train", file)
    assert code == 0 and "step 4/4" in out and "preceptor chat" in out
    before = (file.parent / "run" / "metrics.jsonl").read_text()
    code, _, err = preceptor("train", file, "train.seed=3")
    assert code == 6 and "train.seed: 0 in" in err and "3 now" in err and "--replace" in err
    assert (file.parent / "run" / "metrics.jsonl").read_text() == before
    code, _, _ = preceptor("train", file, "train.seed=3", "--replace")
    assert code == 0 and (file.parent / "run" / "metrics.jsonl").read_text() != before


def test_replace_leaves_a_folder_alone_that_is_no_run(preceptor, run_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    code, _, err = preceptor("train", run_file(), "--replace")
    assert code == 6 and "not the folder of a run" in err
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"


BAD_ROWS = {
    "no_assistant_message": {"messages": [USER]},
    "unknown_role": {"messages": [{"role": "robot", "content": "x"}, ANSWER]},
    "empty_answer": {"messages": [USER, {"role": "assistant", "content": ""}]},
}


@pytest.mark.parametrize("code", BAD_ROWS)
def test_a_bad_row_is_shown_with_its_place_and_nothing_is_written(preceptor, run_file, tmp_path, code):
    exit_code, _, err = preceptor("train", run_file([*conversations(3), BAD_ROWS[code]]))
    assert exit_code == 3
    assert "1 of 4 examples cannot be trained" in err
    assert f"1 x {code}: first at {tmp_path}/train.jsonl:4:" in err
    assert f"data.allow_rejected: [{code}]" in err
    assert not (tmp_path / "run").exists()


def test_a_few_bad_rows_are_left_out_and_recorded(preceptor, run_file, tmp_path):
    rows = [*conversations(3), BAD_ROWS["empty_answer"]]
    code, out, _ = preceptor("train", run_file(rows, data__max_rejected=0.5))
    assert code == 0 and "1 example rejected" in " ".join(out.split())
    (rejection,) = map(json.loads, (tmp_path / "run" / "rejections.jsonl").read_text().splitlines())
    assert rejection["source"].endswith("train.jsonl:4") and rejection["code"] == "empty_answer"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_rejected"] == 1


def test_a_conversation_longer_than_a_row_is_rejected_not_cut(preceptor, run_file):
    code, _, err = preceptor("train", run_file(data__max_length=16))
    assert code == 3 and "too_long" in err and "raise data.max_length" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "train.jsonl: no such data file"),
        ("", "the file is empty"),
        ('{"messages": [\n', "train.jsonl:1: broken JSON"),
    ],
)
def test_a_bad_file_is_named(preceptor, run_file, tmp_path, text, message):
    file = run_file()
    data = tmp_path / "train.jsonl"
    data.unlink() if text is None else data.write_text(text)
    code, _, err = preceptor("train", file)
    assert code == 3 and message in err
    assert not (tmp_path / "run").exists()


def test_mistakes_in_the_run_file(preceptor, run_file, tmp_path):
    code, _, err = preceptor("train", run_file(optimizer__learnin_rate=1))
    assert code == 2 and "did you mean 'learning_rate'" in err
    code, _, err = preceptor("train", run_file(data__chat_template="no.jinja"))
    assert code == 4 and "no.jinja" in err
    code, _, err = preceptor("train", run_file(data__chat_template="tokenizer"))
    assert code == 4 and "no chat template" in err
    code, _, err = preceptor("train", run_file(adapter={"target_modules": ["no_such_layer"]}))
    assert code == 5 and "no_such_layer" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "not_causal"])
def test_a_model_folder_that_is_none(preceptor, run_file, tmp_path, kind):
    place = tmp_path / "model"
    if kind in ("empty", "not_causal"):
        place.mkdir()
    if kind == "file":
        place.write_text("x")
    if kind == "not_causal":
        (place / "config.json").write_text('{"model_type": "vit"}')
    code, _, err = preceptor("train", run_file(model__path=str(place)))
    assert code == 5 and str(place) in err, err
    assert not (tmp_path / "run").exists()


def test_show_as_json(preceptor, base_folder, write_jsonl, tmp_path):
    data = write_jsonl([*conversations(1, turns=2), {"messages": [USER]}, {"prompt": "a", "completion": "b"}])
    arguments = ("show", "--model", base_folder, "--data", data, "--chat-template", "chatml", "--json")
    code, out, _ = preceptor(*arguments)
    assert code == 0
    chat, rejected, pair = map(json.loads, out.splitlines())
    assert chat["source"] == f"{data}:1" and chat["rejection"] is None
    kinds = [segment["kind"] for segment in chat["segments"]]
    assert kinds == ["context", "target", "context", "target"]
    assert [segment["parent"] for segment in chat["segments"]] == [None, 0, 1, 2]
    assert chat["segments"][1]["text"].endswith("<|im_end|>")
    assert chat["segments"][2]["text"].startswith("\n<|im_start|>user")
    assert rejected == {
        "source": f"{data}:2",
        "segments": [],
        "rejection": {"code": "no_assistant_message", "message": rejected["rejection"]["message"]},
        "thinking": [],
        "left_out": [],
    }
    assert pair["segments"][0]["text"] == "a"
    code, out, _ = preceptor(*arguments, "--example", 3)
    assert code == 0 and json.loads(out) == pair
    code, _, err = preceptor(*arguments, "--example", 9)
    assert code == 3 and "fewer examples" in err


def test_show_for_the_eye(preceptor, run_file):
    code, out, _ = preceptor("show", run_file(), "--example", 1)
    assert code == 0
    assert "<|im_start|>assistant⏎" in out and "trained in 1 turn" in out


@pytest.mark.parametrize("arguments", [(), ("--model", "x"), ("run.yaml", "--model", "x", "--data", "y")])
def test_show_needs_a_run_file_or_model_and_data(preceptor, arguments):
    code, _, err = preceptor("show", *arguments)
    assert code == 2 and "--model and --data" in err


def test_chat_answers_in_turn(preceptor, run_file, base_folder, tmp_path):
    preceptor("train", run_file())
    lines = ["a user", " ", "/new", "again"]
    code, out, _ = preceptor("chat", tmp_path / "run/model", "--base", base_folder, "--max-new-tokens", 3, stdin=lines)
    assert code == 0
    assert out.count(f"[{base_folder}]") == 2 and out.count("[" + str(tmp_path / "run/model") + "]") == 2


def test_one_name_for_a_model_in_every_command(preceptor, run_file, base_folder, tmp_path):
    """A run's folder, its model and its adapter are asked the same way; a run without a model says what to do."""
    preceptor("train", run_file(adapter={"kind": "lora", "rank": 2}))
    run = tmp_path / "run"
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps({"messages": [{"role": "user", "content": "a user"}], "accepted": ["yes"]}) + "\n")
    answers = set()
    for model in (run, run / "model", run / "model/adapter"):
        code, out, err = preceptor("chat", model, "--max-new-tokens", 3, stdin=["a user"])
        assert code == 0, err
        answers.add(out)
        code, _, err = preceptor("eval", model, task, "--max-new-tokens", 3, "--json")
        assert code == 0, err
    assert len(answers) == 1
    code, _, err = preceptor("compare", base_folder, run, "--tasks", task, "--max-new-tokens", 3, "--json")
    assert code == 0, err
    code, _, err = preceptor("merge", base_folder, run / "model/adapter", "--out", tmp_path / "merged")
    assert code == 5 and "--to hf --out DIR` merges it into its base" in err
    (run / "model").rename(tmp_path / "elsewhere")
    code, _, err = preceptor("chat", run)
    assert code == 5 and f"this run has saved no model yet; `preceptor train {run}/config.yaml` goes on" in err


def test_an_interrupted_training_exits_75(preceptor, run_file, monkeypatch):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("preceptor.train.loop.take_step", interrupt)
    code, _, err = preceptor("train", run_file())
    assert code == 75 and "stopped by SIGINT before the first step" in err


def test_few_steps_are_said_before_and_in_training(preceptor, run_file, tmp_path):
    file = run_file(conversations(46), train={"duration": "3 epochs"}, data__max_length=1024)
    said = "optimizer steps, too few to learn much (under 50): `train.batch_size: 1` with `data.max_length: "
    for command in ("check", "train"):
        code, out, _ = preceptor(command, file)
        assert code == 0 and "only 3 " + said in out, (command, out)
    file = run_file(conversations(46), train={"duration": "2 steps"}, out=str(tmp_path / "run-in-steps"))
    for command in ("check", "train", "report"):
        code, out, _ = preceptor(command, tmp_path / "run-in-steps" if command == "report" else file)
        text = out if command != "report" else (tmp_path / "run-in-steps" / "report.html").read_text()
        assert code == 0 and "`train.duration`, which is in steps: an epoch has" in text, (command, out)
        assert "`train.batch_size: 1`" not in text
    code, out, _ = preceptor("check", run_file(conversations(46), train={"duration": "50 steps"}))
    assert "too few to learn" not in out


@pytest.mark.parametrize(("warmup", "is_said"), [("4 steps", False), ("5 steps", True)])
def test_a_warmup_that_is_longer_than_the_run_is_said(preceptor, run_file, warmup, is_said):
    code, out, _ = preceptor("train", run_file(optimizer__warmup=warmup), "--dry-run")
    assert code == 0 and ("optimizer.warmup: 5 steps, more than the run has: its learning rate" in out) == is_said


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "trained with this system prompt in 11 of 12 conversations; /system gives it: Be brief."),
        ("Be brief.", "trained with this system prompt in 11 of 12 conversations: Be brief."),
    ],
)
def test_chat_says_which_system_prompt_was_trained(preceptor, run_file, tmp_path, given, says):
    from preceptor.commands.chat import trained_system_prompt

    if not (tmp_path / "run").exists():
        system = {"role": "system", "content": "Be brief."}
        rows = [{"messages": [system, *row["messages"]]} for row in conversations(11)] + conversations(1)
        assert preceptor("train", run_file(rows))[0] == 0
    assert trained_system_prompt(str(tmp_path / "run/model"), given) == (says, "Be brief.")
    assert trained_system_prompt("scholar", given) == (None, None)
    (tmp_path / "run/data.json").write_text('{"system_prompts": 3}')
    assert trained_system_prompt(str(tmp_path / "run/model"), given) == (None, None)


def test_a_system_prompt_can_be_given_in_a_conversation():
    from preceptor.serve.chat import converse

    heard, said = [], []

    class Echo:
        model = SimpleNamespace(name="a")
        messages: ClassVar = []

        def reply(self, text):
            heard.append([*(each["content"] for each in self.messages), text])
            return text

    lines = ["1?", "/system", "2?", "/system  Be kind.", "3?", "/new", "4?"]
    converse([Echo()], lines, None, lambda name, text: said.append(text), trained="Be brief.")
    assert heard == [["1?"], ["Be brief.", "2?"], ["Be kind.", "3?"], ["Be kind.", "4?"]]
    assert said[1] == "new conversation, with the system prompt: Be brief."
    converse([Echo()], ["/system", "5?"], None, lambda name, text: said.append(text))
    assert heard[-1] == ["5?"] and said[-2] == "new conversation, without a system prompt"
    num = len(heard)
    converse([Echo()], ["/help", "/nwe", "/sys Be kind."], None, lambda name, text: said.append(text))
    assert len(heard) == num and said[-1].startswith(
        "/sys is no message, and was not sent. Commands: /new, /system TEXT"
    )
    converse([Echo()], ["/etc/hosts is a file?"], None, lambda name, text: said.append(text))
    assert len(heard) == num + 1


def test_threads_that_wait_sleep_in_programs_too():
    """As in the commands; torch reads it when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = "import os, preceptor; print(os.environ['OMP_WAIT_POLICY'])"
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**environment, **given}, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected


def test_a_chat_goes_on_where_the_template_refuses_a_system_prompt(preceptor, base_folder, tmp_path):
    """As those of Gemma 2."""
    shutil.copytree(base_folder, tmp_path / "model")
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    lines = ["1?", "/system Be brief.", "2?", "3?", "/system", "4?"]
    code, out, err = preceptor("chat", tmp_path / "model", "--max-new-tokens", 2, stdin=lines)
    assert code == 0, err
    assert out.count("no answer: ") == out.count("System role not supported") == 2, out
    said = out.splitlines()
    assert [("no answer" in line) for line in said if "new conversation, with" not in line][-3:] == [True, True, False]
    assert "/system alone begins a conversation with the system prompt of the training, or none" in out


def test_a_message_that_the_template_refuses_is_forgotten():
    def refuse(prompt):
        raise TemplateError("no")

    from preceptor.serve.chat import Speaker

    model = SimpleNamespace(chat=SimpleNamespace(template=1), prompt_ids=refuse, generate=None)
    speaker = Speaker(model, 2, [{"role": "system"}])
    assert speaker.reply("1?").startswith("(no answer: no; ") and speaker.messages == [{"role": "system"}]
