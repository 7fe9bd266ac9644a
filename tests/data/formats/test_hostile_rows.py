"""Rows that are broken, hostile, or say more than is read: each is one rejection with its place; none is lost."""

import json
import re
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

from preceptor.data.examples import ADVICE, CODES, READING, TRAIN_KEYS, Conversation, Rejection
from preceptor.data.formats.rows import UNREAD_COLUMNS, read_row
from preceptor.data.formats.values import Struct
from preceptor.data.sources import OpenSource
from preceptor.errors import DataError, short

CASES = Path(__file__).parents[4] / "shared" / "cases"
HOSTILE = sorted([*CASES.glob("row_*.jsonl"), *CASES.glob("data/*.jsonl"), CASES / "dupkeys.jsonl"])
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
DEEP = json.loads("[" * 200 + "]" * 200)
GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}'


def read(*lines, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return list(OpenSource(str(file)).examples())


def answered(**answer):
    return json.dumps({"messages": [USER, ANSWER | answer]})


def called(**call):
    return answered(content="", tool_calls=[call])


ROWS = {
    "a key twice": ('{"text": "a", "text": "b"}', "unreadable", "the key 'text' is given twice"),
    "a key twice, deep": ('{"text": "a", "x": [{"k": 1, "k": 1}]}', "unreadable", "the key 'k' is given twice"),
    "a key twice in a string": ('{"messages": "[{\\"role\\": 1, \\"role\\": 2}]"}', "unreadable", "given twice"),
    "NaN": ('{"text": "a", "system": NaN}', "unreadable", "system is nan, which is no number of JSON"),
    "infinite": ('{"text": "a", "tools": [1e999]}', "unreadable", "tools[0] is inf"),
    "huge integer": ('{"text": ' + "9" * 5000 + "}", "unreadable", "an integer of 5,000 digits"),
    "huge integer in a string": ('{"messages": "[' + "9" * 5000 + ']"}', "unreadable", "an integer of 5,000 digits"),
    "too deep for Python": ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "unreadable", "nested too deeply"),
    "deep": (json.dumps({"messages": [USER | {"x": DEEP}, ANSWER]}), "unreadable", "nested more than 100 deep"),
    "deep tools": (json.dumps({"messages": [USER, ANSWER], "tools": [{"x": DEEP}]}), "unreadable", "nested more than"),
    "messages a number": ('{"messages": 5}', "no_messages", "messages is 5"),
    "messages true": ('{"messages": true}', "no_messages", "messages is True"),
    "from a list": ('{"conversations": [{"from": [], "value": "x"}]}', "unknown_role", "is from []"),
    "an image": (json.dumps({"messages": [USER, ANSWER], "images": ["a.png"]}), "unread_column", "has 'images'"),
    "functions": (
        json.dumps({"messages": [USER, ANSWER], "functions": [{}]}),
        "unread_column",
        "write them as `tools`",
    ),
    "documents": (json.dumps({"messages": [USER, ANSWER], "documents": ["x"]}), "unread_column", "{documents: ...}"),
    "documents of the wrong kind": (
        json.dumps({"messages": [USER, ANSWER], "chat_template_kwargs": {"documents": "x"}}),
        "bad_template_kwargs",
        "chat_template_kwargs.documents is 'x'; it must be a list of objects",
    ),
    "weight of an example": (json.dumps({"messages": [USER, ANSWER], "weight": 0.5}), "unread_column", "weight: 0.5"),
    "mask of an example": (json.dumps({"messages": [USER, ANSWER], "loss_mask": [0, 1]}), "unread_column", "[0, 1]"),
    "image of a message": (json.dumps({"messages": [USER | {"images": ["a"]}, ANSWER]}), "unread_field", "[0].images"),
    "detail": (answered(train_detail=[{"train": False}]), "unread_field", "messages[1].train_detail is not read"),
    "function_call": (answered(function_call={"name": "f"}), "unread_field", "write the call as `tool_calls`"),
    "arguments as args": (
        called(name="f", args={"a": 1}, id="c"),
        "unread_field",
        "[1].tool_calls[0].args is not read",
    ),
    "arguments as parameters": (
        called(function={"name": "f", "parameters": {"a": 1}}),
        "unread_field",
        "tool_calls[0].function.parameters is not read, and the call has no arguments: write it as",
    ),
    "arguments as input": (called(type="tool_use", name="f", input={"a": 1}), "unread_field", "[0].input is not read"),
    "arguments as args beside blank ones": (called(name="f", args={"a": 1}, arguments=" "), "unread_field", "[0].args"),
    "arguments beside a function": (
        called(function={"name": "f"}, arguments={"a": 1}),
        "unread_field",
        "tool_calls[0].arguments is not read",
    ),
    "call without a name": (called(function={"arguments": {"a": 1}}), "bad_tool_call", "[0].function.name is None"),
    "call with a blank name": (called(name=" ", arguments={"a": 1}), "bad_tool_call", "tool_calls[0].name is ' '"),
    "function that is a string": (called(function="f", arguments={"a": 1}), "bad_tool_call", "tool_calls[0].name is"),
    "custom call": (called(type="custom", custom={"name": "f", "input": "x"}), "bad_tool_call", "write a call as"),
    "two reasonings": (
        answered(reasoning="So.", thinking=[{"type": "text", "text": "Not so."}]),
        "bad_message",
        "messages[1] has thinking and reasoning, and they differ; keep one of them",
    ),
    "part of type image": (
        json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "image": "a"}]}, ANSWER]}),
        "unread_field",
        "messages[0].content[0] is a part of type 'image'; only text is trained here",
    ),
    "part that is a string": (
        answered(content=["a", "b"]),
        "bad_message",
        "messages[1].content[0] is str; write a part",
    ),
    "part without text": (answered(content=[{"type": "text"}]), "bad_message", "content[0].text is None"),
    "flags disagree": (answered(train=True, loss=False), "bad_message", "train: true and loss: false; keep one"),
    "flag of another type": (answered(trainable="no"), "bad_message", "trainable is 'no'; it must be true or false"),
    "user is trained": (json.dumps({"messages": [USER | {"train": True}, ANSWER]}), "not_an_answer", "role is user"),
}


@pytest.mark.parametrize("name", ROWS)
def test_one_row_is_rejected_with_its_place_and_the_next_is_read(name, tmp_path):
    line, code, message = ROWS[name]
    before, found, after = read(GOOD, line, GOOD, tmp_path=tmp_path)
    assert isinstance(before, Conversation) and isinstance(after, Conversation)
    assert isinstance(found, Rejection) and found.source == f"{tmp_path}/rows.jsonl:2"
    assert (found.code, message in found.message) == (code, True), found
    assert len(found.message) < 500


READABLE_CALLS = {
    "of a server": {"id": "c", "type": "function", "index": 0, "function": {"name": "f", "arguments": '{"a": 1}'}},
    "with nulls": {"name": "f", "arguments": {"a": 1}, "function": None, "custom": None},
    "with more than its arguments": {"function": {"name": "f", "arguments": '{"a": 1}', "parsed_arguments": {"a": 1}}},
    "without arguments": {"function": {"name": "f"}},
    "with none under another key": {"name": "f", "args": {}, "type": "tool_call"},
}


@pytest.mark.parametrize("name", READABLE_CALLS)
def test_a_call_whose_arguments_are_where_they_are_read_is_read(name, tmp_path):
    (found,) = read(called(**READABLE_CALLS[name]), tmp_path=tmp_path)
    assert isinstance(found, Conversation), found


def test_reasoning_under_two_names_is_read_where_it_is_one_or_context(tmp_path):
    same, apart = {"reasoning": "So.", "thinking": "So.\n"}, {"reasoning": "So.", "thinking": "Not so.", "train": False}
    for fields in (same, apart, {"reasoning": "So.", "thinking": ""}):
        (found,) = read(json.dumps({"messages": [USER, ANSWER | fields, USER, ANSWER]}), tmp_path=tmp_path)
        assert isinstance(found, Conversation), found


@pytest.mark.skipif(not CASES.is_dir(), reason="the folder shared/cases is not beside the repository")
@pytest.mark.parametrize("file", HOSTILE, ids=lambda file: file.name)
def test_the_collected_rows_are_read_or_rejected(file):
    try:
        found = list(OpenSource(str(file)).examples())
    except DataError:
        return
    assert found and all(len(each.message) < 500 for each in found if isinstance(each, Rejection))


def test_what_goes_wrong_in_reading_a_row_is_that_rows_rejection(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("boom")

    monkeypatch.setattr("preceptor.data.formats.rows._example", fail)
    _, found = read_row({"text": "a"}, "x:1")
    assert (found.code, found.source) == ("unreadable", "x:1") and "RuntimeError: 'boom'" in found.message


@pytest.mark.parametrize("key", ["train", "trainable", "loss", "loss_mask"])
@pytest.mark.parametrize(("no", "yes"), [(False, True), (0, 1)])
def test_flags_of_other_trainers_say_what_is_trained_and_no_template_sees_them(key, no, yes, tmp_path):
    messages = [USER, ANSWER | {key: no}, USER | {key: no}, ANSWER | {key: yes}]
    (found,) = read(json.dumps({"messages": messages}), tmp_path=tmp_path)
    assert [message.train for message in found.messages] == [False, False, False, True]
    assert all(key not in message.given for message in found.messages)
    (found,) = read(json.dumps({"messages": [USER, ANSWER | {key: None}]}), tmp_path=tmp_path)
    assert found.messages[1].train


@pytest.mark.parametrize("value", [True, 1, 1.0, "train", 2.3, "2.3", "1", "1.0", "true", "True", "yes", "", " "])
def test_a_flag_of_an_example_that_changes_nothing_is_passed_over(value, tmp_path):
    key = "loss" if value in (2.3, "2.3") else "train"
    (found,) = read(json.dumps({"messages": [USER, ANSWER], key: value}), tmp_path=tmp_path)
    assert isinstance(found, Conversation)


@pytest.mark.parametrize("key", [*TRAIN_KEYS, "weight"])
@pytest.mark.parametrize("cell", ["0", "0.0", " 0 ", "false", "False", "no", "[0]", Decimal(0), False, 0])
def test_a_flag_of_an_example_that_changes_something_is_rejected_as_text_too(key, cell):
    """Every cell of a CSV file is text."""
    found = read_row({"question": "q", "answer": "a", key: cell}, "x:1")[1]
    assert isinstance(found, Rejection) and (found.code, f"has {key}: " in found.message) == ("unread_column", True)


@pytest.mark.parametrize("weight", ["0.5", "2", "nan", "inf", 0.5, Decimal("0.5")])
def test_a_weight_of_an_example_is_rejected_as_text_too(weight):
    assert read_row({"question": "q", "answer": "a", "weight": weight}, "x:1")[1].code == "unread_column"


@pytest.mark.parametrize("key", UNREAD_COLUMNS)
def test_a_false_that_asks_for_something_is_rejected(key):
    """`images: false` says that there are none; `enable_thinking: false` that thinking is off."""
    found = [read_row({"messages": [USER, ANSWER], key: value}, "x:1")[1] for value in (False, 0, "", None, [])]
    asks = [isinstance(each, Rejection) for each in found]
    assert asks == [key == "enable_thinking"] * 2 + [False] * 3


@pytest.mark.parametrize("value", [date(2026, 1, 2), Decimal("1.5"), b"x", {1}])
@pytest.mark.parametrize("where", ["messages[2].content.a[0]", "messages[1].tool_calls[0].function.arguments.a[0]",
    "tools[0].a[0]", "chat_template_kwargs.a[0]"])  # fmt: skip
def test_a_value_that_json_cannot_spell_rejects_its_row_where_it_is_read(value, where):
    def row(**of):
        held = {key: {"a": [each]} for key, each in of.items()}
        call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": held.get("arguments", {})}}
        messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": held.get("content", {})}, ANSWER]  # fmt: skip
        kwargs = held.get("chat_template_kwargs", {})
        return {"messages": messages, "tools": [held.get("tools[0]", {})], "chat_template_kwargs": kwargs}

    key = where.removesuffix(".a[0]").rpartition("." if where.startswith("messages") else "\0")[2]
    found = read_row(row(**{key: value}), "x:1")[1]
    assert isinstance(found, Rejection) and found.code == "unreadable"
    assert found.message.startswith(f"{where} is ") and f"JSON has no {type(value).__name__}" in found.message
    if not isinstance(value, set):
        found = read_row(row(**{key: {value: 1}}), "x:1")[1]
        assert found.message.startswith(f"a key of {where} is {short(value)}, and JSON has no"), found
    assert isinstance(read_row(row(**{key: 1.5}) | {"beside": value}, "x:1")[1], Conversation), "what is not read"


def test_columns_read_an_example_without_what_is_not_read(tmp_path):
    from preceptor.config import Source

    row = {"messages": [USER, ANSWER], **dict.fromkeys(UNREAD_COLUMNS, "x")}
    read(json.dumps(row), tmp_path=tmp_path)
    (found,) = OpenSource(Source(path=str(tmp_path / "rows.jsonl"), columns={"messages": "messages"})).examples()
    assert isinstance(found, Conversation)


def test_padding_in_json_lines_is_dropped_as_in_parquet_and_what_may_be_meant_is_kept(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "description": None, "parameters": {"type": "object",
        "properties": {"a": {"type": "string", "default": None, "enum": None}, "other": None}}}}  # fmt: skip
    call = {"type": "function", "id": None, "function": {"name": "f", "arguments": {"a": None, "other": None}}}
    row = {"messages": [USER | {"tool_calls": None}, ANSWER | {"content": "", "tool_calls": [call]}], "tools": [tool]}
    (found,) = read(json.dumps(row), tmp_path=tmp_path)
    schema = found.tools[0]["function"]
    assert schema == {
        "name": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "default": None}}},
    }
    assert found.messages[0].given == USER
    assert found.messages[1].tool_calls[0] == {"type": "function", "function": {"name": "f", "arguments": {}}}
    as_parquet = read_row({**row, "tools": json.dumps([tool])}, "x")[1]
    assert "other" in as_parquet.tools[0]["function"]["parameters"]["properties"], "a JSON string is exact"
    assert not any(isinstance(each, Struct) for each in (found.tools[0], schema, found.messages[1].given))


def test_every_code_in_the_source_is_listed_and_documented():
    source = Path(__file__).parents[3] / "src" / "preceptor"
    text = "".join(file.read_text() for file in sorted(source.rglob("*.py")))
    made = r'(?:Unreadable|Rejected)\(\s*"(\w+)"|Rejection\(\s*[\w.]+,\s*"(\w+)"'
    used = {code for groups in re.findall(made, text) for code in groups if code}
    assert len(used) > 30 and used <= CODES, used - CODES
    assert not set(READING) & set(ADVICE)
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [code for code in sorted(CODES) if f"\n| `{code}` | " not in page] == []
