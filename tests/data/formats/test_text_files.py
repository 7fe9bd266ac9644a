"""Files of every kind -> the same rows, each with its place; and each way in which a file can be broken."""

import bz2
import csv
import gzip
import json
import lzma
import tracemalloc

import pytest

from preceptor.data.examples import Conversation
from preceptor.data.formats import text_files
from preceptor.data.sources import OpenSource, read_rows
from preceptor.errors import DataError

ROWS = [
    {"prompt": "Line one\nline two", "response": 'She said: "é, 好, 🙂"'},
    {"prompt": "2 + 2, please", "response": "4"},
    {"prompt": "tab\there", "response": "fine  "},
]


def jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def compressed(suffix):
    import pyarrow as pa

    compress = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
    }[suffix]

    def write(file, rows):
        file.write_bytes(compress("".join(json.dumps(row) + "\n" for row in rows).encode()))

    return write


def json_list(file, rows):
    file.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")


def json_object(file, rows):
    file.write_text(json.dumps({"version": "1.0", "numbers": [1, 2], "data": rows, "end": {}}), encoding="utf-8")


def table(separator):
    def write(file, rows):
        with file.open("w", encoding="utf-8-sig", newline="") as text:
            writer = csv.DictWriter(text, list(rows[0]), delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)

    return write


def parquet(file, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)


def saved(folder, rows):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))


LINES = ["1", "2", "3"]
NUMBERS = ["row 1", "row 2", "row 3"]
KINDS = {
    "a.jsonl": (jsonl, LINES),
    "lines.json": (jsonl, LINES),
    "a.jsonl.gz": (compressed(".gz"), LINES),
    "a.jsonl.zst": (compressed(".zst"), LINES),
    "a.jsonl.xz": (compressed(".xz"), LINES),
    "a.jsonl.bz2": (compressed(".bz2"), LINES),
    "list.json": (json_list, NUMBERS),
    "object.json": (json_object, NUMBERS),
    "a.csv": (table(","), ["2", "4", "5"]),  # the first row has two lines
    "a.tsv": (table("\t"), ["2", "4", "5"]),
    "a.parquet": (parquet, NUMBERS),
    "saved": (saved, NUMBERS),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows_and_their_places(tmp_path, name):
    write, places = KINDS[name]
    write(tmp_path / name, ROWS)
    found = list(read_rows(str(tmp_path / name)))
    assert [row for _, row in found] == ROWS
    assert [source for source, _ in found] == [f"{tmp_path}/{name}:{place}" for place in places]
    records = list(OpenSource(str(tmp_path / name)).examples())
    assert all(isinstance(record, Conversation) for record in records)
    assert [[m.content for m in record.messages] for record in records] == [list(row.values()) for row in ROWS]


BROKEN = {
    "broken line": ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: broken JSON: Expecting value at column"),
    "two objects in a line": ("a.jsonl", b'{"text": "a"} {"text": "b"}\n', r":1: broken JSON: Extra data"),
    "no object": ("a.jsonl", b'{"text": "a"}\n[1]\n', r":2: an example must be a JSON object, found list"),
    "deep": ("a.json", b'[{"text": ' + b"[" * 100_000, r":1: broken JSON: JSON nested too deeply"),
    "empty": ("a.jsonl", b"", "the file is empty"),
    "latin-1": (
        "a.jsonl",
        '{"text": "café"}'.encode("latin-1"),
        r"a\.jsonl:1: not UTF-8 text \(byte 0xe9, 'é' in Windows-1252\); convert it .*CP1252",
    ),
    "bad byte": ("a.jsonl", (b'{"text": "%s"}\n' % (b"a" * 80)) * 2000 + b'"\xff"\n', r"a\.jsonl:2001: not UTF-8 text"),
    "bad byte packed": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n"\x81"'), r"gz:2: not UTF-8 text \(byte 0x81\)"),
    "cut character": ("a.jsonl", b'{"text": "a"}\n"\xc3', r"a\.jsonl:2: not UTF-8 text"),
    "utf-16": ("a.csv", "text\na\n".encode("utf-16"), r"a\.csv: UTF-16 text, not UTF-8; convert it.* -f UTF-16"),
    "utf-16 lines": ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"a\.jsonl: UTF-16 text"),
    "list in lines": ("a.jsonl", b'[{"text": "a"},\n{"text": "b"}]\n', r":1: broken JSON.*name the file \.json,"),
    "list in a line": ("a.jsonl", b'[{"text": "a"}, {"text": "b"}]\n', r":1: .*found list: name .* \.json"),
    "object over lines": ("a.jsonl", b'{\n"text": "a"\n}\n', r":1: broken JSON.*each example on one line"),
    "string not closed": ("a.jsonl", b'{"text": "a', r"Unterminated string at column 10\."),
    "json string not closed": ("a.json", b'[{"text": "a', r"broken JSON: Unterminated string\. Fix"),
    "control character": ("a.jsonl", b'{"text": "a\tb"}\n', r"Invalid control character at column 12\."),
    "latin-1 csv": ("a.csv", "text\ncafé\n".encode("latin-1"), r"a\.csv:2: not UTF-8 text"),
    "no gzip": ("a.jsonl.gz", b'{"text": "a"}\n', "cannot be read: Not a gzipped file"),
    "no zstd": ("a.jsonl.zst", b'{"text": "a"}\n', "cannot be read: .*(Unknown frame|ZSTD)"),
    "no xz": ("a.jsonl.xz", b'{"text": "a"}\n', "cannot be read"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-12], "cannot be read: Compressed file ended"),
    "json cut off": ("a.json", b'[{"text": "a"},\n{"text": "b"}', r"a\.json:2: broken JSON: the file ends where"),
    "json broken": ("a.json", b'[{"text": "a"},\n\n{"text" "b"}]', r"a\.json:3: broken JSON: Expecting ':' delimiter"),
    "json of numbers": ("a.json", b"[1, 2]", r"a\.json:row 1: an example must be a JSON object, found int"),
    "json number": ("a.json", b"12", "must hold a list of objects"),
    "json empty": ("a.json", b"  \n", "the file is empty"),
    "json empty list": ("a.json", b"[]", "the file is empty"),
    "json more": ("a.json", b'[{"text": "a"}]\n[]', r"a\.json:2: broken JSON: there is more after the end"),
    "json two lists": ("a.json", b'{"a": [{"text": "a"}], "b": [{"text": "b"}]}', "two lists, 'a' and 'b'"),
    "json without list": ("a.json", b'{"a":\n 1}', "holds no list of objects"),
    "json one row": ("a.json", b'{\n"messages": []}', "a single example"),
    "csv empty": ("a.csv", b"", "the file is empty"),
    "csv header only": ("a.csv", b"text\n", "no row under the header 'text'"),
    "csv without header": ("a.csv", b"What is it?,It is.\nWho?,Me.\n", "Line 1 is read as the header; if it is an ex"),
    "csv too few": ("a.csv", b'prompt,response\n"a\nb",c\n\nd\n', r"a\.csv:5: 1 cells under a header of 2"),
    "csv quotation": ("a.csv", b'text\n"a" b\n', r"a\.csv:2: broken CSV"),
    "csv not closed": ("a.csv", b'text\na\n"b\n', r"a\.csv:3: broken CSV: unexpected end of data"),
    "csv twice": ("a.csv", b"text,text\na,b\n", "two columns are named 'text'"),
    "csv columns": ("a.csv", b"frage,antwort\na,b\n", "the keys are 'frage', 'antwort'; an example needs messages"),
    "csv semicolons": (
        "a.csv",
        b"prompt;response\na;b\n",
        "the keys are 'prompt;response': its cells are separated by ';'; separate",
    ),
    "parquet": ("a.parquet", b"PAR1" + b"x" * 99, r"a\.parquet: cannot be read: .*Write or download the file again"),
    "kind": ("a.xlsx", b"x", "what kind of file it is cannot be told from its name; it must end in .jsonl"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_an_error_that_says_where(tmp_path, case):
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(OpenSource(str(tmp_path / name)).examples())
    assert name in str(caught.value)


def test_parquet_damaged_behind_its_footer(tmp_path):
    parquet(tmp_path / "a.parquet", ROWS * 100)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:400] = bytes(396)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet:row 1: cannot be read"):
        list(OpenSource(str(tmp_path / "a.parquet")).examples())


def test_a_saved_folder_that_lacks_a_file(tmp_path):
    saved(tmp_path / "saved", ROWS)
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="saved: cannot be read"):
        list(OpenSource(str(tmp_path / "saved")).examples())


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
def test_json_is_the_same_in_pieces_of_any_size(tmp_path, monkeypatch, piece):
    """Cut inside numbers, strings, escapes and between tokens."""
    rows = [{"text": 'a "quoted" \\ é 🙂 \n', "n": [1, -2.5e10, None, True], "o": {}}] * 3
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "b.json").write_text('\n{"n": 12345, "rows":' + json.dumps(rows) + ', "last": 67890}', encoding="utf-8")
    monkeypatch.setattr(text_files, "_PIECE_CHARACTERS", piece)
    for name in ("a.json", "b.json"):
        assert [row for _, row in read_rows(str(tmp_path / name))] == rows


def test_a_json_object_of_rows_on_one_line_is_no_row(tmp_path):
    (tmp_path / "a.json").write_text('{"data": [{"text": "a"}, {"text": "b"}]}\n')
    assert [row for _, row in read_rows(str(tmp_path / "a.json"))] == [{"text": "a"}, {"text": "b"}]
    (tmp_path / "b.json").write_text('\n{"messages": [{"role": "user", "content": "x"}]}\n')
    assert [source for source, _ in read_rows(str(tmp_path / "b.json"))] == [f"{tmp_path}/b.json:2"]


@pytest.mark.parametrize("name", ["a.jsonl", "list.json", "a.csv", "a.parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch, name):
    monkeypatch.setattr(text_files, "_PIECE_CHARACTERS", 1 << 14)
    write = KINDS[name][0]
    list(read_rows(str(_written(write, tmp_path / name, 10))))  # imports and caches

    def peak(num_rows):
        file = str(_written(write, tmp_path / name, num_rows))
        tracemalloc.start()
        for _ in OpenSource(file).examples():
            pass
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    few, many = peak(500), peak(4000)
    assert many < 1.5 * few + 100_000, (few, many)


def _written(write, file, num_rows):
    write(file, [{"prompt": f"question {number} " * 20, "response": "answer " * 20} for number in range(num_rows)])
    return file


def test_a_cell_longer_than_the_csv_modules_own_limit(tmp_path):
    table(",")(tmp_path / "a.csv", [{"prompt": "x" * 500_000, "response": "y"}])
    (record,) = OpenSource(str(tmp_path / "a.csv")).examples()
    assert len(record.messages[0].content) == 500_000
