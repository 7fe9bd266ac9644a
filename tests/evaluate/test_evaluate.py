"""Exact match and scores."""

import pytest

from preceptor.errors import DataError
from preceptor.evaluate.generate import Answer
from preceptor.evaluate.questions import read_questions, sample, score, score_by
from preceptor.evaluate.score import goes_on_with_question, is_exact, share

ROW = {
    "messages": [{"role": "user", "content": "Which region?"}, {"role": "assistant", "content": "It is America."}],
    "answers": ["It is America.", "America it is."],
    "family": "region",
    "wording": "new",
    "kind": "single",
}


def test_exact_is_letter_for_letter():
    assert is_exact(" It is America.\n", ROW["answers"])
    assert not is_exact("It is america.", ROW["answers"])
    assert not is_exact("It is America. It is Asia.", ROW["answers"])
    assert not is_exact("", ROW["answers"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("\nWhich one is it?\nNo", True), ("It is so.\nIs it?", False), ("", False), ("Is it", False)],
)
def test_going_on_with_a_question(text, expected):
    assert goes_on_with_question(text) is expected


def test_scores_by_group(write_jsonl):
    rows = [ROW, ROW | {"family": "hex"}, ROW | {"family": "hex", "wording": "seen"}]
    questions = read_questions(write_jsonl(rows))
    answers = [Answer((), text, stopped) for text, stopped in [("It is America.", True), ("x?", True), ("y", False)]]
    total = score(questions, answers)
    assert (total.num, total.exact_match, total.stop_rate) == (3, 1 / 3, 2 / 3)
    assert total.continues_with_question == 1 / 3
    by_family = score_by("family", questions, answers)
    assert {name: (s.num, s.exact_match) for name, s in by_family.items()} == {"hex": (2, 0.0), "region": (1, 1.0)}
    with pytest.raises(ValueError, match="a share of nothing"):
        share([])


def test_a_sample_is_seeded_and_in_order(write_jsonl):
    questions = read_questions(write_jsonl([ROW] * 50))
    chosen = sample(questions, 10, seed=0)
    places = [questions.index(q) for q in chosen]
    assert places == sorted(places) and len(chosen) == 10
    assert chosen == sample(questions, 10, seed=0) != sample(questions, 10, seed=1)
    assert len(sample(questions, 99, seed=0)) == 50


@pytest.mark.parametrize("row", [{"text": "x"}, {"messages": []}, {"messages": ROW["messages"][:1]}])
def test_a_row_that_is_no_question_is_an_error_with_its_place(write_jsonl, row):
    with pytest.raises(DataError, match=r"train\.jsonl:2: "):
        read_questions(write_jsonl([ROW, row]))
