"""Alignments: what is learnt of a turn's render is found again in others, and only where the texts are equal."""

import random

import pytest
import template_table as tt
from children import TORTURE
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.chat.origins import Alignments, Leaf, Rendered, _questions, alignment_of
from preceptor.chat.render import Renderer
from preceptor.chat.template import load_template
from preceptor.data.examples import Conversation, Message
from tiny import tiny_tokenizer

PIECES = (
    *("Hello", "it's 12345", " ", "\n", "\n\n", "<", ">", "<|im_", "end|>", "<think>", "</think>", "<think>a</think>b"),
    *("assistant", "user\n", "é", "e\u0301", "日本", "🙂", "\u0085", "x" * 40, "None", "{}", '"q" \\ '),
)
OWN = range(3, 5)


def leaves(*texts):
    return [Leaf(0, ("content",), "of others")] * 3 + [Leaf(1, ("content",), text) for text in texts]


def rendered(*pieces):
    texts, origins = [text for text, _ in pieces], [origin for _, origin in pieces]
    return Rendered("".join(texts), texts, origins)


def test_what_was_learnt_is_found_in_other_texts():
    learnt = Alignments()
    learnt.learn(
        "kind", "P:", rendered(("P:<", None), ("so", 3), ("|", None), ('a\\"', 4), (">", None)), leaves("so", 'a"'), OWN
    )
    found = learnt.fit("kind", "Q, P:", 'Q, P:<yes|no\\">', leaves("yes", 'no"'), OWN)
    assert list(found.parts()) == [("Q, P:", None), ("<", None), ("yes", 3), ("|", None), ('no\\"', 4), (">", None)]
    assert (found.span(OWN), found.spelled(4)) == ((6, 14), 'no\\"')
    for prompt, text in (
        ("P:", "P:<yes|no>"),
        ("P:", 'Q:<yes|no\\">'),
        ("P:", 'P:<yes|no\\"> '),
        ("P:", 'P:<no|no\\">'),
    ):
        assert learnt.fit("kind", prompt, text, leaves("yes", 'no"'), OWN) is None
    assert learnt.fit("another kind", "P:", 'P:<yes|no\\">', leaves("yes", 'no"'), OWN) is None


def test_the_end_of_a_prompt_that_the_render_lacks():
    prompt = "A:<think></think>"
    learnt = alignment_of(prompt, rendered(("A:", None), ("so", 3), (".", None)), leaves("so", ""), OWN)
    assert learnt.dropped == "<think></think>"
    assert learnt.fit("B A:<think></think>", "B A:no.", leaves("no", ""), OWN).span(OWN) == (4, 6)
    assert learnt.fit("B A:", "B A:no.", leaves("no", ""), OWN) is None


def test_what_is_done_to_a_text_that_no_form_does_is_not_learnt():
    assert alignment_of("P:", rendered(("P:", None), ("SO", 3)), leaves("so", ""), OWN) is None
    assert alignment_of("x" * 100, rendered(("y", None), ("so", 3)), leaves("so", ""), OWN) is None


def test_the_strings_that_a_template_looks_for():
    text = "{% if '</think>' in c %}{{ c.split('<b>')[0] | replace('<r>', '') }}{% elif c == 'yes' %}{% endif %}"
    assert _questions(text + "{% set tag = '<t>' %}{{ 'shown' ~ tag }}") == (("</think>", "<b>", "<r>", "<t>"), {"yes"})


# A renderer that has learnt gives what one that knows nothing gives --------------------------------------------------


def chat(contents, reasoning=None):
    roles = ("user", "assistant")
    rows = [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)]
    if reasoning is not None:
        rows[-1]["reasoning_content"] = reasoning
    return Conversation("file:1", tuple(Message(row, train=row["role"] == "assistant") for row in rows))


def make(template):
    tokenizer = tiny_tokenizer(
        special_tokens=("<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    )
    loaded = load_template(template, tokenizer)
    return Renderer(tokenizer, loaded, stop_token_ids=[0, 2])


words = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
LEARNT = {name: make(name) for name in ("chatml", "llama3")}


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(list(LEARNT)), st.lists(words, min_size=2, max_size=6), st.none() | words)
def test_the_same_tree_whatever_was_learnt_before(name, contents, reasoning):
    record = chat(contents[: len(contents) // 2 * 2], reasoning)
    assert LEARNT[name].render(record) == make(name).render(record)


def test_plain_chats_are_rendered_with_marks_once():
    renderer = make("llama3")
    rng = random.Random(0)
    for turns in (1, 2, 10, 3):
        renderer.render(chat([" ".join(rng.choices(("one", "two", "three"), k=5)) for _ in range(2 * turns)]))
    assert renderer.counts == {"renders with marks": 1, "one pass": 1}


ENTRIES = {entry.name: entry for entry in tt.read_entries()} if (tt.TEMPLATES / "index.json").is_file() else {}


FORMS = [(2, False, False), (6, False, False), (4, True, False), (4, False, True)] * (3 if TORTURE else 1)


@pytest.mark.skipif(not ENTRIES, reason=f"the stock templates are not at {tt.TEMPLATES}")
@pytest.mark.parametrize("name", ENTRIES)
def test_the_same_trees_under_every_stock_template(name):
    entry = ENTRIES[name]
    tokenizer = tt.tokenizer_for(entry)
    learnt = tt.renderer_for(entry, tokenizer)
    rng = random.Random(name)
    for num_messages, system, reasons in FORMS:
        contents = [" ".join(rng.choices(PIECES, k=rng.choice((1, 3)))) for _ in range(num_messages)]
        record = chat(contents, reasoning="So it is." if reasons else None)
        if system:
            system_message = Message({"role": "system", "content": rng.choice(PIECES)}, train=False)
            record = Conversation(record.source, (system_message, *record.messages))
        knowing_nothing = Renderer(tokenizer, learnt.template, stop_token_ids=learnt.stop_token_ids)
        assert learnt.render(record) == knowing_nothing.render(record), contents
