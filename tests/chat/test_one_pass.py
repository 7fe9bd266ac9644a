"""One pass over a conversation writes what rendering each of its beginnings writes, or says that it cannot."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.chat.environment import compiled, plain_environment
from preceptor.chat.one_pass import LooksAhead, OnePass, Request, one_pass

TEMPLATES = Path(__file__).parents[3] / "shared" / "templates"
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]


def plainly(text, messages, asked, **variables):
    shown = messages[: asked.num_messages]
    return compiled(text).render(messages=shown, add_generation_prompt=asked.add_generation_prompt, **variables)


def in_one_pass(text, messages, several, head_again=False, **variables):
    template = one_pass(text, head_again)
    assert template is not None
    return OnePass(messages, several).run(template, variables)


def conversation(*roles):
    return [{"role": role, "content": f"{role[0]}{at}"} for at, role in enumerate(roles)]


def every_turn(messages):
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    return [asked for k in turns for asked in (Request(k, True), Request(k + 1, False))]


CHAT = conversation("system", "user", "assistant", "user", "assistant", "user", "assistant")
PROMPT = "{% if add_generation_prompt %}A:{% endif %}"
FRONT_TO_BACK = {
    "plain": "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}" + PROMPT,
    "system apart": "{% if messages[0].role == 'system' %}S={{ messages[0].content }}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ loop.index0 }}{{ m.content }}{% endfor %}" + PROMPT,
    "last": "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% else %},{% endif %}{% endfor %}" + PROMPT,
    "neighbours": "{% for m in messages %}{{ (loop.previtem or m).role }}<{{ m.content }}>"
    "{{ (loop.nextitem or m).role }}{% endfor %}",
    "length": "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}{{ messages[-1].content }}",
    "namespace": "{% set ns = namespace(n=0, seen='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.seen = ns.seen + m.role[0] %}{{ ns.n }}{% endfor %}{% set ns.n = 100 %}{{ ns.seen }}{{ ns.n }}" + PROMPT,
    "unset prompt": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}" + PROMPT,
    "macro": "{% macro say(m, last) %}[{{ m.content }}{{ '.' if last }}]{% endmacro %}"
    "{% for m in messages %}{{ say(m, loop.last) }}{% endfor %}" + PROMPT,
    "continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "set in loop": "{% set x = 'a' %}{% for m in messages %}{% set x = x + m.role %}{{ x }};{% endfor %}{{ x }}"
    + PROMPT,
}
TOLD_IN_THE_LOOP = {
    "length": "{% for m in messages %}{{ messages | length }}{{ m.content }}{% endfor %}",
    "reversed": "{% for m in messages %}{{ messages[::-1][0].content }}{{ m.role }}{% endfor %}" + PROMPT,
    "is sequence": "{% for m in messages %}{{ messages is sequence }}{{ m.content }}{% endfor %}",
    "two on": "{% for m in messages %}{{ (messages[loop.index0 + 2] or m).content }}{% endfor %}",
    "prompt": "{% for m in messages %}{% if add_generation_prompt and loop.last %}A{% endif %}{{ m.role }}{% endfor %}",
    "revindex": "{% for m in messages %}{{ loop.revindex }}{{ m.role }}{% endfor %}",
    "told once": "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.content == 'u3' %}"
    "{% set ns.n = messages | length %}{% endif %}{{ ns.n }}{{ m.content }}{% endfor %}",
}
TOLD_BEFORE = {
    "reversed": "{% for m in messages[::-1] %}{{ m.content }}{% endfor %}",
    "length": "{% set n = messages | length %}{% for m in messages %}{{ n }}{{ m.content }}{% endfor %}",
    "last user": "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{{ m.content }}"
    "{% if loop.index0 > ns.last %}!{% endif %}{% endfor %}" + PROMPT,
    "written before": "{{ messages[-1].content }}:{% for m in messages %}{{ m.content }}{% endfor %}",
    "list": "{% set rest = messages[:-1] %}{% for m in rest %}{{ m.content }}{% endfor %}" + PROMPT,
    "range": "{% for at in range(messages | length) %}{{ messages[at].content }}{% endfor %}" + PROMPT,
    "macro": "{% set n = messages | length %}{% macro say(m) %}{{ n }}{{ m.content }}{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% endfor %}",
    "branch": "{% if messages | length > 3 %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}" + PROMPT,
    "kept state": "{% set ns = namespace(first=messages[0].role, many=messages | length > 3, n=0) %}"
    "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ ns.many }}{% endfor %}{% set ns.n = 50 %}{{ ns.n }}",
}
OTHER_FORM = {
    "break": "{% for m in messages %}{% if m.content == 'u1' %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "filtered": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "else": "{% for m in messages %}{{ m.content }}{% else %}none{% endfor %}",
    "cycler": "{% set c = cycler('a', 'b') %}{% for m in messages %}{{ c.next() }}{% endfor %}",
    "changed": "{% for m in messages %}{{ loop.changed(m.role) }}{% endfor %}",
    "hidden namespace": "{% set ns = namespace(n=namespace(x=0)) %}{% for m in messages %}"
    "{% set inner = ns.n %}{% set inner.x = inner.x + 1 %}{{ inner.x }}{% endfor %}",
    "own prompt": "{% set add_generation_prompt = true %}{% for m in messages %}{{ m.content }}{% endfor %}" + PROMPT,
    "no loop": "{{ messages[0].content }}",
}


@pytest.mark.parametrize("name", FRONT_TO_BACK)
@pytest.mark.parametrize("start", [0, 1], ids=["with system", "without"])
def test_front_to_back_templates_give_every_render(name, start):
    messages, text = CHAT[start:], FRONT_TO_BACK[name]
    made = in_one_pass(text, messages, every_turn(messages))
    assert made == {asked: plainly(text, messages, asked) for asked in every_turn(messages)}


@pytest.mark.parametrize("name", TOLD_IN_THE_LOOP)
@pytest.mark.parametrize("head_again", [False, True])
def test_what_a_world_is_told_does_not_pass_to_longer_ones(name, head_again):
    made = in_one_pass(TOLD_IN_THE_LOOP[name], CHAT, every_turn(CHAT), head_again)
    assert made == {asked: plainly(TOLD_IN_THE_LOOP[name], CHAT, asked) for asked in every_turn(CHAT)}


@pytest.mark.parametrize("name", TOLD_BEFORE)
def test_a_head_that_looks_ahead_is_seen_and_run_again(name):
    if name not in ("reversed", "list", "range"):
        with pytest.raises(LooksAhead):
            in_one_pass(TOLD_BEFORE[name], CHAT, every_turn(CHAT))
    made = in_one_pass(TOLD_BEFORE[name], CHAT, every_turn(CHAT), head_again=True)
    assert made == {asked: plainly(TOLD_BEFORE[name], CHAT, asked) for asked in every_turn(CHAT)}


def test_what_saves_nothing_is_given_up():
    messages = conversation(*["user", "assistant"] * 20)
    with pytest.raises(LooksAhead):
        in_one_pass(TOLD_BEFORE["length"], messages, every_turn(messages), head_again=True)
    assert len(in_one_pass(TOLD_BEFORE["last user"], messages, every_turn(messages), head_again=True)) == 40


@pytest.mark.parametrize("name", OTHER_FORM)
def test_other_forms_are_not_taken(name):
    assert one_pass(OTHER_FORM[name]) is None


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([*FRONT_TO_BACK.values(), *TOLD_IN_THE_LOOP.values(), *TOLD_BEFORE.values()]),
    st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=1, max_size=9),
    st.data(),
)
def test_any_beginnings_of_any_conversation(text, roles, data):
    messages = conversation(*roles)
    asked = st.builds(Request, st.integers(1, len(messages)), st.booleans())
    several = data.draw(st.lists(asked, min_size=1, max_size=6, unique=True))
    try:
        made = in_one_pass(text, messages, several, head_again=data.draw(st.booleans()))
    except LooksAhead:
        assert text in TOLD_BEFORE.values() or "is sequence" in text
        return
    assert made == {one: plainly(text, messages, one) for one in several}


@pytest.mark.parametrize("head_again", [False, True])
def test_the_work_is_linear(head_again, monkeypatch):
    counted = []
    monkeypatch.setitem(plain_environment().filters, "noted", lambda text: counted.append(text) or text)
    text = "{% set x = messages[0].role %}{% for m in messages %}{{ m.content | noted }}{{ loop.last }}{% endfor %}"
    messages = conversation(*["user", "assistant"] * 50)
    OnePass(messages, every_turn(messages)).run(one_pass(text, head_again), {})
    assert len(messages) <= len(counted) < 3 * len(messages)


def real_conversation(kind):
    messages = [{"role": "system", "content": "Be brief."}] if "system" in kind else []
    for turn in range(4):
        messages.append({"role": "user", "content": f"Q{turn} ün"})
        if "tools" in kind:
            call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"x": turn}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "content": f"r{turn}", "name": "f", "tool_call_id": "abcdefghi"})
        answer = {"role": "assistant", "content": f"A{turn}"}
        messages.append({**answer, "reasoning_content": f"R{turn}"} if "reasoning" in kind else answer)
    return messages


@pytest.mark.skipif(not TEMPLATES.is_dir(), reason="the folder shared/templates is not beside the repository")
def test_real_templates():
    """Where a pass comes to its end it is right; and most templates that can be rendered come there."""
    num_passes = num_ahead = 0
    for file in sorted(TEMPLATES.glob("*.jinja")):
        text = file.read_text(encoding="utf-8")
        if one_pass(text) is None:
            continue
        for kind in ("plain", "reasoning", "system tools reasoning"):
            messages = real_conversation(kind)
            variables = {"tools": TOOLS if "tools" in kind else None, "documents": None}
            variables |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
            expected = None
            for head_again in (False, True):
                try:
                    made = in_one_pass(text, messages, every_turn(messages), head_again, **variables)
                except LooksAhead:
                    num_ahead += 1
                    continue
                except Exception:
                    assert any(rejects(text, messages, asked, variables) for asked in every_turn(messages)), file.name
                    continue
                num_passes += 1
                if expected is None:
                    expected = {asked: plainly(text, messages, asked, **variables) for asked in every_turn(messages)}
                assert made == expected, (file.name, kind, json.dumps(messages))
    assert num_passes > 2 * num_ahead > 0


def rejects(text, messages, asked, variables):
    try:
        plainly(text, messages, asked, **variables)
    except Exception:
        return True
    return False
