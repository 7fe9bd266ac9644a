"""Windows of a stream: the same examples in the same windows at every start, rendered ahead, memory for a few."""

import contextlib
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from preceptor.chat.render import Renderer
from preceptor.config import Source
from preceptor.config.held import LiveSource
from preceptor.data import sources as reading
from preceptor.data import stream, workers
from preceptor.data.formats.tables import RecordList
from preceptor.data.records import FlatFile
from preceptor.data.stream import WindowReader, Windows, window_shares
from preceptor.data.truncation import Fitter
from preceptor.errors import ProcessError, StreamError
from tiny import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork")


@pytest.fixture(autouse=True)
def _forked(monkeypatch):
    """Whatever threads other tests have left."""
    monkeypatch.setattr(stream, "start_method", lambda: "fork")
    monkeypatch.setattr(workers, "start_method", lambda: "fork")


class NoCounts:
    def add(self, example, tree):
        pass

    def of_table(self, name):
        return {}


def reader_of(sources, size=4, cache=None):
    renderer = Renderer(tiny_tokenizer(), None, stop_token_ids=(0,))
    return WindowReader(sources, size, Fitter(renderer, 64, "reject"), cache)


def places(window):
    """The file and line of each tree, and each rejection."""
    trees = [table.tree(k).source for table in window.tables for k in range(len(table))]
    return [place.rpartition("/")[2] for place in trees + [r.source for t in window.tables for r in t.rejections]]


def texts(num, start=0):
    return [{"text": f"Text {start + n} of many."} for n in range(num)]


@pytest.fixture
def opened():
    made = []

    def open_windows(*arguments, **more):
        made.append(Windows.rendered(reader_of(*arguments, **more)))
        return made[-1]

    yield open_windows
    for windows in made:
        windows.close()
        assert not windows.spool.exists()


def test_sources_are_read_in_order_each_by_its_weight_and_begin_anew(write_jsonl, opened):
    sources = [
        Source(path=write_jsonl(texts(5), "a.jsonl"), weight=3.0),
        Source(path=write_jsonl([*texts(2), {"text": ""}], "b.jsonl")),
    ]
    windows = opened(sources)
    assert places(windows.get(0)) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:1"]
    assert places(windows.get(1)) == ["a.jsonl:4", "a.jsonl:5", "a.jsonl:1", "b.jsonl:2"]
    third = windows.get(2)
    assert places(third) == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "b.jsonl:3"]
    assert [r.code for t in third.tables for r in t.rejections] == ["empty_text"] and third.num_examples == 4


def test_a_reader_can_be_sent_to_a_fresh_interpreter(write_jsonl, tmp_path):
    reader = reader_of([Source(path=write_jsonl(texts(6)))])
    again = pickle.loads(pickle.dumps(reader))
    for each, folder in ((reader, tmp_path / "a"), (again, tmp_path / "b")):
        folder.mkdir()
        each.read_next(folder)
    assert (tmp_path / "a" / "0.flat").read_bytes() == (tmp_path / "b" / "0.flat").read_bytes()


BESIDE = """
from preceptor.data.forest import Segment, Tree

class Lengths:
    targets, key = "assistant", None

    def render(self, example):
        return Tree(example.source, (Segment("target", tuple(range(len(example.text))), None, example.text),))

    def new_counts(self):
        return NoCounts()

class NoCounts:
    def add(self, example, tree):
        pass

    def of_table(self, name):
        return {}
"""
PROGRAM = """
import sys, threading
print("runs", __name__, flush=True)
from beside import Lengths
from preceptor.config import Source
from preceptor.data.stream import WindowReader, Windows
from preceptor.data.truncation import Fitter
reader = WindowReader([Source(path=sys.argv[1])], 2, Fitter(Lengths(), 64, "reject"))
end = threading.Event()
threading.Thread(target=end.wait).start()  # as a program may have: nothing is forked then
try:
    print(Windows.rendered(reader).get(0).num_examples, sys.modules["__main__"].__file__)
finally:
    end.set()
"""


def test_a_program_with_threads_is_not_run_anew_by_the_process_that_renders(write_jsonl, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "beside.py").write_text(BESIDE)
    command = [sys.executable, str(tmp_path / "program.py"), write_jsonl(texts(4))]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert found.stdout.split() == ["runs", "__main__", "2", str(tmp_path / "program.py")], found.stderr


def test_a_hash_tells_of_the_examples_up_to_the_end_of_a_window(write_jsonl, opened):
    rows = texts(8)
    found = []
    for changed in (None, 6):
        own = [{"text": "Another."} if at == changed else row for at, row in enumerate(rows)]
        windows = opened([Source(path=write_jsonl(own, f"{changed}.jsonl"))])
        found.append([windows.get(number).sha256 for number in range(2)])
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


def test_nothing_is_left_where_no_process_can_be_started(write_jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "start_method", lambda: "spawn")
    monkeypatch.setattr(stream.tempfile, "tempdir", str(tmp_path / "spools"))
    (tmp_path / "spools").mkdir()
    reader = reader_of([Source(path=write_jsonl(texts(6)))])
    reader.held = lambda: None  # cannot be pickled
    with pytest.raises((AttributeError, pickle.PicklingError)):
        Windows.rendered(reader)
    assert not list((tmp_path / "spools").iterdir())


def test_shares_add_up_over_the_windows():
    sources = [Source(path="a", weight=0.5), Source(path="b"), Source(path="c", weight=2.0)]
    shares = [window_shares(sources, 10, number) for number in range(7)]
    assert [sum(column) for column in zip(*shares, strict=True)] == [10, 20, 40]


def test_windows_are_the_same_when_the_first_are_passed_over(write_jsonl, opened, tmp_path):
    sources = [Source(path=write_jsonl(texts(30)))]
    for cache in (None, tmp_path / "cache"):
        every, late = opened(sources, cache=cache), opened(sources, cache=cache)
        wanted = [every.get(number) for number in range(6)]
        late.get(0, is_trained=False)
        found = late.get(5)
        assert places(found) == places(wanted[5]) and found.sha256 == wanted[5].sha256
        digests = [[bytes(table.load("digests")) for table in window.tables] for window in (found, wanted[5])]
        assert digests[0] == digests[1]
        assert len({window.sha256 for window in wanted}) == 6
    assert list((tmp_path / "cache" / "portions").glob("*/*.flat")), "files that are known go through the cache"


def fourth_window(reader, folder, read):
    """Its hash. read: what is noted of each example, of three windows before it none."""
    for _ in range(3):
        reader.read_next(None)
    assert not read
    reader.read_next(folder)
    assert len(read) == 4
    read.clear()
    return FlatFile(folder / "3.flat").about["sha256"]


def test_lines_that_are_passed_over_are_not_parsed(write_jsonl, tmp_path, monkeypatch):
    parsed, parse_line = [], reading.parse_line
    monkeypatch.setattr(reading, "parse_line", lambda *line: parsed.append(line) or parse_line(*line))
    rows = texts(20)
    of_window = {}
    for name, at in (("as it was", None), ("changed", 5), ("with other spaces", 5)):
        lines = [json.dumps(row) + "\n" for row in rows]
        if at is not None:
            lines[at] = json.dumps({"text": "Another."}) + "\n" if name == "changed" else lines[at].replace(": ", ":")
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(lines)[:-1])
        reader = reader_of([Source(path=str(file))])
        of_window[name] = fourth_window(reader, tmp_path, parsed)
    assert len(set(of_window.values())) == 3, "the hash of a line is of how it is spelled"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + json.dumps({"text": "More."}))
    more = reader_of([Source(path=str(file))])
    for _ in range(3):
        more.read_next(None)
    more.read_next(tmp_path)
    assert FlatFile(tmp_path / "3.flat").about["sha256"] == of_window["as it was"], "a file may grow"


@pytest.mark.parametrize("kind", ["csv", "parquet", "json", "code", "records"])
def test_of_rows_that_are_passed_over_no_example_is_made(tmp_path, monkeypatch, kind):
    made, read_row = [], reading.read_row
    monkeypatch.setattr(reading, "read_row", lambda *row: made.append(row) or read_row(*row))
    file, of_window = tmp_path / f"x.{'jsonl' if kind == 'code' else kind}", {}
    for name, rows in (("as it was", texts(20)), ("changed", [*texts(5), {"text": "Another."}, *texts(20)[6:]])):
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        elif kind == "csv":
            file.write_text("text\n" + "".join(f"{row['text']}\n" for row in rows))
        elif kind == "code":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            file.write_text(json.dumps(rows))
        source = Source(path=str(file))
        if kind == "records":
            source = LiveSource.model_construct(**dict(source), table=RecordList(rows, "rows"))
        if kind == "code":
            (tmp_path / "own.py").write_text("def same(row):\n    return row\n")
            source = Source(path=str(file), code=f"{tmp_path / 'own.py'}:same")
        reader = reader_of([source])
        of_window[name] = fourth_window(reader, tmp_path, made)
    assert len(set(of_window.values())) == 2


def test_few_windows_are_there_at_once(write_jsonl, opened):
    windows = opened([Source(path=write_jsonl(texts(40)))])
    windows.get(0, is_trained=False)
    time.sleep(0.2)
    assert sorted(place.stem for place in windows.spool.glob("*.flat")) == ["0"], "nothing ahead before the training"
    for number in range(8):
        windows.get(number)
        time.sleep(0.1)
        there = {int(place.stem) for place in windows.spool.glob("*.flat")}
        assert there <= set(range(number, number + stream._AHEAD)), there


def test_a_pipe_is_read_once_and_its_end_is_an_error_that_all_see(tmp_path, opened):
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)

    def write():
        with pipe.open("w") as file:
            for row in texts(10):
                file.write(json.dumps(row) + "\n")

    writer = threading.Thread(target=write, daemon=True)
    windows = opened([Source(path=str(pipe))])
    writer.start()
    other = Windows(windows.spool)  # of another process of the run
    assert [len(places(windows.get(number))) for number in range(2)] == [4, 4]
    for each in (windows, other):
        with pytest.raises(StreamError, match=r"rows\.jsonl: the pipe ended after 10 examples, in window 2"):
            each.get(2)  # of two examples: other ones would be in it when more are written
    writer.join(5)


def test_a_server_that_sends_without_end(opened):
    class Endless(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for number in itertools.count():
                    self.wfile.write(json.dumps(texts(1, number)[0]).encode() + b"\n")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        windows = opened([Source(path=f"http://127.0.0.1:{server.server_port}/rows.jsonl")], size=50)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert [places(windows.get(number))[0] for number in (0, 3)] == ["rows.jsonl:1", "rows.jsonl:151"]
        windows.close()
        server.shutdown()


def test_what_goes_wrong_in_the_other_process_is_told(write_jsonl, opened, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("".join(json.dumps(row) + "\n" for row in texts(6)) + "{\n")
    windows = opened([Source(path=str(broken))])
    windows.get(0)
    with pytest.raises(StreamError, match=r"broken\.jsonl:7: broken JSON"):
        windows.get(1)
    windows = opened([Source(path=write_jsonl(texts(6)))])
    windows.get(0, is_trained=False)
    windows._process.kill()
    with pytest.raises(StreamError, match="ended, often for want of memory"):
        windows.get(1)


def test_a_signal_to_the_whole_group_does_not_end_what_renders(write_jsonl, opened):
    """As Ctrl-C is. The run finishes its step and saves."""
    windows = opened([Source(path=write_jsonl(texts(40)))])
    windows.get(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(windows._process.pid, number)
    assert windows.get(5).num_examples == 4


def test_a_program_that_leaves_a_stream_open_ends():
    """Though multiprocessing, which waits for its processes, is heard before what the program made first."""
    program = """
import tempfile, time
kept = tempfile.TemporaryDirectory()
from preceptor.data.stream import Windows
class Reader:
    def read_next(self, folder):
        time.sleep(60)
windows = Windows.rendered(Reader())
print(windows.spool)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20)
    assert ended.returncode == 0 and not Path(ended.stdout.strip()).exists(), ended.stderr


def test_what_renders_ends_when_the_process_that_trains_is_killed(write_jsonl):
    rows = write_jsonl(texts(6))
    read, write = os.pipe()
    child = os.fork()
    if not child:
        windows = Windows.rendered(reader_of([Source(path=rows)]))
        windows.get(0)
        os.write(write, f"{windows._process.pid} {windows.spool}".encode())
        time.sleep(60)
        os._exit(1)
    _, spool = os.read(read, 1000).decode().split(maxsplit=1)
    os.kill(child, 9)
    os.waitpid(child, 0)
    until = time.monotonic() + 10
    while Path(spool).exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(spool).exists()
    with pytest.raises(ProcessError, match="has ended"):
        Windows(Path(spool)).get(100)  # another process of the run, which waits
    os.close(read)
    os.close(write)
