"""The small values that processes tell each other, and what one says when another one fails."""

import os
import re
import signal
import time

import pytest
import torch.distributed as dist
from ranks import run_ranks

from preceptor.cli import unexpected
from preceptor.errors import ConfigError, DataError, ModelError, ProcessError
from preceptor.world import ONE, Silenced, World

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork")


@pytest.fixture
def alone(monkeypatch):
    """What tells the errors of one of two processes of which the other says nothing."""
    monkeypatch.setattr("preceptor.world._CONSEQUENCE_SECONDS", 0.1)
    monkeypatch.setattr("preceptor.world._ignore_signals", lambda: None)
    return World(1, 2, store=dist.HashStore()).errors_told_once()


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


NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {}, NCCL version 2.27.5\n{}\nLast error:\n{}"
)
SYSTEM_ERROR = NCCL.format(
    "unhandled system error (run with NCCL_DEBUG=INFO for details)",
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. ",
    "Error while creating shared memory segment /dev/shm/nccl-X (size 9637888)",
)
INVALID_USAGE = NCCL.format(
    "invalid usage (run with NCCL_DEBUG=WARN for details)",
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
    "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1a000",
)
REMOTE_ERROR = NCCL.format(
    "remote process exited or there was a network error",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    "NET/IB : Got completion from peer with status=12",
)
INTERNAL_ERROR = NCCL.format(
    "internal error",
    "ncclInternalError: Internal check failed.",
    "Net : Connection closed by remote peer node-b<5>",
)
GLOO = "/pytorch/third_party/gloo/gloo/transport/tcp"


@pytest.mark.parametrize(
    ("kind", "message", "told"),
    [
        (
            dist.DistBackendError,
            SYSTEM_ERROR,
            "Error while creating shared memory segment /dev/shm/nccl-X (size 9637888) (NCCL error in: ",
        ),
        (
            dist.DistBackendError,
            INVALID_USAGE,
            "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1a000 (NCCL error in: ",
        ),
        (
            RuntimeError,
            f"[enforce fail at {GLOO}/device.cc:84] ifa != nullptr. Unable to find interface for: eth7",
            "ifa != nullptr. Unable to find interface for: eth7",
        ),
    ],
)
def test_what_keeps_the_processes_from_computing_together_is_told(kind, message, told, alone, monkeypatch, tmp_path):
    """Where no other process says that it has failed, none was killed; the command would fail again."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OSError, match=f"^the processes cannot compute together: {re.escape(told)}") as raised, alone:
        raise kind(message)
    shown = unexpected(raised.value)
    assert told in shown and "(in process 1 of 2)" in shown and "bug" not in shown and "killed" not in shown
    (file,) = tmp_path.iterdir()
    assert message.splitlines()[-1] in file.read_text() and str(file) in shown


@pytest.mark.parametrize(
    ("kind", "message", "told"),
    [
        (dist.DistBackendError, REMOTE_ERROR, REMOTE_ERROR.splitlines()[-1]),
        (dist.DistBackendError, INTERNAL_ERROR, INTERNAL_ERROR.splitlines()[-1]),
        (
            RuntimeError,
            f"[{GLOO}/pair.cc:547] Connection closed by peer [127.0.0.1]:93. This may indicate a remote failure.",
            "Connection closed by peer [127.0.0.1]:93",
        ),
        (RuntimeError, f"[{GLOO}/unbound_buffer.cc:81] Timed out waiting 1800000ms", "Timed out waiting 1800000ms"),
        (dist.DistNetworkError, "failed to recv, got 0 bytes", "failed to recv, got 0 bytes"),
    ],
)
def test_a_lost_process_is_told_with_what_was_heard(kind, message, told, alone):
    with pytest.raises(ProcessError) as raised, alone:
        raise kind(message)
    lost = "another process of the run was killed, or cannot be reached any more"
    assert str(raised.value) == f"process 1 of 2: {lost} ({told})"


def test_an_error_of_the_program_that_speaks_of_time_stays_what_it_is(alone):
    message = "CUDA error: the launch timed out and was terminated"
    with pytest.raises(RuntimeError) as raised, alone:
        raise RuntimeError(message)
    assert (str(raised.value), raised.value.__notes__) == (message, ["in process 1 of 2"])


def test_a_launcher_that_says_too_little(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    names = ("RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=f"WORLD_SIZE is 2, but {', '.join(names)} is not set"):
        World.launched().__enter__()
    for name in names[:3]:  # all that srun and mpirun are commonly made to say
        monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match="but LOCAL_RANK, LOCAL_WORLD_SIZE is not set"):
        World.launched().__enter__()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'many'"):
        World.launched().__enter__()
