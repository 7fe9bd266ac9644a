"""Counts of the tokens that another trainer trains and that are trained here."""

import pytest

from preceptor.chat.render import Renderer
from preceptor.config import Source
from preceptor.inspect import peer_comparison
from preceptor.inspect.emulation import Emulation, PeerTokens
from preceptor.inspect.peer_comparison import BothCounts, BothTokens, add, compared, counts_lines
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
            return self.document(example)

    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    renderer = Renderer(tiny_tokenizer(), None, stop_token_ids=(0,))
    (found,) = compared(Source(path=write_jsonl([{"text": "a text"}])), NoEnd({}, tokenizer, ""), renderer)
    assert (
        found.theirs
        == "cannot be told: the trainer writes a token that this tokenizer has not, such as its end of a text"
    )
