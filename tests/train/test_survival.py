"""Runs that are killed, or find the disk full, at any file operation, and are finished by the same command.

The fast form takes a few of the operations, spread over the run; PRECEPTOR_TORTURE=1 (`make torture`) takes all.
"""

import json
import random
import signal

import pytest
import yaml
from children import TORTURE, command, moments, result_of

from conftest import conversations
from preceptor import cli
from preceptor.files import write_atomically

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork")  # Python 3.12: a native library may have a thread

KINDS = {"full": {}, "lora": {"adapter": {"rank": 2, "dropout": 0.1}}}


@pytest.fixture(scope="module", params=KINDS if TORTURE else ["full"])
def run(request, tmp_path_factory, base_folder):
    """(run file, what an uninterrupted run leaves, its number of file operations)."""
    place = tmp_path_factory.mktemp(request.param)
    for name, num in (("train", 6), ("eval", 2)):
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
        **KINDS[request.param],
    }
    file = place / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:  # in this process first: children then have all modules
        if not TORTURE:  # its plots take half of the time
            patch.setattr(
                "preceptor.train.finish.write_report", lambda of: write_atomically(of[0] / "report.html", "-")
            )
        patch.setattr("sys.argv", ["preceptor", "train", str(file), f"out={place / 'first'}"])
        with pytest.raises(SystemExit):
            cli.main()
        ended = command("train", file, f"out={place / 'whole'}", folder=place / "whole")
        assert ended.code == 0, ended.shown
        assert result_of(place / "first") == result_of(place / "whole")
        yield file, result_of(place / "whole"), ended.num_operations


def finished(file, out, expected):
    """The same command again: what is wrong with what the run then leaves; "" where it is as if never interrupted."""
    ended = command("train", file, f"out={out}", folder=out)
    if ended.code and not (ended.code == 6 and "this run is finished" in ended.shown):
        return f"the same command ended with {ended.code}: {ended.shown[-2000:]}"
    if "Traceback" in ended.shown:
        return f"the same command shows {ended.shown[-2000:]}"
    found = result_of(out)
    return "; ".join(f"{key} {found[key]}, not {expected[key]}" for key in expected if found[key] != expected[key])


def test_a_run_killed_at_any_operation_is_finished_by_the_same_command(run, tmp_path):
    file, expected, num = run
    wrong = {}
    for at in moments(num, 4):
        out = tmp_path / f"killed{at}"
        assert command("train", file, f"out={out}", folder=out, kill_at=at).code == -signal.SIGKILL
        wrong[at] = finished(file, out, expected)
    assert not {at: what for at, what in wrong.items() if what}


def test_a_run_killed_again_and_again_is_finished(run, tmp_path):
    """Killed at random operations until it gets through; also while it takes up what the one before left."""
    file, expected, num = run
    wrong = {}
    for seed in range(10 * TORTURE or 1):
        out, drawn = tmp_path / f"again{seed}", random.Random(seed)
        for _ in range(12 if TORTURE else 2):
            command("train", file, f"out={out}", folder=out, kill_at=drawn.randint(1, num))
        wrong[seed] = finished(file, out, expected)
    assert not {seed: what for seed, what in wrong.items() if what}


@pytest.mark.parametrize("kind", ["full_at", "fails_at"])
def test_a_full_disk_loses_nothing_that_was_saved(run, tmp_path, kind):
    """From some operation on nothing can grow, or one operation fails: one message, exit code 6, then the same end."""
    file, expected, num = run
    wrong = {}
    for at in moments(num, 2, seed=len(kind)):
        out = tmp_path / f"{kind}{at}"
        ended = command("train", file, f"out={out}", folder=out, **{kind: at})
        if ended.code not in (0, 6) or "Traceback" in ended.shown:
            wrong[at] = f"exit code {ended.code}: {ended.shown[-2000:]}"
        elif ended.code == 6 and (ended.shown.count("error: ") != 1 or str(out) not in ended.shown):
            wrong[at] = f"the message: {ended.shown[-2000:]}"
        else:
            wrong[at] = finished(file, out, expected)
    assert not {at: what for at, what in wrong.items() if what}
