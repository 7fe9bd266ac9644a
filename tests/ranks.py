"""Functions run on several ranks: forked processes that talk over gloo, with nothing imported again.

`on_ranks` is for functions that must succeed on all ranks, `run_ranks` for a World whose ranks may fail or be killed.
"""

import faulthandler
import os
import pickle
import select
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from preceptor.world import World

AFTER_A_FAILURE = 5.0  # seconds that the others then have to say what they find


def on_ranks(num_ranks, function, *arguments, seconds=120):
    """What `function(rank, *arguments)` gives on each rank, in order; None of a rank that ends by `os._exit(0)`.

    Raises AssertionError with the exit codes and the traceback of each rank that fails, the first one first, and when
    the time is over.
    """
    with tempfile.TemporaryDirectory() as folder:

        def work(rank):
            store = dist.FileStore(f"{folder}/store", num_ranks)
            timeout = timedelta(seconds=seconds / 2)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
            return function(rank, *arguments)

        ranks = _run(num_ranks, work, seconds, AFTER_A_FAILURE)
    failed = sorted((rank for rank in ranks if rank.failed_at is not None), key=lambda rank: rank.failed_at)
    codes = [rank.code for rank in ranks]
    told = ["".join(rank.found.__notes__) for rank in failed] + [rank.fault for rank in ranks]
    assert codes == [0] * num_ranks, "\n".join([f"exit codes of the ranks: {codes} (None: hung)", *filter(None, told)])
    return [rank.found for rank in ranks]


def run_ranks(num_ranks, work, seconds=60, connected=True):
    """What `work(world)` returns on each rank, in order; an exception that it raises is returned.

    connected False: `work(rank)`, which launches its world by itself.

    None of those that take longer than `seconds`, which are killed, and of one that kills itself. All is done once more
    where one hangs: a process that is forked beside the threads of a test does so once in some hundred times.
    """
    for _ in range(2):
        store = world_store()

        def launched(rank, port=store.port):
            set_environment(rank, num_ranks, port)
            if not connected:
                return work(rank)
            with World.launched() as world:
                world.connect("cpu")
                return work(world)

        ranks = _run(num_ranks, launched, seconds)
        if all(rank.code is not None for rank in ranks):
            break
    return [rank.found for rank in ranks]


def world_store():
    """The store of a world, which the test holds as a launcher does."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))


def set_environment(rank, num_ranks, port):
    """What a launcher tells a process of the world."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(num_ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")


# Processes -----------------------------------------------------------------------------------------------------------


@dataclass
class _Rank:
    """A process, until `code` is known not waited for yet, so its pid is its own.

    found: what the work gave, or the exception that it raised at the time failed_at. fault: the stack of a crash.
    """

    pid: int
    reader: int
    received: bytes = b""
    found: Any = None
    failed_at: float | None = None
    code: int | None = None
    fault: str = ""


def _run(num_ranks, work, seconds, after_a_failure=None):
    """The ranks in order, after `work(rank)` on each.

    A rank that succeeds ends when all have: it closes no connection that another one still reads. One that fails ends
    at once, and the others have so many seconds more, where after_a_failure is given.
    """
    assert torch.get_num_threads() == 1, "threads do not survive a fork"
    held, holding = os.pipe()  # its other end is closed when all ranks may end
    with tempfile.TemporaryDirectory() as folder:
        faults = [Path(folder) / str(rank) for rank in range(num_ranks)]
        ranks = []
        try:
            for rank in range(num_ranks):
                reader, writer = os.pipe()
                pid = os.fork()
                if not pid:
                    os.close(holding)
                    _in_process(rank, work, writer, held, faults[rank])
                os.close(writer)
                ranks.append(_Rank(pid, reader))
            _receive(ranks, seconds, after_a_failure)
        finally:
            os.close(held)
            os.close(holding)
            for rank, fault in zip(ranks, faults, strict=False):
                _end(rank)
                rank.fault = fault.read_text() if fault.exists() else ""
    return ranks


def _in_process(rank, work, writer, held, fault):
    code = 1
    try:
        with fault.open("w") as file, os.fdopen(writer, "wb") as output:
            faulthandler.enable(file)
            sent = _done(rank, work)
            output.write(pickle.dumps(sent))
            code = 0 if sent["failed_at"] is None else 1
        if not code:
            os.read(held, 1)
    finally:
        os._exit(code)


def _done(rank, work):
    """The fields of a _Rank after its work, which pickle takes."""
    try:
        found = work(rank)
        pickle.dumps(found)
    except BaseException as error:
        failed_at, shown = time.monotonic(), f"rank {rank}: {traceback.format_exc()}"
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(repr(error))
        error.add_note(shown)
        return {"found": error, "failed_at": failed_at}
    return {"found": found, "failed_at": None}


def _receive(ranks, seconds, after_a_failure):
    """Read what all ranks have to say, until they have ended or wait for the end of all."""
    until, open_ = time.monotonic() + seconds, {rank.reader: rank for rank in ranks}
    while open_ and time.monotonic() < until:
        for reader in select.select(list(open_), [], [], max(0.0, until - time.monotonic()))[0]:
            part = os.read(reader, 1 << 20)
            open_[reader].received += part
            if part:
                continue
            rank = open_.pop(reader)
            try:
                vars(rank).update(pickle.loads(rank.received))
            except (EOFError, pickle.UnpicklingError):  # it has ended before it could say all
                rank.code = os.waitstatus_to_exitcode(os.waitpid(rank.pid, 0)[1])
            if after_a_failure is not None and (rank.failed_at is not None or rank.code):
                until = min(until, time.monotonic() + after_a_failure)


def _end(rank):
    """Wait for a process that is about to end; kill one that is not, whose code stays None."""
    os.close(rank.reader)
    if rank.code is not None:
        return
    hangs = not rank.received
    if hangs:
        os.kill(rank.pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(rank.pid, 0)[1])
    rank.code = None if hangs else code
