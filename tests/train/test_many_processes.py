"""A run in several processes: what they write and say, and how they end when one of them fails."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from processes import run_command
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import conversations
from preceptor.errors import CheckpointError
from preceptor.train import loop
from preceptor.train.evaluations import Evaluations

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr("preceptor.world._CONSEQUENCE_SECONDS", 1.0)


def in_step(number, rank, action):
    """Makes the process of this rank do something before its n-th step."""
    steps = loop.take_step

    def take_step(state, *arguments):
        if state.step == number - 1:
            action()
        return steps(state, *arguments)

    def before(own):
        if own == rank:
            loop.take_step = take_step

    return before


def test_an_error_of_one_process_ends_all_with_its_message_and_exit_code(run_file):
    def no_memory():
        raise MemoryError("no memory")

    def before(rank):
        if rank == 1:
            loop.peak_memory_bytes = lambda _: no_memory()

    started = time.monotonic()
    first, second = run_command(2, "train", run_file(), before=before)
    assert time.monotonic() - started < 60
    assert first.code == second.code == 1
    assert "error: " not in first.shown and "no memory" in second.shown
    assert second.shown.count("error: ") == 1


def test_an_error_that_all_have_is_told_once(run_file):
    file = run_file([{"messages": [{"role": "user", "content": "?"}]}])
    found = run_command(2, "train", file)
    assert [process.code for process in found] == [3, 3]
    assert "".join(process.shown for process in found).count("error: process ") == 1


def test_a_finished_training_is_kept_where_one_process_cannot_write(run_file, tmp_path):
    """The second one its part of a checkpoint, in a thread; the first one the last evaluation."""
    file = run_file(eval_rows=conversations(3), checkpoint__every="3 steps", checkpoint__async_save=True)

    def before(rank):
        from preceptor.train import checkpoint, evaluations

        def failing(write, fails):
            def written(*arguments):
                if fails(*arguments):
                    raise CheckpointError("no room")
                return write(*arguments)

            return written

        if rank == 1:
            writer = checkpoint.FileSystemWriter
            writer.write_data = failing(writer.write_data, lambda own, *_: "step-00000003" in str(own.path))
        else:
            append = evaluations.append_line
            evaluations.append_line = failing(append, lambda file, line: file.stem == "eval" and line["step"] == 4)

    found = run_command(2, "train", file, "eval.every=4 steps", before=before)
    shown = "".join(process.shown for process in found)
    assert [process.code for process in found] == [6, 6], shown
    assert shown.count("no room. The training is finished and kept in") == 1
    assert "no room; the training is over, and its model needs no checkpoint" in shown
    found = run_command(2, "train", file, "eval.every=4 steps")
    assert [process.code for process in found] == [0, 0], found
    for name, steps in (("metrics", [1, 2, 3, 4]), ("eval", [0, 4])):
        lines = (tmp_path / "run" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == steps


def test_a_killed_process_ends_all_in_time(run_file):
    before = in_step(2, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    first, second = run_command(2, "train", run_file(), before=before)
    assert (first.code, second.code) == (7, -signal.SIGKILL)
    assert "error: process 0 of 2: another process of the run was killed" in first.shown


def test_other_data_on_one_machine_is_refused(run_file, tmp_path):
    file = run_file()

    def before(rank):
        if rank == 1:
            from preceptor.data.dataset import Dataset

            Dataset.sha256 = property(lambda self: "other")

    found = run_command(2, "train", file, before=before)
    assert [process.code for process in found] == [3, 3]
    shown = "".join(process.shown for process in found)
    assert shown.count("process 1 has other examples and held-out examples than process 0") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_that_one_process_does_not_see_is_refused(run_file, tmp_path):
    """As of two nodes whose `out` are two disks: before anything is loaded, and nothing is left behind."""

    def before(rank):
        if rank == 1:
            from preceptor.train import lock
            from preceptor.world import World

            published, lock._SEEN_SECONDS = World.published, 0.0

            def of_another_disk(world, name):
                found = published(world, name)
                return {**found, "path": str(tmp_path / "other")} if name == "folder" else found

            World.published = of_another_disk

    found = run_command(2, "train", run_file(), before=before)
    assert [process.code for process in found] == [6, 6]
    shown = "".join(process.shown for process in found)
    assert shown.count("error: process 1 of 2: ") == 1 and "does not see its lock (.lock)" in shown
    assert f"{tmp_path / 'run'}: process " in shown and "file system that all of them mount" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["null", "nf4"])
def test_other_weights_on_one_machine_are_refused(run_file, tmp_path, base_folder, kind):
    """Twice as large ones, which have the same codes in four bits."""
    for rank in range(2):
        place = shutil.copytree(base_folder, tmp_path / str(rank) / "base") / "model.safetensors"
        weights = load_file(place)
        save_file({name: weight * (1 + rank) for name, weight in weights.items()}, place, {"format": "pt"})
    file = run_file(model__path="base", adapter__rank=2, model__quantization=None if kind == "null" else kind)
    keys = ("parallel.strategy=replicate",)
    found = run_command(2, "train", file, *keys, before=lambda rank: os.chdir(tmp_path / str(rank)))
    shown = "".join(process.shown for process in found)
    assert {process.code for process in found} == {5}, shown
    assert shown.count("base: process 1 of 2 has other weights before the first step than process 0") == 1, shown
    assert not (tmp_path / "run").exists()


def unequal(rank):
    """The environment of three processes, one on the first machine and two on the second."""
    os.environ.update(LOCAL_RANK=str(max(0, rank - 1)), LOCAL_WORLD_SIZE=str(1 + (rank > 0)))


def test_a_model_is_not_spread_over_machines_of_other_numbers_of_processes(run_file):
    found = run_command(3, "train", run_file(), "parallel.strategy=hybrid", before=unequal)
    shown = "".join(process.shown for process in found)
    assert {process.code for process in found} == {2}, shown
    assert shown.count("hybrid needs as many processes on each machine, but here they have 1 and 2") == 1, shown


# What a run leaves --------------------------------------------------------------------------------------------------

TIMED = ("seconds", "peak_memory_bytes")


def lines(folder, name):
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in found]


def numbers(value, place=""):
    """Everything in a log, by its place."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in numbers(inner, f"{place}.{key}").items()}
    if isinstance(value, list):
        return {k: v for at, inner in enumerate(value) for k, v in numbers(inner, f"{place}[{at}]").items()}
    return {place: value}


def require_same(folder, expected):
    """Logs and weights up to rounding, all else to the letter."""
    for name, tolerance in (("metrics.jsonl", 1e-3), ("eval.jsonl", 1e-3), ("samples.jsonl", 0)):
        found, wanted = numbers(lines(folder, name)), numbers(lines(expected, name))
        assert found.keys() == wanted.keys(), name
        for place, value in wanted.items():
            near = pytest.approx(value, rel=tolerance) if isinstance(value, float) else value
            assert found[place] == near, f"{name}{place}: {found[place]}, not {value}"
    losses = [[line["loss"] for line in lines(each, "metrics.jsonl")] for each in (folder, expected)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)
    names = [sorted(path.name for path in each.iterdir() if path.name != "checkpoints") for each in (folder, expected)]
    assert names[0] == names[1]
    own, whole = (AutoModelForCausalLM.from_pretrained(each / "model").state_dict() for each in (folder, expected))
    assert own.keys() == whole.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(own[name], weight, rtol=1e-3, atol=1e-5, msg=name)


def run_of(run_file, tmp_path):
    task = tmp_path / "task.jsonl"
    task.write_text(
        "".join(json.dumps({"prompt": f"{n}?", "match": "contains", "accepted": [str(n)]}) + "\n" for n in range(3))
    )
    more = {"eval__tasks": [str(task)], "eval__every": "2 steps", "train__batch_size": 3, "eval__num_samples": 2}
    return run_file(eval_rows=conversations(5), checkpoint__every="2 steps", **more)


REPLAY = ("loss.kl_coef=0.1", "replay={data: [{path: replay.jsonl}], share: 0.4}")


@pytest.mark.parametrize(
    ("strategy", "keys"),
    [
        ("replicate", ("model.quantization=nf4", "adapter.rank=2", "adapter.dropout=0.1")),
        ("shard", ("memory.context_gradient=recompute", *REPLAY)),
        ("shard", ("adapter.rank=2", "adapter.dropout=0.1", "memory.activation_checkpointing=all")),
    ],
)
def test_two_processes_leave_what_one_leaves(run_file, tmp_path, preceptor, strategy, keys, write_jsonl, monkeypatch):
    file = run_of(run_file, tmp_path)
    write_jsonl(conversations(5, turns=2), "replay.jsonl")
    monkeypatch.chdir(tmp_path)
    code, _, err = preceptor("train", file, f"out={tmp_path / 'one'}", *keys)
    assert code == 0, err
    first, second = run_command(2, "train", file, f"out={tmp_path / 'two'}", f"parallel.strategy={strategy}", *keys)
    assert (first.code, second.code) == (0, 0), first.shown + second.shown
    assert second.shown.strip() == "" or "Warning" in second.shown, second.shown
    require_same(tmp_path / "two", tmp_path / "one")


def test_what_one_process_is_told_in_the_last_evaluation_stops_all(run_file, tmp_path):
    evaluate = Evaluations.evaluate

    def told(self, state, **named):
        evaluate(self, state, **named)
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    def before(rank):
        if rank == 1:
            Evaluations.evaluate = told

    file = run_file(eval_rows=conversations(2))
    first, second = run_command(2, "train", file, before=before)
    assert (first.code, second.code) == (75, 75), first.shown + second.shown
    assert "stopped by SIGTERM after step 4, which is saved" in first.shown
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("told", ["SIGTERM", "the file STOP"])
def test_a_run_goes_on_with_another_number_of_processes(run_file, tmp_path, preceptor, told):
    """Told to stop in one of them, both save after the same step; one process then finishes the run.

    By the file, while checkpoints are written beside the training.
    """
    file = run_of(run_file, tmp_path)
    assert preceptor("train", file, f"out={tmp_path / 'one'}")[0] == 0
    stop = tmp_path / "two" / "STOP"
    by_file = told == "the file STOP"
    every = ("checkpoint.every=1 steps", "checkpoint.async_save=true") if by_file else ("checkpoint.every=null",)
    command = ("train", file, f"out={tmp_path / 'two'}", "parallel.strategy=shard", *every)
    before = in_step(2, 1, stop.touch if by_file else lambda: os.kill(os.getpid(), signal.SIGTERM))
    first, second = run_command(2, *command, before=before)
    assert (first.code, second.code) == (75, 75), first.shown + second.shown
    assert f"stopped by {told} after step 2, which is saved" in first.shown and not stop.exists()
    saved = sorted(path.name for path in (tmp_path / "two" / "checkpoints").iterdir())
    assert saved == ["step-00000001", "step-00000002"][not by_file :]
    assert [line["step"] for line in lines(tmp_path / "two", "metrics.jsonl")] == [1, 2]
    code, out, err = preceptor(*command)
    assert code == 0, err
    assert "num_processes: 2 before, 1 now" in out
    require_same(tmp_path / "two", tmp_path / "one")


def test_bfloat16_weights_are_sharded_and_saved_as_one_model(run_file, tmp_path):
    half = {"model__dtype": "bfloat16", "optimizer__name": "adamw_8bit", "optimizer__rounding": "exact"}
    file = run_file(**half, parallel__strategy="shard")
    found = run_command(2, "train", file)
    assert [process.code for process in found] == [0, 0], found
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto").state_dict()
    assert all(torch.equal(value, value.bfloat16().to(value.dtype)) for value in saved.values())
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4 and last["loss"] < 6
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["engine"]["not_compiled"] == "it is spread over processes"
