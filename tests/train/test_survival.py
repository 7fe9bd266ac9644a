"""Runs that are killed, told to stop, or find the disk full, at any file operation; the same command finishes them.

The fast form takes a few of the operations, spread over the run; PRECEPTOR_TORTURE=n (`make torture`) n times as many,
each kind of run, and writes a table of what was tried.
"""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
import yaml
from children import TORTURE, command, moments, result_of

from conftest import conversations
from preceptor import cli
from preceptor.files import write_atomically
from preceptor.train.signals import EXIT_CODE

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork")  # Python 3.12: a native library may have a thread

KINDS = {
    "full": {},
    "lora": {"adapter": {"rank": 2, "dropout": 0.1}},
    "async": {"checkpoint": {"every": "2 steps", "async_save": True, "best": "loss"}},
    "stream": {"data": {"streaming": True, "window": 4}},
    "cached": {},  # rendered data in a cache beside the run's folder, which is built first
    "qlora, 8-bit AdamW": {
        "model": {"quantization": "nf4"},
        "adapter": {"rank": 2},
        "optimizer": {"name": "adamw_8bit", "learning_rate": 1e-3},
    },
}
RANDOM_KILLS = 30  # of the long form, over all kinds


def train_in(out, file, kind):
    """The command that trains in a folder. A cache has the folder's name and more, so faults find it too."""
    return ("train", file, f"out={out}", *([f"data.cache={out}.cache"] if kind == "cached" else []))


@pytest.fixture(scope="module", params=KINDS if TORTURE else ["full"])
def run(request, tmp_path_factory, base_folder):
    """(run file, what an uninterrupted run leaves, how that one ended, its kind)."""
    place = tmp_path_factory.mktemp(request.param)
    for name, num in (("train", 40 if request.param == "cached" else 6), ("eval", 2)):
        rows = "".join(json.dumps(row) + "\n" for row in conversations(num))
        (place / f"{name}.jsonl").write_text(rows)
    tree = {
        "model": {"path": str(base_folder)},
        "data": {
            "train": [{"path": str(place / "train.jsonl")}],
            "eval": [{"path": str(place / "eval.jsonl")}],
            "chat_template": "chatml",
            "max_length": 128,
        },
        "train": {"duration": "6 steps", "batch_size": 1},
        "optimizer": {"learning_rate": 1e-3},
        "checkpoint": {"every": "2 steps"},
        "eval": {"every": "3 steps", "num_samples": 1, "max_new_tokens": 3},
        "out": str(place / "run"),
    }
    for section, own in KINDS[request.param].items():
        tree[section] = {**tree.get(section, {}), **own}
    file = place / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:  # in this process first: children then have all modules
        patch.setattr("preceptor.train.finish._SECONDS", 0.0)  # ten minutes in all, where the end finds no room
        if not TORTURE:  # its plots take half of the time
            patch.setattr(
                "preceptor.train.finish.write_report", lambda of: write_atomically(of[0] / "report.html", "-")
            )
        if request.param == "cached":  # small data is not, and a portion has a megabyte of it
            for name, size in (("SMALL_BYTES", 0), ("SMALL_CHARACTERS", 300), ("MEAN_CHARACTERS", 600)):
                patch.setattr(f"preceptor.data.reading._{name}", size)
        patch.setattr("sys.argv", ["preceptor", *map(str, train_in(place / "first", file, request.param))])
        with pytest.raises(SystemExit):
            cli.main()
        ended = command(*train_in(place / "whole", file, request.param), folder=place / "whole")
        assert ended.code == 0, ended.shown
        assert result_of(place / "first") == result_of(place / "whole")
        yield file, result_of(place / "whole"), ended, request.param


def finished(file, out, expected, kind, but=()):
    """The same command again: what is wrong with what the run then leaves; "" where it is as if never interrupted."""
    ended = command(*train_in(out, file, kind), folder=out)
    if ended.code and not (ended.code == 6 and "this run is finished" in ended.shown):
        return f"the same command ended with {ended.code}: {ended.shown[-2000:]}"
    if "Traceback" in ended.shown:
        return f"the same command shows {ended.shown[-2000:]}"
    found = result_of(out)
    return "; ".join(
        f"{key} {found[key]}, not {expected[key]}" for key in expected if key not in but and found[key] != expected[key]
    )


def place_of(path):
    """What the file belongs to, for the table."""
    parts = path.strip("/").split("/")
    if parts[0] == ".cache":
        return "cache"
    if parts[0] == "checkpoints":
        return "checkpoint"
    if "model" in parts[0]:
        return "final export"
    return "log" if any(name in parts[0] for name in ("metrics", "eval", "samples")) else "record"


def assert_none_wrong(table, fault, kind, wrong):
    """wrong: of each (run, place), "" where it ended well."""
    table += [{"fault": fault, "kind": kind, "place": place, "wrong": what} for (_, place), what in wrong.items()]
    assert not {at: what for at, what in wrong.items() if what}


def test_a_run_killed_at_any_operation_is_finished_by_the_same_command(run, tmp_path, torture_table):
    file, expected, whole, kind = run
    wrong = {}
    for at in moments(whole.num_operations, 4):
        out = tmp_path / f"killed{at}"
        ended = command(*train_in(out, file, kind), folder=out, kill_at=at)
        assert ended.code == -signal.SIGKILL
        wrong[at, place_of(ended.place)] = finished(file, out, expected, kind)
    assert_none_wrong(torture_table, "SIGKILL at a file operation", kind, wrong)


def test_a_run_killed_again_and_again_is_finished(run, tmp_path, torture_table):
    """Killed at random operations until it gets through; also while it takes up what the one before left."""
    file, expected, whole, kind = run
    wrong = {}
    for seed in range(5 if TORTURE else 1):
        out, drawn = tmp_path / f"again{seed}", random.Random(seed)
        for _ in range(6 if TORTURE else 2):
            command(*train_in(out, file, kind), folder=out, kill_at=drawn.randint(1, whole.num_operations))
        wrong[seed, "any"] = finished(file, out, expected, kind)
    assert_none_wrong(torture_table, "SIGKILL again and again", kind, wrong)


def test_a_run_killed_at_random_instants_is_finished(run, tmp_path, torture_table):
    """Wherever the program is: in a step, a save, an evaluation, the final export."""
    file, expected, whole, kind = run
    wrong, drawn = {}, random.Random(kind)
    for number in range(RANDOM_KILLS // len(KINDS) if TORTURE else 1):
        out = tmp_path / f"instant{number}"
        command(*train_in(out, file, kind), folder=out, kill_after=drawn.uniform(0.0, whole.seconds))
        wrong[number, "any"] = finished(file, out, expected, kind)
    assert_none_wrong(torture_table, "SIGKILL at a random instant", kind, wrong)


FAULTS = {
    "full_at": "no file can grow from an operation on",
    "fails_at": "an operation fails for want of room",
    "read_only_at": "the folder is read-only from an operation on",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_full_disk_loses_nothing_that_was_saved(run, tmp_path, torture_table, fault):
    """One message, exit code 6 (3 where a read of the cache fails); when there is room again, the same end."""
    file, expected, whole, kind = run
    wrong = {}
    for at in moments(whole.num_operations, 2, seed=len(fault)):
        out = tmp_path / f"{fault}{at}"
        ended = command(*train_in(out, file, kind), folder=out, **{fault: at})
        place = place_of(ended.place)
        if ended.code not in (0, 6, *[3] * (place == "cache")) or "Traceback" in ended.shown:
            wrong[at, place] = f"exit code {ended.code}: {ended.shown[-2000:]}"
        elif ended.code and (ended.shown.count("error: ") != 1 or str(out) not in ended.shown):
            wrong[at, place] = f"the message: {ended.shown[-2000:]}"
        else:  # older checkpoints may have had to make room
            wrong[at, place] = finished(file, out, expected, kind, but=["checkpoints"])
    assert_none_wrong(torture_table, FAULTS[fault], kind, wrong)


# Signals, and a display that is gone ---------------------------------------------------------------------------------

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
NO_CHECKPOINTS = ("checkpoint.every=null",)  # a signal saves all the same


def same_but_for_checkpoints(found, whole):
    return all(found[key] == whole[key] for key in ("logs", "summary", "model"))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_the_same_command_goes_on(run, tmp_path, number):
    file, whole, *_ = run
    out = tmp_path / "run"
    while_logging = ("metrics.jsonl", 5, number)  # the first is a removal, the fifth logs step 4
    train = ("train", file, *NO_CHECKPOINTS, f"out={out}")
    ended = command(*train, "--replace", folder=out, signals=[while_logging])
    name = signal.Signals(number).name
    assert ended.code == EXIT_CODE, ended.shown
    assert f"{name}: the run finishes this step and saves it" in ended.shown
    assert f"stopped by {name} after step 4, which is saved in {out}/checkpoints" in ended.shown
    assert "--replace" not in ended.shown.rpartition("this goes on: ")[2]
    assert command(*train, folder=out).code == 0
    assert same_but_for_checkpoints(result_of(out), whole)


def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(run, tmp_path):
    """The evaluation after step 3 is made again when the run goes on."""
    file, whole, *_ = run
    out = tmp_path / "run"
    train = ("train", file, *NO_CHECKPOINTS, f"out={out}")
    while_sampling = ("samples.jsonl", 3, signal.SIGTERM)  # after a removal and the evaluation before step 1
    ended = command(*train, folder=out, signals=[while_sampling])
    assert ended.code == EXIT_CODE and "after step 3" in ended.shown, ended.shown
    assert [json.loads(line)["step"] for line in (out / "eval.jsonl").read_text().splitlines()] == [0]
    assert command(*train, folder=out).code == 0
    assert same_but_for_checkpoints(result_of(out), whole)


def test_the_second_signal_ends_at_once(run, tmp_path):
    file, *_ = run
    out = tmp_path / "run"
    train = ("train", file, *NO_CHECKPOINTS, f"out={out}")
    twice = [("metrics.jsonl", 5, signal.SIGTERM), (".step-00000004.partial", 1, signal.SIGTERM)]
    ended = command(*train, folder=out, signals=twice)
    assert ended.code == -signal.SIGTERM, ended.shown
    assert not (out / "checkpoints" / "step-00000004").exists()


def test_a_signal_before_the_training_leaves_nothing(run, tmp_path):
    file, *_ = run
    out = tmp_path / "run"
    train = ("train", file, f"out={out}")
    of_the_model = ("config.json", 1, signal.SIGTERM)  # the data of a stream are read in a child
    ended = command(*train, folder=out, signals=[of_the_model])
    assert ended.code == EXIT_CODE and not out.exists()
    assert "stopped by SIGTERM before the first step" in ended.shown


def test_a_display_that_is_gone_does_not_end_the_run(run, tmp_path):
    """`preceptor train run.yaml | head -1`."""
    file, whole, *_ = run
    out = tmp_path / "run"
    train = [sys.executable, "-m", "preceptor", "train", str(file), *NO_CHECKPOINTS, f"out={out}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(train, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read().decode()
    assert process.returncode == 0, error
    assert "Traceback" not in error and "BrokenPipe" not in error
    assert same_but_for_checkpoints(result_of(out), whole)
