"""Rows in every format -> the messages that they mean, or a rejection with its reason."""

import gzip
import json
from pathlib import Path

import pytest

from preceptor.config import ROW_KEYS, Source
from preceptor.config.held import LiveSource
from preceptor.config.yaml_text import parse_yaml
from preceptor.data.examples import Completion, Conversation, Document, Rejection
from preceptor.data.formats.columns import PAIRS, has_format, unknown_format
from preceptor.data.formats.rows import format_of, read_row
from preceptor.data.formats.tables import RecordList
from preceptor.data.sources import OpenSource
from preceptor.errors import ConfigError, DataError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def to_example(row, source, nulls="reject"):
    return read_row(row, source, nulls)[1]


def messages(row, nulls="reject"):
    record = to_example(row, "x:1", nulls)
    assert isinstance(record, Conversation), record
    return [dict(message.given) for message in record.messages]


def said(*texts):
    return [
        {"role": role, "content": text} for role, text in zip(("user", "assistant") * len(texts), texts, strict=False)
    ]


SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]


@pytest.mark.parametrize(
    ("row", "expected", "name"),
    [
        ({"messages": [USER, ANSWER], "prompt": "Hi", "text": "x"}, [USER, ANSWER], "messages"),
        ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER], "messages"),
        ({"messages": None, "conversations": [USER, ANSWER]}, [USER, ANSWER], "messages"),
        ({"conversations": SHAREGPT, "id": 5}, [USER, ANSWER], "ShareGPT conversations"),
        ({"messages": SHAREGPT}, [USER, ANSWER], "ShareGPT conversations"),
        ({"conversations": SHAREGPT, "system": "S"}, [{"role": "system", "content": "S"}, USER, ANSWER], None),
        ({"messages": [{"role": "system", "content": "S"}, USER, ANSWER], "system": "S"}, None, "messages"),
        (
            {"instruction": "Add.", "input": "", "output": "4"},
            said("Add.", "4"),
            "Alpaca: instruction, input and output",
        ),
        ({"instruction": "Add.", "input": " \n", "output": "4"}, said("Add.", "4"), None),
        ({"instruction": "Add.", "input": "2 + 2", "output": "4", "text": "Below"}, said("Add.\n\n2 + 2", "4"), None),
        ({"instruction": "", "input": "2 + 2", "output": "4"}, said("2 + 2", "4"), None),
        ({"instruction": "Add.", "output": "4"}, said("Add.", "4"), "Alpaca: instruction, output"),
        ({"instruction": "c", "output": "d", "history": [["a", "b"]]}, said("a", "b", "c", "d"), None),
        ({"instruction": "a", "response": "b", "input": "c"}, said("a\n\nc", "b"), "instruction and response"),
        ({"question": " a ", "answer": "b\n"}, said(" a ", "b\n"), "question and answer"),
        ({"prompt": "a", "response": "b"}, said("a", "b"), "prompt and response"),
        ({"prompt": [USER, ANSWER, USER], "response": "b"}, [USER, ANSWER, USER, {**ANSWER, "content": "b"}], None),
        ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER], "prompt and completion as messages"),
        ({"prompt": json.dumps([USER]), "response": "b"}, [USER, {**ANSWER, "content": "b"}], None),
        ({"prompt": json.dumps([USER]), "response": json.dumps([ANSWER])}, [USER, ANSWER], None),
        ({"prompt": json.dumps(SHAREGPT[:1]), "response": json.dumps(SHAREGPT[1:])}, [USER, ANSWER], None),
    ],
)
def test_a_conversation_in_every_format(row, expected, name):
    found = messages(row)
    assert found == (row["messages"] if expected is None else expected)
    assert name in (None, format_of(row))


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_in_parts_is_one_text(field):
    parts = [{"type": "text", "text": "Recall "}, {"text": "it."}]
    asked, answer = to_example({"messages": [USER, {**ANSWER, field: parts}]}, "x:1").messages
    assert answer.given == {**ANSWER, field: "Recall it."} and answer.reasoning_content == "Recall it."
    assert asked.reasoning_content == "" and not messages({"messages": [USER, {**ANSWER, field: []}]})[1][field]


@pytest.mark.parametrize("form", [[USER], json.dumps([USER]), " " + json.dumps(SHAREGPT[:1], indent=1)])
@pytest.mark.parametrize("answer", [[ANSWER], json.dumps([ANSWER]), json.dumps(SHAREGPT[1:])])
def test_prompt_and_completion_may_be_messages_as_json(form, answer):
    found = to_example({"prompt": form, "completion": answer}, "x:1")
    assert [dict(message.given) for message in found.messages] == [USER, ANSWER]
    assert [message.train for message in found.messages] == [False, True]
    assert format_of({"prompt": form, "completion": answer}) == "prompt and completion as messages"


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "[]",
        '{"role": "user"}',
        '[{"a": 1}]',
        '[{"role": "user"',
        "[NaN]",
        '[{"a": 1, "a": 2}]',
        "[[]]",
        '[{"from": "Paris", "to": "London"}]',
        '[{"role": "CEO", "name": "Ann"}]',
        '[{"from": "EUR", "value": 3}]',
        '[{"role": "user", "name": "Ann"}]',
        '[{"role": "CEO", "content": "a"}]',
        '[{"role": ["a"], "content": "a"}]',
    ],
)
def test_a_prompt_that_looks_like_json_and_is_no_messages_is_text(text):
    assert to_example({"prompt": text, "completion": text}, "x:1") == Completion("x:1", text, text)
    assert messages({"prompt": text, "response": text}) == said(text, text)


def test_what_is_no_conversation():
    assert to_example({"prompt": "a", "completion": "b", "text": "ab"}, "x:1") == Completion("x:1", "a", "b")
    assert to_example({"text": "a", "messages": None}, "x:1") == Document("x:1", "a")
    assert format_of({"text": "a"}) == "text" and format_of({"body": "a"}) == "no known format"


@pytest.mark.parametrize("beside", [{"content": None}, {"content": ""}, {"role": "", "content": []}])
def test_empty_keys_beside_from_and_value_say_nothing(beside):
    row = {"conversations": [message | beside for message in SHAREGPT]}
    assert to_example(row, "x:1") == to_example({"conversations": SHAREGPT}, "x:1")


def test_sharegpt_with_tools_as_llama_factory_writes_them():
    calls = [{"name": "f", "arguments": {"x": None}}, {"name": "g", "arguments": "{}"}]
    row = {
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": json.dumps(calls[0])},
            {"from": "observation", "value": "12"},
            {"from": "function_call", "value": json.dumps(calls), "train": False},
            {"from": "tool", "value": "13"},
            {"from": "gpt", "value": "Done.", "weight": 0.5, "reasoning_content": "easy"},
        ],
        "tools": json.dumps([TOOL]),
    }
    record = to_example(row, "x:1")
    given = [dict(message.given) for message in record.messages]
    assert [message["role"] for message in given] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert given[2] == {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": calls[0]}]}
    assert [call["function"] for call in given[4]["tool_calls"]] == calls
    assert given[6] == {"role": "assistant", "content": "Done.", "reasoning_content": "easy"}
    assert [message.train for message in record.messages] == [False, False, True, False, False, False, True]
    assert record.messages[6].weight == 0.5
    assert record.tools == [TOOL]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_as_a_list_or_as_json(tools):
    assert to_example({"messages": [USER, ANSWER], "tools": tools}, "x:1").tools == [TOOL]
    assert to_example({"question": "a", "answer": "b", "tools": tools}, "x:1").tools == [TOOL]


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools(tools):
    assert to_example({"messages": [USER, ANSWER], "tools": tools}, "x:1").tools is None


def test_template_kwargs_as_an_object_or_as_json():
    for kwargs in ({"enable_thinking": None}, '{"enable_thinking": null}'):
        record = to_example({"messages": [USER, ANSWER], "chat_template_kwargs": kwargs}, "x:1")
        assert record.template_kwargs == {"enable_thinking": None}


def test_nulls_that_a_json_file_holds_are_meant():
    call = {"id": None, "function": {"name": "f", "arguments": {"a": None}}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"a": {"default": None}, "b": None}}},
    }
    record = to_example({"messages": [USER, message], "tools": [tool]}, "x:1")
    assert record.messages[1].given == message and record.tools == [tool]


@pytest.mark.parametrize(
    ("row", "code", "words"),
    [
        ({"messages": [USER, ANSWER], "conversations": SHAREGPT}, "ambiguous_format", "messages and conversations"),
        ({"prompt": "a", "completion": "b", "response": "c"}, "ambiguous_format", "or prompt and response"),
        ({"question": "a", "answer": "b", "context": "c"}, "unread_column", "'context'"),
        ({"question": "a", "answer": "B", "choices": ["x", "y"]}, "unread_column", "'choices'"),
        ({"prompt": "a", "completion": "b", "input": "c"}, "unread_column", "'input'"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "needs_template", "system would be lost"),
        ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "needs_template", "tools would be lost"),
        (
            {"prompt": json.dumps([USER]), "completion": "b"},
            "bad_prompt_completion",
            "prompt is list and completion str",
        ),
        ({"prompt": "a", "completion": json.dumps([ANSWER])}, "bad_prompt_completion", "prompt is str and completion"),
        ({"prompt": "a", "response": json.dumps([ANSWER])}, "bad_prompt_completion", "prompt is str and response list"),
        ({"question": "a", "answer": 3}, "not_text", "answer is 3"),
        ({"question": "a", "answer": " "}, "empty_answer", "answer is empty"),
        ({"instruction": " ", "input": "", "output": "b"}, "empty_prompt", "instruction is empty"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "bad_history", "[['a']]"),
        ({"messages": "[{'role': 'user'}]"}, "no_messages", "it must be a list"),
        ({"messages": [USER, ANSWER], "tools": "[{"}, "bad_tools", "'[{'"),
        ({"messages": [USER, ANSWER], "tools": "f"}, "bad_tools", "'f'"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": "[]"}, "bad_template_kwargs", "must be an object"),
        ({"messages": [USER, ANSWER], "system": 1}, "bad_system", "must be a string"),
        (
            {"messages": [{"role": "system", "content": "S"}, USER, ANSWER], "system": "T"},
            "two_system_prompts",
            "keep one",
        ),
        ({"conversations": [{"from": "human", "value": "x"}, USER]}, "bad_message", "conversations[1] has no from"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "unknown_role", "known are human, user, gpt"),
        (
            {"conversations": [{"from": "human", "value": "x", "content": "y"}]},
            "ambiguous_format",
            "a different `content`; remove `content`",
        ),
        (
            {"conversations": [{"from": "human", "value": "x", "role": "system"}]},
            "ambiguous_format",
            "a different `role`; remove `role`",
        ),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "bad_message", "conversations[0].content must be a string"),
        (
            {"conversations": [{"from": "function_call", "value": "f(1)"}]},
            "bad_tool_call",
            "JSON with name and arguments",
        ),
        ({"conversations": [{"from": "function_call", "value": '{"name": "f"}'}]}, "bad_tool_call", "conversations[0]"),
        *(
            ({"messages": [USER, {**ANSWER, field: value}]}, "bad_message", f"messages[1].{field} must be a string")
            for field in ("reasoning_content", "thinking", "reasoning")
            for value in (True, {"text": "so"})
        ),
        ({"messages": [USER, {**ANSWER, "content": "a\ud83d"}]}, "broken_character", "messages[1].content"),
        ({"messages": [{"role": "User", "content": "Hi"}, ANSWER]}, "unknown_role", "did you mean 'user'? known"),
        ({"messages": [USER, {**ANSWER, "role": "asistant"}]}, "unknown_role", "did you mean 'assistant'?"),
        ({"messages": [USER, {"role": "assistant", "text": "a"}]}, "bad_message", "its text is under 'text'"),
        ({"messages": [{"role": "user", "text": "a"}, ANSWER]}, "bad_message", "messages[0] has no content; its text"),
        ({"conversation": [USER, ANSWER]}, "unknown_format", "set `columns: {messages: conversation}`"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "unknown_format", "'chosen'"),
        ({"query": "a", "reply": "b"}, "unknown_format", "such as `columns: {question: query, answer: reply}`"),
    ],
)
def test_a_row_that_cannot_be_read_is_refused_with_its_reason(row, code, words):
    rejection = to_example(row, "x:1")
    assert isinstance(rejection, Rejection)
    assert rejection.code == code and words in rejection.message, rejection


@pytest.mark.parametrize(
    ("keys", "columns"),
    [
        ("query reply", "{question: query, answer: reply}"),
        ("input output", "{question: input, answer: output}"),
        ("Question Answer", "{question: Question, answer: Answer}"),
        ("Answer Frage", "{question: Frage, answer: Answer}"),
        ("id Answer Question", "{question: Question, answer: Answer}"),
        ("Prompt Completion", "{prompt: Prompt, response: Completion}"),
        ("instructions output", "{instruction: instructions, output: output}"),
        ("Instruction Input Output System", "{instruction: Instruction, output: Output, input: Input, system: System}"),
        ("id query reply", "{question: ..., answer: ...}"),
        ("Text", "{text: Text}"),
        ("id Messages", "{messages: Messages}"),
        ("question good bad", "{question: question, answer: ...}"),
    ],
)
def test_the_columns_for_unknown_keys_are_those_of_a_conversation(keys, columns, tmp_path):
    said = unknown_format(dict.fromkeys(keys.split()))
    assert said.endswith(f", such as `columns: {columns}`")
    if "..." not in columns and "Messages" not in columns and "Text" not in columns:
        row = dict.fromkeys(keys.split(), "x")
        mapping = parse_yaml(columns)
        assert unknown_format(row) == said
        (example,) = OpenSource(Source(path=write(tmp_path, [row]), columns=mapping)).examples()
        assert isinstance(example, Conversation)


def test_a_null_that_completes_the_format_is_named():
    rejection = to_example({"question": "a", "answer": None}, "x:1")
    assert rejection.code == "unknown_format"
    assert "the keys are 'question'; 'answer' is null, so absent; an example needs" in rejection.message


def test_columns_that_make_no_format_are_named_as_the_file_has_them(tmp_path):
    path = write(tmp_path, [{"query": "a", "reply": "b"}])
    with pytest.raises(ConfigError, match=r"such as `columns: \{question: query, answer: reply\}`") as caught:
        OpenSource(Source(path=path, columns={"prompt": "query", "answer": "reply"}))
    assert "names prompt, answer, which make no format" in str(caught.value)


def test_the_keys_of_the_formats_are_those_of_the_run_file():
    """A key that `columns` may name, and every key that a pair is made of."""
    assert {key for pair in PAIRS for key in pair} < set(ROW_KEYS)
    assert has_format(["prompt", "response"]) and not has_format(["prompt"]) and not has_format([])


def write(tmp_path, rows):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "a.jsonl")


def test_columns_say_what_the_files_keys_are_and_no_other_is_read(tmp_path):
    rows = [
        {"frage": "a", "antwort": "b", "messages": [USER], "context": "c"},
        {"frage": "d", "antwort": "e", "rolle": "S"},
    ]
    columns = {"prompt": "frage", "response": "antwort", "system": "rolle"}
    first, second = OpenSource(Source(path=write(tmp_path, rows), columns=columns)).examples()
    assert [dict(m.given) for m in first.messages] == said("a", "b")
    assert [m.role for m in second.messages] == ["system", "user", "assistant"]


def test_a_column_that_is_not_there_is_rejected_with_the_nearest(tmp_path):
    path = write(tmp_path, [{"frage": "a", "antwort": "b"}])
    with pytest.raises(DataError, match=r"a\.jsonl: has no column 'antwrt', .*did you mean 'antwort'"):
        list(OpenSource(Source(path=path, columns={"prompt": "frage", "response": "antwrt"})).examples())
    (tmp_path / "a.csv").write_text("frage,antwort\na,b\n")
    with pytest.raises(DataError, match=r"a\.csv: has no column 'antwrt', .*did you mean 'antwort'"):
        list(
            OpenSource(
                Source(path=str(tmp_path / "a.csv"), columns={"prompt": "frage", "response": "antwrt"})
            ).examples()
        )
    with pytest.raises(ConfigError, match="`columns` names prompt, which make no format"):
        list(OpenSource(Source(path=path, columns={"prompt": "frage"})).examples())


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "memory"])
def test_a_column_that_a_format_can_lack_may_occur_late(tmp_path, kind):
    """The file is looked through before it is refused."""

    def opened(rows, columns):
        if kind == "memory":
            return OpenSource(LiveSource(path="memory:a", table=RecordList(rows, "memory:a"), columns=columns))
        text = json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
        content = gzip.compress(text.encode()) if kind.endswith("gz") else text.encode()
        (tmp_path / f"a.{kind}").write_bytes(content)
        return OpenSource(Source(path=str(tmp_path / f"a.{kind}"), columns=columns))

    rows = [{"m": [USER, ANSWER]} for _ in range(150)]
    with_tools = [*rows, {"m": [USER, ANSWER], "t": [TOOL]}]
    for each in (opened(with_tools, {"messages": "m", "tools": "t"}),) * 2:
        assert [found.tools for found in each.examples()] == [None] * 150 + [[TOOL]]
    with pytest.raises(DataError, match="has no column 't', which `columns` names"):
        list(opened(rows, {"messages": "m", "tools": "t"}).examples())
    late = [*rows, {"q": "a", "a": "b"}]
    with pytest.raises(DataError, match="has no column 'q'"):
        list(opened(late, {"prompt": "q", "response": "a"}).examples())


def test_a_column_that_a_format_needs_is_missed_at_once(tmp_path):
    """Nothing is read beyond the first examples."""
    path = write(tmp_path, [{"m": [USER, ANSWER]} for _ in range(150)])
    Path(path).write_text(Path(path).read_text() + "broken")
    with pytest.raises(DataError, match="has no column 'n'"):
        list(OpenSource(Source(path=path, columns={"messages": "n", "tools": "m"})).examples())


def test_the_format_of_each_row_is_named(tmp_path):
    path = write(tmp_path, [{"text": "a"}, {"conversations": SHAREGPT}, {}])
    entries = list(OpenSource(path).entries())
    assert [entry.format for entry in entries] == ["text", "ShareGPT conversations", "no known format"]
    assert {entry.table for entry in entries} == {path}
