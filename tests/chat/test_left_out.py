"""What a template leaves out of the context is counted and said; what is there in another form is not."""

import json

import pytest
from test_render import CHAT, conversation, make

from preceptor.chat.thinking import left_out_lines

TURN = "{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n"
TURN += "{% elif m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endif %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TWO_ROLES = "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT
FIRST_SYSTEM = "{% if messages[0].role == 'system' %}{{ messages[0].content | tojson }}{% endif %}" + TWO_ROLES
ONE_TURN = "{% for m in messages[-3:] %}" + TURN + "{% endfor %}" + PROMPT  # forgets what was before
TOOLS = [{"type": "function", "function": {"name": "f", "description": "f", "parameters": {"type": "object"}}}]
SHORT, LONG = {"role": "system", "content": "a"}, {"role": "system", "content": 'ALWAYS SHOUT, "always"'}
LATER = {"role": "system", "content": "NOW SHOUT, I beg you"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"name": "a"}}}
CALLED = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [CALL], "train": False}, *CHAT[2:]]
NAMED_LATER = [*CALLED[:2], {"role": "user", "content": "Call f again."}, *CALLED[3:]]
WITH_CALLS = TWO_ROLES.replace(
    "assistant\n{{ m.content }}",
    "assistant\n{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ m.content }}",
)
RESULT = [CHAT[0], {"role": "assistant", "content": "one moment"}, {"role": "tool", "content": "42"}, CHAT[3]]


@pytest.mark.parametrize(
    ("text", "rows", "tools", "expected"),
    [
        (TWO_ROLES, CHAT, None, ()),
        (TWO_ROLES, [SHORT, *CHAT], None, ("system prompt",)),  # though the letter stands in the prompt
        (TWO_ROLES, [LONG, *CHAT], None, ("system prompt",)),
        (TWO_ROLES, CHAT, TOOLS, ("tools",)),
        (TWO_ROLES, RESULT, None, ("tool result",)),
        (TWO_ROLES, CALLED, None, ("tool call",)),
        (TWO_ROLES, CALLED, TOOLS, ("tools", "tool call")),
        (WITH_CALLS, CALLED, None, ()),
        (TWO_ROLES, NAMED_LATER, None, ("tool call",)),
        (WITH_CALLS, NAMED_LATER, None, ()),
        (FIRST_SYSTEM, [LONG, *CHAT], None, ()),  # as JSON
        (FIRST_SYSTEM, [LONG, *CHAT[:2], LATER, *CHAT[2:]], None, ("system prompt",)),
        (ONE_TURN, [*CHAT, CHAT[2], CHAT[3]], None, ("user message", "earlier answer")),
        (None, [LONG, *RESULT], TOOLS, ()),
        (None, [CHAT[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nthe end"}, *CHAT[2:]], None, ()),
    ],
)  # fmt: skip
def test_what_is_left_out_is_found(text, rows, tools, expected):
    assert make(text=text).render(conversation(rows, tools)).left_out == expected


def test_parts_that_the_template_does_not_take_are_joined_and_not_lost():
    empties = TWO_ROLES.replace("user\n{{ m.content }}", "user\n{{ m.content if m.content is string else '' }}")
    parts = [{"type": "text", "text": "start of"}, {"type": "text", "text": "a message"}]
    tree = make(text=empties).render(conversation([{"role": "user", "content": parts}, CHAT[1]]))
    assert tree.left_out == () and "user\nstart of\na message<|im_end|>" in tree.segments[0].text
    letters = TWO_ROLES.replace(
        "user\n{{ m.content }}", "user\n{% for p in m.content %}<{{ p.text }}{{ p if p is string }}>{% endfor %}"
    )
    tree = make(text=letters).render(conversation(CHAT))
    assert "user\n<start of a message><|im_end|>" in tree.segments[0].text


def test_counts_say_how_many_and_where_first():
    renderer = make(text=TWO_ROLES)
    counts = renderer.new_counts()
    for rows in (CHAT, [LONG, *CHAT], [SHORT, *CHAT]):
        counts.add(conversation(rows), renderer.render(conversation(rows)))
    (line,) = left_out_lines(counts.left_out())
    assert line.startswith("the template leaves out the system prompt of 2 examples, first at file:1")


def test_the_commands_say_it(preceptor, base_folder, tmp_path):
    (tmp_path / "two.jinja").write_text(TWO_ROLES)
    rows = [{"messages": [LONG, *CHAT]}, {"messages": CHAT, "tools": TOOLS}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = ["--model", base_folder, "--data", tmp_path / "data.jsonl", "--chat-template", tmp_path / "two.jinja"]
    code, out, _ = preceptor("check", *chosen)
    assert code == 0 and "leaves out the system prompt of 1 example, first at" in " ".join(out.split())
    code, out, _ = preceptor("check", *chosen, "--json")
    assert [(one["what"], one["num_examples"]) for one in json.loads(out)["left_out"]] == [
        ("system prompt", 1),
        ("tools", 1),
    ]
    code, out, _ = preceptor("show", *chosen)
    assert code == 0 and "leaves out the tools" in " ".join(out.split())
