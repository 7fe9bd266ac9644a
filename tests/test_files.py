"""Files that are whole or not there, and errors that name them."""

import resource
from pathlib import Path

import pytest

from preceptor import files
from preceptor.errors import CheckpointError


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.jsonl"
    files.write_json_lines(file, [{"a": 1}])

    def values():
        yield {"a": 2}
        raise KeyError

    with pytest.raises(KeyError):
        files.write_json_lines(file, values())
    assert files.read_json_lines(file) == [{"a": 1}] and list(tmp_path.iterdir()) == [file]
    files.write_json(file.with_suffix(".json"), {"ü": [None]})
    assert files.read_json(file.with_suffix(".json")) == {"ü": [None]}


def test_a_folder_is_flushed_before_it_takes_its_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files, "sync", lambda path: flushed.append((path.name, (tmp_path / "model").exists())))
    (tmp_path / ".model.partial").mkdir()  # of a killed process
    (tmp_path / ".model.partial" / "old").touch()
    with files.replacing(tmp_path / "model") as partial:
        (partial / "deep").mkdir(parents=True)
        (partial / "deep" / "weights").write_bytes(b"1")
    assert flushed[:3] == [("weights", False), ("deep", False), (".model.partial", False)]
    assert flushed[3:] == [(tmp_path.name, True)]
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "deep", "weights"]


def test_what_cannot_be_written_is_named(tmp_path):
    file = tmp_path / "none" / "a.json"
    for write in (files.write_json, files.append_line):
        with pytest.raises(CheckpointError, match=r"none/a\.json: cannot be written: No such file or directory$"):
            write(file, {})
    with pytest.raises(CheckpointError, match="of its own"), files.writing(tmp_path):
        raise CheckpointError("a message of its own")


def test_lines_are_read_as_far_as_they_are_complete(tmp_path):
    file = tmp_path / "a.jsonl"
    assert files.read_json_lines(file) == [] and files.read_json(file) == {}
    files.append_line(file, {"text": "a\u2028b"})
    files.append_line(file, {"text": "c"})
    with file.open("a") as lines:
        lines.write('{"text": "d"}')
    assert [line["text"] for line in files.read_json_lines(file)] == ["a\u2028b", "c"]
    file.write_text("[1]\n")
    with pytest.raises(CheckpointError, match=r"a\.jsonl:1: list, not an object"):
        files.read_json_lines(file)


def test_a_line_for_which_there_is_no_room_leaves_no_half_of_it(tmp_path):
    """The next one would be joined to it."""
    file = tmp_path / "log.jsonl"
    files.append_line(file, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"log\.jsonl"):
            files.append_line(file, {"step": 2, "text": "longer than there is room"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    files.append_line(file, {"step": 3})
    assert file.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_no_file_takes_the_place_of_a_folder(tmp_path):
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_bytes(b"1")
    writers = (files.write_json, files.write_atomically, lambda path, text: files.write_json_lines(path, [text]))
    for write in (*writers, lambda path, _: files.try_file(path)):
        with pytest.raises(CheckpointError, match="run: is a folder, which a file does not replace"):
            write(folder, "text")
    assert (folder / "model" / "weights").read_bytes() == b"1" and list(tmp_path.iterdir()) == [folder]
    with files.replacing(folder) as partial:
        partial.mkdir()
    assert list(tmp_path.rglob("*")) == [folder], "a folder by a folder"


def test_where_a_file_can_be_written_is_known_before(tmp_path):
    (file := tmp_path / "a.json").write_text("old")
    files.try_file(file)
    files.try_file(tmp_path / "new.json")
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "old", "nothing is left of the try"
    with pytest.raises(CheckpointError, match=r"none/a\.json: the folder .*none does not exist; make it first"):
        files.try_file(tmp_path / "none" / "a.json")
    with pytest.raises(CheckpointError, match=r"/proc/a\.json: cannot be written"):
        files.try_file(Path("/proc/a.json"))
