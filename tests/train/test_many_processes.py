"""A run in several processes: what they write and say, and how they end when one of them fails."""

import os
import signal
import time

import pytest
from processes import run_command

from preceptor.train import loop

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
