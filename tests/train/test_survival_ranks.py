"""Runs of two processes that are killed: the same command finishes them, in as many processes or in another number.

The long form (PRECEPTOR_TORTURE) kills one process or both at random instants, full and LoRA, sharded and replicated.
"""

import json
import os
import random
import signal
import threading
import time

import pytest
import torch
import yaml
from children import TORTURE, command, result_of
from processes import run_command
from safetensors.torch import load_file

from conftest import conversations
from preceptor.files import write_atomically
from preceptor.train import loop

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork")

KINDS = {
    "full, sharded": {"parallel": {"strategy": "shard"}},
    "lora, replicated": {"adapter": {"rank": 2, "dropout": 0.1}, "parallel": {"strategy": "replicate"}},
}
if TORTURE:
    KINDS["stream, sharded"] = {"data": {"streaming": True, "window": 4}, "parallel": {"strategy": "shard"}}
NUM_RANDOM = 15  # kills of each kind in the long form


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory, base_folder):
    """(run file, what two processes leave uninterrupted, the seconds that they take, kind)."""
    place = tmp_path_factory.mktemp("ranks")
    for name, num in (("train", 8), ("eval", 3)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations(num)))
    tree = {
        "model": {"path": str(base_folder)},
        "data": {
            "train": [{"path": str(place / "train.jsonl")}],
            "eval": [{"path": str(place / "eval.jsonl")}],
            "chat_template": "chatml",
            "max_length": 128,
        },
        "train": {"duration": "6 steps", "batch_size": 2},
        "optimizer": {"learning_rate": 1e-3},
        "checkpoint": {"every": "2 steps"},
        "eval": {"every": "3 steps", "num_samples": 0},
        "out": str(place / "run"),
    }
    for section, own in KINDS[request.param].items():
        tree[section] = {**tree.get(section, {}), **own}
    file = place / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preceptor.world._CONSEQUENCE_SECONDS", 1.0)
        patch.setattr("preceptor.train.finish.write_report", lambda of: write_atomically(of[0] / "report.html", "-"))
        started = time.monotonic()
        assert_well(run_command(2, "train", file, f"out={place / 'whole'}"))
        yield file, place / "whole", time.monotonic() - started, request.param


def assert_well(processes):
    assert [process.code for process in processes] == [0] * len(processes), [process.shown for process in processes]


def killed_in_step(number, victims):
    """Kills these ranks when they are about to take the n-th step."""

    def before(rank):
        take_step = loop.take_step

        def killed(state, *arguments):
            if state.step == number - 1 and rank in victims:
                os.kill(os.getpid(), signal.SIGKILL)
            return take_step(state, *arguments)

        loop.take_step = killed

    return before


def killed_after(seconds, victims):
    def before(rank):
        if rank in victims:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    return before


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    """Of the model, which each process writes a part of."""
    return {
        name: tensor for file in (folder / "model").glob("*.safetensors") for name, tensor in load_file(file).items()
    }


def wrong_with(processes, out, whole):
    """What is wrong with what the same command leaves; "" where it is as if never interrupted."""
    shown = " ".join(process.shown for process in processes)
    if [process.code for process in processes] != [0, 0] and "this run is finished" not in shown:
        return f"the same command ended with {[process.code for process in processes]}: {shown[-3000:]}"
    found, expected = result_of(out), result_of(whole)
    return "; ".join(f"{key} {found[key]}, not {expected[key]}" for key in expected if found[key] != expected[key])


def test_two_processes_killed_at_random_instants_are_finished_to_the_bit(run, tmp_path, torture_table):
    """One of them, or both; the same command then leaves the weights and logs of an uninterrupted run of two."""
    file, whole, seconds, kind = run
    drawn, wrong = random.Random(kind), {}
    for number in range(NUM_RANDOM if TORTURE else 1):
        out, victims = tmp_path / f"killed{number}", drawn.choice([(0,), (1,), (0, 1)])
        run_command(2, "train", file, f"out={out}", before=killed_after(drawn.uniform(0.2, seconds), victims))
        wrong[number] = wrong_with(run_command(2, "train", file, f"out={out}"), out, whole)
    fault = "SIGKILL of one or both of two processes at a random instant"
    torture_table += [{"fault": fault, "kind": kind, "place": "any", "wrong": what} for what in wrong.values()]
    assert not {number: what for number, what in wrong.items() if what}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_killed_run_goes_on_with_another_number_of_processes(run, tmp_path, before, after):
    """The same sequences in the same steps, losses within the rounding of float32, no step lost or doubled."""
    file, whole, _, _ = run
    out = tmp_path / "run"
    arguments = ("train", file, f"out={out}")
    if before == 2:
        first, second = run_command(2, *arguments, before=killed_in_step(6, (1,)))
        assert second.code == -signal.SIGKILL and first.code == 7
        ended = command(*arguments, folder=out)
        assert ended.code == 0, ended.shown
        shown = ended.shown
    else:
        ended = command(*arguments, folder=out, signals=[("metrics.jsonl", 6, signal.SIGKILL)])
        assert ended.code == -signal.SIGKILL
        processes = run_command(2, *arguments)
        assert_well(processes)
        shown = processes[0].shown
    assert f"num_processes: {before} before, {after} now" in shown
    lines, expected = logged(out), logged(whole)
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert [line["num_tokens"] for line in lines] == [line["num_tokens"] for line in expected]
    losses = torch.tensor([[line["loss"], line["grad_norm"]] for line in lines])
    torch.testing.assert_close(
        losses, torch.tensor([[line["loss"], line["grad_norm"]] for line in expected]), rtol=1e-4, atol=1e-5
    )
    ours, theirs = (weights(folder) for folder in (out, whole))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-4)
