"""Several processes of one world on this machine (gloo), forked from the test with nothing imported anew."""

import os
import pickle
import select
import signal
import socket
import time
import traceback

from preceptor.world import World


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(num, work, seconds=60):
    """What `work(world)` returns in each of `num` processes, by rank; an exception that it raises is returned.

    Those that take longer than `seconds` are killed and give None. So does one that kills itself.
    """
    port, readers, pids = free_port(), [], []
    for rank in range(num):
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reader)
            _in_process(rank, num, port, work, writer)
        os.close(writer)
        readers.append(reader)
        pids.append(pid)
    until = time.monotonic() + seconds
    found = [_read(reader, until) for reader in readers]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return found


def _in_process(rank, num, port, work, writer):
    signal.alarm(0)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(num))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        with World.launched() as world:
            world.connect("cpu")
            found = work(world)
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
