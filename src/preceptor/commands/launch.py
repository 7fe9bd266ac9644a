"""Several processes of one command on this machine, started and watched by torch's own launcher."""

import logging
import os
import shlex
import signal
from collections.abc import Sequence

from preceptor.console import say
from preceptor.errors import ConfigError, ProcessError
from preceptor.train.signals import EXIT_CODE
from preceptor.world import COMMAND, command_words, num_cores

_SHUTDOWN_SECONDS = "600"  # to finish a step and save, before a process that was told to stop is killed


def require_number(nproc: str) -> None:
    """Raises ConfigError for a number of processes that cannot be."""
    if nproc != "gpu" and (not nproc.isdigit() or int(nproc) < 1):
        raise ConfigError(f"--nproc {shlex.quote(nproc)}: neither a number of processes nor `gpu`")


def launch(nproc: str, arguments: Sequence[str]) -> int:
    """Run `preceptor ARGUMENTS` in so many processes (`gpu`: one for each GPU); the exit code of the run.

    What torchrun does, in this process: it hands signals on, and ends all processes where one ends with an error, whose
    exit code is returned. Raises ConfigError where there is no GPU, ProcessError where a process was killed.
    """
    import torch

    num = torch.cuda.device_count() if nproc == "gpu" else int(nproc)
    if num < 1:
        raise ConfigError("--nproc gpu: torch sees no GPU here")
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[COMMAND] = shlex.join(command_words())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_SECONDS)
    logging.disable(logging.CRITICAL)  # of the launcher: the processes say themselves what went wrong
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(num)]
    options += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    try:
        torchrun.run(torchrun.parse_args([*options, "-m", "preceptor", *arguments]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        return _exit_code(error)
    except SignalException:  # the processes have saved, or the same command goes on from the checkpoint before
        return EXIT_CODE
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _exit_code(error: "Exception") -> int:
    """Of the processes that ended with an error; a killed one is named where no other says more.

    The launcher itself ends by SIGTERM what still runs.
    """
    failures = error.failures  # type: ignore[attr-defined]
    codes = [failure.exitcode for failure in failures.values() if failure.exitcode > 0]
    ended = {rank: failure.exitcode for rank, failure in failures.items() if failure.exitcode < 0}
    killed = {
        rank: code for rank, code in ended.items() if code != -signal.SIGTERM and set(codes) <= {ProcessError.exit_code}
    }
    if killed:
        names = ", ".join(f"process {rank} by {signal.Signals(-code).name}" for rank, code in sorted(killed.items()))
        why = " (SIGKILL: memory may have run out)" if -signal.SIGKILL in killed.values() else ""
        say(f"killed: {names}{why}", error=True)
    return codes[0] if codes else ProcessError.exit_code
