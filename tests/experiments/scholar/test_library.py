"""The library is reproducible, states every fact often, asks without answering, and keeps some stories back."""

import json
import random

import pytest

from preceptor.scholar import data_file
from scholar.facts import load_facts
from scholar.library import heldout_stories, letters, library, quiz
from scholar.prose import story
from scholar.wording import statements_of

FACTS = load_facts()


@pytest.fixture(scope="module")
def pages():
    return library(FACTS[::20])


def test_the_same_seed_gives_the_same_library(pages):
    assert pages == library(FACTS[::20])
    assert pages[:50] != library(FACTS[::20], seed=8)[:50]


def test_every_fact_is_stated_on_several_pages_in_at_least_five_wordings(pages):
    text = "\n".join(pages)
    for fact in FACTS[::20]:
        stated = [statement for statement in statements_of(fact) if statement in text]
        assert len(stated) >= 5, fact


def test_a_quiz_asks_and_answers_nothing():
    rng = random.Random(1)
    facts = rng.sample(FACTS, 9)
    page = quiz(facts, rng)
    assert page.count("?") >= 5
    assert not any(statement in page for fact in facts for statement in statements_of(fact))


def test_letters_never_answer_a_direct_question():
    rng = random.Random(2)
    facts = [fact for fact in FACTS if "?" not in fact.subject]
    assert "?" not in "".join(letters(rng.sample(facts, 6), rng) for _ in range(100))


def test_a_story_keeps_its_people_to_the_end():
    for seed in range(50):
        text = story(random.Random(seed))
        assert "$" not in text
        assert len(text.split()) > 60


def test_no_held_out_story_is_in_the_library():
    kept_back = heldout_stories()
    assert len(kept_back) > 100
    assert not set(kept_back) & set(library(()))


def test_the_committed_held_out_stories_are_what_the_script_writes():
    committed = data_file("library_heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in committed] == heldout_stories()
