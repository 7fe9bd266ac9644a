"""Files at a URL: through fsspec's memory file system and a server on this machine; what is missing is named."""

import bz2
import gzip
import http.server
import json
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.registry import known_implementations

from preceptor.config import Source
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


def test_a_content_that_ends_early_is_an_error(server, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE.encode() * 3)
    server[1].cut = True
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: the server sent 10 bytes less than it said"):
        texts(f"{server[0]}/a.jsonl")


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
