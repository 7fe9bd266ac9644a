"""Files at a URL: through fsspec's memory file system and a server on this machine; what is missing is named."""

import bz2
import gzip
import http.server
import json
import os
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry, known_implementations

from preceptor.config import Source
from preceptor.data.formats import remote_files
from preceptor.data.formats.tables import find_tables
from preceptor.data.sources import OpenSource, read_rows
from preceptor.errors import ConfigError, DataError

LINE = json.dumps({"text": "a text"}) + "\n"


def parquet():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{"text": "a text"}]), sink)
    return sink.getvalue().to_pybytes()


CONTENTS = {
    "a.jsonl": LINE.encode(),
    "b.jsonl.gz": gzip.compress(LINE.encode()),
    "c.json.bz2": bz2.compress(f"[{LINE}]".encode()),
    "d.csv.zst": pa.Codec("zstd").compress(b"text\na text\n", asbytes=True),
    "e.parquet": parquet(),
}


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield lambda path, content: system.pipe(path, content)
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def server(tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        cut = False

        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_):
            pass

        def copyfile(self, source, outputfile):
            outputfile.write(source.read()[:-10] if Handler.cut else source.read())

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", Handler
        running.shutdown()
        thread.join()


def texts(path, **keys):
    return [(place, row["text"]) for place, row in read_rows(Source(path=path, **keys))]


@pytest.mark.parametrize("name", CONTENTS)
def test_each_kind_of_file_is_read_from_a_file_system_and_over_http(memory, server, tmp_path, name):
    memory(f"/set/{name}", CONTENTS[name])
    (tmp_path / name).write_bytes(CONTENTS[name])
    for url in (f"memory://set/{name}", f"{server[0]}/{name}"):
        ((place, text),) = texts(url)
        assert place.startswith(f"{url}:") and text == "a text"


def test_folders_patterns_and_splits(memory):
    for name in ("train-0.jsonl", "train-1.jsonl", "deep/test.jsonl", "README.md"):
        memory(f"/set/{name}", LINE.encode())
    names = [f"memory:///set/train-{n}.jsonl:1" for n in (0, 1)]
    assert [place for place, _ in texts("memory://set/train-*.jsonl")] == names
    assert [place for place, _ in texts("memory://set", split="train")] == names
    with pytest.raises(DataError, match="of the splits test, train"):
        find_tables(Source(path="memory://set"))
    with pytest.raises(DataError, match=r"memory://set/\*\.csv: no such file"):
        find_tables(Source(path="memory://set/*.csv"))
    with pytest.raises(ConfigError, match="is a pattern, and `split` goes with"):
        find_tables(Source(path="memory://set/*.jsonl", split="train"))


def test_what_changes_is_known_by_what_the_server_says(memory, server, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE.encode())
    memory("/a.jsonl", LINE.encode())

    def identities():
        tables = [OpenSource(url).tables[0] for url in ("memory://a.jsonl", f"{server[0]}/a.jsonl")]
        return [table.identity(lambda path: "") for table in tables]

    first = identities()
    assert first == identities() and None not in first
    (tmp_path / "a.jsonl").write_bytes(LINE.encode() * 2)
    memory("/a.jsonl", LINE.encode() * 2)
    assert all(old != new for old, new in zip(first, identities(), strict=True))


def test_two_urls_have_two_identities(server, memory, tmp_path):
    """Whatever the server says: shards of one length that were written within one second are alike to it."""
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(LINE.encode())
        os.utime(tmp_path / name, (0, 0))
    tables = [OpenSource(f"{server[0]}/{name}.jsonl").tables[0] for name in "ab"]
    first, second = (table.identity(lambda path: "") for table in tables)
    assert None not in (first, second) and first != second


@pytest.mark.parametrize("folder", ["alias://{}", "alias://{}/", "one://{}"])
def test_the_files_of_a_folder_whose_protocol_has_several_names(folder, tmp_path, monkeypatch):
    """fsspec names the files it finds by the first of them: az:// finds abfs://, s3a:// s3://, gcs:// gs://."""

    class Aliased(LocalFileSystem):
        protocol = ("one", "alias")

    for name in Aliased.protocol:
        monkeypatch.setitem(_registry, name, Aliased)
    for name in ("train.jsonl", "test.jsonl", "deep/train-1.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(LINE)
    url = folder.format(tmp_path)
    found = [table.name for table in find_tables(Source(path=url, split="train"))]
    assert [name.removeprefix(f"one://{tmp_path}/") for name in found] == ["deep/train-1.jsonl", "train.jsonl"]
    with pytest.raises(DataError, match="of the splits test, train"):
        find_tables(Source(path=url))
    assert len(texts(url, split="train")) == 2


def test_a_content_that_ends_early_is_an_error(server, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE.encode() * 3)
    server[1].cut = True
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: the server sent 10 bytes less than it said"):
        texts(f"{server[0]}/a.jsonl")


def test_what_breaks_off_in_pieces_is_an_error(server, tmp_path, monkeypatch):
    """Without a length the server sends pieces, each of a length of its own; http.client's errors are no OSError."""

    def do_GET(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"fff\r\n" + CONTENTS[handler.path[1:]][:-5])
        handler.close_connection = True

    monkeypatch.setattr(server[1], "do_GET", do_GET)
    monkeypatch.setattr(server[1], "protocol_version", "HTTP/1.1")
    for name in CONTENTS:
        with pytest.raises(DataError, match=rf"{name}: cannot be read: .*IncompleteRead"):
            list(OpenSource(f"{server[0]}/{name}").examples())


def test_a_parquet_file_is_fetched_once_for_each_time_that_its_rows_are_read(server, tmp_path, monkeypatch):
    fetched, get = [], server[1].do_GET
    monkeypatch.setattr(server[1], "do_GET", lambda handler: fetched.append(handler.path) or get(handler))
    (tmp_path / "e.parquet").write_bytes(CONTENTS["e.parquet"])
    opened = OpenSource(f"{server[0]}/e.parquet")
    (table,) = opened.tables
    assert table.num_rows() == 1 and table.columns() == ["text"]
    assert len(opened.peek()) == 1 and len(list(opened.examples())) == 1 and len(fetched) == 1
    pq.write_table(pa.Table.from_pylist([{"text": "another"}] * 2), tmp_path / "e.parquet")
    assert [example.text for example in opened.examples()] == ["another"] * 2 and table.num_rows() == 2
    (tmp_path / "e.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"e\.parquet: cannot be read: Parquet file size is 0 bytes"):
        OpenSource(f"{server[0]}/e.parquet").tables[0].columns()


@pytest.mark.parametrize("length", [None, 2 * len(LINE)])
def test_a_server_that_sends_without_end_may_be_silent_and_one_that_sends_a_file_may_not(server, monkeypatch, length):
    ended = threading.Event()

    def do_GET(handler):
        handler.send_response(200)
        if length is not None:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(LINE.encode())
        handler.wfile.flush()
        ended.wait(1)  # five times as long as an answer may take
        handler.wfile.write(LINE.encode())

    monkeypatch.setattr(server[1], "do_GET", do_GET)
    monkeypatch.setattr(remote_files, "_SECONDS", 0.2)
    rows = read_rows(f"{server[0]}/a.jsonl")
    try:
        if length is None:
            assert len(list(rows)) == 2
        else:
            with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: .*timed out"):
                list(rows)
    finally:
        ended.set()


def test_a_url_that_is_none_is_an_error(server):
    opened = OpenSource(f"{server[0]}/a b.jsonl")
    with pytest.raises(DataError, match=r"a b\.jsonl: cannot be read: URL can't contain control characters"):
        list(opened.examples())
    with pytest.raises(DataError, match=r"a b\.jsonl: cannot be read: URL can't contain control characters"):
        opened.tables[0].identity(lambda path: "")


def test_what_is_missing_is_named(server):
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: HTTP Error 404"):
        texts(f"{server[0]}/none.jsonl")
    with pytest.raises(DataError, match=r"memory://none\.jsonl: no such file"):
        texts("memory://none.jsonl")
    with pytest.raises(DataError, match=r"what://a\.jsonl: what:// is no protocol that is known"):
        find_tables(Source(path="what://a.jsonl"))


def test_a_package_that_is_missing_is_named(monkeypatch):
    known = {"class": "no_such_package_here.System", "err": "install it"}
    monkeypatch.setitem(known_implementations, "s3", known)
    with pytest.raises(DataError, match="s3:// needs the package no_such_package_here: pip install"):
        find_tables(Source(path="s3://bucket/a.jsonl"))


def test_patterns_of_local_files(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(LINE)
    assert [place.rpartition("/")[2] for place, _ in texts(f"{tmp_path}/*.jsonl")] == ["a.jsonl:1", "b.jsonl:1"]
    assert len(texts(f"{tmp_path}/**/*.jsonl")) == 3
    with pytest.raises(DataError, match="no data file has such a name"):
        texts(f"{tmp_path}/*.csv")
