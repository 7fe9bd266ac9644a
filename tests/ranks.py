"""Functions run on several ranks: forked processes that talk over gloo, with nothing imported again."""

import os
import pickle
import signal
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 120


def on_ranks(num_ranks, function, *arguments):
    """What `function(rank, *arguments)` gives on each rank, in order.

    Raises AssertionError with the exit codes and the traceback of each rank that fails, the first one first, and when
    the time is over; no process is left behind.
    """
    assert torch.get_num_threads() == 1, "threads do not survive a fork"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        codes = dict.fromkeys(_forked(rank, num_ranks, place, function, arguments) for rank in range(num_ranks))
        try:
            _wait(codes)
            trouble = [
                file.read_text() for file in sorted(place.glob("error-*"), key=lambda file: file.stat().st_mtime)
            ]
            ended = list(codes.values())
            assert ended == [0] * num_ranks, "\n".join([f"exit codes of the ranks: {ended} (None: hung)", *trouble])
            return [pickle.loads((place / f"result-{rank}").read_bytes()) for rank in range(num_ranks)]
        finally:
            for pid in [pid for pid, code in codes.items() if code is None]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _forked(rank, num_ranks, place, function, arguments):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=num_ranks)
        result = function(rank, *arguments)
        (place / f"result-{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
        code = 0
    except BaseException:
        (place / f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
    finally:
        os._exit(code)


def _wait(codes):
    """Fill in the exit code of each process; as soon as one rank fails the others have a second to say why."""
    ends = time.monotonic() + TIMEOUT_SECONDS
    while None in codes.values() and time.monotonic() < ends:
        for pid in [pid for pid, code in codes.items() if code is None]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                ends = min(ends, time.monotonic() + 1) if codes[pid] else ends
        time.sleep(0.01)
