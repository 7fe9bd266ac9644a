"""What a signal does, by where the program is."""

import os
import signal
import threading
from pathlib import Path

import pytest

from preceptor.train.signals import Stopped, stop_on_signals
from preceptor.world import World


def test_an_ignored_signal_stays_ignored_and_handlers_come_back():
    before, of_interrupts = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGINT)  # as `nohup`
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is of_interrupts
    finally:
        signal.signal(signal.SIGHUP, before)


def test_inside_and_outside_of_a_step():
    with stop_on_signals() as stop:
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with stop_on_signals() as stop, stop.while_training(Path()):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        with pytest.raises(Stopped), stop.at_once():
            raise AssertionError("an evaluation after a signal is not begun")
        with pytest.raises(Stopped):
            stop.check()


def test_in_a_program_a_second_signal_meets_the_handler_of_before():
    """A second Ctrl-C ends no notebook's process."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with stop_on_signals(of_program=True) as stop, stop.while_training(Path()):
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.number == signal.SIGINT and not heard
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupts)


def test_of_several_processes_each_may_be_told_twice(monkeypatch):
    """By the scheduler, and by the launcher that was told too; only a later signal ends the process at once."""
    with stop_on_signals() as stop, stop.while_training(Path(), World(0, 2)):
        ended = []
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        monkeypatch.setattr("preceptor.train.signals._SAME_SECONDS", 0.0)
        monkeypatch.setattr("preceptor.train.signals.os.kill", lambda _, number: ended.append(number))
        stop.receive(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.SIGTERM in ended


@pytest.mark.parametrize("size", [1, 2])
def test_the_first_signal_of_a_process_does_not_end_it_where_the_run_is_stopping_already(tmp_path, monkeypatch, size):
    """By the file STOP, or by a signal to another process that all know of: it may be saving."""

    class Told(World):
        def max(self, *values):
            return [max(2 * signal.SIGUSR1 if size > 1 else 0, values[0]), *values[1:]]

    if size == 1:
        (tmp_path / "STOP").touch()
    number, ended = signal.SIGUSR1 if size > 1 else -1, []
    with stop_on_signals() as stop, stop.while_training(tmp_path, Told(size - 1, size)):
        stop.after_step()
        assert stop.number == number
        monkeypatch.setattr("preceptor.train.signals.os.kill", lambda _, number: ended.append(number))
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == number and not ended
        assert (signal.getsignal(signal.SIGTERM) == signal.SIG_DFL) == (size == 1)  # a second one ends it at once
        monkeypatch.setattr("preceptor.train.signals._SAME_SECONDS", 0.0)
        stop.receive(signal.SIGTERM)
        assert ended == [signal.SIGTERM]


def test_in_another_thread_no_signal_is_heard():
    heard = []

    def work():
        with stop_on_signals() as stop:
            heard.append(stop.number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [None]
