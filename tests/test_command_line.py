"""What all commands have in common: help, overrides, completion, a dry run, and refusals before torch is imported."""

import inspect
import json
import os
import subprocess
import sys

import pytest

from conftest import conversations
from preceptor import cli
from runs import write_run

COMMANDS = [command.callback.__name__ for command in cli.app.registered_commands]
COMMANDS += [group.name for group in cli.app.registered_groups]


def test_summaries_are_whole_at_eighty_columns(preceptor, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = preceptor("--help")
    listed = out[out.index("Commands:") :].splitlines()[1:]
    assert code == 0 and [line.split()[0] for line in listed] == COMMANDS
    assert all(line.endswith(".") and not line.endswith("..") and len(line) <= 80 for line in listed), listed


@pytest.mark.parametrize("command", COMMANDS)
def test_h_is_help(preceptor, command):
    code, out, _ = preceptor(command, "-h")
    assert (code, out) == preceptor(command, "--help")[:2] and code == 0


def test_no_command_takes_a_negative_seed(preceptor):
    """NumPy would refuse it after the work."""
    own = [command for command in COMMANDS if "--seed" in preceptor(command, "--help")[1]]
    assert set(own) >= {"select", "eval", "compare", "merge"}
    for command in own:
        code, _, err = preceptor(command, "--seed", -1)
        assert code == 2 and "Invalid value for '--seed'" in err, (command, err)


def in_a_process(*arguments, **environment):
    """What is printed, and at last whether torch was imported and the CPU seconds until the end."""
    code = (
        "import atexit, sys, time; from preceptor import cli; sys.argv = ['preceptor', *sys.argv[1:]];"
        "atexit.register(lambda: print('torch' in sys.modules, time.process_time())); cli.main()"
    )
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture
def mistakes(run_file, tmp_path):
    """Run files that cannot work: (change of the file, exit code, what is said)."""
    done = tmp_path / "run"

    def finish(file):
        from preceptor import config

        done.mkdir()
        run = config.load(file)
        record = {"command": "preceptor train", "versions": {}, "trees_sha256": "", "date": "2026-01-01T00:00:00+00:00"}
        (done / "environment.json").write_text(json.dumps(record))
        (done / "config.yaml").write_text(config.dump(run))
        for name in ("summary.json", "report.html"):
            (done / name).write_text("{}")

    return {
        "data": (lambda: run_file(data__train=[{"path": "none.jsonl"}]), 3, "none.jsonl: no such data file"),
        "key": (lambda: run_file(optimizer__learnin_rate=1), 2, "did you mean 'learning_rate'"),
        "model": (lambda: run_file(model__path="no/such/model"), 5, "no/such/model: no such folder"),
        "finished": (lambda: finish(file := run_file()) or file, 6, "this run is finished"),
        "out": (lambda: run_file(out=str(tmp_path)), 2, "holds the run file"),
    }


@pytest.mark.parametrize("kind", ["data", "key", "model", "finished", "out"])
def test_what_can_be_refused_is_refused_before_torch_is_imported(mistakes, kind):
    write, code, says = mistakes[kind]
    shown = in_a_process("train", write())
    imported, seconds = shown.stdout.splitlines()[-1].split()
    assert shown.returncode == code and says in shown.stderr
    assert imported == "False" and float(seconds) < 1.5, "0.4 to 0.6 s where the test was written"


def test_several_processes_are_refused_before_torch_is_imported(mistakes):
    write, code, says = mistakes["finished"]
    shown = in_a_process("train", write(), "--nproc", "2")
    assert shown.returncode == code and says in shown.stderr and "trained on" in shown.stdout
    assert shown.stdout.splitlines()[-1].split()[0] == "False"


def test_completion_knows_the_commands():
    words = {"_PRECEPTOR_COMPLETE": "complete_bash", "COMP_WORDS": "preceptor do", "COMP_CWORD": "1"}
    assert in_a_process(**words).stdout.split()[0] == "doctor"


def test_overrides_of_show_and_check(preceptor, run_file, base_folder, write_jsonl):
    file = run_file()
    code, out, _ = preceptor("check", file, "data.max_length=16", "--json")
    assert code == 3 and json.loads(out)["rejections"][0]["code"] == "too_long"
    code, out, _ = preceptor("show", file, "data.chat_template=llama3", "--json")
    assert code == 0 and "<|start_header_id|>" in out
    data = write_jsonl(conversations(3))
    code, out, _ = preceptor("show", "--model", base_folder, "--data", data, "data.chat_template=llama3", "--json")
    assert code == 0 and "<|start_header_id|>" in out
    code, _, err = preceptor("check", file, "data.no_such=1")
    assert code == 2 and "data.no_such" in err


def files_in(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_dry_run_makes_all_checks_and_writes_nothing(preceptor, run_file, tmp_path):
    rows = [*conversations(12), {"messages": [{"role": "user", "content": "Hi"}]}]
    file = run_file(rows, data__max_rejected=0.5)
    before = files_in(tmp_path)
    code, out, err = preceptor("train", file, "--dry-run")
    assert code == 0, err
    assert "do not see each other" in out and "4 steps" in out and "nothing is written" in out
    assert "1 example rejected, `preceptor check` counts them" in out
    assert "step 1/4" not in out and files_in(tmp_path) == before
    code, _, err = preceptor("train", file, "--dry-run", "adapter.target_modules=[no_such_layer]")
    assert code == 5 and "no_such_layer" in err and files_in(tmp_path) == before


def test_a_dry_run_leaves_the_run_in_its_folder_alone(preceptor, run_file, tmp_path):
    file = run_file()
    assert preceptor("train", file)[0] == 0
    before = files_in(tmp_path)
    code, _, err = preceptor("train", file, "--dry-run")
    assert code == 6 and "this run is finished" in err
    code, out, err = preceptor("train", file, "--dry-run", "--replace")
    assert code == 0 and "nothing is written" in out, err
    assert files_in(tmp_path) == before
    (tmp_path / "run" / "summary.json").unlink()
    code, out, _ = preceptor("train", file, "--dry-run")
    assert code == 0 and "the model is saved already" in out and not (tmp_path / "run" / "summary.json").exists()


RESULTS = ("out", "html", "explain")  # options that name what a command writes
MAKES_A_FOLDER = ("init", "demo", "export")  # of which one that is there is refused, or is a run's that goes on


def test_no_result_takes_the_place_of_what_is_no_such_result(
    preceptor, base_folder, write_jsonl, tmp_path, monkeypatch
):
    """A folder for a file and a file for a folder: refused before a model is loaded, and left alone."""
    rows = [{"prompt": "the", "choices": [" user", " message"], "answer": 0}]
    task, texts = write_jsonl(rows, "task.jsonl"), write_jsonl([{"text": "the user"}], "text.jsonl")
    run = tmp_path / "run"
    write_run(run)
    (tmp_path / "file").write_text("1")
    (tmp_path / "partly" / "compare.json").mkdir(parents=True)
    for name in ("folder", "folder.html", "folder.jsonl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("1")
    merged = (base_folder, base_folder, "--sweep", "--trained", task, "--text", texts)
    tried = [
        ("eval", "no/such/model", "none.jsonl", "--out", tmp_path / "folder"),
        ("select", "none.jsonl", "--keep", 2, "--replace", "--out", tmp_path / "folder.jsonl"),
        ("select", "n.jsonl", "--keep", 2, "--replace", "--out", "k.jsonl", "--explain", tmp_path / "folder.jsonl"),
        ("show", "--model", "no/such/model", "--data", "none.jsonl", "--html", tmp_path / "folder.html"),
        ("report", run, "--out", tmp_path / "folder.html"),
        ("compare", base_folder, base_folder, "--tasks", task, "--out", tmp_path / "file"),
        ("compare", base_folder, base_folder, "--tasks", task, "--out", tmp_path / "partly"),
        ("merge", *merged, "--out", tmp_path / "file"),
        ("merge", base_folder, base_folder, "--out", tmp_path / "folder"),
    ]
    writing = {
        command.callback.__name__
        for command in cli.app.registered_commands
        if any(name in RESULTS for name in inspect.signature(command.callback).parameters)
    }
    assert {command for command, *_ in tried} | {*MAKES_A_FOLDER} == writing
    for name in ("evaluate.model.load_evaluated_model", "train.from_checkpoint.open_model"):
        monkeypatch.setattr(f"preceptor.{name}", lambda *_, **__: 1 / 0)
    monkeypatch.chdir(tmp_path)
    before = files_in(tmp_path)
    for arguments in tried:
        code, _, err = preceptor(*arguments)
        assert code == 6 and str(arguments[-1]) in err, (arguments, err)
        assert files_in(tmp_path) == before, arguments
