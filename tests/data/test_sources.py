"""Files -> examples: formats, provenance, rejections by reason, and files that cannot be read."""

import gzip
import json

import pytest

from preceptor.config import Source
from preceptor.config.held import LiveSource
from preceptor.data.dataset import mix
from preceptor.data.examples import Completion, Conversation, Document, Rejection
from preceptor.data.formats import text_files
from preceptor.data.formats.tables import RecordList
from preceptor.data.sources import OpenSource
from preceptor.errors import DataError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}


def write(tmp_path, *rows):
    file = tmp_path / "data.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(file)


def one(tmp_path, row):
    (record,) = OpenSource(write(tmp_path, row)).examples()
    return record


def test_messages(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    path = write(tmp_path, "", {"messages": [USER, ANSWER], "tools": [tool], "chat_template_kwargs": {"a": 1}})
    (record,) = OpenSource(path).examples()
    assert isinstance(record, Conversation)
    assert record.source == f"{path}:2"
    assert [m.given for m in record.messages] == [USER, ANSWER]
    assert [m.train for m in record.messages] == [False, True]
    assert record.tools == [tool] and record.template_kwargs == {"a": 1}


def test_the_template_sees_a_message_as_it_was_given(tmp_path):
    record = one(tmp_path, {"messages": [USER, {**ANSWER, "train": True, "weight": 0.5, "mood": "glad"}]})
    assert record.messages[1].given == {**ANSWER, "mood": "glad"}
    assert record.messages[1].weight == 0.5


def test_prompt_and_completion_as_strings(tmp_path):
    record = one(tmp_path, {"prompt": "2+2=", "completion": "4"})
    assert record == Completion(record.source, "2+2=", "4")


def test_prompt_and_completion_as_messages_train_the_completion_only(tmp_path):
    record = one(tmp_path, {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert [m.train for m in record.messages] == [False, False, False, True]


def test_text(tmp_path):
    record = one(tmp_path, {"text": "Once upon a time"})
    assert record == Document(record.source, "Once upon a time")


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"messages": []}, "no_messages"),
        ({"messages": "Hi"}, "no_messages"),
        ({"messages": [USER]}, "no_assistant_message"),
        ({"messages": [USER, {"role": "robot", "content": "x"}]}, "unknown_role"),
        ({"messages": [{"content": "x"}]}, "unknown_role"),
        ({"messages": ["Hi"]}, "bad_message"),
        ({"messages": [{"role": "user", "content": 5}, ANSWER]}, "bad_message"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "empty_answer"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "empty_answer"),
        ({"messages": [USER, {**ANSWER, "train": "no"}]}, "bad_message"),
        ({"messages": [USER, {**ANSWER, "weight": -1}]}, "bad_message"),
        ({"messages": [USER, {**ANSWER, "train": False}]}, "nothing_to_train"),
        ({"messages": [USER, ANSWER], "tools": {}}, "bad_tools"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": 1}, "bad_template_kwargs"),
        ({"prompt": "x", "completion": " "}, "empty_answer"),
        ({"prompt": "x", "completion": [ANSWER]}, "bad_prompt_completion"),
        ({"text": ""}, "empty_text"),
        ({"question": "x"}, "unknown_format"),
        ({}, "unknown_format"),
    ],
)
def test_a_row_that_cannot_be_trained_is_rejected_with_its_reason(tmp_path, row, code):
    path = write(tmp_path, {"text": "fine"}, row)
    fine, rejection = OpenSource(path).examples()
    assert isinstance(fine, Document)
    assert isinstance(rejection, Rejection)
    assert (rejection.source, rejection.code) == (f"{path}:2", code)
    assert len(rejection.message) > 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n{"text": \n', ":2: broken JSON"),
        ('{"text": "a"}\n[1]\n', ":2: an example must be a JSON object, found list"),
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_that_says_where(tmp_path, text, message):
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        list(OpenSource(str(file)).examples())


def test_missing_files_folders_and_other_encodings(tmp_path):
    with pytest.raises(DataError, match="no such data file"):
        list(OpenSource(str(tmp_path / "none.jsonl")).examples())
    with pytest.raises(DataError, match="the folder holds no data file"):
        list(OpenSource(str(tmp_path)).examples())
    with pytest.raises(DataError, match=r"scholar:none\.jsonl: the package has no such data file"):
        list(OpenSource("scholar:none.jsonl").examples())
    (tmp_path / "latin.jsonl").write_bytes('{"text": "café"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        list(OpenSource(str(tmp_path / "latin.jsonl")).examples())


def test_mix_copies_whole_and_chooses_parts_by_seed():
    def mixed(seed=0, **share):
        return mix([100], [Source(path="x", **share)], seed).tolist()

    rows = list(range(100))
    assert mixed() == rows
    assert mixed(weight=2.0) == rows + rows
    half = mixed(weight=0.5)
    assert len(half) == 50 and half == sorted(set(half))
    assert half == mixed(weight=0.5) != mixed(weight=0.5, seed=1)


def test_mix_by_count():
    def mixed(count, rows, seed=0):
        return mix([len(rows)], [Source(path="x", count=count)], seed).tolist()

    rows = list(range(100))
    some = mixed(30, rows)
    assert len(some) == 30 and some == sorted(set(some)) and some != mixed(30, rows, seed=1)
    more = mixed(230, rows)
    assert more[:200] == rows + rows and len(set(more[200:])) == 30
    assert mixed(100, rows) == rows
    assert mixed(5, []) == []


def test_mix_numbers_the_examples_of_all_sources():
    sources = [Source(path="a", weight=2.0), Source(path="b", count=1), Source(path="c")]
    mixed = mix([2, 3, 2], sources, 0).tolist()
    assert mixed[:4] == [0, 1, 0, 1] and mixed[4] in (2, 3, 4) and mixed[5:] == [5, 6]


def test_what_was_peeked_at_is_not_read_again(tmp_path, monkeypatch):
    path = write(tmp_path, *({"text": f"text {number}"} for number in range(150)))
    times = []
    lines = text_files.jsonl_lines
    monkeypatch.setattr(text_files, "jsonl_lines", lambda *arguments: times.append(1) or lines(*arguments))
    source = OpenSource(path)
    first = source.peek()
    assert len(first) == 100 and source.peek() == first
    examples = list(source.examples())
    assert [example.text for example in examples] == [f"text {number}" for number in range(150)]
    assert examples[:100] == first and len(times) == 1
    assert list(source.examples()) == examples and len(times) == 2


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.ndjson", "x.json", "x.csv"])
@pytest.mark.parametrize("columns", [{}, {"prompt": "q", "completion": "a"}])
def test_only_lines_of_json_are_parsed_later(tmp_path, name, columns):
    keys = list(columns.values()) or ["prompt", "completion"]
    if name == "x.csv":
        text = "\n".join([",".join(keys), "one,two", ",", "three,four"])
    else:
        rows = [dict(zip(keys, pair, strict=True)) for pair in (("one", "two"), ("", ""), ("three", "four"))]
        text = "\n\n".join(json.dumps(row | {"other": 1}) for row in rows)
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wb") as file:
        file.write(text.encode())
    source = OpenSource(Source(path=str(tmp_path / name), columns=columns))
    unread = list(source.unread())
    is_line = "jsonl" in name or "ndjson" in name
    assert [isinstance(each.row, str) for each in unread] == [is_line] * 3
    assert [each.entry() for each in unread] == list(source.entries())
    assert len({each.spelled() for each in unread}) == 3
    (tmp_path / "empty.jsonl").write_text("\n")
    for path, own, words in (("empty.jsonl", {}, "is empty"), (name, {"text": "none"}, "has no column 'none'")):
        with pytest.raises(DataError, match=words):
            list(OpenSource(Source(path=str(tmp_path / path), columns=own)).unread())


@pytest.mark.parametrize("columns", [{}, {"prompt": "q", "completion": "a"}])
def test_of_records_in_memory_only_what_is_read_is_spelled(columns):
    """Else an object beside it, which is spelled by its address, would make each process read other data."""
    keys = list(columns.values()) or ["prompt", "completion"]

    def spelled(answer):
        table = RecordList([{keys[0]: "one", keys[1]: answer, "beside": object()}], "memory:a")
        return [
            each.spelled() for each in OpenSource(LiveSource(path="memory:a", table=table, columns=columns)).unread()
        ]

    assert spelled("two") == spelled("two") != spelled("three")
