"""How the tests' own ranks end: what fails is told in full, and nothing is left behind."""

import ctypes
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork")


def _sum(rank, more):
    total = torch.tensor(rank + more)
    dist.all_reduce(total)
    return total


def test_results_are_in_order_and_a_rank_that_is_done_waits_for_the_others():
    kept = []

    def uneven(rank):
        found = torch.tensor([7])
        if rank == 0:
            kept.append(dist.isend(found, 1))  # and is done
        else:
            time.sleep(0.2)
            dist.recv(found.zero_(), 0)
        return rank, os.getpid(), found.item()

    found = on_ranks(2, uneven)
    assert [(rank, received) for rank, _, received in found] == [(0, 7), (1, 7)]
    for _, pid, _ in found:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_every_rank_that_fails_is_told_the_first_one_first():
    def fails(rank):
        time.sleep(0.2 * (rank == 0))
        raise ValueError(f"the reason of rank {rank}")

    with pytest.raises(AssertionError) as raised:
        on_ranks(2, fails)
    shown = str(raised.value)
    assert "exit codes of the ranks: [1, 1]" in shown
    assert -1 < shown.index("the reason of rank 1") < shown.index("the reason of rank 0")


def test_a_crash_is_told_with_its_stack_beside_what_follows_from_it():
    def crashes(rank):
        return ctypes.string_at(0) if rank == 0 else _sum(rank, 1)

    with pytest.raises(AssertionError) as raised:
        on_ranks(2, crashes)
    shown = str(raised.value)
    assert f"exit codes of the ranks: [{-signal.SIGSEGV}, 1]" in shown and "rank 1: Traceback" in shown
    assert "Segmentation fault" in shown and "in crashes" in shown


def test_a_rank_that_hangs_is_ended_when_the_time_is_over():
    with pytest.raises(AssertionError, match=r"\[0, None\] \(None: hung\)"):
        on_ranks(2, lambda rank: rank and time.sleep(60), seconds=1)


def test_of_a_world_each_says_what_it_has_found():
    class Own(Exception):  # which pickle cannot take
        pass

    def work(rank):
        if rank == 0:
            raise Own("of the first")
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return rank

    failed, killed, well = run_ranks(3, work, connected=False)
    assert "of the first" in str(failed) and "rank 0: Traceback" in failed.__notes__[0]
    assert killed is None and well == 2
