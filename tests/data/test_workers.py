"""Rendering in several processes gives what one process gives, in order, reads little ahead, and hides no error."""

import gc
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import conversations
from preceptor.chat.render import Renderer
from preceptor.chat.template import BUILTIN, load_template
from preceptor.data import workers
from preceptor.data.examples import Conversation, Document, Example, Message, Rejection
from preceptor.data.forest import Segment, Tree
from preceptor.data.workers import render_all
from preceptor.errors import PreceptorError


class ShowsProcess:
    """Renders to the id of the process that did it; ends as its records ask."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def render(self, record: Example) -> Tree | Rejection:
        assert isinstance(record, Document)
        (self.folder / str(os.getpid())).touch()
        if record.text == "slow":
            time.sleep(0.001)
        if record.text == "fail":
            raise ValueError(f"cannot render {record.source}")
        if record.text == "die" and os.getpid() != int((self.folder / "caller").read_text()):
            os._exit(1)
        return Tree(record.source, (Segment("target", (os.getpid(),), None),))


@pytest.fixture
def shows_process(tmp_path: Path) -> ShowsProcess:
    (tmp_path / "caller").write_text(str(os.getpid()))
    return ShowsProcess(tmp_path)


@pytest.fixture
def started_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes are started from the first chunk on, and are ready before the second."""
    monkeypatch.setattr(workers, "_SMALL_CHARACTERS", {"fork": 1, "spawn": 1})
    monkeypatch.setattr(workers, "_CHUNK_CHARACTERS", 4000)


def documents(num: int) -> list[Document]:
    return [Document(f"file:{number}", "text " * 20) for number in range(num)]


def waiting_for_the_pool(shows_process: ShowsProcess, records: list[Document]) -> Iterator[Document]:
    """Records that keep coming until another process has rendered some of them."""
    while {file.name for file in shows_process.folder.iterdir()} <= {"caller", str(os.getpid())}:
        time.sleep(0.01)
        yield Document("more", "x" * 4000)
    yield from records


def test_gives_the_same_in_order_as_one_process(started_at_once: None) -> None:
    from tiny import tiny_tokenizer  # not above: the other processes import this file, and torch takes seconds

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(BUILTIN["chatml"].tokens)})
    renderer = Renderer(tokenizer, load_template("chatml", tokenizer), stop_token_ids=[])
    records: list[Example | Rejection] = [
        Conversation(f"file:{n}", tuple(Message(m, train=m["role"] == "assistant") for m in row["messages"]))
        for n, row in enumerate(conversations(600))
    ]
    records[5] = Rejection("file:5", "bad_message", "as it was read")
    records[7] = Conversation("file:7", (Message({"role": "user", "content": "no answer"}),))
    alone = list(render_all(renderer, records))
    assert [outcome.source for outcome in alone] == [record.source for record in records]
    assert isinstance(alone[5], Rejection) and isinstance(alone[7], Rejection)
    assert sum(isinstance(outcome, Tree) for outcome in alone) == 598
    assert list(render_all(renderer, records, num_processes=2)) == alone
    copy = pickle.loads(pickle.dumps(renderer))  # as another process gets it
    assert list(render_all(copy, records)) == alone


def test_other_processes_do_a_part_of_the_work(shows_process: ShowsProcess, started_at_once: None) -> None:
    slow = [Document(f"file:{number}", "slow") for number in range(400)]  # what one process alone cannot keep up with
    given = waiting_for_the_pool(shows_process, slow)
    outcomes = list(render_all(shows_process, given, num_processes=2))
    processes = {tree.segments[0].ids[0] for tree in outcomes if isinstance(tree, Tree)}
    assert len(processes) == 2 and os.getpid() in processes
    assert [outcome.source for outcome in outcomes][-400:] == [record.source for record in slow]


def test_starts_no_process_for_a_small_input(shows_process: ShowsProcess) -> None:
    list(render_all(shows_process, documents(100), num_processes=8))
    assert sorted(file.name for file in shows_process.folder.iterdir()) == sorted(["caller", str(os.getpid())])


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_error_reaches_the_caller(shows_process: ShowsProcess, started_at_once: None, num_processes: int) -> None:
    given = waiting_for_the_pool(shows_process, [*documents(50), Document("file:50", "fail"), *documents(2000)])
    if num_processes == 1:
        (shows_process.folder / "another").touch()
    with pytest.raises(ValueError, match="cannot render file:50"):
        list(render_all(shows_process, given, num_processes))


def test_a_process_that_is_killed_is_reported(shows_process: ShowsProcess, started_at_once: None) -> None:
    given = waiting_for_the_pool(shows_process, [Document("file:1", "die")] * 3000)
    with pytest.raises(PreceptorError, match="use fewer processes than 2"):
        list(render_all(shows_process, given, num_processes=2))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_reads_a_bounded_number_of_records_ahead(
    shows_process: ShowsProcess, started_at_once: None, num_processes: int
) -> None:
    num_read = 0

    def read() -> Iterator[Document]:
        nonlocal num_read
        waiting = waiting_for_the_pool(shows_process, documents(3000)) if num_processes > 1 else documents(3000)
        for document in waiting:
            num_read += 1
            yield document

    ahead = [num_read - number for number, _ in enumerate(render_all(shows_process, read(), num_processes))]
    assert len(ahead) >= 3000
    assert max(ahead) <= 14 * (2 * workers._BACKLOG + 2)  # 14 of these make a chunk


@pytest.mark.skipif(sys.platform != "linux", reason="processes are not forked here")
def test_the_next_input_can_be_forked_for_too(
    shows_process: ShowsProcess, started_at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "start_method", lambda: "fork")  # whatever threads other tests have left
    threads, interval, thresholds = set(threading.enumerate()), sys.getswitchinterval(), gc.get_threshold()
    list(render_all(shows_process, waiting_for_the_pool(shows_process, documents(3000)), num_processes=2))
    assert set(threading.enumerate()) <= threads  # one that another test has left may have ended
    assert (sys.getswitchinterval(), gc.get_threshold()) == (interval, thresholds)


def test_can_be_left_early(shows_process: ShowsProcess, started_at_once: None) -> None:
    outcomes = render_all(shows_process, documents(3000), num_processes=2)
    assert next(outcomes).source == documents(1)[0].source
    outcomes.close()


def test_a_process_ends_with_the_one_that_it_works_for():
    """One that is killed cannot say so: its workers would wait for ever."""
    code = (
        "import os, sys; from preceptor.data import workers\n"
        "parent = os.getpid()\n"
        "if child := os.fork(): print(child, flush=True); os._exit(0)\n"
        "os.close(1); workers._end_with(parent)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    child = int(shown.stdout)
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("it still lives after 10 s")
