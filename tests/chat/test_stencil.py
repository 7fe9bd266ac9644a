"""What a stencil gives is what the proof gives turn by turn; and where words decide, it gives nothing."""

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from preceptor.chat.one_pass import Pass
from preceptor.chat.render import Renderer
from preceptor.chat.stencil import Stencil
from preceptor.chat.template import load_template
from preceptor.data.examples import Conversation, Message
from tiny import tiny_tokenizer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import template_table as tt

LLAMA3 = ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
CHATML = ("<|im_end|>", "<|im_start|>", "<|im_tail|>")
CROSSING = (*CHATML, "t\n<")  # a token that the template's own text may begin
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PIECES = (
    *("Hello", "it's 12345", " ", "\n", "\n\n", "\n\n\n", "<", ">", "<|im_", "end|>", "tail|>", "<|im_tail|>", "|>"),
    *(
        "<think>",
        "</think>",
        "<think>a</think>b",
        "assistant",
        "user\n",
        "é",
        "e\u0301",
        "日本",
        "🙂",
        "\u0085",
        "x" * 40,
    ),
)


def make(template, tokens, **options):
    tokenizer = tiny_tokenizer(special_tokens=tokens)
    if "<|begin_of_text|>" in tokens:
        tokenizer.bos_token = "<|begin_of_text|>"
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    loaded = load_template(template, tokenizer)
    tokenizer.chat_template = loaded.text
    return Renderer(tokenizer, loaded, stop_token_ids=tokenizer.convert_tokens_to_ids(tokens[:1]), **options)


def without_stencils(renderer):
    renderer._cache.stencils = False
    return renderer


def chat(contents, reasoning=None, weight=1.0):
    roles = ("user", "assistant")
    rows = [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)]
    if reasoning is not None:
        rows[-1]["reasoning_content"] = reasoning
    messages = tuple(Message(row, train=row["role"] == "assistant", weight=weight) for row in rows)
    return Conversation("file:1", messages)


def num_filled(monkeypatch):
    """Counts the conversations that a stencil gives."""
    given_back, fill = [], Stencil.fill

    def counted(self, *args):
        found = fill(self, *args)
        given_back.append(found is not None)
        return found

    monkeypatch.setattr(Stencil, "fill", counted)
    return given_back


words = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
PAIRS = {
    (name, tokens, options): tuple(make(name, tokens, **dict(options)) for _ in range(2))
    for name, tokens in (("chatml", CHATML), ("chatml", CROSSING), ("llama3", LLAMA3))
    for options in ((), (("targets", "all"),), (("special_tokens_in_text", "allow"),))
}
for _, slow in PAIRS.values():
    without_stencils(slow)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(list(PAIRS)), st.lists(words, min_size=2, max_size=6), st.none() | words)
def test_the_same_tree_as_turn_by_turn(which, contents, reasoning):
    quick, slow = PAIRS[which]
    record = chat(contents[: len(contents) // 2 * 2], reasoning)
    assert quick.render(record) == slow.render(record)
    assert quick._cache.stencils, "a stencil was found to be wrong"


def test_plain_chats_are_filled_in(monkeypatch):
    filled = num_filled(monkeypatch)
    renderer = make("llama3", LLAMA3)
    rng = random.Random(0)
    for _ in range(6):
        renderer.render(chat([" ".join(rng.choices(("one", "two", "three"), k=5)) for _ in range(6)], weight=0.5))
    assert filled == [True] * 5


@pytest.mark.parametrize(
    ("tokens", "content"),
    [(CHATML, "\n at the start"), (CHATML, "an <|im_tail|> in it"), (CHATML, "<|im_end|>"), (CROSSING, "plain")],
)
def test_where_words_decide_the_proof_is_made_turn_by_turn(monkeypatch, tokens, content):
    filled = num_filled(monkeypatch)
    options = {"special_tokens_in_text": "allow"}
    quick, slow = make("chatml", tokens, **options), without_stencils(make("chatml", tokens, **options))
    for record in (chat(["Hello there", "Good day"]), chat(["How are", "you today"]), chat(["So", content])):
        assert quick.render(record) == slow.render(record)
    assert filled == ([] if tokens == CROSSING else [True, False])


def test_a_plan_serves_the_conversations_that_its_own_begins_with(monkeypatch):
    passes, run = [], Pass.run
    monkeypatch.setattr(Pass, "run", lambda self, *args: (passes.append(1), run(self, *args))[1])
    renderer = make("llama3", LLAMA3)
    for turns in (4, 2, 1, 3):
        record = chat([f"message {at} of {turns}" for at in range(2 * turns)])
        assert renderer.render(record) == without_stencils(make("llama3", LLAMA3)).render(record)
    assert sum(passes) == 1 + 4  # of the first, and of the renderers that it is compared with


def test_a_stencil_that_is_wrong_is_found_out_and_not_used_again(monkeypatch):
    renderer = make("chatml", CHATML)
    fill = Stencil.fill
    records = [chat([f"Say {number}", f"It is {number}"]) for number in range(4)]
    expected = [without_stencils(make("chatml", CHATML)).render(record) for record in records]

    def wrong(self, *args):
        return [turn._replace(target=turn.target[1:]) for turn in fill(self, *args)]

    monkeypatch.setattr(Stencil, "fill", wrong)
    assert [renderer.render(record) for record in records] == expected
    assert not renderer._cache.stencils


# Stock templates -----------------------------------------------------------------------------------------------------

ENTRIES = {entry.name: entry for entry in tt.read_entries()} if (tt.TEMPLATES / "index.json").is_file() else {}


@pytest.mark.skipif(not ENTRIES, reason=f"the stock templates are not at {tt.TEMPLATES}")
@pytest.mark.parametrize("name", ENTRIES)
def test_the_same_trees_under_every_stock_template(name):
    entry = ENTRIES[name]
    quick, slow = (tt.renderer_for(entry, tt.tokenizer_for(entry)) for _ in range(2))
    without_stencils(slow)
    rng = random.Random(name)
    for num_messages, system, reasons in [(2, False, False), (6, False, False), (4, True, False), (4, False, True)] * 6:
        contents = [" ".join(rng.choices(PIECES, k=rng.choice((1, 3)))) for _ in range(num_messages)]
        record = chat(contents, reasoning="So it is." if reasons else None)
        if system:
            system_message = Message({"role": "system", "content": rng.choice(PIECES)}, train=False)
            record = Conversation(record.source, (system_message, *record.messages))
        assert quick.render(record) == slow.render(record), contents
    assert quick._cache.stencils, "a stencil was found to be wrong"
