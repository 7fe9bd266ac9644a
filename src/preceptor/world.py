"""The processes of a run: which of them this one is, and the small values that they tell each other.

A launcher (torchrun, `preceptor train --nproc`) starts them and says by the environment which is which. A run of one
process is a world of one, in which every method returns what it is given. Tensors of the model are not exchanged here
(model/sharding.py). torch is imported in the functions, not at the top.
"""

import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from preceptor.errors import ConfigError, PreceptorError, ProcessError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""After which a process that waits for another one gives up."""

COMMAND = "PRECEPTOR_COMMAND"
"""Variable of the environment in which a launcher hands on what was typed."""

_OF_LAUNCHER = ("RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # of each process
_LOOK_SECONDS = 0.05  # between two looks for what another process has published
_CONSEQUENCE_SECONDS = 5.0  # that a process whose connection broke waits for another one to say why
_ALIKE_SECONDS = 60.0  # in which processes that fail alike do so: one compiles longer than another
_BACKENDS = ("gloo", "nccl")  # in the messages of torch, as are those of a process that is lost
_LOST = ("connection", "broken pipe", "timed out", "timeout", "ncclremoteerror")
_FAILURE, _ARRIVED, _CONNECTED = "failure", "arrived", "connected"


class Silenced(SystemExit):
    """The end of a process whose error another one has told already; with its exit code."""


@dataclass(frozen=True)
class World:
    """rank: of all processes; local_rank: of those on this machine. store: where all can read what one has written.

    group: torch's group of the processes; None: the one of `connect`.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: Any = None
    group: Any = None

    @classmethod
    @contextmanager
    def launched(cls) -> "Iterator[World]":
        """The world that the environment tells of; its processes can publish, and compute together after `connect`.

        Raises ConfigError where a launcher says how many processes there are, but not which is which.
        """
        size = _number(os.environ, "WORLD_SIZE", 1)
        if size <= 1:
            yield ONE
            return
        missing = [name for name in _OF_LAUNCHER if not os.environ.get(name)]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set: start the processes by torchrun, use "
                "`preceptor train --nproc N`, or set it in each process (LOCAL_: among those of its machine)"
            )
        from torch import distributed
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        local_rank = _number(os.environ, "LOCAL_RANK", 0)
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        store = PrefixStore("preceptor", store)
        world = cls(rank, size, local_rank, _number(os.environ, "LOCAL_WORLD_SIZE", 1), store)
        yield world
        if distributed.is_initialized():  # after an error nothing is waited for
            distributed.destroy_process_group()

    @classmethod
    def of_process_group(cls) -> "World":
        """Of the processes that compute together already."""
        from torch import distributed

        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    # Before the processes are connected

    def publish(self, name: str, value: Any) -> None:
        """For all others to read. value: of what JSON has."""
        if self.size > 1:
            self.store.set(name, json.dumps(value))

    def published(self, name: str) -> Any:
        """What another process publishes under a name, sooner or later. Ends this process where one has failed."""
        self._wait(lambda: self.store.check([name]), name)
        return json.loads(self.store.get(name))

    def _wait(self, is_there: Callable[[], bool], name: str) -> None:
        until = time.monotonic() + TIMEOUT.total_seconds()
        while not is_there():
            self.end_if_another_failed()
            if time.monotonic() > until:
                raise ProcessError(f"waited {TIMEOUT} for another process ({name})")
            time.sleep(_LOOK_SECONDS)

    def _wait_for_all(self, name: str) -> None:
        """Until all processes have come here. Ends this process where one has failed."""
        self.store.add(name, 1)
        self._wait(lambda: self.store.add(name, 0) == self.size, name)

    def connect(self, device_type: str) -> None:
        """Let the processes compute together. Data is rendered before: processes cannot be forked afterwards."""
        if self.size == 1:
            return
        from torch import distributed

        self._wait_for_all(_ARRIVED)  # while torch connects them, none would hear that another one has failed
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.size, timeout=TIMEOUT)
        self._wait_for_all(_CONNECTED)  # none may end before all are: who still connects would wait for it

    def with_own_group(self) -> "World":
        """The same processes, who talk apart from others: a thread that waits for them there disturbs nothing else.

        All make such groups in the same order.
        """
        if self.size == 1:
            return self
        from torch import distributed

        return replace(self, group=distributed.new_group(backend="gloo", timeout=TIMEOUT))

    # Connected; all processes call the same methods in the same order

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, by rank: whatever pickle takes."""
        if self.size == 1:
            return [value]
        from torch import distributed

        found = [None] * self.size
        distributed.all_gather_object(found, value, group=self.group)
        return found

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do `work` in every process; its results by rank. Where it fails in one, all raise the first error."""
        if self.size == 1:
            return [work()]
        result: tuple[T | None, BaseException | None, BaseException | None]
        try:
            result = (work(), None, None)
        except BaseException as error:
            result = (None, error, error.__cause__)
        results = self.gather(result)
        for _, failed, cause in results:
            if failed is not None:
                raise failed from cause
        return [own for own, _, _ in results]

    def first(self, work: Callable[[], T]) -> T:
        """Do `work` in the first process alone; its result, or its error, in all."""
        return self.together(lambda: work() if self.is_first else None)[0]  # type: ignore[return-value]

    def sum(self, *values: float) -> list[float]:
        """Of each value the sum over the processes: the same on all of them, to the bit, in whatever order."""
        return [math.fsum(each) for each in self._gathered(values)]

    def max(self, *values: float) -> list[float]:
        return [max(each) for each in self._gathered(values)]

    def _gathered(self, values: tuple[float, ...]) -> list[tuple[float, ...]]:
        if self.size == 1:
            return [(value,) for value in values]
        import torch
        from torch import distributed

        own = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(found, own, group=self.group)
        return list(zip(*(each.tolist() for each in found), strict=True))

    # Errors

    @contextmanager
    def errors_told_once(self) -> Iterator[None]:
        """Inside, an error is raised on in the process that fails first, with its rank; others end with its exit code.

        So one message is shown, and the launcher ends what still runs. What only follows from the end of another
        process, such as a broken connection, waits a while for that process to say what happened.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except Silenced:
            raise
        except Exception as error:
            _ignore_signals()
            found = self._failed(error)
            if found is error:
                raise
            raise found from error

    def fails_everywhere(self, name: str) -> bool:
        """Whether all processes fail in the same work: those that do so call this, within a minute of each other.

        By the store alone: a process in which the work goes on may wait for this one in the middle of it.
        """
        if self.size == 1:
            return True
        self.store.add(name, 1)
        until = time.monotonic() + _ALIKE_SECONDS
        while self.store.add(name, 0) < self.size:
            self.end_if_another_failed()
            if time.monotonic() > until:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def end_if_another_failed(self) -> None:
        """Also for a process that was told to stop: by the launcher, perhaps, because another one has failed."""
        failure = self._failure() if self.size > 1 else None
        if failure is not None:
            raise Silenced(failure["exit_code"])

    def _failed(self, error: Exception) -> BaseException:
        if not isinstance(error, PreceptorError) and _is_of_backend(error):
            until = time.monotonic() + _CONSEQUENCE_SECONDS
            while self._failure() is None and time.monotonic() < until:
                time.sleep(_LOOK_SECONDS)
            error = _explained(error)
        exit_code = error.exit_code if isinstance(error, PreceptorError) else PreceptorError.exit_code
        try:
            own = json.dumps({"rank": self.rank, "exit_code": exit_code})
            first = self.store.compare_set(_FAILURE, "", own).decode()
        except RuntimeError:  # the process that held the store has ended
            first = own
        if first != own:
            return Silenced(json.loads(first)["exit_code"])
        if not isinstance(error, PreceptorError):
            error.add_note(f"in process {self.rank} of {self.size}")
            return error
        told = type(error)(f"process {self.rank} of {self.size}: {error}")
        told.__dict__.update(error.__dict__)
        return told

    def _failure(self) -> Any:
        try:
            return json.loads(self.store.get(_FAILURE)) if self.store.check([_FAILURE]) else None
        except RuntimeError:
            return None

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, only the first process prints; what the others have to say is said by their errors."""
        if self.is_first:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # noqa: PTH123
            yield


def _ignore_signals() -> None:
    """This process ends by itself: the launcher, which tells all to stop where one has failed, need not hurry it."""
    if threading.current_thread() is threading.main_thread():
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)


def is_launched_first() -> bool:
    """Whether the environment tells that this is the first process, or the only one."""
    return _number(os.environ, "WORLD_SIZE", 1) == 1 or _number(os.environ, "RANK", 0) == 0


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not text.isdigit():
        raise ConfigError(f"the environment's {name} is {text!r}, which is no number")
    return int(text)


def _is_of_backend(error: Exception) -> bool:
    from torch import distributed

    of_backend = isinstance(error, RuntimeError) and any(name in str(error).lower() for name in _BACKENDS)
    return of_backend or isinstance(error, distributed.DistError)


def _explained(error: Exception) -> PreceptorError | OSError:
    """What is told of an error of NCCL or gloo: another process is lost, or the processes cannot compute together."""
    from torch import distributed

    text = re.sub(r"^\[[^]]*\] ", "", str(error).strip()) or type(error).__name__
    where, _, cause = (" ".join(part.split()) for part in text.partition("Last error:"))  # NCCL's own
    is_lost = isinstance(error, distributed.DistNetworkError | distributed.DistStoreError)
    if is_lost or any(words in text.lower() for words in _LOST):
        reason = cause or where.partition(". ")[0]
        return ProcessError(f"another process of the run was killed, or cannot be reached any more ({reason})")
    return OSError(f"the processes cannot compute together: {cause or where}{f' ({where})' if cause else ''}")


def command_words() -> list[str]:
    """The command that was typed: of a process that a launcher of ours has started, the launcher's."""
    typed = os.environ.get(COMMAND)
    if typed:
        return shlex.split(typed)
    name = Path(sys.argv[0]).name
    return ["preceptor" if name == "__main__.py" else name, *sys.argv[1:]]


def package_version(package: str) -> str | None:
    """None: not installed; of this package, also where it runs from its source."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


ONE = World()
"""A run of one process."""
