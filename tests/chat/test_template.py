"""Which template a run uses, and that it renders what transformers renders."""

import json
import re
from datetime import datetime

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from preceptor.chat.environment import SETTINGS, compiled
from preceptor.chat.message_forms import find_forms
from preceptor.chat.rendering_key import rendering_key
from preceptor.chat.stop_tokens import find_stop_tokens
from preceptor.chat.template import (
    BUILTIN,
    MessageRules,
    load_template,
    probe_message_rules,
)
from preceptor.errors import TemplateError
from tiny import tiny_tokenizer

LOOP = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
ROWS = [
    {"role": "system", "content": " a\n"},
    {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
    {
        "role": "assistant",
        "content": None,
        "reasoning": "d",
        "tool_calls": [{"function": {"name": "f", "arguments": {"é": [1, None]}}}],
    },
    {"role": "tool", "content": "e"},
    {"role": "tool", "content": "f"},
    {"role": "assistant", "content": "g\n"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "enum": None}}}]


def test_built_in_templates_know_their_tokens():
    assert BUILTIN["chatml"].tokens == ("<|im_start|>", "<|im_end|>") and BUILTIN["chatml"].stop == "<|im_end|>"
    assert BUILTIN["llama3"].stop == "<|eot_id|>"
    tokenizer = tiny_tokenizer()
    for name in BUILTIN:
        template = load_template(name, tokenizer)
        assert template.needed_tokens == BUILTIN[name].tokens and template.stop == BUILTIN[name].stop


@pytest.mark.parametrize("name", [*BUILTIN, "{{ messages | tojson }}{{ tools | tojson }}{{ enable_thinking }}"])
@pytest.mark.parametrize("upto", [1, 2, 3, 6])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_renders_are_those_of_transformers(name, upto, tools):
    tokenizer = tiny_tokenizer()
    if name not in BUILTIN:
        tokenizer.chat_template, name = name, "tokenizer"
    template = load_template(name, tokenizer)
    for prompted in (False, True):
        expected = tokenizer.apply_chat_template(
            ROWS[:upto],
            tools,
            chat_template=template.text,
            add_generation_prompt=prompted,
            tokenize=False,
            enable_thinking=True,
        )
        assert template.render(ROWS[:upto], tools, prompted, enable_thinking=True) == expected


def test_what_chatml_says():
    template = load_template("chatml", tiny_tokenizer())
    rendered = template.render(ROWS, add_generation_prompt=True)
    assert (
        rendered
        == (
            "<|im_start|>system\n a\n<|im_end|>\n<|im_start|>user\nbc<|im_end|>\n"
            "<|im_start|>assistant\n<think>\nd\n</think>\n\n"
            '<tool_call>\n{"name": "f", "arguments": {"é": [1, null]}}\n</tool_call><|im_end|>\n'
            "<|im_start|>user\n<tool_response>\ne\n</tool_response>\n<tool_response>\nf\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\ng\n<|im_end|>\n<|im_start|>assistant\n"
        )
        or not probe_message_rules(tiny_tokenizer()).aliases_reasoning
    )
    assert "system" not in template.render(ROWS[1:2])


def test_the_rules_for_messages_are_learned():
    tokenizer, message = tiny_tokenizer(), {"role": "assistant", "content": None, "reasoning": "r"}
    shown = tokenizer.apply_chat_template([message], chat_template="{{ messages[0] | tojson }}", tokenize=False)
    assert json.loads(shown) == probe_message_rules(tokenizer).apply(message)
    seen = MessageRules(True, True).apply({"role": "assistant", "content": None, "reasoning": "r"})
    assert list(seen) == ["thinking", "role", "reasoning", "reasoning_content"]
    assert MessageRules(False, False).apply({"content": None}) == {"content": None}


def test_which_template_is_chosen(tmp_path):
    tokenizer = tiny_tokenizer()
    assert load_template(None, tokenizer).name == "chatml"
    with pytest.raises(TemplateError, match="has no chat template"):
        load_template("tokenizer", tokenizer)
    tokenizer.chat_template = LOOP
    assert load_template(None, tokenizer).text == LOOP
    file = tmp_path / "mine.jinja"
    file.write_text("{# <|old|> #}<|start|>{{ messages[0].content }}<|stop_1|>", encoding="utf-8")
    assert load_template(str(file), tokenizer).needed_tokens == ("<|start|>", "<|stop_1|>")
    tokenizer.chat_template = {"a": LOOP, "b": LOOP}
    with pytest.raises(TemplateError, match="none is named default"):
        load_template("tokenizer", tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        "{% macro f(a) %}{% generation %}{{ a }}{{ kwargs }}{% endgeneration %}{% endmacro %}{{ f(1, z=3) }}",
        "{% set kwargs = 'u' %}{% generation %}{{ kwargs }}{{ varargs }}{% endgeneration %}",
        "{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}{% endgeneration %}{{ x }}{% endfor %}",
        "{% for m in [1] %}{% generation %}" * 25 + "deep" + "{% endgeneration %}{% endfor %}" * 25,
    ],
)
def test_generation_blocks_are_rendered_as_by_transformers(text):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = text
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert load_template(None, tokenizer).render(messages) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_generation_block_cannot_end_a_loop_around_it():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% generation %}{% continue %}{% endgeneration %}{% endfor %}"
    with pytest.raises(TemplateError, match="cannot be compiled"):
        load_template(None, tokenizer)


def test_a_date_is_known_to_be_written():
    """Else what is rendered today would be read from the cache tomorrow."""
    for text, writes in (("{{ strftime_now('%d') }}", True), ("{{ messages[0].content }}", False)):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = text
        template = load_template(None, tokenizer)
        date = datetime(2001, 2, 3)
        of_today, of_then = (rendering_key(tokenizer, each, {}) for each in (template, template.at(date)))
        assert template.writes_date == writes and bool(template.at(date).clock) == writes
        assert (of_today is None) == writes and of_then is not None


def test_errors_say_where(tmp_path):
    with pytest.raises(TemplateError, match="none of chatml, llama3, tokenizer, and no file"):
        load_template("chat-ml", tiny_tokenizer())
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}\n{% for m in messages %}\n{{ m.content }", encoding="utf-8")
    with pytest.raises(TemplateError, match=r"mine\.jinja:3: unexpected '}'"):
        load_template(str(file), tiny_tokenizer())
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only users') }}"
    with pytest.raises(TemplateError, match="only users"):
        load_template(None, tokenizer).render(ROWS)


READS = [
    *(
        "m.role",
        "m['role']",
        "m.none",
        "m['none'] is defined",
        "m.none.more",
        "m['none']['more']",
        "m.a.b.c",
        "m['a'].b['c']",
    ),
    *("m.items", "m['items']", "m.items()", "m.keys() | list", "m['keys']() | list", "m.pop('role')", "m.__class__"),
    *("m.strip", "m.strip.x", "m['strip']", "m.index", "m['index']", "m.format", "m['format']"),
    *(
        "s.strip()",
        "s.strip",
        "s['strip']",
        "s.upper().lower()[1]",
        "s.role",
        "s['role']",
        "s.format(1)",
        "s.format_map(m)",
    ),
    *("s.__class__", "s['__class__']", "s.title().x", "s.split(s.strip())[0]", "s.startswith(' ')", "s.join(['a', s])"),
    *(
        "none.x",
        "n.x",
        "n.index",
        "n.real",
        "l.index(2)",
        "l.count(1)",
        "l.append(1)",
        "l[0]",
        "l['x']",
        "absent.x",
        "absent.strip()",
    ),
    "{% for loop.x in l %}{% endfor %}",
    "{% for i in l %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.revindex0 }}{{ loop.x }}{% endfor %}",
    "{% for i in l %}{% set loop = m %}{{ loop.index }}{{ loop.last }}{% endfor %}",
    "{% macro f(x, y=m.role) %}{{ x.role }}{{ y.strip() }}{{ x.none }}{% endmacro %}{{ f(m) }}{{ f(s) }}",
    "{% for x in [m, s, n] if x.role is defined %}{{ x.role }}{% endfor %}",
    "{% set ns = namespace(role='r') %}{% set ns.x = m.role %}{{ ns.role }}{{ ns.x }}{{ ns.none }}",
]


@pytest.mark.parametrize("read", READS)
def test_what_is_read_without_a_call_is_what_the_sandbox_gives(read):
    m = {"role": "user", "items": "i", "strip": {"x": 1}, "index": 3, "format": "f", "a": {"b": {"c": "d"}}}
    variables = {"m": m, "s": " Ab ", "n": 5, "l": [1, 2]}
    text = read if read.startswith("{%") else "{{ " + read + " }}"

    def outcome(compile_):
        try:
            return compile_(text).render(**variables)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            return type(error), str(error)

    plain = ImmutableSandboxedEnvironment(**SETTINGS)
    given, expected = outcome(compiled), outcome(plain.from_string)
    assert re.sub("0x[0-9a-f]+", "", str(given)) == re.sub("0x[0-9a-f]+", "", str(expected))


def test_the_sandbox_holds():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}"
    with pytest.raises(TemplateError):
        load_template(None, tokenizer).render(ROWS)


@pytest.mark.parametrize(
    ("text", "closings"),
    [
        ("{% for m in messages %}<|a|>{{ m.content }}<|b|>\n{% endfor %}", ("<|b|>",)),
        ("{% for m in messages %}<|a|>{{ m.content }}{% endfor %}", ("<|a|>",)),
        ("{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}", ()),
        ("{% for m in messages %}<|a|>{{ m.content }}{{ eos_token if loop.last else '<|b|>' }}{% endfor %}", ("<e>",)),
        (
            "{% for m in messages %}<|a|>{{ m.content }}{% for c in m.tool_calls or [] %}"
            "{{ c.function | tojson }}<|b|>{% endfor %}{{ '' if m.tool_calls else eos_token }}{% endfor %}",
            ("<e>", "<|b|>"),
        ),
    ],
)
def test_what_ends_a_turn_is_found(text, closings):
    tokenizer = tiny_tokenizer(special_tokens=("<e>", "<|a|>", "<|b|>"))
    tokenizer.chat_template = text
    assert find_stop_tokens(load_template(None, tokenizer), tokenizer).tokens == closings


def test_forms_that_a_template_takes():
    tokenizer = tiny_tokenizer()

    def forms(shown):
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        tokenizer.chat_template += "{{ c.function.name }}" + shown + "{% endfor %}{% endfor %}"
        found = find_forms(load_template(None, tokenizer))
        return found.object_arguments, found.string_arguments

    assert forms("{{ c.function.arguments | tojson }}") == (True, False)
    assert forms("{{ '' + c.function.arguments }}") == (False, True)
    assert forms("{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}") == (
        True,
        True,
    )
    assert forms("") == (False, False)
    chatml = find_forms(load_template("chatml", tokenizer))
    assert chatml.object_arguments and chatml.string_arguments and chatml.absent_content
    assert {"user", "assistant", "system", "tool"} <= chatml.texts
