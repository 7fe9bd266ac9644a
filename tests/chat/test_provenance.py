"""Marked strings behave as plain ones, know where they came from, and what is recorded can be done again."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.chat.environment import plain_environment
from preceptor.chat.marked import Marked, join, plain
from preceptor.chat.marked_environment import render_marked
from preceptor.chat.tape import Tape

TEXT = st.text(alphabet="ab \n<>/thinkß|{}\"'\\é", max_size=12)
OPERATIONS = st.sampled_from(
    [
        lambda s, t: s.strip(),
        lambda s, t: s.lstrip("\n"),
        lambda s, t: s.rstrip(" \n"),
        lambda s, t: s + t,
        lambda s, t: t + s,
        lambda s, t: "<" + s,
        lambda s, t: "%s!" % s,  # noqa: UP031
        lambda s, t: s[1:],
        lambda s, t: s[:-2],
        lambda s, t: s[::-1],
        lambda s, t: s.replace("a", "<|b|>"),
        lambda s, t: s.replace("a", ""),
        lambda s, t: s.split("</think>")[-1],
        lambda s, t: s.split("a", 1)[0],
        lambda s, t: s.rsplit("b", 1)[-1],
        lambda s, t: "|".join(s.splitlines()) if type(s) is str else join(s.tape, _piped(s)),
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
@given(TEXT, TEXT, st.lists(OPERATIONS, max_size=5), TEXT, TEXT)
def test_marked_strings_behave_as_plain_ones_and_replay(one, other, operations, again_one, again_other):
    def run(s, t):
        for operation in operations:
            s = operation(s, t)
        return s

    tape = Tape(2)
    marked = run(Marked.leaf(tape, 0, one), Marked.leaf(tape, 1, other))
    expected = run(one, other)
    assert plain(marked) == expected
    if isinstance(marked, Marked):
        assert sum(atom.length for atom in marked.atoms) == len(expected)
        if tape.exact and all(atom.ref >= 0 for atom in marked.atoms):
            for leaves in ((one, other), (again_one, again_other)):
                values = tape.replay(leaves)
                assert values is not None or leaves != (one, other)
                if values is not None:
                    assert "".join(values[atom.ref] for atom in marked.atoms) == run(*leaves)


def test_that_a_joined_string_has_no_lines_is_not_replayed_for_others():
    tape = Tape(2)
    assert (Marked.leaf(tape, 0, "") + Marked.leaf(tape, 1, "")).splitlines() == []
    assert not tape.exact


@pytest.mark.parametrize("split", [str.split, str.rsplit])
def test_a_piece_of_a_joined_string_is_not_looked_for_in_the_separator(split):
    tape = Tape(1)
    text = join(tape, ("<think>why</think>", Marked.leaf(tape, 0, "k")))
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
    "{% generation %}{{ a }}{% endgeneration %}{{ '%s.' % b }}",
    "{{ ([a, b] | map('upper') | list)[0] }}{{ [a, b] | select('equalto', a) | first }}",
    "{% for c in a %}{% if c == 'b' %}{% break %}{% endif %}{{ c }}{% endfor %}{{ b[-1:] }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@settings(deadline=None, max_examples=40)
@given(TEXT, TEXT, TEXT, TEXT)
def test_templates_render_the_same_text_with_origins(template, a, b, again_a, again_b):
    def rendered(a, b):
        return plain_environment().from_string(template).render(a=a, b=b)

    tape = Tape(2)
    result, atoms = render_marked(template, tape, {"a": Marked.leaf(tape, 0, a), "b": Marked.leaf(tape, 1, b)})
    assert result.text == rendered(a, b)
    assert not tape.lost
    if tape.exact and all(atom.ref >= 0 for atom in atoms):
        values = tape.replay((again_a, again_b))
        if values is not None:
            assert "".join(values[atom.ref] for atom in atoms) == rendered(again_a, again_b)


def test_every_character_of_a_message_keeps_its_origin():
    a, b = 'Grüße & "x"', "é\n"
    tape = Tape(2)
    template = "<|{{ a | trim }}|>{{ {'b': b} | tojson }}"
    result, _ = render_marked(template, tape, {"a": Marked.leaf(tape, 0, a), "b": Marked.leaf(tape, 1, b)})
    assert list(result.parts()) == [
        ("<|", None),
        (a, 0),
        ("|>", None),
        ('{"b": "', None),
        (json.dumps(b, ensure_ascii=False)[1:-1], 1),
        ('"}', None),
    ]
    assert result.span(range(1)) == (2, 2 + len(a))


def test_a_guard_stops_the_replay_where_the_template_would_do_otherwise():
    tape = Tape(1)
    render_marked("{{ a if '</think>' in a else a | upper }}", tape, {"a": Marked.leaf(tape, 0, "no")})
    assert tape.replay(["yes"]) is not None
    assert tape.replay(["</think>yes"]) is None


def test_what_cannot_be_followed_is_said_to_be_lost():
    tape = Tape(1)
    result, _ = render_marked("{{ a | urlencode }}", tape, {"a": Marked.leaf(tape, 0, "a b")})
    assert result.text == "a%20b" and tape.lost and not tape.exact
