"""Records longer than a row: rejected, shortened or split, always proved, never half a target, always counted."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from preceptor.chat.render import Renderer
from preceptor.chat.template import load_template
from preceptor.data.examples import Completion, Conversation, Document, Rejection, read_messages
from preceptor.data.forest import Segment, path_ids
from preceptor.data.reading import read_trees
from preceptor.data.sources import OpenSource
from preceptor.data.truncation import Fitter, _first
from tiny import tiny_tokenizer

REWRITES = (  # leaves the reasoning of earlier turns out, as most reasoning models' templates do
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def renderer(text=None, **options):
    tokenizer = tiny_tokenizer(special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    if text is not None:
        tokenizer.chat_template = text
    template = load_template("chatml" if text is None else "tokenizer", tokenizer)
    return Renderer(tokenizer, template, stop_token_ids=[tokenizer.convert_tokens_to_ids("<|im_end|>")], **options)


def chat(num_turns, system="the system", **message):
    rows = [{"role": "system", "content": system}]
    for turn in range(num_turns):
        rows.append({"role": "user", "content": f"user {turn}: what is the end of a message?"})
        rows.append({"role": "assistant", "content": f"answer {turn}", **message})
    return conversation(rows)


def conversation(rows):
    return Conversation("file:1", read_messages(rows, "file:1"))


def fit(record, max_length, overflow, render=None):
    render = render or renderer()
    fitter = Fitter(render, max_length, overflow)
    return fitter.fit(record, render.render(record)), fitter.shortened, render.tokenizer


def turns(tree, tokenizer):
    """(what is read, what is trained) of each turn."""
    return [
        (tokenizer.decode(path_ids(tree, segment.parent)), tokenizer.decode(segment.ids))
        for segment in tree.segments
        if segment.kind == "target"
    ]


def test_what_fits_stays_as_it_is_and_what_does_not_is_rejected():
    found, shortened, _ = fit(chat(1), 4096, "split")
    assert found == [(chat(1), renderer().render(chat(1)))] and str(shortened) == ""
    rejection, shortened, _ = fit(chat(9), 100, "reject")
    assert (rejection.code, rejection.source) == ("too_long", "file:1") and "data.max_length" in rejection.message
    assert str(shortened) == ""


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("overflow", ["truncate_context", "split"])
@pytest.mark.parametrize("max_length", [70, 90, 150])
def test_system_messages_before_a_turn_stay_wherever_they_stand(role, overflow, max_length):
    """Also within the last exchange, between the steps of an answer."""
    rows = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "answer 0"}]
    rows += [{"role": role, "content": "rule 1"}]
    for turn in range(1, 6):
        rows += [
            {"role": "user", "content": f"user {turn}: what is it?"},
            {"role": "assistant", "content": f"a {turn}"},
        ]
    rows += [{"role": role, "content": "rule 2"}, {"role": "user", "content": "go on"}]
    for step in range(4):
        rows += [{"role": "assistant", "content": f"step {step}"}, {"role": "tool", "content": f"result {step} " * 5}]
    rows += [{"role": role, "content": "rule 3"}, {"role": "assistant", "content": "the end"}]
    whole = conversation(rows)
    found, _, _ = fit(whole, max_length, overflow)
    assert not isinstance(found, Rejection) and (overflow == "truncate_context") == (len(found) == 1)
    contents = [row["content"] for row in rows]
    for part, tree in found:
        at = [contents.index(m.content) for m in part.messages if m.role != "user"]  # whose text may be cut
        assert at == sorted(at) and tree.num_tokens <= max_length
        assert {k for k in range(at[-1]) if rows[k]["role"] == role} <= set(at), "a system message was left out"


@pytest.mark.parametrize("text", [None, REWRITES])
def test_truncated_context_is_what_a_server_builds_from_the_messages_that_are_left(text):
    render = renderer(text)
    record = chat(9, reasoning_content="so") if text else chat(9)
    found, shortened, tokenizer = fit(record, 150, "truncate_context", render)
    ((kept, tree),) = found
    assert tree.num_tokens <= 150 and tree == render.render(kept)
    assert kept.messages[0].role == "system" and kept.messages[1:] == record.messages[-len(kept.messages) + 1 :]
    assert kept.messages[1].role == "user"
    one_more = Conversation("file:1", (record.messages[0], *record.messages[-len(kept.messages) - 1 :]))
    assert render.render(one_more).num_tokens > 150
    seen = turns(tree, tokenizer)
    assert all(answer.endswith("<|im_end|>") for _, answer in seen) and "answer 8" in seen[-1][1]
    assert shortened.num_truncated == 1 and shortened.num_messages_left_out == 19 - len(kept.messages)
    assert shortened.num_turns_left_out == 9 - len(seen) > 0


@pytest.mark.parametrize("text", [None, REWRITES])
@pytest.mark.parametrize("max_length", [60, 90, 150, 400])
def test_split_trains_every_turn_once_each_with_much_of_what_came_before(text, max_length):
    render = renderer(text)
    record = chat(9, system="", reasoning_content="so") if text else chat(9, system="")
    found, shortened, tokenizer = fit(record, max_length, "split", render)
    whole = render.render(record)
    pieces = [turns(tree, tokenizer) for _, tree in found]
    assert [answer for piece in pieces for _, answer in piece] == [answer for _, answer in turns(whole, tokenizer)]
    assert sum(tree.num_trained for _, tree in found) == whole.num_trained
    for (kept, tree), after in zip(found, [*found[1:], None], strict=True):
        assert tree.num_tokens <= max_length
        assert [s.ids for s in tree.segments] == [s.ids for s in render.render(kept).segments]
        if after is not None and max_length >= 150:
            first = next(i for i, s in enumerate(after[1].segments) if s.kind == "target")
            assert len(path_ids(after[1], first)) > max_length // 2 - 40
    if max_length == 150:  # no part could begin with the exchange before, and few are needed
        assert len(found) <= (4 if text is None else 7)
        for kept, _ in found[1:]:
            given = [message.given for message in record.messages]
            first = given.index(kept.messages[1].given)
            assert [message.given for message in kept.messages[1:]] == given[first : first + len(kept.messages) - 1]
            before = [replace(message, train=False) for message in record.messages[first - 2 : first]]
            longer = (kept.messages[0], *before, *kept.messages[1:])
            assert render.render(replace(kept, messages=longer)).num_tokens > max_length
    assert (shortened.num_split, shortened.num_parts) == ((1, len(found)) if len(found) > 1 else (0, 0))
    assert shortened.num_turns_left_out == shortened.num_truncated == 0
    if len(found) > 1:
        assert found[0][1].source == f"file:1 (part 1 of {len(found)})"


def test_within_one_exchange_the_oldest_steps_of_an_agent_go_first():
    rows = [{"role": "user", "content": "the task"}]
    for step in range(8):
        call = {"type": "function", "function": {"name": "look", "arguments": {"at": step}}}
        rows.append({"role": "assistant", "content": "", "tool_calls": [call]})
        rows.append({"role": "tool", "content": f"the message {step}"})
    rows.append({"role": "assistant", "content": "done"})
    ((kept, tree),), shortened, _ = fit(conversation(rows), 250, "truncate_context")
    assert [m.content for m in kept.messages[:1]] == ["the task"] and kept.messages[1].tool_calls
    assert kept.messages[-1].content == "done" and tree.num_tokens <= 250
    assert shortened.num_turns_left_out == 9 - sum(m.role == "assistant" for m in kept.messages) > 0


def test_as_much_of_a_question_is_left_as_fits_whatever_its_words():
    """Words of different lengths: what is guessed is the beginning of a word that was tried already."""
    words, drawn, render = ("the", "of", "is", "message", "1234", "what"), random.Random(0), renderer()
    for _ in range(30):
        text = " ".join(drawn.choices(words, k=drawn.randint(150, 600)))
        rows = [{"role": "user", "content": text}, {"role": "assistant", "content": "answer"}]
        ((kept, tree),), *_ = fit(conversation(rows), 128, "truncate_context", render)
        longer = text[: -len(kept.messages[0].content)].rsplit(maxsplit=1)[-1] + " " + kept.messages[0].content
        rows = [{"role": "user", "content": longer}, *rows[1:]]
        assert tree.num_tokens <= 128 < render.render(conversation(rows)).num_tokens


@pytest.mark.parametrize("overflow", ["truncate_context", "split"])
def test_the_beginning_of_a_long_question_is_cut_where_nothing_else_can_be(overflow):
    words = " ".join(f"word{n}" for n in range(300))
    rows = [{"role": "user", "content": words}, {"role": "assistant", "content": "the answer"}]
    ((kept, tree),), shortened, tokenizer = fit(conversation(rows), 200, overflow)
    left = kept.messages[0].content
    assert words.endswith(" " + left) and 190 <= tree.num_tokens <= 200
    context, answer = turns(tree, tokenizer)[0]
    assert (
        context == f"<|im_start|>user\n{left}<|im_end|>\n<|im_start|>assistant\n" and answer == "the answer<|im_end|>"
    )
    assert (shortened.num_truncated, shortened.num_texts_cut) == (1, 1)
    ((kept, tree),), shortened, tokenizer = fit(Completion("file:1", words, " the answer"), 200, overflow)
    assert words.endswith(kept.prompt) and 190 <= tree.num_tokens <= 200 and shortened.num_texts_cut == 1
    assert turns(tree, tokenizer)[0][1] == " the answer<|endoftext|>"


@pytest.mark.parametrize("overflow", ["truncate_context", "split"])
def test_a_target_that_does_not_fit_is_rejected_whole(overflow):
    rows = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "message " * 200}]
    found, shortened, _ = fit(conversation(rows), 100, overflow)
    assert isinstance(found, Rejection) and found.code == "too_long" and str(shortened) == ""


@pytest.mark.parametrize("record", [Document("file:1", "the end of a message " * 60), chat(9)])
def test_texts_are_split_into_rows_and_every_token_is_trained_once(record):
    render = renderer(targets="all")
    whole = render.render(record)
    found, shortened, _ = fit(record, 100, "split", render)
    assert [tree.num_tokens for _, tree in found[:-1]] == [100] * (len(found) - 1)
    ids = [i for s in whole.segments for i in s.ids]
    trained = [i for _, tree in found for s in tree.segments if s.kind == "target" for i in s.ids]
    assert trained == ids and sum(tree.num_trained for _, tree in found) == whole.num_trained == len(ids) - 1
    assert shortened.num_parts == len(found)
    for (_, before), (_, after) in pairwise(found):
        assert after.segments[0] == Segment("context", before.segments[-1].ids[-1:], None)
    if isinstance(record, Document):
        assert fit(record, 100, "truncate_context", render)[0].message.endswith("data.overflow: split")


def test_what_cannot_be_short_enough_is_not_rendered(write_jsonl):
    rows = [{"text": "x" * 6401}, {"text": "y" * 6400}, {"prompt": "a", "completion": "b" * 9999}, {"text": "the end"}]
    render, seen = renderer(), []
    whole = render.render
    render.render = lambda record: seen.append(record.source[-1]) or whole(record)
    fitter = Fitter(render, 64, "reject")
    found = [fitted for _, fitted in read_trees(OpenSource(write_jsonl(rows)), fitter)]
    assert seen == ["2", "4"]
    assert [each.code if isinstance(each, Rejection) else "" for each in found] == ["too_long"] * 3 + [""]
    assert "it has 6,401 characters, a sequence holds 64: raise data.max_length, or split the text" in found[0].message
    split = Fitter(render, 64, "split")
    assert not isinstance(next(iter(read_trees(OpenSource(write_jsonl(rows)), split)))[1], Rejection)


@pytest.mark.parametrize("near_end", [False, True])
def test_the_search_tries_little_and_near_where_it_is_told(near_end):
    for num in range(40):
        for first in range(num + 1):
            tried = []
            found = _first(
                num, lambda option, first=first, tried=tried: tried.append(option) or option >= first, near_end
            )
            assert found == (None if first == num else first)
            reach = num - first if near_end else first + 1
            assert all(0 <= option < num for option in tried) and len(tried) <= 2 + 2 * reach.bit_length()
            assert not tried or (min(tried) >= num - 2 * reach - 2 if near_end else max(tried) <= 2 * reach + 2)
