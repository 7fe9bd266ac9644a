"""The thinking switch: what is trained is what the saved model is asked, by plain transformers without arguments."""

import json
from dataclasses import replace

import jinja2
import pytest
from golden import conversations as golden
from transformers import AutoTokenizer

from preceptor.chat.environment import SETTINGS
from preceptor.chat.format import ChatFormat
from preceptor.chat.render import Renderer
from preceptor.chat.stop_tokens import find_stop_tokens
from preceptor.chat.template import Template, load_template
from preceptor.chat.thinking import Switch, find_switch, thinking_lines, with_defaults
from preceptor.data.examples import Conversation, Rejection, read_messages
from preceptor.data.forest import path_ids
from preceptor.errors import TemplateError
from tiny import tiny_tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENING = CHATML + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>\n{% endif %}"
    "{% endif %}"
)
USER = {"role": "user", "content": "Who is it?"}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bern"}}}


def says(content, reasoning=None, **fields):
    return {"role": "assistant", "content": content, **fields} | (
        {} if reasoning is None else {"reasoning_content": reasoning}
    )


def conversations(reasons):
    """Messages and tools of several kinds. reasons: of each turn, whether it has reasoning."""
    for number, reason in enumerate(reasons):
        thought = f"Thought {number}." if reason else None
        yield [USER, says(f"It is {number}.", thought)], None
        yield [{"role": "system", "content": "Be brief."}, USER, says(f"It is {number}.", thought)], None
        yield [USER, says("It is I.", thought), USER, says(f"Still {number}.", thought)], None
        result = {"role": "tool", "content": "warm", "tool_call_id": "abcdefghi", "name": "get_weather"}
        yield [USER, says("", thought, tool_calls=[CALL]), result, says(f"Warm {number}.", thought)], golden.TOOLS


def renderer_of(tokenizer, **settings):
    template = load_template("tokenizer", tokenizer)
    stops = (*find_stop_tokens(template, tokenizer).tokens, tokenizer.eos_token)
    ids = [tokenizer.convert_tokens_to_ids(stop) for stop in stops if stop is not None]
    return Renderer(tokenizer, template, stop_token_ids=ids, **settings)


def trained(renderer, rows):
    """What is proved of the rows, each (messages, tools, its tree), and the arguments of their turns."""
    found, arguments = [], renderer.new_counts()
    for messages, tools in rows:
        example = Conversation("row:1", read_messages(messages, "row:1"), tools)
        tree = renderer.render(example)
        if not isinstance(tree, Rejection):
            found.append((messages, tools, tree))
            arguments.add(example, tree)
    return found, arguments


def saved(tokenizer, renderer, arguments, folder):
    """The tokenizer as plain transformers reads it from the folder of the tuned model."""
    chat = ChatFormat(tokenizer, renderer.template, tuple(renderer.stop_token_ids))
    chat.trained_with(arguments).tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def contexts(tree):
    """By message, the context of its turn."""
    found = {}
    for segment in tree.segments:
        if segment.message is not None:
            found.setdefault(segment.message, path_ids(tree, segment.parent))
    return found


def asked(tokenizer, messages, tools, **arguments):
    """What apply_chat_template builds, in the forms in which a server may hand tool calls over."""
    for as_text in (False, True):
        given = json.loads(json.dumps(messages))
        for call in (call for message in given for call in message.get("tool_calls", ()) if as_text):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        try:
            yield tuple(
                tokenizer.apply_chat_template(given, tools, add_generation_prompt=True, return_dict=False, **arguments)
            )
        except Exception:
            continue


def switched_entries():
    if golden.TEMPLATES.is_dir():
        for entry in golden.read_entries():
            if any(word in entry.text for word in ("think", "reason")):
                template = load_template("tokenizer", golden.tokenizer_for(entry, "bytes"))
                if find_switch(template, {}).names:
                    yield entry


ENTRIES = {entry.name: entry for entry in switched_entries()}


@pytest.mark.skipif(not ENTRIES, reason="the folder shared/templates is not beside the repository")
@pytest.mark.parametrize("reasons", [(False,), (True,), (False, True)], ids=["answers", "reasoning", "mixed"])
@pytest.mark.parametrize("name", ENTRIES)
def test_the_saved_folder_asks_in_the_trained_contexts(name, reasons, tmp_path):
    tokenizer = golden.tokenizer_for(ENTRIES[name], "bytes")
    renderer = renderer_of(tokenizer)
    rows, arguments = trained(renderer, conversations(reasons))
    if not rows:
        assert name == "MiroThinker" or reasons == (True,), "nothing of it is proved"
        return
    read = saved(tokenizer, renderer, arguments, tmp_path)
    settings = {str(count["arguments"]) for count in arguments.thinking()}
    if len(settings) == 1:
        assert len(arguments.defaults()) in (0, len(renderer.switch.names))
    else:
        assert not arguments.defaults(), "both settings are trained: the template's own default stays"
    for messages, tools, tree in rows:
        switched = dict(tree.switched)
        for k, context in contexts(tree).items():
            given = renderer.switch.set_to(switched[k]) if k in switched and len(settings) > 1 else {}
            assert context in list(asked(read, messages[:k], tools, **given)), (k, given, read.decode(context))


@pytest.mark.skipif(not ENTRIES, reason="the folder shared/templates is not beside the repository")
@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("name", ENTRIES)
def test_arguments_of_the_run_become_the_saved_default(name, on, tmp_path):
    tokenizer = golden.tokenizer_for(ENTRIES[name], "bytes")
    names = find_switch(load_template("tokenizer", tokenizer), {}).names
    renderer = renderer_of(tokenizer, template_kwargs={names[0]: on})
    rows, arguments = trained(renderer, conversations((on,)))
    read = saved(tokenizer, renderer, arguments, tmp_path)
    for messages, tools, tree in rows:
        assert not tree.switched
        for k, context in contexts(tree).items():
            assert context in list(asked(read, messages[:k], tools))


def chat_tokenizer(text):
    tokenizer = tiny_tokenizer(special_tokens=("<|im_end|>", "<|im_start|>", "<think>", "</think>"))
    tokenizer.chat_template = text
    return tokenizer


def test_a_prompt_that_opens_reasoning_is_not_the_one_of_a_turn_without():
    renderer = renderer_of(chat_tokenizer(OPENING))
    rows, arguments = trained(renderer, [([USER, says("It is I.")], None)] * 3)
    assert [tree.switched for *_, tree in rows] == [((1, False),)] * 3
    assert arguments.defaults() == {"enable_thinking": False}
    inline = [([USER, says("<think>\nHm.\n</think>\n\nIt is I.")], None)]
    more, both = trained(renderer, [(row[0], row[1]) for row in rows] + inline)
    assert more[-1][2].switched == () and both.defaults() == {}
    assert thinking_lines(both.thinking(), both.defaults()) == [
        "3 turns without reasoning are trained with thinking off (enable_thinking=false); "
        "1 turn with reasoning is trained with thinking on (the template's default)"
    ]
    (_, line) = thinking_lines(arguments.thinking(), arguments.defaults())
    assert line == "the saved chat template has as its defaults: enable_thinking=false"


def test_a_switch_that_the_user_set_is_left_as_it_is():
    """Of two names for one thing too: the other would win over it."""
    two = OPENING.replace("{% if enable", "{% if thinking is not defined and enable_thinking is defined %}", 1)
    two = (
        "{% if thinking is not defined %}{% if enable_thinking is defined %}{% set thinking = enable_thinking %}"
        "{% else %}{% set thinking = true %}{% endif %}{% endif %}" + OPENING.replace("enable_thinking", "thinking")
    )
    renderer = renderer_of(chat_tokenizer(two), template_kwargs={"enable_thinking": False})
    assert renderer.switch.names == ("enable_thinking", "thinking")
    ((_, _, tree),), arguments = trained(renderer, [([USER, says("It is I.")], None)])
    assert tree.switched == () and tree.segments[0].text.endswith("<think></think>")
    template = with_defaults(renderer.template, arguments.defaults(), renderer.switch)
    assert template.render([USER], None, True).endswith("<think></think>")
    for name in renderer.switch.names:
        assert template.render([USER], None, True, **{name: True}).endswith("<think>\n"), name


def test_a_row_s_own_arguments_win_and_are_the_default_where_all_have_them():
    renderer = renderer_of(chat_tokenizer(OPENING), template_kwargs={"enable_thinking": True})
    found = renderer.new_counts()
    example = Conversation("a:1", read_messages([USER, says("I.")], "a:1"), None, {"enable_thinking": False})
    found.add(example, renderer.render(example))
    assert found.defaults() == {"enable_thinking": False}
    other = replace(example, template_kwargs={})
    found.add(other, replace(renderer.render(example)))
    assert found.defaults() == {"enable_thinking": True}, "the run's argument, where the rows differ"


@pytest.mark.parametrize(
    ("text", "names", "default"),
    [
        (CHATML, (), None),
        (OPENING, ("enable_thinking",), True),
        (OPENING.replace("enable_thinking", "slow"), ("slow",), True),
        (CHATML + "{% if enable_thinking is defined and not enable_thinking %}{% endif %}", (), None),
        (CHATML + "{% if date is defined %}{{ date }}{% endif %}", (), None),
        (CHATML + "{{ '/think' if thinking else '' }}", ("thinking",), False),
        (CHATML + "{{ thinking }}", ("thinking",), None),
        (CHATML + "{% for m in messages %}{{ m.thinking }}{% endfor %}", (), None),
        ("{{ reasoning_effort + '' if reasoning_effort else '' }}" + CHATML, (), None),
    ],
)
def test_a_switch_is_what_changes_the_prompt(text, names, default):
    tokenizer = chat_tokenizer(text)
    assert find_switch(load_template("tokenizer", tokenizer), {}) == Switch(names, default)


VALUES = {
    "flag": False,
    "nothing": None,
    "number": 3,
    "small": 0.5,
    "text": "a \"b\" 'c' \\n \n\t%} {# é 日本 👩‍🚀 \x07",
    "items": [1, "x", {"k": [True, None]}],
    "object": {"a b": {"c": 1.5}, "}}": "{{"},
}


@pytest.mark.parametrize("name", VALUES)
def test_values_are_spelled_so_that_jinja_reads_them(name):
    template = with_defaults(Template("t", {"default": f"{{{{ {name} | tojson }}}}"}, {}), VALUES, Switch())
    assert json.loads(template.render([])) == VALUES[name]
    assert json.loads(template.render([], **{name: "given"})) == "given"


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), [float("inf")], object()])
def test_what_json_has_not_cannot_be_saved(value):
    with pytest.raises(TemplateError, match=r"data\.chat_template_kwargs\.x holds"):
        with_defaults(Template("t", {"default": "{{ x }}"}, {}), {"x": value}, Switch())


READERS = [
    "{% if x %}on{% else %}off{% endif %}",
    "\n{% if x %}on{% else %}off{% endif %}",
    "\n\n  {{ x }}\n",
    "   {% if x %}on{% endif %}",
    "  text {{ x }}",
    "{#- a comment #}\n {{- x }}",
    "{%- macro f(m) %}{{ m.content }}{{ x }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
    "{% block a %}{{ x }}{% endblock %}",
    "{% for m in messages %}{% if x %}{{ x }}{% endif %}{% endfor %}",
    "{% set ns = namespace(x=x) %}{{ ns.x }}",
    "{% if x is not defined %}{% set x = true %}{% endif %}{{ x }}",
    "{% set x = x if x is defined else true %}{{ x }}",
    "{% set x = x | default(true) %}{% for m in messages %}{{ x }}{% endfor %}",
]


@pytest.mark.parametrize("text", READERS)
@pytest.mark.parametrize("settings", [SETTINGS, {}], ids=["transformers", "plain Jinja"])
def test_a_default_changes_nothing_but_the_variable(text, settings):
    """Also in the environments of servers that trim no line ends, but where the text begins with a line of its own."""
    template = with_defaults(Template("t", {"default": text}, {}), {"x": False}, Switch(("x",)))
    environment = jinja2.Environment(**settings)
    before, after = environment.from_string(text), environment.from_string(template.text)
    messages = [{"content": "a"}, {"content": "b"}]
    line = "\n" if not settings and not text.startswith(("{%-", "{#-")) else ""
    assert after.render(messages=messages) == line + before.render(messages=messages, x=False)
    assert after.render(messages=messages, x=True) == line + before.render(messages=messages, x=True)


def test_each_named_template_gets_the_defaults_of_what_it_reads():
    texts = {"default": "{{ x }}", "tool_use": "{{ y }}{{ documents }}", "rag": "none"}
    template = Template("t", texts, {"bos_token": "<s>"})
    made = with_defaults(template, {"x": 1, "y": 2, "documents": [], "messages": [], "unread": 5}, Switch())
    assert made.texts["rag"] == "none" and "y" not in made.texts["default"] and "unread" not in str(made.texts)
    assert made.render([], None) == "1" and made.render([], []) == "2[]"
    with_bos = with_defaults(replace(template, texts={"default": "{{ bos_token }}"}), {"bos_token": ""}, Switch())
    assert with_bos.render([]) == "", "every caller gives it: the default is the value"


# Arguments that the template does not read ---------------------------------------------------------------------------


def test_arguments_that_the_template_does_not_read_are_named_and_are_no_defaults():
    given = {"enable_thinkin": False, "enable_thinking": False, "effort": "low"}
    renderer = renderer_of(chat_tokenizer(OPENING), template_kwargs=given)
    _, counts = trained(renderer, [([USER, says("It is I.")], None)])
    assert counts.defaults() == {"enable_thinking": False} and counts.unread() == ["enable_thinkin", "effort"]
    assert thinking_lines([], counts.defaults(), counts.unread()) == [
        "the saved chat template has as its defaults: enable_thinking=false",
        "data.chat_template_kwargs.enable_thinkin changes nothing: the chat template does not read it",
        "data.chat_template_kwargs.effort changes nothing: the chat template does not read it",
    ]
    own = Conversation("a:1", read_messages([USER, says("I.")], "a:1"), None, {"mood": "good"})
    counts = renderer.new_counts()
    counts.add(own, renderer.render(own))
    assert counts.defaults() == {"enable_thinking": False}, "of an example's own arguments too"
    plain = Renderer(chat_tokenizer(None), None, stop_token_ids=[0], template_kwargs=given).new_counts()
    assert plain.defaults() == {} and plain.unread() == []


@pytest.mark.parametrize("command", [("check",), ("train", "--dry-run")])
def test_commands_name_an_argument_that_the_template_does_not_read(command, preceptor, run_file):
    file = run_file(data__chat_template_kwargs={"enable_thinking": False})  # as of a file of another trainer
    code, out, err = preceptor(command[0], file, *command[1:])
    printed = " ".join(out.split())
    assert code == 0, err
    assert "data.chat_template_kwargs.enable_thinking changes nothing: the chat template does not read it" in printed
    assert "has as its defaults" not in printed


def test_a_turn_reasons_by_the_tags_that_the_template_knows():
    """By others it is trained as a text, and counted so."""
    renderer = renderer_of(chat_tokenizer(OPENING))
    unknown, known = says("<thinking>\nHm.\n</thinking>\nI."), says("<think>\nHm.\n</think>\n\nI.")
    for turn, reasons in ((unknown, False), (known, True)):
        _, counts = trained(renderer, [([USER, turn], None)])
        (count,) = counts.thinking()
        assert (count["reasoning"], count["thinking"]) == (reasons, reasons)
