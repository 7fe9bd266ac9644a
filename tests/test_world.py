"""The small values that processes tell each other, and what one says when another one fails."""

import os
import signal
import time

import pytest
from ranks import run_ranks

from preceptor.errors import ConfigError, DataError, ModelError, ProcessError
from preceptor.world import ONE, Silenced, World

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork")


def test_one_process_is_a_world_of_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with World.launched() as world:
        world.connect("cpu")
        assert world is ONE and world.is_first
        assert (world.sum(1.5, 2), world.max(3, -1), world.gather("a")) == ([1.5, 2], [3, -1], ["a"])
        with pytest.raises(DataError, match=r"^told as it is$"), world.errors_told_once():
            raise DataError("told as it is")


def test_values_are_the_same_in_all_processes():
    def work(world):
        values = [0.1, 1e16, -1e16][world.rank]
        return world.sum(values, 1), world.max(world.rank, -world.rank), world.gather({"rank": world.rank})

    found = run_ranks(3, work)
    assert found[0] == ([0.1, 3], [2, 0], [{"rank": 0}, {"rank": 1}, {"rank": 2}])  # exact, whatever the order
    assert found == [found[0]] * 3


def test_what_is_published_is_read_later():
    def work(world):
        if world.is_first:
            time.sleep(0.2)
            world.publish("folder", {"date": "today"})
        return world.published("folder")

    assert run_ranks(2, work) == [{"date": "today"}] * 2


def test_an_error_of_one_process_is_told_once_with_its_rank():
    """The others end with the same exit code, whether they wait for a value or for what is published."""

    def work(world):
        with world.errors_told_once():
            if world.rank == 1:
                raise ModelError("no memory")
            return world.published("never") if world.rank == 2 else world.sum(1)

    first, failed, third = run_ranks(3, work)
    assert isinstance(failed, ModelError) and str(failed) == "process 1 of 3: no memory"
    assert all(isinstance(other, Silenced) and other.code == ModelError.exit_code for other in (first, third))


def test_an_error_of_all_processes_is_told_once():
    def work(world):
        with world.errors_told_once():
            raise DataError("no such file")

    found = run_ranks(3, work)
    assert sum(isinstance(each, DataError) for each in found) == 1
    assert sum(isinstance(each, Silenced) and each.code == DataError.exit_code for each in found) == 2


def test_a_killed_process_ends_the_others(monkeypatch):
    monkeypatch.setattr("preceptor.world._CONSEQUENCE_SECONDS", 0.3)

    def work(world):
        world.sum(1)  # all are connected: one that dies before is waited for, as long as one that is late
        with world.errors_told_once():
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return world.sum(1)

    first, killed, third = run_ranks(3, work, seconds=20)
    assert killed is None and None not in (first, third)
    told = [each for each in (first, third) if isinstance(each, ProcessError)]
    assert len(told) == 1 and "another process of the run was killed" in str(told[0])
    assert all(getattr(each, "code", 7) == 7 for each in (first, third))


def test_a_launcher_that_says_too_little(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set"):
        World.launched().__enter__()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'many'"):
        World.launched().__enter__()
