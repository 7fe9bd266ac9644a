"""A run's folder: no user's file is deleted, one process uses it, and what is in it decides what happens."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from children import Killed

from preceptor import config
from preceptor.errors import CheckpointError, ConfigError
from preceptor.train import lock
from preceptor.train.run_folder import NAMES, claim, move_aside
from runs import DATA, ENVIRONMENT, steps

RECORD = {**ENVIRONMENT, "run": "1"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with data and a model; `run(out=...)` makes a run of it."""
    work = tmp_path / "work"
    (work / "base").mkdir(parents=True)
    (work / "base" / "config.json").write_text("{}")
    (work / "data").mkdir()
    (work / "data" / "a.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(work)
    return work


def run_of(out="run", **changes):
    tree = {"model": {"path": "base"}, "data": {"train": [{"path": "data/a.jsonl"}]}, "out": str(out)}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    return config.build(tree, "test")


def left_by(run, folder, state="finished"):
    """The files that a run leaves: `started`, `stopped` with a checkpoint, `saved` its model, `finished`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps(RECORD))
    (folder / "data.json").write_text(json.dumps({**DATA, "num_examples": 3}))
    for name in ("rejections.jsonl", "examples.jsonl", "metrics.jsonl", "eval.jsonl", "samples.jsonl"):
        (folder / name).touch()
    (folder / "metrics.jsonl").write_text(json.dumps(steps([1.0] * 4)[-1] | {"seconds": 2.0}) + "\n")
    (folder / "config.yaml").write_text(config.dump(run))
    if state == "started":
        return
    (folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000004" / "state.pt").write_text("old state")
    if state == "stopped":
        return
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_text("old model")
    if state == "finished":
        summary = {"num_steps": 4, "model_files": ["model.safetensors"]}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "report.html").touch()


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


# No user's file is deleted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (".", "is the working directory"),
        ("..", "holds the working directory"),
        ("base", "is model.path"),
        ("base/config.json/..", "is model.path"),
        ("files", "holds the run file"),
        ("inner", "holds data"),
        ("data/run", "lies in the data folder"),
        ("templates", "holds data.chat_template"),
        ("tasks", "holds eval.tasks"),
        ("link", "is model.path"),
    ],
)
@pytest.mark.parametrize("replace", [False, True])
def test_out_that_is_or_holds_what_the_run_reads_is_refused(place, out, message, replace):
    for name in ("files/run.yaml", "inner/b.jsonl", "templates/t.jinja", "tasks/t.jsonl"):
        (place / name).parent.mkdir()
        (place / name).write_text("precious")
    (place / "link").symlink_to(place / "base")
    before = contents(place)
    sources = [{"path": "data"}, {"path": "inner/b.jsonl"}]
    run = run_of(out, data__train=sources, data__chat_template="templates/t.jinja", eval__tasks=["tasks/t.jsonl"])
    with pytest.raises(ConfigError, match=message), claim(run, run_file=Path("files/run.yaml"), replace=replace):
        pass
    assert contents(place) == before


def test_model_or_data_inside_an_earlier_run_are_not_replaced(place):
    """A run on the model of the run that it would replace."""
    left_by(run_of(), place / "run")
    before = contents(place)
    with pytest.raises(ConfigError, match=r"holds model\.path"), claim(run_of(model__path="run/model"), replace=True):
        pass
    assert contents(place) == before


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_that_is_no_run_is_left_alone(place, replace):
    """A run file called config.yaml beside other files was once taken for a run."""
    (place / "thesis").mkdir()
    (place / "thesis" / "thesis.txt").write_text("precious")
    (place / "thesis" / "config.yaml").write_text(config.dump(run_of()))
    before = contents(place)
    with pytest.raises(CheckpointError, match="not the folder of a run"), claim(run_of("thesis"), replace=replace):
        pass
    assert contents(place) == before


REFUSED = {
    "other runs, one half written": ({"a/environment.json": "{}", ".x.partial/model.safetensors": "half"}, ""),
    "something half written alone": ({".x.partial/model.safetensors": "half"}, ""),
    "an environment of Python": ({"pyvenv.cfg": "home", ".lock": ""}, ""),
    "a lock of another program": ({"thesis.txt": "mine", ".lock": '{"pid": 7}', "STOP": ""}, ""),
    "checkpoints of another program": ({"checkpoints/.a.partial": "half"}, ""),
    "a finished run": ({".report.html.partial": "half", ".lock": "process 1 on here\n", "STOP": ""}, "finished"),
    "another run": ({"checkpoints/.step-00000009.partial": "half", "SAVE": ""}, "stopped"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_folder_that_is_refused_is_left_as_it_was(place, kind):
    """What another process has half written, or a killed one left, too."""
    files, state = REFUSED[kind]
    if state:
        left_by(run_of(train__seed=7 if kind == "another run" else 0), place / "run", state)
    for name, content in files.items():
        (place / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "run" / name).write_text(content)
    before = contents(place)
    with pytest.raises(CheckpointError, match=r"is not empty|is finished|holds another run"), claim(run_of()):
        pass
    assert contents(place) == before


def test_a_run_leaves_what_another_program_has_half_written_in_its_folder(place):
    left_by(run_of(), place / "run", "stopped")
    (place / "run" / ".x.partial").write_text("half")
    with claim(run_of()) as folder:
        assert folder.goes_on
    assert (place / "run" / ".x.partial").read_text() == "half"


@pytest.mark.parametrize(
    "name", ["thesis.txt", "model/model.gguf", "checkpoints/mine/state.pt", ".git/HEAD", ".x.partial"]
)
def test_what_no_run_wrote_keeps_replace_away(place, name):
    left_by(run_of(), place / "run")
    (place / "run" / name).parent.mkdir(parents=True, exist_ok=True)
    (place / "run" / name).write_text("precious")
    before = contents(place)
    with (
        pytest.raises(CheckpointError, match=f"what no run wrote.*{name.split('/')[0]}"),
        claim(run_of(), replace=True),
    ):
        pass
    assert contents(place) == before


def begin(folder):
    folder.begin({**RECORD, "run": "2"}, "new run file\n", lambda path: (path / "data.json").write_text("{}"))


def test_the_old_run_is_kept_until_the_new_one_has_something(place):
    left_by(run_of(), place / "run")
    before = contents(place / "run")
    with claim(run_of(), replace=True) as folder:
        assert before.items() <= contents(place / "run").items()
        begin(folder)
        assert contents(place / "run" / "replaced") == before
        assert (place / "run" / "config.yaml").read_text() == "new run file\n"
        folder.drop_replaced()
    assert not (place / "run" / "replaced").exists()


def test_a_second_replace_keeps_the_run_that_has_a_model(place):
    """The first replacing run was killed before its first checkpoint: what it left is worth less than the old run."""
    left_by(run_of(), place / "run")
    before = contents(place / "run")
    for _ in range(2):
        with claim(run_of(), replace=True) as folder:
            begin(folder)
    assert contents(place / "run" / "replaced") == before
    left_by(
        run_of(), place / "run", "stopped"
    )  # the new run has a checkpoint, and was killed before it removed the old
    newer = contents(place / "run" / "checkpoints")
    with claim(run_of(), replace=True) as folder:
        begin(folder)
    assert contents(place / "run" / "replaced" / "checkpoints") == newer
    assert not (place / "run" / "replaced" / "model").exists()


def test_moving_aside_may_be_killed_anywhere(place, monkeypatch):
    """After each number of moved names, the next start finishes the move, and nothing of the old run is lost."""
    run = run_of()
    left_by(run, place / "whole")
    whole = contents(place / "whole")
    replace_path = Path.replace
    for num in range(len(NAMES)):
        folder = place / f"run{num}"
        left_by(run, folder)
        moves = 0

        def move(self, target, num=num, folder=folder):
            nonlocal moves
            if folder in self.parents:
                if moves == num:
                    raise Killed
                moves += 1
            return replace_path(self, target)

        monkeypatch.setattr(Path, "replace", move)
        with suppress(Killed):
            move_aside(folder)
        monkeypatch.setattr(Path, "replace", replace_path)
        with claim(run_of(folder.name), replace=True) as claimed:
            begin(claimed)
        assert contents(folder / "replaced") == whole, num


# One process ---------------------------------------------------------------------------------------------------------

HOLD = """
import os, sys, time
from preceptor import config
from preceptor.train.run_folder import claim
run = config.load(sys.argv[1])
with claim(run):
    if len(sys.argv) > 2 and os.fork() == 0:
        time.sleep(10)  # as a process that renders data
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("child", [[], ["with a child"]])
def test_a_folder_in_use_is_refused_until_its_process_ends_however_it_ends(place, child):
    (place / "run.yaml").write_text(config.dump(run_of()))
    holder = subprocess.Popen([sys.executable, "-c", HOLD, "run.yaml", *child], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for replace in (False, True):
            used = pytest.raises(CheckpointError, match=f"used by another run \\(process {holder.pid} on")
            with used, claim(run_of(), replace=replace):
                pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with claim(run_of()):
        pass


RACE = """
import sys, time
from pathlib import Path
from preceptor import config
from preceptor.errors import CheckpointError
from preceptor.train.run_folder import claim
run = config.load(sys.argv[1])
for _ in range(150):
    try:
        with claim(run) as folder:
            mark = folder.path.parent / "mark"
            mark.touch(exist_ok=False)  # fails where another holds the folder too
            mark.unlink()
    except CheckpointError:
        pass
"""


def test_processes_that_start_together_never_share_a_folder(place):
    """The folder and its lock are made and removed again by each."""
    (place / "run.yaml").write_text(config.dump(run_of()))
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE, "run.yaml"], stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for racer in racers:
        _, error = racer.communicate()
        assert racer.returncode == 0, error


def test_a_lock_that_cannot_be_written_is_an_error(place, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock.os, "write", fail)
    with pytest.raises(CheckpointError, match="cannot be written: No space left"), claim(run_of()):
        pass
    assert not (place / "run" / ".lock").exists()


def test_a_file_system_without_locks_is_said(place, monkeypatch):
    def fail(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "lockf", fail)
    with claim(run_of()) as folder:
        (note,) = folder.notes
        assert "has no locks (Operation not supported)" in note


# What a folder may be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "deep", "empty", "symlink", "dangling symlink", "disk", "killed at once"])
def test_where_a_run_may_begin(place, kind):
    out = place / "run"
    if kind == "deep":
        out = place / "a" / "b" / "run"
    if kind == "empty":
        out.mkdir()
    if kind in ("symlink", "dangling symlink"):
        (place / "run").symlink_to(place / "elsewhere")
        if kind == "symlink":
            (place / "elsewhere").mkdir()
    if kind == "disk":
        (out / "lost+found").mkdir(parents=True)
    if kind == "killed at once":
        out.mkdir()
        for name in (".lock", ".environment.json.partial"):
            (out / name).touch()
    before = {path for path in place.rglob("*") if not path.name.startswith(".")}
    with claim(run_of(out)) as folder:
        assert not folder.goes_on
    after = set(place.rglob("*"))
    if kind == "dangling symlink":
        before |= {place / "elsewhere"} & after
    assert after == before  # nothing is left where nothing began
    with claim(run_of(out)) as folder:
        begin(folder)
    assert (out / "config.yaml").is_file()
    assert (kind not in ("symlink", "dangling symlink")) or (place / "run").is_symlink()


def test_a_file_and_a_place_that_cannot_be_written_are_refused(place):
    (place / "file").touch()
    for out in ("file", "file/run"):
        with pytest.raises(CheckpointError, match="file"), claim(run_of(out)):
            pass
    (place / "closed").mkdir()
    (place / "closed").chmod(0o500)
    if os.access(place / "closed" / "x", os.W_OK) or os.geteuid() == 0:
        return  # root may write everywhere
    closed = pytest.raises(CheckpointError, match=r"closed/run: cannot be written: Permission denied")
    with closed, claim(run_of("closed/run")):
        pass


def test_the_time_of_a_run_is_that_of_all_its_sessions(place):
    lines = [line | {"seconds": 2.0} for line in steps([1.0] * 4)]
    lines[1]["compile_seconds"] = 5.0
    for name, sessions, seconds, expected in (
        ("one", [], 30.0, 30.0),
        ("two", [{"step": 2}], 3.0, 23.0),
        ("completed", [], None, 23.0),
    ):
        left_by(run_of(), place / name, "saved")
        (place / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (place / name / "data.json").write_text(json.dumps({**DATA, "compile_seconds": 10.0}))
        with claim(run_of(name)) as folder:
            folder.record["resumed"] = sessions
            assert folder.summarise(seconds)["seconds"] == expected, name


def test_a_run_that_was_stopped_goes_on_and_a_finished_one_is_refused(place):
    for state in ("started", "stopped"):
        left_by(run_of(), place / state, state)
        with claim(run_of(state)) as folder:
            assert folder.goes_on and folder.record["run"] == "1" and not folder.has_model
            assert folder.date.isoformat() == RECORD["date"]
    left_by(run_of(), place / "saved", "saved")
    with claim(run_of("saved")) as folder:
        assert folder.has_model
        summary = folder.summarise()
        assert summary["num_examples"] == 3 and summary["num_steps"] == 4 and summary["seconds"] == 2.0
    assert json.loads((place / "saved" / "summary.json").read_text()) == summary
    with claim(run_of("saved")) as folder:
        assert folder.has_model  # its report is missing
    (place / "saved" / "report.html").touch()
    with (
        pytest.raises(CheckpointError, match=r"(?s)finished.*--from saved out=saved-2"),
        claim(run_of("saved")),
    ):
        pass
    with claim(run_of("saved"), replace=True) as folder:
        assert not folder.goes_on and folder.replaces


def test_resume_asks_for_a_run(place):
    with pytest.raises(CheckpointError, match="no run to resume"), claim(run_of(), resume=True):
        pass
    left_by(run_of(), place / "run", "stopped")
    with claim(run_of(), resume=True) as folder:
        assert folder.goes_on


def test_a_start_that_was_killed_begins_again(place):
    """The record is there, the run file is not: no step was taken, whatever the run was."""
    left_by(run_of(), place / "run", "started")
    (place / "run" / "config.yaml").unlink()
    with claim(run_of(train__seed=7)) as folder:
        assert not folder.goes_on and not folder.replaces
        begin(folder)
    assert json.loads((place / "run" / "environment.json").read_text())["run"] == "2"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("{", "cannot be read"), ("- a", "is no run file")]
)
def test_a_run_whose_run_file_is_gone_or_broken_is_not_taken_for_new(place, content, message):
    left_by(run_of(), place / "run", "stopped")
    if content is None:
        (place / "run" / "config.yaml").unlink()
    else:
        (place / "run" / "config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=rf"(?s)config.yaml: {message}.*--replace"), claim(run_of()):
        pass
    with claim(run_of(), replace=True) as folder:
        assert folder.replaces


def test_a_run_goes_on_from_its_own_run_file(place):
    left_by(run_of(), place / "run", "stopped")
    with claim(config.load(place / "run" / "config.yaml"), run_file=place / "run" / "config.yaml") as folder:
        assert folder.goes_on


def test_leftovers_of_killed_processes_are_removed(place):
    left_by(run_of(), place / "run", "stopped")
    (place / "run" / ".model.partial").mkdir()
    (place / "run" / ".model.partial" / "model.safetensors").touch()
    (place / "run" / ".report.html.partial").touch()
    (place / "run" / "checkpoints" / ".step-00000009.partial").mkdir()
    (place / "run" / "checkpoints" / ".step-00000001.removed.partial").mkdir()
    with claim(run_of()):
        left = sorted(path.name for path in (place / "run").rglob(".*"))
    assert left == [".lock"] and not (place / "run" / ".lock").exists()


# What goes on --------------------------------------------------------------------------------------------------------


def test_logs_are_taken_back_to_the_step_and_broken_lines_are_said(place):
    left_by(run_of(), place / "run", "stopped")
    folder = place / "run"
    lines = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4))
    (folder / "metrics.jsonl").write_bytes(lines.encode() + b"\x00\x00\n" + b'{"step": 5}\n{"st')
    (folder / "eval.jsonl").write_text('{"step": 0}\n{"step": 2}\n')
    (folder / "samples.jsonl").write_text('{"step": 0, "n": 1}\n{"step": 2}\n{"step": 4, "n": 1}\n')
    said = []
    with claim(run_of()) as claimed:
        claimed.go_on(4, {"command": "again"}, said.append)

    def left(name):
        return [json.loads(line)["step"] for line in (folder / name).read_text().splitlines()]

    assert left("metrics.jsonl") == [1, 2, 3, 4] and left("eval.jsonl") == [0, 2]
    assert left("samples.jsonl") == [0, 2]  # of the evaluation after step 4 only a part was there
    assert any("metrics.jsonl:5: broken JSON" in line for line in said)
    record = json.loads((folder / "environment.json").read_text())
    assert record["resumed"] == [{"step": 4, "command": "again"}] and record["run"] == "1"


def test_refusals_come_before_torch(place):
    (place / "run.yaml").write_text(config.dump(run_of(".")))
    code = (
        "import atexit, sys; from preceptor import cli; sys.argv = ['preceptor', 'train', 'run.yaml'];"
        "atexit.register(lambda: print('torch' in sys.modules)); cli.main()"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 2 and "is the working directory" in shown.stderr and shown.stdout == "False\n"
    left_by(run_of(), place / "run")
    (place / "run.yaml").write_text(config.dump(run_of()))
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 6 and "this run is finished" in shown.stderr and shown.stdout == "False\n"
    shutil.rmtree(place / "run")
    left_by(run_of(), place / "run", "saved")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0 and "the record is completed" in shown.stdout and shown.stdout.endswith("False\n")
    assert (place / "run" / "summary.json").is_file() and (place / "run" / "report.html").is_file()
