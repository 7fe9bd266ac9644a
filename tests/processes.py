"""The command in several processes of one world on this machine (gloo), forked with nothing imported again."""

import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
from children import exit_code_of
from ranks import set_environment, world_store


@dataclass(frozen=True)
class Process:
    """code: exit code, or minus the signal that ended it; None: it was killed for taking too long."""

    code: int | None
    shown: str  # on standard output and standard error


def run_command(num, *arguments, before=None, seconds=120):
    """`preceptor ARGUMENTS` in `num` processes of one world, by rank, without a launcher that ends them.

    before(rank): called first in each, to break something there.
    """
    store, outputs, pids = world_store(), [], []
    for rank in range(num):
        output = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
        pid = os.fork()
        if not pid:
            code = 70
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                set_environment(rank, num, store.port)
                code = _command(arguments, before, rank)
            finally:
                os._exit(code)
        outputs.append(output)
        pids.append(pid)
    ended = _wait(pids, seconds)
    found = []
    for pid, output in zip(pids, outputs, strict=True):
        output.seek(0)
        found.append(Process(ended[pid], output.read().decode()))
        output.close()
    return found


def _command(arguments, before, rank):
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    from preceptor import cli

    # OpenMP hangs in a forked process that starts threads where its parent had some; tests have one thread. Said once
    # here, as torch replaces its pool of threads after a fork, which two threads must not ask for at the same time.
    torch.set_num_threads(1)
    torch.set_num_threads = lambda num: None
    sys.argv = ["preceptor", *map(str, arguments)]

    def work():
        if before is not None:
            before(rank)
        cli.main()

    return exit_code_of(work)


def _wait(pids, seconds):
    """The exit codes of processes; those that take too long are killed and have None."""
    ended, until = {}, time.monotonic() + seconds
    while len(ended) < len(pids):
        late = time.monotonic() > until
        for pid in set(pids) - set(ended):
            if late:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, 0 if late else os.WNOHANG)
            if done:
                ended[pid] = None if late else os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return ended
