"""Several processes of one world on this machine (gloo), forked from the test with nothing imported again.

The test holds the store of the world, as a launcher does.
"""

import os
import pickle
import select
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore

from preceptor.world import World


def run_ranks(num, work, seconds=60, connected=True):
    """What `work(world)` returns in each of `num` processes, by rank; an exception that it raises is returned.

    connected False: `work(rank)`, which launches its world by itself.

    Those that take longer than `seconds` are killed and give None. So does one that kills itself.
    """
    store, readers, pids = _store(), [], []
    for rank in range(num):
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reader)
            _in_process(rank, num, store.port, work, writer, connected)
        os.close(writer)
        readers.append(reader)
        pids.append(pid)
    until = time.monotonic() + seconds
    found = [_read(reader, until) for reader in readers]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return found


def _in_process(rank, num, port, work, writer, connected):
    _environment(rank, num, port)
    try:
        if connected:
            with World.launched() as world:
                world.connect("cpu")
                found = work(world)
        else:
            found = work(rank)
    except BaseException as error:
        error.add_note("".join(traceback.format_exception(error)))
        found = error
    try:
        sent = pickle.dumps(found)
    except Exception as error:
        sent = pickle.dumps(RuntimeError(f"{found!r} cannot be sent: {error}"))
    with os.fdopen(writer, "wb") as file:
        file.write(sent)
    os._exit(0)


def _store():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))


def _environment(rank, num, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(num))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")


def _read(reader, until):
    received = b""
    while time.monotonic() < until and select.select([reader], [], [], max(0.0, until - time.monotonic()))[0]:
        part = os.read(reader, 1 << 20)
        if not part:
            break
        received += part
    os.close(reader)
    try:
        return pickle.loads(received)
    except (EOFError, pickle.UnpicklingError):
        return None


@dataclass(frozen=True)
class Process:
    """code: exit code, or minus the signal that ended it; None: it was killed for taking too long."""

    code: int | None
    shown: str  # on standard output and standard error


def run_command(num, *arguments, before=None, seconds=120):
    """`preceptor ARGUMENTS` in `num` processes of one world, by rank, without a launcher that ends them.

    before(rank): called first in each, to break something there.
    """
    store, outputs, pids = _store(), [], []
    for rank in range(num):
        output = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
        pid = os.fork()
        if not pid:
            code = 70
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                _environment(rank, num, store.port)
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

    sys.argv = ["preceptor", *map(str, arguments)]
    code = 0
    try:
        if before is not None:
            before(rank)
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 71
    sys.stdout.flush()
    sys.stderr.flush()
    return code


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
