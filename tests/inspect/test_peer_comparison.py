"""Counts of the tokens that another trainer trains and that are trained here."""

import json
import os

import pytest

import peer_labels
from preceptor.chat.render import Renderer
from preceptor.chat.template import load_template
from preceptor.config import Source
from preceptor.data.forest import Segment, Tree
from preceptor.data.sources import OpenSource
from preceptor.errors import ConfigError
from preceptor.inspect import peer_comparison
from preceptor.inspect.emulation import Emulation, PeerTokens
from preceptor.inspect.peer_comparison import BothCounts, BothTokens, add, compared, counts_lines, to_json
from preceptor.inspect.peer_rules import rule_of
from tiny import tiny_tokenizer


@pytest.fixture
def counted(monkeypatch):
    """The counts of examples as pairs of lists of ids, all trained; over 4 tokens is long."""
    monkeypatch.setattr(peer_comparison, "_LONGEST", 4)
    tokenizer = tiny_tokenizer()

    def of(*pairs):
        counts = BothCounts()
        for theirs, ours in pairs:
            both = (PeerTokens(ids, [True] * len(ids)) for ids in (theirs, ours))
            add(counts, BothTokens("a:1", *both), tokenizer)
        return counts

    return of


def test_tokens_of_both_and_of_one(counted):
    counts = counted(([5, 6, 7], [6, 7, 8, 9]), ([5] * 9, [5] * 9))
    assert (counts.examples, counts.theirs, counts.ours) == (2, 12, 13)
    assert (counts.only_theirs, counts.only_ours, counts.examples_too_long) == (1, 2, 0), "what is equal needs no limit"


def test_an_example_that_is_too_long_to_be_aligned_is_named_and_not_counted(counted):
    counts = counted(([5, 6, 7], [5, 6, 7]), ([5, 6, 7, 8, 9], [6, 7, 8, 9]))
    assert (counts.theirs, counts.ours, counts.only_theirs, counts.only_ours) == (3, 3, 0, 0)
    assert counts.examples_too_long == counts.to_json()["examples_too_long"] == 1
    assert "1 longer than 4 tokens: not compared, and not counted" in list(counts_lines("TRL", counts))
    assert not any("longer than" in line for line in counts_lines("TRL", counted(([5], [5]))))


def test_a_token_that_the_tokenizer_has_not_is_said(write_jsonl):
    class NoEnd(Emulation):
        def what(self):
            return "writes an end of the text"

        def tokens(self, example, row):
            return PeerTokens.of(([5, self.tokenizer.eos_token_id], True))

    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    renderer = Renderer(tiny_tokenizer(), None, stop_token_ids=(0,))
    (found,) = compared(Source(path=write_jsonl([{"text": "a text"}])), NoEnd({}, tokenizer, ""), renderer)
    assert (
        found.theirs
        == "cannot be told: the trainer writes a token that this tokenizer has not, such as its end of a text"
    )


def test_what_every_path_of_a_tree_trains_is_counted(write_jsonl, tmp_path):
    """A template that leaves earlier thoughts out: each turn but the last is trained in a context of its own."""
    asked, answered = {"role": "user", "content": "the user"}, {"role": "assistant", "content": "an end"}
    thoughts = [{**answered, "content": f"<think>\nso {n}\n</think>\n\nan end"} for n in range(3)]
    source = Source(path=write_jsonl([{"messages": [m for each in thoughts for m in (asked, each)]}]))
    tokenizer = peer_labels.tokenizer(eos_token="<|im_end|>")
    (tmp_path / "own.jinja").write_text(peer_labels.STRIPS_THOUGHTS)
    renderer = Renderer(tokenizer, load_template(str(tmp_path / "own.jinja"), tokenizer), stop_token_ids=())
    rule = rule_of("Axolotl", {}, tokenizer, peer_labels.STRIPS_THOUGHTS)
    (example,) = OpenSource(source).examples()
    (both,) = compared(source, rule, renderer)
    found = to_json([both], tokenizer)
    counts = found["counts"]
    assert both.branches == 3 and counts["ours"] == renderer.render(example).num_trained
    own = [len(tokenizer(each["content"] + "<|im_end|>")["input_ids"]) for each in thoughts]
    assert counts["ours"] == sum(own) and counts["only_ours"] == sum(own[:2])
    assert counts["ours"] - counts["only_ours"] == counts["theirs"] - counts["only_theirs"] == own[2]
    assert [tokenizer.decode(ids) for ids in both.off_path] == [f"{m['content']}<|im_end|>" for m in thoughts[:2]]
    json.dumps(found)


def test_a_target_that_two_paths_share_is_trained_on_the_last_too(tmp_path):
    """The comparison shows one path; what it shares with an earlier one is as trained there."""
    shared = Tree("a:1", (
        Segment("context", (5,), None), Segment("target", (6, 7), 0), Segment("target", (8,), 1),
        Segment("context", (9,), 1), Segment("target", (10,), 3),
    ))  # fmt: skip

    class One(Renderer):
        def render(self, example):
            return shared

    class All(Emulation):
        peer = "TRL"

        def what(self):
            return "all"

        def tokens(self, example, row):
            return PeerTokens([5, 6, 7, 9, 10], [True] * 5)

    tokenizer = tiny_tokenizer()
    (tmp_path / "a.jsonl").write_text('{"text": "a text"}\n')
    renderer = One(tokenizer, None, stop_token_ids=(0,))
    (both,) = compared(Source(path=str(tmp_path / "a.jsonl")), All({}, tokenizer, ""), renderer)
    assert both.ours == PeerTokens([5, 6, 7, 9, 10], [False, True, True, False, True])
    counts = to_json([both], tokenizer)["counts"]
    assert (counts["ours"], counts["only_ours"], counts["only_theirs"]) == (4, 1, 2)
    assert shared.num_trained == counts["ours"]


def test_of_more_examples_the_first_are_counted(counted, monkeypatch):
    monkeypatch.setattr(peer_comparison, "COUNTED", 2)
    assert next(counts_lines("TRL", counted(([5], [5])))).startswith("1 example: TRL")
    assert next(counts_lines("TRL", counted(*[([5], [5])] * 2))).startswith("the first 2 examples: TRL")


def test_a_pipe_is_refused_as_it_would_be_read_twice(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    tokenizer = tiny_tokenizer()
    rule, renderer = rule_of("TRL", {}, tokenizer, ""), Renderer(tokenizer, None, stop_token_ids=(0,))
    with pytest.raises(ConfigError, match=r"pipe\.jsonl: is a pipe, which can be read only once: write what it gives"):
        next(compared(Source(path=str(tmp_path / "pipe.jsonl")), rule, renderer))
