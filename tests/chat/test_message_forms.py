"""Messages in the forms that a template takes, and one rule for all templates where no form is right."""

import json
import re

import pytest
from test_render import CHAT, LLAMA3, code, conversation, make, segments

from preceptor.data.examples import REASONING_FIELDS, Rejection

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.tool_calls or [] %}SHOWN{% endfor %}"
    "{{ m.content or '' }}<|im_end|>\n{% endfor %}" + PROMPT
)
AS_JSON = CALLS.replace("SHOWN", "{{ c.function | tojson }}")
AS_STRING = CALLS.replace("SHOWN", "{{ c.function.name + '(' + c.function.arguments + ')' }}")
BY_ID = CALLS.replace("SHOWN", "<{{ c.id }}>{{ c.function.arguments | tojson }}").replace(
    "{{ m.content", "{{ m.tool_call_id or '' }}{{ m.content"
)
NINE = CALLS.replace(
    "SHOWN", "{{ raise_exception('nine') if c.id is not defined or c.id | length != 9 }}{{ c | tojson }}"
)
PARTS_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT
)
TEMPLATES = {"chatml": None, "as JSON": AS_JSON, "as a string": AS_STRING, "by id": BY_ID}


def calling(*arguments, ids=None, name="get_weather"):
    calls = [
        {**({"id": id_} if id_ else {}), "type": "function", "function": {"name": name, "arguments": a}}
        for a, id_ in zip(arguments, ids or [None] * len(arguments), strict=True)
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


@pytest.mark.parametrize("text", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("arguments", ["{'x': 1}", '"{\\"x\\": 1}"', "[1]", "null", "3", '{"x": NaN}', "{"])
def test_arguments_that_are_no_json_object_are_rejected_by_every_template(text, arguments):
    rows = [CHAT[0], calling(arguments), {"role": "tool", "content": "2"}, CHAT[3]]
    rejection = make(text=text).render(conversation(rows))
    assert isinstance(rejection, Rejection) and rejection.code == "arguments_not_object"
    assert rejection.message.startswith("messages[1].tool_calls[0].function.arguments")


@pytest.mark.parametrize("text", TEMPLATES.values(), ids=TEMPLATES)
def test_no_arguments_are_an_empty_object_and_a_string_is_what_it_holds(text):
    renderer = make(text=text)
    targets = [segments(renderer, [CHAT[0], calling(given)])[-1][2] for given in ("", None, " ", {}, "{}")]
    assert len(set(targets)) == 1 and "{}" in targets[0] and "null" not in targets[0]
    as_object, as_text = (segments(renderer, [CHAT[0], calling(a)])[-1] for a in ({"x": "é"}, '{"x": "é"}'))
    assert as_object == as_text


@pytest.mark.parametrize("text", [None, AS_JSON, NINE], ids=["chatml", "the function as JSON", "the call as JSON"])
@pytest.mark.parametrize(
    "beside", [{"index": 0}, {"id": "abcdefghi"}, {"index": 1, "status": "done", "of": {"a": "b"}}]
)
@pytest.mark.parametrize("given", [{"x": 1}, '{"x": 1}'])
def test_of_a_flat_call_the_function_has_name_and_arguments_alone(text, beside, given):
    function, id_ = {"name": "get_weather", "arguments": given}, {k: v for k, v in beside.items() if k == "id"}
    calls = {**beside, **function}, {"type": "function", **id_, "function": function}
    flat, nested = ([CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}] for call in calls)
    renderer = make(text=text)
    assert segments(renderer, flat) == segments(renderer, nested)
    assert '{"name": "get_weather", "arguments": {"x": 1}}' in segments(renderer, flat)[-1][2]


def test_ids_that_carry_the_functions_name():
    rows = [
        CHAT[0],
        calling({"a": 1}, {"b": 2}, ids=("call_1", "call_2")),
        {"role": "tool", "content": "one", "tool_call_id": "call_2"},
        {"role": "tool", "content": "two", "tool_call_id": "call_1"},
        CHAT[3],
    ]
    texts = [text for _, _, text in segments(make(text=BY_ID), rows)]
    assert texts[1] == '<functions.get_weather:0>{"a": 1}<functions.get_weather:1>{"b": 2}<|im_end|>'
    assert "functions.get_weather:1one" in texts[2] and "functions.get_weather:0two" in texts[2]


@pytest.mark.parametrize("id_", [None, "call_9Ab-12cd_EF345", "x"])
def test_ids_of_nine_letters_and_digits(id_):
    result = {"role": "tool", "content": "one", **({"tool_call_id": id_} if id_ else {})}
    target = segments(make(text=NINE), [CHAT[0], calling({}, ids=[id_]), result, CHAT[3]])[1][2]
    made = json.loads(target.removesuffix("<|im_end|>"))["id"]
    assert len(made) == 9 and made.isalnum()


def test_ids_of_nine_letters_and_digits_stay_apart():
    """What is left of two ids may be the same, an id that another call has, or one that is made for a call."""
    ids = ["0_get_weather", "1_get_weather", "etweather", None, "call00003", "call_5"]
    results = [{"role": "tool", "content": f"<{n}>", "tool_call_id": id_} for n, id_ in enumerate(ids)]
    rows = [CHAT[0], calling(*({"n": n} for n in range(6)), ids=ids), *results, CHAT[3]]
    shown = NINE.replace("{{ m.content", "{{ m.tool_call_id or '' }}{{ m.content")
    _, called, context, _ = (text for _, _, text in segments(make(text=shown), rows))
    made = re.findall(r'"id": "(.*?)"', called)
    assert made == ["etweather", "call00001", "call00002", "call00003", "call00004", "0005call5"]
    assert [f"{id_}<{n}>" in context for n, id_ in enumerate(made)] == [True] * 6
    twice = [CHAT[0], calling({}, ids=["abcdefghi"]), {**results[0], "tool_call_id": "abcdefghi"}]
    texts = [text for kind, _, text in segments(make(text=shown), twice * 2) if kind == "target"]
    assert len(texts) == 2 and all('"id": "abcdefghi"' in text for text in texts), "an id that fits stays"


NO_KEY = (
    "{% for m in messages %}{% if 'tool_calls' in m %}{{ raise_exception('one call, please') if not m.tool_calls }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
)
ELSE_NOTHING = CALLS.replace("{{ m.content or '' }}", "{{ m.content or '' if 'tool_calls' not in m }}").replace(
    "SHOWN", "{{ c.function | tojson }}"
)


@pytest.mark.parametrize("text", [None, NO_KEY, ELSE_NOTHING], ids=["chatml", "asks", "reads the key"])
def test_an_empty_list_of_calls_is_none(text):
    rows = [{**row, "tool_calls": []} for row in CHAT]
    assert segments(make(text=text), rows) == segments(make(text=text), CHAT)


def test_a_template_that_takes_parts_only_and_one_that_takes_texts_only():
    parted = [{**row, "content": [{"type": "text", "text": row["content"]}]} for row in CHAT]
    expected = segments(make(), CHAT)
    for text in (PARTS_ONLY, None):
        assert [segments(make(text=text), rows)[1:] for rows in (CHAT, parted)] == [expected[1:]] * 2


def test_results_as_text_parts_or_objects():
    for content in ('{"degrees": 12}', {"degrees": 12}, [{"type": "text", "text": '{"degrees": 12}'}]):
        rows = [CHAT[0], calling({}), {"role": "tool", "content": content}, CHAT[3]]
        assert '\n{"degrees": 12}\n' in segments(make(), rows)[2][2].replace("<tool_response>", "")


LISTS = CALLS.replace("SHOWN", "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}")
TWICE = CALLS.replace("SHOWN", "<{{ c.function.name }}>{{ c.function.arguments | tojson }}</{{ c.function.name }}>")
SAFE = CALLS.replace("SHOWN", "{{ '<' + c.function.name + '>' + c.function.arguments | tojson | safe + '</f>' }}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LISTS, "get_weather|a=['x', \"it's\"];b={'c': True};"),
        (TWICE, '<get_weather>{"a": ["x", "it\'s"], "b": {"c": true}}</get_weather>'),
        (SAFE, '&lt;get_weather&gt;{"a": ["x", "it\'s"], "b": {"c": true}}&lt;/f&gt;'),
    ],
)
def test_calls_as_templates_spell_them(text, expected):
    text = text.replace("{% for k, v", "{{ c.function.name }}|{% for k, v")
    target = segments(make(text=text), [CHAT[0], calling({"a": ["x", "it's"], "b": {"c": True}})])[-1][2]
    assert target == expected + "<|im_end|>"


# Reasoning in every spelling -----------------------------------------------------------------------------------------

KNOWS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '<think>' not in m.content %}"
    "<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>"
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>\n"
    "{% endif %}{% endif %}"
)


@pytest.mark.parametrize(
    ("content", "context", "target"),
    [
        ("Two and two.\n</think>\n\nFour.", "assistant\n<think>\n", "Two and two.\n</think>\n\nFour.<|im_end|>"),
        ("<think>\nTwo.\n</think>\n\nFour.", "assistant\n<think>\n", "Two.\n</think>\n\nFour.<|im_end|>"),
        ("<think>\n\n</think>\n\nFour.", "assistant\n<think></think>", "Four.<|im_end|>"),
        ("<think>\nTwo and two make", "reasoning_unclosed", None),
        ("<think>\nTwo and two.\n</think>\n\n", "empty_answer", None),
    ],
)
def test_reasoning_in_every_spelling(content, context, target):
    rows = [CHAT[0], {"role": "assistant", "content": content}]
    if target is None:
        assert code(make(text=KNOWS), rows) == context
        assert segments(make("llama3", LLAMA3, stops=("<|eot_id|>",)), rows)  # to whom the tags are text
    else:
        found = segments(make(text=KNOWS), rows)
        assert found[-2][2].endswith(context) and found[-1][2] == target


READS = {
    name: "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.FIELD %}<think>\n{{ m.FIELD }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}".replace("FIELD", name)
    + PROMPT
    for name in REASONING_FIELDS
}


@pytest.mark.parametrize(("name", "text"), [("reasoning_content", None), *READS.items()])
def test_the_same_reasoning_under_several_names_is_one(name, text):
    answer = {"role": "assistant", "content": "Four."}
    for names in ([name], *({name, other} for other in REASONING_FIELDS), REASONING_FIELDS):
        turn = {**answer, **{field: "Two and two." for field in REASONING_FIELDS if field in names}}
        found = segments(make(text=text), [CHAT[0], turn, *CHAT[:2]])
        first, last = (text for kind, _, text in found if kind == "target")
        assert (first, last) == ("<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>", "the end<|im_end|>"), names


# What the messages say -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content", "says"),
    [
        (
            AS_JSON.replace("{{ m.content or ''", "{{ m.content | upper"),
            "the end",
            "content: 'the end' is rendered as 'THE",
        ),
        (AS_JSON.replace("assistant\n{% endif", "bot\n{% endif"), "the end", "the render of the turn"),
        (AS_JSON.replace("{{ m.content or ''", "{{ m.content + style.tone"), "the end", "needs the argument 'style'"),
    ],
)
def test_messages_name_the_place_and_what_differs(text, content, says):
    rejection = make(text=text).render(conversation([CHAT[0], {"role": "assistant", "content": content}]))
    assert isinstance(rejection, Rejection) and says in rejection.message, rejection.message
    assert "no choice" not in rejection.message


def test_the_argument_that_helps_is_named():
    opens = KNOWS.replace("enable_thinking is defined and not enable_thinking", "effort == 'none'")
    rejection = make(text=opens).render(conversation(CHAT[:2]))
    assert isinstance(rejection, Rejection) and 'chat_template_kwargs: {"effort": "none"}' in rejection.message, (
        rejection
    )
    tree = make(text=opens, template_kwargs={"effort": "none"}).render(conversation(CHAT[:2]))
    assert not isinstance(tree, Rejection)


def test_an_argument_of_reasoning_is_named_before_others():
    either = "attempt == 'second' or reasoning_effort == 'none'"
    opens = KNOWS.replace("enable_thinking is defined and not enable_thinking", either)
    rejection = make(text=opens).render(conversation(CHAT[:2]))
    assert isinstance(rejection, Rejection) and '{"reasoning_effort": "none"}' in rejection.message, rejection
