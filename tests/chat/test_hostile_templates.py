"""Templates that hang, fill the memory, read what is not theirs, or are refused by transformers."""

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizer_families as tf

from preceptor.chat import environment, tokenise, words
from preceptor.chat.environment import RenderLimit, plain_environment
from preceptor.chat.marked import Marked, compiled_marked, split_by_origin
from preceptor.chat.render import Renderer
from preceptor.chat.stop_tokens import find_stop_tokens
from preceptor.chat.template import Template, load_template
from preceptor.chat.thinking import find_switch
from preceptor.data.examples import Conversation, Message, Rejection
from preceptor.errors import ConfigError, TemplateError
from tiny import tiny_tokenizer

PLACES = [parent / "shared" / "cases" for parent in Path(__file__).parents[2:]]
CASES = next((place for place in PLACES if place.is_dir()), None)
FILES = sorted([*CASES.glob("tmpl/*.jinja"), *CASES.glob("tmplfz/*.jinja")]) if CASES else []
LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SECRET = "hf_SECRET123"

# What one operation makes, each of 1 GB or more; all of them end before they have made it.
BOMBS = [
    "{{ 'a' * 10**10 }}",
    "{% set x = [0] * 10**10 %}",
    "{% set x = 9 ** (9 ** 9) %}",
    "{{ 'a'.center(2000000000) }}",
    "{{ 'a'.encode().ljust(2000000000) }}",
    "{{ 'a' | center(2000000000) }}",
    "{{ 'a' | center(width=2000000000) }}",
    "{{ ('a\n' * 1000000) | indent(100000) }}",
    "{{ 'a'.zfill(2000000000) }}",
    "{{ '%2000000000d' % 1 }}",
    "{{ '%*d' % (2000000000, 1) }}",
    "{{ '%2000000000d' | format(1) }}",
    "{{ '{:2000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 2000000000) }}",
    "{{ '{x:2000000000}'.format_map({'x': 1}) }}",
    "{{ ('a' * 1000000).replace('', 'x' * 1000000) }}",
    "{{ ('a' * 1000000) | replace('a', 'x' * 1000000) }}",
    "{{ ('x' * 1000000).join(['a'] * 1000000) }}",
    "{{ (['a'] * 1000000) | join('x' * 1000000) }}",
    "{{ ('a' * 1000000).translate({97: 'x' * 1000000}) }}",
    "{{ (1).to_bytes(10000000000, 'big') }}",
    "{{ [1] | batch(10000000000, 0) | list }}",
    "{{ strftime_now('%999999999d') }}",
    "{% set ns = namespace(s='a' * 1000000) %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='a' * 1000000) %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set x = 'a' * 100000000 %}{% for i in range(100) %}{{ x }}{% endfor %}",
    "{% set x = 'a' * 100000000 %}{% macro f() %}{% for i in range(100) %}{{ x }}{% endfor %}{% endmacro %}{{ f() }}",
]
SLOW = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ '' }}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
]
GETS_OUT = [
    "{{ (m.content[:0] ~ '{0.__init__.__globals__[os].environ[SECRET_TOKEN]}').format(namespace) }}",
    "{{ (m.content[:0] ~ '{x.__init__.__globals__[os].environ[SECRET_TOKEN]}').format_map({'x': namespace}) }}",
    "{{ ((m.content[:0] ~ '{0.__init__.__globals__[os].environ[SECRET_TOKEN]}') | attr('format'))(namespace) }}",
    "{{ raise_exception((m.content[:0] ~ '{0.__init__.__globals__[os].environ[SECRET_TOKEN]}').format(namespace)) }}",
    "{{ m.content.atoms }}",
    "{{ m.content.make.__func__.__globals__ }}",
    "{{ (m.content | attr('leaf')).__func__.__globals__ }}",
    "{{ messages.start }}{{ messages._pass }}",
    "{{ __pass__ }}",
]


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(environment, "SECONDS", 0.5)


def rendered(text, num=2):
    """What becomes of `num` conversations: their trees and rejections."""
    tokenizer = tiny_tokenizer(special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = text
    template = load_template("tokenizer", tokenizer)
    stops = [tokenizer.convert_tokens_to_ids(token) for token in find_stop_tokens(template, tokenizer).tokens]
    renderer = Renderer(tokenizer, template, stop_token_ids=stops)
    found = []
    for number in range(num):
        turns = [Message({"role": role, "content": f"{role} {number}"}) for role in ("user", "assistant") * 3]
        found.append(renderer.render(Conversation(f"a:{number}", tuple(turns), None)))
    return found


@pytest.mark.skipif(not FILES, reason="the folder shared/cases is not beside the repository")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_hostile_template_ends_in_a_template_error_or_works(file, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", SECRET)
    started, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = [str(outcome) for outcome in rendered(file.read_text(encoding="utf-8"))]
    except TemplateError as error:
        found = [str(error)]
    assert SECRET not in str(found)
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2_500_000  # kB


def test_the_timer_does_not_outlive_its_handler():
    """Python puts the default handler back when it ends, and that one kills the process."""
    script = """
import atexit, signal
atexit.register(lambda: print(signal.getitimer(signal.ITIMER_PROF)[0]))
from preceptor.chat.template import Template
Template("t", {"default": "a"}, {}).render([])
print(signal.getitimer(signal.ITIMER_PROF)[0] > 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0.0"]


@pytest.mark.parametrize("text", BOMBS)
def test_what_one_operation_makes_is_bounded(text):
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TemplateError, match=r"took more than|a width|characters|bits") as raised:
        rendered(text + LOOP)
    assert raised.value.is_fatal
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2_500_000


@pytest.mark.parametrize("text", SLOW)
def test_a_render_has_a_limit_of_time(text):
    started = time.process_time()
    with pytest.raises(TemplateError, match=r"took more than 0\.5 s"):
        rendered(text + LOOP)
    assert time.process_time() - started < 3


def test_a_switch_that_hangs_is_fatal_at_once_and_not_tried_with_each_probe():
    template = Template("t", {"default": f"{{% if enable_thinking %}}{SLOW[0]}{{% endif %}}{LOOP}"}, {})
    started = time.process_time()
    with pytest.raises(TemplateError, match=r"took more than 0\.5 s") as raised:
        find_switch(template, {})
    assert raised.value.is_fatal and time.process_time() - started < 1.2


def test_a_program_that_ends_while_the_timer_runs_ends_well():
    program = """
from preceptor.chat.environment import limits
import sys, time
class Late:
    def __del__(self, clock=time.process_time):
        started = clock()
        while clock() - started < 0.5:
            pass
sys.late = Late()
with limits("a"):
    print("rendered")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "rendered\n")


def test_many_short_renders_meet_no_limit(monkeypatch):
    monkeypatch.setattr(environment, "SECONDS", 0.3)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for i in range(20000) %}{{ '' }}{% endfor %}" + LOOP
    template = load_template("tokenizer", tokenizer)
    started = time.process_time()
    while time.process_time() - started < 1:
        template.render([{"role": "user", "content": "a"}])


ORDINARY = {
    "{{ 'ab' * 3 }}": "ababab",
    "{{ 2 ** 10 }}{{ 7 % 3 }}": "10241",
    "{{ '%05.1f|%s' % (2.5, 'x') }}": "002.5|x",
    "{{ 'a' | center(5) }}{{ 'a'.ljust(3) }}": "  a  a  ",
    "{{ '{:>4}'.format(1) }}": "   1",
    "{{ 'a-a-a' | replace('-', '+', 1) }}": "a+a-a",
    "{{ 'a' ~ 1 ~ none }}": "a1None",
    "{{ ['a', 'b'] | join(', ') }}{{ ', '.join(['a', 'b']) }}": "a, ba, b",
    "{{ {'a': 1} | tojson(indent=2) }}": '{\n  "a": 1\n}',
    "{{ 'x\ny' | indent(2) }}": "x\n  y",
    "{{ [1, 2, 3] | batch(2) | list }}": "[[1, 2], [3]]",
}


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_operations_are_those_of_jinja(text):
    assert plain_environment().from_string(text).render() == ORDINARY[text]
    compiled = compiled_marked(text)
    assert "".join(split_by_origin(compiled.root_render_func(compiled.new_context({})))[0]) == ORDINARY[text]


@pytest.mark.parametrize("text", GETS_OUT)
def test_marked_strings_and_passes_show_nothing_of_their_own(text, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", SECRET)
    whole = "{% for m in messages %}{% if m.content.atoms is defined or 1 %}" + text + "{% endif %}{% endfor %}" + LOOP
    try:
        found = str(rendered(whole))
    except TemplateError as error:
        found = str(error)
    assert SECRET not in found and "Atom(" not in found
    compiled = compiled_marked("{{ x.atoms is defined }}{{ x['atoms'] is defined }}{{ (x | attr('leaf')) is defined }}")
    written = compiled.root_render_func(compiled.new_context({"x": Marked.leaf(0, "a")}))
    assert "".join(written) == "FalseFalseFalse"


DIFFERENT = {
    "refuses": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}" + LOOP,
    "another text": "{{ range(100000) | random }}" + LOOP,
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_one_difference_from_transformers_is_fatal(what):
    with pytest.raises(TemplateError, match=what) as raised:
        rendered(DIFFERENT[what], num=1)
    assert raised.value.is_fatal


def test_a_limit_is_no_answer_of_a_test():
    """Jinja takes an Exception in a test for a `no`."""
    with pytest.raises(RenderLimit):
        plain_environment().from_string("{{ ('a' * 10**10) is sequence }}").render()


@pytest.mark.parametrize("name", ["self", "messages", "tools", "tokenize", "add_generation_prompt", "max_length"])
def test_arguments_of_the_server_are_rejected(name):
    tokenizer = tiny_tokenizer(special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = LOOP + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    template = load_template("tokenizer", tokenizer)
    turns = (Message({"role": "user", "content": "a"}), Message({"role": "assistant", "content": "b"}))
    renderer = Renderer(tokenizer, template, stop_token_ids=[2])
    rejected = renderer.render(Conversation("a:1", turns, None, {name: True}))
    assert isinstance(rejected, Rejection) and rejected.code == "reserved_argument" and name in rejected.message
    with pytest.raises(ConfigError, match=name):
        Renderer(tokenizer, template, stop_token_ids=[2], template_kwargs={name: True})


@pytest.mark.parametrize("family", ["bytes (GPT-2)", "bytes, prefix space (RoBERTa, Falcon)", "unigram always (T5)"])
def test_texts_for_which_a_tokenizer_takes_much_memory_are_rejected(family, monkeypatch):
    """Of words, or of all that the tokenizer must take at once; what can be cut into words may be of any size."""
    monkeypatch.setattr(words, "_HUGE", 1000)
    monkeypatch.setattr(tokenise, "_HUGE", 3000)
    text = LOOP + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = tf.tokenizer_for(family, tf.tt.Entry("own", text, None, "<|im_end|>"))
    renderer = Renderer(tokenizer, load_template("tokenizer", tokenizer), stop_token_ids=[tokenizer.eos_token_id])

    def outcome(content):
        turns = (Message({"role": "user", "content": content}), Message({"role": "assistant", "content": "yes"}))
        return renderer.render(Conversation("a:1", turns, None))

    assert not isinstance(outcome("who is it " * 20), Rejection)
    for content in ("x" * 5000, "who is it " * 500):
        found = outcome(content)
        if family == "bytes (GPT-2)" and " " in content:
            assert not isinstance(found, Rejection)
        else:
            assert isinstance(found, Rejection) and found.code == "text_too_large" and "characters" in found.message
