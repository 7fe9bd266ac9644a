"""Tokens for the eye: every character there, special tokens marked, targets in their own style."""

import json

import pytest

from conftest import conversations
from preceptor import Run
from preceptor.chat import tokenise
from preceptor.chat.tokenise import pieces_of
from preceptor.data.examples import Rejection
from preceptor.data.forest import Segment, Tree
from preceptor.inspect import show
from preceptor.inspect.show import legend, summary_line, to_text
from tiny import tiny_tokenizer


def tree(tokenizer, *texts):
    segments = []
    for index, text in enumerate(texts):
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        segments.append(Segment("target" if index % 2 else "context", ids, index - 1 if index else None, text))
    return Tree("f:1", tuple(segments))


def test_pieces_spell_the_text_also_where_a_character_takes_several_tokens():
    tokenizer = tiny_tokenizer()
    text = "a user 日本 <|endoftext|> ∑é\n"
    ids = tokenizer(text)["input_ids"]
    found = [(piece.text, piece.special) for piece in pieces_of(ids, tokenizer)]
    assert "".join(piece for piece, _ in found) == text
    assert [piece for piece, special in found if special] == ["<|endoftext|>"]


def test_targets_are_styled_and_line_ends_are_visible():
    tokenizer = tiny_tokenizer()
    shown = to_text(tree(tokenizer, "user\n", "message"), tokenizer)
    assert shown.plain == "user⏎\nmessage"
    styles = {shown.plain[span.start : span.end]: str(span.style) for span in shown.spans}
    assert all(("green" in style) == (piece in "message") for piece, style in styles.items())


def test_a_token_shows_the_characters_that_have_no_shape():
    tokenizer = tiny_tokenizer()
    shown = to_text(tree(tokenizer, "a\u202euser\u200dmessage"), tokenizer).plain
    assert shown == r"a\u202euser\u200dmessage"


def test_the_special_tokens_are_found_out_once(monkeypatch):
    calls, find = [], tokenise.special_ids
    for module in (tokenise, show):
        monkeypatch.setattr(module, "special_ids", lambda own: calls.append(own) or find(own), raising=False)
    tokenizer = tiny_tokenizer()
    assert to_text(tree(tokenizer, "user", "message", "user"), tokenizer).plain == "usermessageuser"
    assert len(calls) == 1


def test_branches_and_rejections_are_said():
    tokenizer = tiny_tokenizer()
    branched = Tree(
        "f:1",
        (Segment("context", (5,), None), Segment("target", (6,), 0, message=1), Segment("target", (7,), 0, message=3)),
    )
    assert "continues segment 0" in to_text(branched, tokenizer).plain
    assert "rejected: too_long: cut it" in to_text(Rejection("f:1", "too_long", "cut it"), tokenizer).plain
    assert summary_line(branched) == "3 tokens, 2 trained in 2 turns (67%)"


def test_what_all_targets_train_is_counted_and_marked(preceptor, run_file):
    """Of a text that is trained from its start the first token is read only; a turn may be in several segments."""
    tokenizer = tiny_tokenizer()
    ids = tuple(tokenizer("a user message")["input_ids"])
    (first, *_) = pieces_of(ids, tokenizer)
    parts = (
        Segment("target", ids, None),
        Segment("target", ids[:2], 0, message=1),
        Segment("target", ids[2:], 1, message=1),
        Segment("target", ids, 1, weight=0.0, message=3),
    )
    shown = Tree("f:1", parts)
    assert summary_line(shown).endswith(
        f"{2 * len(ids) - 1} trained in 2 turns ({(2 * len(ids) - 1) / (3 * len(ids)):.0%})"
    )
    plain = to_text(shown, tokenizer, coloured=False).plain
    assert plain.startswith(f"{first.text}⟦") and plain.count("⟦") == plain.count("⟧") == 3
    assert plain.endswith("continues segment 1\na user message"), "of weight 0: not trained"
    text = Tree("f:1", parts[:1])
    assert summary_line(text) == f"{len(ids)} tokens, {len(ids) - 1} trained ({(len(ids) - 1) / len(ids):.0%})"
    styles = {str(span.style) for span in to_text(text, tokenizer).spans if span.start < len(first.text)}
    assert styles == {"dim"}
    code, out, err = preceptor("show", run_file(conversations(1, turns=2), data__train_on="all"), "--example", 1)
    assert code == 0 and "trained in 2 turns" in out and "<|im_start|>⟦user⏎" in out, out + err


def test_what_is_trained_is_seen_without_colours_and_the_signs_are_explained(preceptor, run_file):
    code, out, _ = preceptor("show", run_file(), "--example", 1)
    assert code == 0 and out.splitlines()[0] == "⟦trained⟧ context; ⏎ line end, ⇥ tab"
    assert "<|im_start|>assistant⏎\n⟦The start is 0.<|im_end|>⟧" in out
    assert legend(coloured=True).plain == " trained  context; ⏎ line end, ⇥ tab; shades show where tokens meet"


SHORTENED = "it was too long: this is what data.overflow makes of it"


@pytest.mark.parametrize(
    ("overflow", "shown", "num"),
    [("reject", "rejected: too_long: it has 1", 1), ("truncate_context", SHORTENED, 1), ("split", SHORTENED, 2)],
)
def test_an_example_that_is_too_long_is_shown_as_it_is_trained(overflow, shown, num, preceptor, run_file):
    file = run_file(conversations(1, turns=4), data__max_length=100, data__overflow=overflow)
    code, out, err = preceptor("show", file, "--example", 1)
    assert code == 0 and out.count(shown) == num, out + err
    assert str(Run.from_file(file).show(1)).count(shown) == num
    code, out, _ = preceptor("show", file, "--json")
    sizes = [sum(len(segment["ids"]) for segment in json.loads(line)["segments"]) for line in out.splitlines()]
    assert code == 0 and len(sizes) == num and max(sizes) <= 100
    code, out, _ = preceptor("show", file, "data.max_length=200", "--example", 1)
    assert code == 0 and "too long" not in out and "in 4 turns" in out
