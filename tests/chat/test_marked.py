"""Marked strings behave as plain ones and know where they came from."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_render import CHAT, conversation, make, segments

from preceptor.chat.environment import plain_environment
from preceptor.chat.marked import Marked, compiled_marked, join, plain, split_by_origin
from preceptor.chat.origins import Rendered

TEXT = st.text(alphabet="ab \n<>/thinkß|{}\"'\\é", max_size=12)
OPERATIONS = st.sampled_from(
    [
        lambda s, t: s.strip(),
        lambda s, t: s.lstrip("\n"),
        lambda s, t: s.rstrip(" \n"),
        lambda s, t: s + t,
        lambda s, t: t + s,
        lambda s, t: "<" + s,
        lambda s, t: s[1:],
        lambda s, t: s[:-2],
        lambda s, t: s[::-1],
        lambda s, t: s.replace("a", "<|b|>"),
        lambda s, t: s.replace("a", ""),
        lambda s, t: s.split("</think>")[-1],
        lambda s, t: s.split("a", 1)[0],
        lambda s, t: s.rsplit("b", 1)[-1],
        lambda s, t: "|".join(s.splitlines()) if type(s) is str else join(_piped(s)),
        lambda s, t: s.partition("a")[2],
        lambda s, t: s.upper(),
        lambda s, t: s.removeprefix("a").removesuffix("b"),
        lambda s, t: s * 2,
        lambda s, t: s if "th" in s else t,
        lambda s, t: s if s.startswith("a") or not t else t,
        lambda s, t: s if s == t else s.title(),
        lambda s, t: s.center(5),
    ]
)


def _piped(text):
    return [piece for line in text.splitlines() for piece in ("|", line)][1:]


@settings(deadline=None, max_examples=300)
@given(TEXT, TEXT, st.lists(OPERATIONS, max_size=5))
def test_marked_strings_behave_as_plain_ones(one, other, operations):
    def run(s, t):
        for operation in operations:
            s = operation(s, t)
        return s

    marked = run(Marked.leaf(0, one), Marked.leaf(1, other))
    assert plain(marked) == run(one, other)
    if isinstance(marked, Marked):
        assert sum(atom.length for atom in marked.atoms) == len(plain(marked))
        assert {atom.origin for atom in marked.atoms} <= {0, 1, None}


@pytest.mark.parametrize("split", [str.split, str.rsplit])
def test_a_piece_of_a_joined_string_is_not_looked_for_in_the_separator(split):
    text = join(("<think>why</think>", Marked.leaf(0, "k")))
    before, after = getattr(text, split.__name__)("</think>")
    assert (plain(before), plain(after)) == ("<think>why", "k")
    assert [atom.origin for atom in before.atoms] == [None]
    assert [atom.origin for atom in after.atoms] == [0]


TEMPLATES = [
    "{{ '<' ~ a ~ '|' ~ b }}",
    "{% for x in [a, b] %}{{ x | trim }}{% if not loop.last %}, {% endif %}{% endfor %}",
    "{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(a) + m(b) | upper }}",
    "{% set x %}{{ a }}-{{ b }}{% endset %}{{ x.strip() }}",
    "{% if 'a' in a and a not in 'ab ' %}{{ a[1:] }}{% else %}{{ b | default('x', true) }}{% endif %}",
    "{{ {'k': a, 'l': [b, 1, none, true], 'm': {'n': a}} | tojson }}",
    "{{ [a, b] | tojson(indent=2, ensure_ascii=true) }}",
    "{{ [a, b] | join('\\n') }}{{ ', '.join([a, b]) }}",
    "{{ a | replace('a', b) | indent(2, true) }}",
    "{% set ns = namespace(s='') %}{% for x in [a, b] %}{% set ns.s = ns.s + x %}{% endfor %}{{ ns.s }}",
    "{{ 'long' if a | length > 3 else a | string }}{{ a | length }}",
    "{{ a.split('a')[0] + b.split('b')[-1] | lower }}{{ a == b }}{{ a | capitalize }}",
    "{% generation %}{{ a }}{% endgeneration %}{{ '%s.' % b }}{{ 5 | replace('5', a) }}",
    "{{ '%s|%%s %-9s %d%s' | format(a, b, 3, {'x': [a]}) }}{{ '%(k)s %(k).2s' % {'k': b} }}",
    "{{ 'a%s %s' % (a, b) }}{{ '%r' % a }}",
    "{{ ([a, b] | map('upper') | list)[0] }}{{ [a, b] | select('equalto', a) | first }}",
    "{% for c in [a] %}{{ ', '.join([c, 'x']) }}{{ 'a b'.replace('a', b) }}{% endfor %}",
    "{% for c in a.split('b', maxsplit=1) %}{{ c.split(sep='a') | join('|') }}{{ b.rsplit(None, 1)[-1:] }}{% endfor %}",
    "{% for c in a %}{% if c == 'b' %}{% break %}{% endif %}{{ c }}{% endfor %}{{ b[-1:] }}",
]


def with_origins(template, **texts):
    """The pieces of a render and their origins: the number of the text that each came from."""
    marked = {name: Marked.leaf(number, text) for number, (name, text) in enumerate(texts.items())}
    compiled = compiled_marked(template)
    return split_by_origin(compiled.root_render_func(compiled.new_context(marked)))


@pytest.mark.parametrize("template", TEMPLATES)
@settings(deadline=None, max_examples=40)
@given(TEXT, TEXT)
def test_templates_render_the_same_text_with_origins(template, a, b):
    pieces, origins = with_origins(template, a=a, b=b)
    assert "".join(pieces) == plain_environment().from_string(template).render(a=a, b=b)
    assert set(origins) <= {0, 1, None} and all(pieces)


def test_every_character_of_a_message_keeps_its_origin():
    a, b = 'Grüße & "x"', "é\n"
    pieces, origins = with_origins("<|{{ a | trim }}|>{{ {'b': b} | tojson }}", a=a, b=b)
    assert list(zip(pieces, origins, strict=True)) == [
        ("<|", None),
        (a, 0),
        ('|>{"b": "', None),
        (json.dumps(b, ensure_ascii=False)[1:-1], 1),
        ('"}', None),
    ]
    assert Rendered("".join(pieces), pieces, origins).span(range(1)) == (2, 2 + len(a))


def test_methods_of_the_templates_own_strings_keep_origins_in_a_loop_too():
    template = "{% for m in [a] %}{{ ', '.join([m, b]) }}{{ ' <x>'.replace('x', m) }}{% endfor %}"
    assert with_origins(template, a="one", b="two") == (
        ["one", ", ", "two", " <", "one", ">"],
        [0, None, 1, None, 0, None],
    )


@pytest.mark.parametrize(
    "template",
    ["{{ '[%s, %d, %s]' | format(a, 1, {'k': b}) }}", "{{ '[%s, %d, %s]' % (a, 1, {'k': b}) }}"],
)
def test_texts_behind_percent_signs_keep_their_origins(template):
    pieces, origins = with_origins(template, a="one", b="it's")
    assert "".join(pieces) == """[one, 1, {'k': "it's"}]"""
    assert [(p, o) for p, o in zip(pieces, origins, strict=True) if o is not None] == [("one", 0), ("it's", 1)]
    assert with_origins("{{ '<%s>' % a }}", a="x") == (["<", "x", ">"], [None, 0, None])
    assert with_origins("{{ '%5s' | format(a) }}", a="x") == (["    x"], [None])


def test_what_cannot_be_followed_counts_as_the_templates_own():
    assert with_origins("{{ a | urlencode }}", a="a b") == (["a%20b"], [None])
    assert with_origins("{{ a.center(5) }}", a="a") == (["  a  "], [None])


def test_marked_strings_that_fail_where_plain_ones_do_not_are_a_fault_of_this_program(monkeypatch):
    def fails(text, chars=None):
        raise KeyError("strip")

    text = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.strip() }}<|im_end|>\n{% endfor %}"
    renderer = make(text=text + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    assert segments(renderer, CHAT)
    monkeypatch.setattr(Marked, "strip", fails)
    fresh = make(text=renderer.tokenizer.chat_template)
    with pytest.raises(AssertionError, match="marked strings fail where plain ones do not"):
        fresh.render(conversation(CHAT))
