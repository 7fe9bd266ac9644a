"""Held-out figures: the mean over all target tokens, in all and by source, kind and turn."""

import math

import pytest
import torch

from preceptor.chat.reasoning import TAGS
from preceptor.chat.render import Renderer
from preceptor.chat.template import load_template
from preceptor.data.examples import Rejection
from preceptor.data.reading import SourceReader
from preceptor.data.sources import OpenSource
from preceptor.data.truncation import Fitter
from preceptor.evaluate.held_out import LabelledTree, TargetLabels, label_targets, measure
from preceptor.evaluate.intervals import interval
from tiny import tiny_model, tiny_tokenizer

SYSTEM = {"role": "system", "content": "a start"}
USER = {"role": "user", "content": "the user?"}
ANSWER = {"role": "assistant", "content": "The message — is."}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}
ROWS = [
    {"messages": [USER, ANSWER]},
    {"messages": [SYSTEM, USER, ANSWER, USER, {"role": "assistant", "content": "and then"}]},
    {"prompt": "a user ", "completion": "and an assistant"},
]


@pytest.fixture
def rendered(write_jsonl):
    tokenizer = tiny_tokenizer(special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    renderer = Renderer(tokenizer, load_template("chatml", tokenizer), stop_token_ids=[stop])
    file = write_jsonl(ROWS)
    pairs = [(record, renderer.render(record)) for record in OpenSource(file).examples()]
    assert not any(isinstance(tree, Rejection) for _, tree in pairs)
    return file, tokenizer, label_targets(pairs, tokenizer, renderer.template.reasoning_tags)


def test_labels(rendered):
    file, _, held_out = rendered
    found = [[labels for labels in each.labels if labels is not None] for each in held_out]
    assert [[(own.kinds, own.turn) for own in each] for each in found] == [
        [(("plain",), 1)],
        [(("system",), 1), (("system",), 2)],
        [(("completion",), None)],
    ]
    assert {own.source for each in found for own in each} == {file}
    sizes = [[own.num_bytes for own in each] for each in found]
    assert sizes == [[len("The message — is.".encode())], [len("The message — is.".encode()), 8], [16]]


def test_reasoning_is_what_the_tags_of_the_template_enclose(fitted):
    """Between other tags it is text, and trained so."""
    contents = [f"<{tag}>\na start\n</{tag}>\n\nthe end" for tag in ("think", "thinking")]
    rows = [{"messages": [USER, {**ANSWER, "content": content}]} for content in contents]
    kinds = [own.kinds for each in fitted(rows, 4096) for own in each.labels if own is not None]
    assert kinds == [("reasoning",), ("plain",)]


@pytest.fixture
def fitted(write_jsonl):
    """Held-out examples within so many tokens, with their labels."""
    tokenizer = tiny_tokenizer(special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def read(rows, max_length, overflow="split", **options):
        renderer = Renderer(tokenizer, load_template("chatml", tokenizer), stop_token_ids=[stop], **options)
        reader = SourceReader(Fitter(renderer, max_length, overflow))
        pairs = reader.read_held_out(OpenSource(write_jsonl(rows)))
        held_out = label_targets(pairs, tokenizer, renderer.template.reasoning_tags)
        assert not reader.rejections
        return held_out

    return read


def sizes(held_out):
    return [own.num_bytes for each in held_out for own in each.labels if own is not None]


@pytest.mark.parametrize("max_length", range(5, 16))
def test_pieces_of_a_text_have_its_bytes(fitted, max_length):
    """Wherever it is cut, within a character too."""
    text = "The end — of 🦉🦉 a message ﬁ. " * 5
    rows = [{"text": text}, {"text": text + "🦉"}]
    whole, pieces = fitted(rows, 4096), fitted(rows, max_length)
    assert len(pieces) > 12 > len(whole) and min(sizes(whole)) > len(text)
    assert sum(sizes(pieces)) == sum(sizes(whole))
    assert max(sizes(pieces)) <= 8 * max_length
    rows = [{"messages": [SYSTEM, USER, {**ANSWER, "content": text}, USER, ANSWER]}]
    whole, pieces = (fitted(rows, length, targets="all") for length in (4096, max_length))
    assert len(pieces) > 12 and sum(sizes(pieces)) == sum(sizes(whole)) > len(text)


@pytest.mark.parametrize("overflow", ["split", "truncate_context"])
def test_turns_behind_messages_that_are_left_out_have_no_number(fitted, overflow):
    rows = [{"messages": [SYSTEM, *[USER, ANSWER] * 6]}]
    (whole,), parts = fitted(rows, 4096), fitted(rows, 100, overflow)
    assert [own.turn for own in whole.labels if own is not None] == [1, 2, 3, 4, 5, 6]
    found = [[own.turn for own in each.labels if own is not None] for each in parts]
    if overflow == "split":
        first = found.pop(0)
        assert len(first) > 1 and first == list(range(1, len(first) + 1)), "nothing is left out before these"
    assert found and all(turn is None for turns in found for turn in turns)


def test_figures_are_means_over_tokens_against_a_direct_computation(rendered):
    file, tokenizer, held_out = rendered
    model = tiny_model("llama", vocab_size=len(tokenizer)).double()
    nats, correct, groups = [], [], []
    for each in held_out:
        ids = [id_ for segment in each.tree.segments for id_ in segment.ids]
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        place = 0
        for segment, labels in zip(each.tree.segments, each.labels, strict=True):
            for id_ in segment.ids:
                if labels is not None:
                    nats.append(-logits[place - 1, id_].item())
                    correct.append(int(logits[place - 1].argmax()) == id_)
                    groups.append(labels.kinds[0])
                place += 1
    for rows in (512, 40):
        found = measure(model, held_out, rows)
        assert found["loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-6)
        assert (found["token_accuracy"], found["num_trained"]) == (sum(correct) / len(correct), len(nats))
        num_bytes = 2 * len("The message — is.".encode()) + 8 + 16
        assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / num_bytes, rel=1e-6)
    assert model.training, "left in its mode"
    own = [loss for loss, group in zip(nats, groups, strict=True) if group == "system"]
    assert found["by_kind"]["system"]["loss"] == pytest.approx(sum(own) / len(own), rel=1e-6)
    assert found["by_kind"]["system"]["num_trained"] == len(own)
    assert set(found["by_kind"]) == {"plain", "system", "completion"} and set(found["by_turn"]) == {"1", "2"}
    assert found["by_source"][file]["num_trained"] == len(nats)


def test_tools_and_reasoning_are_kinds_and_a_turn_may_have_several(write_jsonl):
    from preceptor.evaluate.held_out import _kinds

    rows = [
        {"messages": [SYSTEM, USER, CALL, {"role": "tool", "content": "x"}, {**ANSWER, "reasoning_content": "so"}]},
        {"messages": [USER, {**ANSWER, "content": "<think>so</think>It is."}]},
    ]
    tools, inline = OpenSource(write_jsonl(rows)).examples()
    assert _kinds(tools, 2, TAGS) == ("tools", "system")
    assert _kinds(tools, 4, TAGS) == ("tools", "reasoning", "system")
    assert _kinds(inline, 1, TAGS) == ("reasoning",)


def test_nothing_held_out_is_an_error(rendered):
    with pytest.raises(ValueError, match="no held-out target"):
        measure(tiny_model("llama"), [], 64)
    context_only = LabelledTree(rendered[2][0].tree, (None,) * len(rendered[2][0].labels), "a:1")
    assert TargetLabels("a", ("plain",), 1, 0).num_bytes == 0
    with pytest.raises(ValueError, match="no held-out target"):
        measure(tiny_model("llama", vocab_size=300), [context_only], 64)


def test_the_loss_has_an_interval_over_examples(rendered):
    _, tokenizer, held_out = rendered
    model = tiny_model("llama", vocab_size=len(tokenizer))
    found = measure(model, held_out, 64, by_example=True)
    own = found["by_example"]
    expected = interval(own["loss"], own["num_tokens"])
    assert found["loss_interval"] == pytest.approx([expected.low, expected.high])
    assert expected.low < found["loss"] < expected.high
    assert "loss_interval" not in measure(model, held_out[:1], 64), "one example shows no spread"
    assert "loss_interval" not in found["by_source"]


def test_copies_and_pieces_of_an_example_are_one_item_of_the_interval(fitted):
    """Drawn apart they would halve the interval of four copies, which hold no more than one."""
    text = "The end of a message and the start. "
    rows = [{"text": text * 9}, {"text": "a user " * 9}, {"messages": [USER, ANSWER]}]
    pieces = fitted(rows, 40)
    model = tiny_model("llama", vocab_size=300)
    found, copied = (measure(model, each, 64, by_example=True) for each in (pieces, pieces * 4))
    assert len(pieces) > 4 and len(found["by_example"]["loss"]) == len(copied["by_example"]["loss"]) == 3
    assert copied["loss_interval"] == pytest.approx(found["loss_interval"], rel=1e-4)
    assert copied["num_trained"] == 4 * found["num_trained"] == 4 * sum(found["by_example"]["num_tokens"])
    assert "loss_interval" not in measure(model, fitted(rows[:1], 40), 64), "the pieces of one text show no spread"
