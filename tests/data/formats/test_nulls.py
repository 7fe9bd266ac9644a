"""What Parquet and Arrow do to objects, undone where it is certain: write real files, read the same rows again."""

import json

import pytest

from preceptor.config import Source
from preceptor.data.examples import Conversation, Rejection
from preceptor.data.formats.rows import read_row
from preceptor.data.formats.values import Struct
from preceptor.data.sources import OpenSource

ASK = {"role": "user", "content": "Weather?"}


def tool(name, properties, **more):
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties, **more}},
    }


def call(name, **arguments):
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


WEATHER = tool(
    "weather", {"city": {"type": "string", "enum": ["Rome", "Oslo"]}, "days": {"type": "integer"}}, required=["city"]
)
CLOCK = tool(
    "clock",
    {"zone": {"type": "string", "description": "A zone."}, "at": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
)
EMPTY = tool("now", {})


def parquet(tmp_path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    return str(tmp_path / "a.parquet")


def saved(tmp_path, rows):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    return str(tmp_path / "saved")


@pytest.mark.parametrize("write", [parquet, saved])
def test_padding_is_gone_from_messages_and_tools(tmp_path, write):
    rows = [
        {"messages": [ASK, call("weather", city="Rome")], "tools": [WEATHER]},
        {
            "messages": [ASK, call("weather", city="Oslo", days=2), {"role": "tool", "content": "12"}],
            "tools": [WEATHER, EMPTY],
        },
        {"messages": [{**ASK, "name": "Ann"}, {"role": "assistant", "content": "Yes."}], "tools": None},
    ]
    records = list(OpenSource(write(tmp_path, rows)).examples())
    for row, record in zip(rows, records, strict=True):
        assert isinstance(record, Conversation), record
        assert [json.loads(json.dumps(message.given)) for message in record.messages] == row["messages"]
        assert record.tools == row["tools"]
        assert (
            '": null' not in json.dumps(record.tools and list(record.tools)) and type(record.messages[0].given) is dict
        )


def test_the_padding_that_a_plain_reader_would_train_on_is_there(tmp_path):
    """The test above would pass without any work if Arrow added nothing."""
    import pyarrow.parquet as pq

    rows = [{"tools": [WEATHER]}, {"tools": [CLOCK]}]
    (first, _) = pq.read_table(parquet(tmp_path, rows)).to_pylist()
    assert first["tools"][0]["function"]["parameters"]["properties"]["zone"] is None
    assert "anyOf" not in WEATHER["function"]["parameters"]["properties"]["city"]


def test_an_argument_that_may_be_null_cannot_be_told_from_padding(tmp_path):
    rows = [
        {"messages": [ASK, call("clock", zone="UTC", at="noon")], "tools": [CLOCK]},
        {"messages": [ASK, call("clock", zone="UTC", at=None)], "tools": [CLOCK]},
    ]
    path = parquet(tmp_path, rows)
    fine, rejection = OpenSource(path).examples()
    assert isinstance(fine, Conversation) and isinstance(rejection, Rejection)
    assert rejection.code == "ambiguous_null" and rejection.source.endswith("a.parquet:row 2")
    assert (
        "messages[1].tool_calls[0].function.arguments.at is null" in rejection.message
        and "JSON strings" in rejection.message
    )
    arguments = {
        nulls: list(OpenSource(Source(path=path, nulls=nulls)).examples())[1]
        .messages[1]
        .tool_calls[0]["function"]["arguments"]
        for nulls in ("drop", "keep")
    }
    assert arguments == {"drop": {"zone": "UTC"}, "keep": {"zone": "UTC", "at": None}}


@pytest.mark.parametrize(
    ("parameters", "padding"),
    [
        ({"type": "object", "properties": {"a": {"type": "string"}}}, True),
        ({"type": "object", "properties": {"a": {"type": ["string", "integer"]}}}, True),
        ({"type": "object", "properties": {"a": {"enum": ["x"]}}}, True),
        ({"type": "object", "properties": {"b": {"type": "string"}}}, True),
        ({"type": "object", "properties": {"a": {"type": ["string", "null"]}}}, False),
        ({"type": "object", "properties": {"a": {"type": "string", "nullable": True}}}, False),
        ({"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}, False),
        ({"type": "object", "properties": {"a": {"enum": ["x", None]}}}, False),
        ({"type": "object", "properties": {"a": {"description": "anything"}}}, False),
        ({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}, False),
        ({"type": "object"}, False),
        (None, False),
    ],
)
def test_when_a_null_argument_is_surely_padding(tmp_path, parameters, padding):
    tools = json.dumps([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    calls = [call("f", a="x", c="y"), call("f", a=None, c="y")]
    rows = [{"messages": [ASK, message], "tools": tools} for message in calls]
    _, second = OpenSource(parquet(tmp_path, rows)).examples()
    if padding:
        assert second.messages[1].tool_calls[0]["function"]["arguments"] == {"c": "y"}
    else:
        assert second.code == "ambiguous_null"


def test_nulls_of_a_message_that_a_function_made_are_meant():
    calls = [call("f", a=None)["tool_calls"][0]]
    arguments = Struct(calls[0]["function"]["arguments"])  # from Parquet, in a message that is new
    function = {**calls[0]["function"], "arguments": arguments}
    answer = {"role": "assistant", "tool_calls": [{**calls[0], "function": function}]}
    _, made = read_row({"messages": [ASK, answer]}, "a.parquet:row 1")
    assert isinstance(made, Conversation), made
    assert made.messages[1].tool_calls == calls


def test_a_default_of_null_cannot_be_told_from_padding(tmp_path):
    with_default = tool("f", {"a": {"type": "string", "default": "x"}})
    without = tool("f", {"a": {"type": "string"}})
    rows = [{"messages": [ASK, {"role": "assistant", "content": "x"}], "tools": [t]} for t in (with_default, without)]
    path = parquet(tmp_path, rows)
    fine, rejection = OpenSource(path).examples()
    assert fine.tools == [with_default]
    assert rejection.code == "ambiguous_null"
    assert "tools[0].function.parameters.properties.a.default is null" in rejection.message
    assert list(OpenSource(Source(path=path, nulls="drop")).examples())[1].tools == [without]


def test_a_default_that_is_an_object_is_data_and_no_schema(tmp_path):
    """Under `type` a schema never holds null; in a default's own data it may."""
    first = tool("f", {"a": {"type": "object", "default": {"type": "x", "b": 1}}})
    second = tool("f", {"a": {"type": "object", "default": {"type": None, "b": 1}}})
    rows = [{"messages": [ASK, {"role": "assistant", "content": "x"}], "tools": [t]} for t in (first, second)]
    fine, rejection = OpenSource(parquet(tmp_path, rows)).examples()
    assert fine.tools == [first]
    assert rejection.code == "ambiguous_null" and "default.type is null" in rejection.message


def test_properties_named_like_keywords(tmp_path):
    """Inside `properties` every key is a name, so a null there is another tool's property, whatever it is called."""
    one, two = tool("f", {"default": {"type": "string"}}), tool("g", {"const": {"type": "string"}})
    rows = [{"messages": [ASK, {"role": "assistant", "content": "x"}], "tools": [t]} for t in (one, two)]
    assert [record.tools for record in OpenSource(parquet(tmp_path, rows)).examples()] == [[one], [two]]


def test_json_strings_and_json_columns_are_exact(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    odd = tool("f", {"a": {"type": "string", "default": None}, "b": {"default": 1}})
    rows = [
        {"messages": [ASK, call("f", a=None)], "tools": [odd]},
        {"messages": [ASK, call("f", b=[1, "x"])], "tools": []},
    ]
    features = datasets.Features({"messages": datasets.List(datasets.Json()), "tools": datasets.Json()})
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.save_to_disk(str(tmp_path / "saved"))
    dataset.to_parquet(str(tmp_path / "b.parquet"))
    strings = [{key: json.dumps(value) for key, value in row.items()} for row in rows]
    for path in (tmp_path / "saved", tmp_path / "b.parquet", parquet(tmp_path, strings)):
        first, second = OpenSource(str(path)).examples()
        assert [dict(m.given) for m in first.messages] == rows[0]["messages"] and first.tools == [odd]
        assert [dict(m.given) for m in second.messages] == rows[1]["messages"]


def test_template_arguments_that_are_null_are_not_given(tmp_path):
    messages = [ASK, {"role": "assistant", "content": "x"}]
    rows = [{"messages": messages, "chat_template_kwargs": kwargs} for kwargs in ({"a": 1}, {"b": True}, None)]
    assert [r.template_kwargs for r in OpenSource(parquet(tmp_path, rows)).examples()] == [{"a": 1}, {"b": True}, {}]


def test_text_parts_and_maps(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [{"type": "text", "text": "a", "image": None}, {"type": "text", "text": "b", "image": None}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "c"}]}]
    (record,) = OpenSource(parquet(tmp_path, [{"messages": messages}])).examples()
    assert record.messages[0].given["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    kind = pa.schema([("text", pa.string()), ("m", pa.map_(pa.string(), pa.struct([("x", pa.int64())])))])
    pq.write_table(pa.Table.from_pylist([{"text": "a", "m": [("k", {"x": 1})]}], schema=kind), tmp_path / "m.parquet")
    from preceptor.data.sources import read_rows

    assert [row for _, row in read_rows(str(tmp_path / "m.parquet"))] == [{"text": "a", "m": {"k": {"x": 1}}}]
